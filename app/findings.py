"""The inputs and findings of `tollbook doctor`'s checks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tollbook.inference.settings import Settings
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.policy import Policy

if TYPE_CHECKING:
    from redis.asyncio import Redis

State = Literal["ok", "skipped", "warning", "failed"]
"""`failed`: calls are stopped or endangered; `warning`: a person should look at it; `skipped`: not checked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do about it."""

    check: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """The ledger that is checked. `is_at_rest`: no process runs on it."""

    settings: Settings
    redis: "Redis"
    pipeline: CommandPipeline
    redis_url: str
    keys: tuple[Keys, ...]
    is_at_rest: bool
    policy: Policy

    async def ask(self, *command: str | int) -> Any:
        """Run a command and return Redis' reply. Errors: LedgerUnavailable; ResponseError."""
        return await self.pipeline.execute(*command)


def first_line(exc: Exception) -> str:
    """Return the first line of an error's message."""
    return str(exc).strip().partition("\n")[0] or type(exc).__name__


def count_of(number: int, thing: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
