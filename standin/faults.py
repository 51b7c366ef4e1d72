"""Faults that the stand-in can simulate, by name, and the plan that says when.

A fault is drawn by its rate from a seeded generator, taken from a script in order, or requested in the prompt with
`[[fault=NAME]]`. `http_NNN:S` adds a Retry-After of S seconds. The names of the scenarios in `standin/scenarios.py` can
be used in the same way.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tollbook.schemas.problems import as_text, problems_of, unknown_name
from tollbook.standin.scenarios import SCENARIOS

STATUS_CODES: Final = (400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503, 524, 529)
_HTTP: Final = re.compile(r"http_(\d{3})(?::(\d+))?")

# Name -> whether the request is charged although it fails.
FAULTS: Final[dict[str, bool]] = {
    **{f"http_{code}": False for code in STATUS_CODES},
    "in_flight": False,  # Status 402 with in_flight_budget_exhausted, which is transient.
    "slow": True,  # Answers after `slow_ms`.
    "hang": False,  # Never answers.
    "hang_charged": True,
    "reset_before_charge": False,  # The connection is reset before any reply.
    "reset_after_charge": True,
    "reset_mid_body": True,  # Status and headers arrive, X-Generation-Id among them, then the connection is reset.
    "cut_off": True,  # The body ends after its first half, as if it were complete.
    # Headers arrive, then nothing. When the client disconnects, one token is charged, as generated until then.
    "stalled": False,
    "broken_json": True,
    "html_body": True,
    "error_in_200": False,  # Status 200 with `error` at the top level.
    "error_finish": True,  # Status 200, `finish_reason` is "error".
    "missing_usage": True,
    "missing_cost": True,
    "null_cost": True,
    "zero_cost": False,  # An explicit zero, and nothing in the book.
    "overcharge": True,  # Charged ten times the list price.
}

STREAM_FAULTS: Final = ("stream_cut", "stream_half_event", "stream_hang", "stream_error", "stream_reset")
"""Faults in the middle of an event stream, in this order: it ends there; it ends inside an event; it sends nothing
more; it sends an event with an error; its connection is reset. The sent part is charged, except before an error. Plain
replies do not have these faults."""


def check_fault(name: str) -> str:
    """Return `name` if it is a fault or a scenario. Errors: ValueError."""
    match = _HTTP.fullmatch(name)
    if name not in (*FAULTS, *STREAM_FAULTS, *SCENARIOS) and not (match and int(match[1]) in STATUS_CODES):
        raise ValueError(unknown_name("fault", name, (*FAULTS, *STREAM_FAULTS, *SCENARIOS)))
    return name


def http_fault(name: str) -> tuple[int, int | None] | None:
    """Return (status, Retry-After seconds) of a fault `http_...`, None for other faults."""
    match = _HTTP.fullmatch(name)
    return (int(match[1]), int(match[2]) if match[2] else None) if match else None


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Document(BaseModel):
    """A plan as JSON."""

    model_config = ConfigDict(extra="forbid")

    rates: dict[str, Share] = {}
    script: tuple[str | None, ...] = ()
    seed: int | None = None


@dataclass
class FaultPlan:
    """Which requests get which fault. `script` is used first, in order (None: no fault); then `rates`, as shares."""

    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    script: Sequence[str | None] = ()
    seed: int = 1

    def __post_init__(self) -> None:
        for name in (*self.rates, *(name for name in self.script if name)):
            check_fault(name)
        if any(rate < 0 for rate in self.rates.values()) or sum(self.rates.values()) > 1:
            raise ValueError("rates must be shares of requests: each at least 0, all together at most 1")
        self._draw = random.Random(self.seed)  # noqa: S311 - repeatable, not secret.
        self._remaining = list(self.script)

    @classmethod
    def from_json(cls, document: object, *, seed: int = 1) -> "FaultPlan":
        """Read a plan; `seed` is used if the plan has none. Errors: ValueError."""
        try:
            read = _Document.model_validate(document)
        except ValidationError as exc:
            raise ValueError(as_text(problems_of(exc, _Document))) from None
        return cls(read.rates, read.script, seed if read.seed is None else read.seed)

    def next(self) -> str | None:
        """Return the fault of the next request, or None."""
        if self._remaining:
            return self._remaining.pop(0)
        drawn = self._draw.random()
        for name, rate in self.rates.items():
            drawn -= rate
            if drawn < 0:
                return name
        return None
