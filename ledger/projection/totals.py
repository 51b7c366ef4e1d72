"""Totals of the ledger for metrics: money, calls and attempts, by type, model, outcome and reason.

Each reading adds only the events folded since the last one, so its cost does not grow with the ledger. Like the
projection, the totals depend only on the ledger up to a position (G5): they do not restart with a process, and any
file of the same ledger gives the same totals.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from string import Template
from typing import Final, NamedTuple

from tollbook.ledger.projection.fold import statement
from tollbook.ledger.projection.store import Store

LATENCY_BUCKETS_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
"""Upper bounds of the latency classes; longer attempts are counted only in the number of attempts."""

_SUMS: Final = (
    "events",
    "usd",
    "less_usd",
    "freed_usd",
    "assumed_usd",
    "overage_usd",
    "charge_usd",
    "prompt_tokens",
    "completion_tokens",
    "latency_ms",
)


class Group(NamedTuple):
    """The columns by which events are grouped; '' or 0 if a type has no such column."""

    type: str
    model: str
    outcome: str
    basis: str
    reason: str
    is_doubted: bool
    http_status: int
    kind: str
    budget: str
    frees_hold: bool


@dataclass(slots=True)
class Sums:
    """Sums over a group's events. Units: dollars, tokens, milliseconds; `within` counts attempts by latency class."""

    events: int = 0
    usd: Decimal = Decimal(0)
    less_usd: Decimal = Decimal(0)
    freed_usd: Decimal = Decimal(0)
    assumed_usd: Decimal = Decimal(0)
    overage_usd: Decimal = Decimal(0)
    charge_usd: Decimal = Decimal(0)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_ms: int = 0
    within: list[int] = field(default_factory=lambda: [0] * len(LATENCY_BUCKETS_S))

    def add(self, other: "Sums") -> None:
        """Add another group's sums to these."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.within = [mine + theirs for mine, theirs in zip(self.within, other.within, strict=True)]


class Totals:
    """The totals of one ledger, over all its partitions."""

    def __init__(self, partitions: Iterable[int]) -> None:
        self._seen = dict.fromkeys(partitions, 0)
        self._groups: dict[Group, Sums] = {}

    def advance(self, store: Store) -> None:
        """Add the events folded since the last call; a file being rebuilt adds none until it has passed these. Blocks.

        Errors: duckdb.Error; StoreClosed; BaselineUnavailable.
        """
        for partition, seq in self._seen.items():
            for row in store.query(_statement(), [partition, seq]):
                group = Group(*(row[name] for name in Group._fields))
                sums = Sums(**{name: row[name] for name in _SUMS}, within=[row[name] for name in _bucket_names()])
                self._groups.setdefault(group, Sums()).add(sums)
                self._seen[partition] = max(self._seen[partition], row["seq"])

    def groups(self, kind: str) -> Iterator[tuple[Group, Sums]]:
        """Yield the groups of one event type."""
        return ((group, sums) for group, sums in self._groups.items() if group.type == kind)

    def of(self, kind: str) -> Sums:
        """Return the sums over all events of one type."""
        sums = Sums()
        for _, part in self.groups(kind):
            sums.add(part)
        return sums

    @property
    def types(self) -> dict[str, int]:
        """How many events there are of each type."""
        found: dict[str, int] = {}
        for group, sums in self._groups.items():
            found[group.type] = found.get(group.type, 0) + sums.events
        return found

    @property
    def held_usd(self) -> Decimal:
        """Money held now: reserved and not yet settled."""
        return self.of("budget-reserved").usd - self.of("cost-recorded").freed_usd

    @property
    def holds_open(self) -> int:
        """How many holds are open now."""
        opened = sum(sums.events for group, sums in self.groups("budget-reserved") if group.kind == "hold")
        return opened - sum(sums.events for group, sums in self.groups("cost-recorded") if group.frees_hold)


def _bucket_names() -> Sequence[str]:
    return [f"within_{number}" for number in range(len(LATENCY_BUCKETS_S))]


def _statement() -> str:
    buckets = ",\n    ".join(
        f"count(*) FILTER (type = 'model-called' AND latency_ms <= {round(1000 * bound)}) AS {name}"
        for bound, name in zip(LATENCY_BUCKETS_S, _bucket_names(), strict=True)
    )
    return Template(statement("totals")).substitute(buckets=buckets)
