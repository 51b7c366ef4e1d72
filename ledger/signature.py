"""Signatures: the author and the reason of a change that a person makes to the ledger."""

import hashlib
import uuid
from dataclasses import dataclass

from tollbook.schemas.identifiers import normalise_id


@dataclass(frozen=True, slots=True)
class Signature:
    """Author and reason of a change. `key` makes a repeat harmless; without a key, each command is new."""

    author: str
    reason: str
    key: str | None = None

    def __post_init__(self) -> None:
        """Normalise author and key (Unicode NFC)."""
        object.__setattr__(self, "author", normalise_id(self.author))
        object.__setattr__(self, "key", self.key and normalise_id(self.key))

    def command_id(self, kind: str) -> str:
        """Return the idempotency key of a command. No task id can begin with a kind of command and a space."""
        return f"{kind} {self.key or uuid.uuid4()}"


def content_digest(*words: str) -> str:
    """Return the digest of a command's content, which is stored with its idempotency key."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:32]
