"""Where `tollbook doctor` looks, and what a check of it found."""

from dataclasses import dataclass
from typing import Any, Literal

from tollbook.inference.settings import Settings
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.policy import Policy

State = Literal["ok", "skipped", "warning", "failed"]
"""`failed`: calls are stopped or endangered; `warning`: somebody should look; `skipped`: not checked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do about it."""

    check: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the ledger is looked at. `is_at_rest`: nothing runs on it."""

    settings: Settings
    pipeline: CommandPipeline
    redis_url: str
    keys: tuple[Keys, ...]
    is_at_rest: bool
    policy: Policy

    async def ask(self, *command: str | int) -> Any:
        """Return a reply of Redis. Errors: LedgerUnavailable; ResponseError."""
        return await self.pipeline.execute(*command)


def first_line(exc: Exception) -> str:
    """Return the first line of what an error says."""
    return str(exc).strip().partition("\n")[0] or type(exc).__name__


def count_of(number: int, thing: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
