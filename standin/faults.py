"""What the stand-in can do wrong, by name, and when.

A fault is drawn by rate from a seeded generator, taken from a script in order, or asked for
by the prompt itself with `[[fault=NAME]]`. `http_NNN:S` adds a Retry-After of S seconds.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

STATUS_CODES: Final = (400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503, 524, 529)
_HTTP: Final = re.compile(r"http_(\d{3})(?::(\d+))?")

# Name -> whether the request is charged all the same.
FAULTS: Final[dict[str, bool]] = {
    **{f"http_{code}": False for code in STATUS_CODES},
    "in_flight": False,  # 402 with in_flight_budget_exhausted: transient.
    "slow": True,  # Answers after `slow_ms`.
    "hang": False,  # Never answers.
    "hang_charged": True,
    "reset_before_charge": False,  # The connection is reset before anything is answered.
    "reset_after_charge": True,
    "reset_mid_body": True,  # Status and headers arrive, X-Generation-Id among them, then the connection is reset.
    "broken_json": True,
    "html_body": True,
    "error_in_200": False,  # Status 200 with `error` at the top.
    "error_finish": True,  # Status 200, `finish_reason` is "error".
    "missing_usage": True,
    "missing_cost": True,
    "null_cost": True,
    "zero_cost": False,  # An explicit zero, and nothing in the book.
    "overcharge": True,  # Charged ten times the list price.
}


def check_fault(name: str) -> str:
    """Return `name` when it is a fault. Errors: ValueError."""
    match = _HTTP.fullmatch(name)
    if name not in FAULTS and not (match and int(match[1]) in STATUS_CODES):
        raise ValueError(f"unknown fault {name!r}; known are {', '.join(FAULTS)}")
    return name


def http_fault(name: str) -> tuple[int, int | None] | None:
    """Return (status, Retry-After seconds) of a status fault, None for the others."""
    match = _HTTP.fullmatch(name)
    return (int(match[1]), int(match[2]) if match[2] else None) if match else None


@dataclass
class FaultPlan:
    """Which faults come when. `rates` are shares of requests; `script` is used up first, None being no fault."""

    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    script: Sequence[str | None] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        for name in (*self.rates, *(name for name in self.script if name)):
            check_fault(name)
        if any(rate < 0 for rate in self.rates.values()) or sum(self.rates.values()) > 1:
            raise ValueError("the rates of faults are shares of the requests and add up to 1 at most")
        self._draw = random.Random(self.seed)  # noqa: S311 - repeatable, not secret.
        self._left = list(self.script)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "FaultPlan":
        """Read a plan. Errors: ValueError; TypeError for unknown members."""
        return cls(**document)

    def next(self) -> str | None:
        """Return the fault of the next request, or None."""
        if self._left:
            return self._left.pop(0)
        drawn = self._draw.random()
        for name, rate in self.rates.items():
            drawn -= rate
            if drawn < 0:
                return name
        return None
