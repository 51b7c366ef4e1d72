"""What a check of `tollbook doctor` found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "skipped", "warning", "failed"]
"""`failed`: calls are stopped or endangered; `warning`: somebody should look; `skipped`: not checked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, and what to do about it."""

    check: str
    state: State
    found: str
    advice: str = ""


def first_line(exc: Exception) -> str:
    """Return the first line of what an error says."""
    return str(exc).strip().partition("\n")[0] or type(exc).__name__


def count_of(number: int, thing: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
