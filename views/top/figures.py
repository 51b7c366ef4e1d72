"""The numbers of the live view: plain values without I/O, money in nano-dollars, ages in seconds.

A part that could not be read now keeps its last values, with their age; None if it was never read.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal

from tollbook.schemas.money import usd_from_nanousd

HISTORY_S: Final = 60
"""How far back the ledger's stream is read, in seconds."""

Level = Literal["person", "notice"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem: `person` if a person must act, `notice` if the system handles it."""

    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """One task stream. `waiting` entries were not delivered yet; None if the server cannot tell."""

    name: str
    length: int
    waiting: int | None
    pending: int
    oldest_pending_s: float | None
    """How long ago the oldest pending entry was published."""


@dataclass(frozen=True, slots=True)
class RedisFigures:
    """What Redis says at one moment. `workers` counts live workers; None if there are too many names to check."""

    url: str
    age_s: float
    ledger_id: str
    seq: int
    """Events ever appended, over all partitions."""
    streams: tuple[StreamFigures, ...]
    open_holds: int
    budgets_waited_for: int
    dead_letters: int
    workers: int | None
    projector: str | None
    """Who has the projector's lease."""
    stopped: str | None = None
    """Why calls are stopped; None if they are not."""
    refusal: str | None = None
    """Why no call can be made on this server, such as a full memory; None if calls can be made."""
    unsynced: str | None = None
    """Why a crash of the server can lose writes; None if it cannot."""
    failing_receivers: tuple[str, ...] = ()
    """Receivers of alerts that do not accept them, each with the reason."""

    @property
    def pending(self) -> int:
        """Tasks that were delivered and not acknowledged, over all streams."""
        return sum(stream.pending for stream in self.streams)


@dataclass(frozen=True, slots=True)
class RateFigures:
    """Sums over the newest events on the ledger, in the last `window_s` seconds."""

    age_s: float
    window_s: int
    """60, or less if there are more events than are read."""
    finished: int
    failed: int
    denied: int
    fallbacks: int
    cost_nanousd: int
    calls_per_s: float
    """Over the last 10 whole seconds, as is the next."""
    nanousd_per_min: int
    finished_by_second: tuple[int, ...]
    """The whole seconds of the window, oldest first."""
    cost_by_second: tuple[int, ...]
    newest_event_s: float | None
    """How old the newest event is."""


@dataclass(frozen=True, slots=True)
class UserFigures:
    """A user's billing period. `cap_nanousd` is None before the first call."""

    user_id: str
    plan: str | None
    spent_nanousd: int
    held_nanousd: int
    cap_nanousd: int | None
    calls: int
    denied: int
    fallbacks: int

    @property
    def used(self) -> float | None:
        """Settled spend as a part of the cap; only for display."""
        return self.spent_nanousd / self.cap_nanousd if self.cap_nanousd else None


@dataclass(frozen=True, slots=True)
class BudgetFigures:
    """A balance of one of the policy's further budgets, in its latest window."""

    name: str
    value: str
    spent_nanousd: int
    cap_nanousd: int


@dataclass(frozen=True, slots=True)
class SpendFigures:
    """A billing period in a copy of the projection, with the newer events of the ledger.

    If `is_current`, numbers include the newest event, otherwise they are as of the copy. Lag, discrepancies and `seq`
    are always as of the copy, whose age is `age_s`.
    """

    age_s: float
    period: str
    ledger_id: str
    seq: int
    """Events folded, over all partitions, when it was copied."""
    is_current: bool
    newer_events: int
    """Events since the copy that are in the numbers."""
    users: int
    spent_nanousd: int
    held_nanousd: int
    calls: int
    denied: int
    fallbacks: int
    discrepancies: int
    by_spend: tuple[UserFigures, ...]
    by_use: tuple[UserFigures, ...]
    lag_events: int | None
    """Events on the ledger that were not folded when it was copied; None if Redis did not answer."""
    lag_s: float | None
    """How old the oldest of them was."""
    budgets: tuple[BudgetFigures, ...] = ()
    """The further budgets with the highest use of their caps, as of the copy."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Everything on the screen, at one moment."""

    at_ms: int
    namespace: str
    data_dir: str
    problems: tuple[Problem, ...]
    redis: RedisFigures | None
    rates: RateFigures | None
    spend: SpendFigures | None


def as_document(value: Any) -> Any:
    """Return figures as they are printed in JSON: money in dollars with nine places, as text."""
    if isinstance(value, tuple):
        return [as_document(part) for part in value]  # pyright: ignore[reportUnknownVariableType]
    if not hasattr(value, "__dataclass_fields__"):
        return value
    document: dict[str, Any] = {}
    for name in value.__dataclass_fields__:
        part = getattr(value, name)
        if name.endswith("_nanousd"):
            document[name.removesuffix("_nanousd") + "_usd"] = None if part is None else _dollars(part)
        elif name == "nanousd_per_min":
            document["usd_per_min"] = _dollars(part)
        elif name == "cost_by_second":
            document["usd_by_second"] = [_dollars(cost) for cost in part]
        else:
            document[name] = as_document(part)
    return document


def _dollars(nanousd: int) -> str:
    dollars: Decimal = usd_from_nanousd(nanousd)
    return f"{dollars:f}"
