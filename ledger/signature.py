"""Who changes the ledger, and why: what every change that a person makes bears."""

import hashlib
import uuid
from dataclasses import dataclass

from tollbook.schemas.identifiers import normalise_id


@dataclass(frozen=True, slots=True)
class Signature:
    """Who changes something, and why. `key` makes a repeat harmless; without one, each command is new."""

    author: str
    reason: str
    key: str | None = None

    def __post_init__(self) -> None:
        """Keep names in their one spelling."""
        object.__setattr__(self, "author", normalise_id(self.author))
        object.__setattr__(self, "key", self.key and normalise_id(self.key))

    def command_id(self, kind: str) -> str:
        """Return the idempotency key of a command: with a space, which no task id has, so that no task can take it."""
        return f"{kind} {self.key or uuid.uuid4()}"


def content_digest(*words: str) -> str:
    """Return what the id of a command is bound to: a digest of its content."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
