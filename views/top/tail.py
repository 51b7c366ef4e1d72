"""The newest entries of one ledger partition: counts by second, and the movements since a copy of the projection.

Entries are added as Redis sends them, in the order of the ledger. Memory is bounded: old seconds are dropped, and the
oldest movements if there are too many. An entry that cannot be parsed is skipped; `tollbook verify` finds it.
"""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tollbook.ledger.stream import RawEntry
from tollbook.schemas.identifiers import EntryId
from tollbook.views.top.figures import HISTORY_S, RateFigures

_MAX_MOVES: Final = 100_000
_RATE_S: Final = 10
# Outcomes that end a call. A call that was taken over goes on; `recorded` is spend outside Tollbook.
_ENDED: Final = frozenset({"done", "failed", "expired"})
_FAILED: Final = frozenset({"failed", "expired"})


@dataclass(slots=True)
class Second:
    """Sums over the events of one second."""

    finished: int = 0
    failed: int = 0
    denied: int = 0
    fallbacks: int = 0
    cost_nanousd: int = 0


@dataclass(frozen=True, slots=True)
class Move:
    """What one event changes in a user's period, as in the projection. `cap_nanousd` is the cap in force."""

    seq: int
    user_id: str
    period: str
    settled_nanousd: int = 0
    held_nanousd: int = 0
    calls: int = 0
    denied: int = 0
    fallbacks: int = 0
    cap_nanousd: int | None = None
    plan: str | None = None


class Tail:
    """The newest entries of one partition."""

    def __init__(self, entries: Sequence[RawEntry], *, is_all: bool, seq: int) -> None:
        """Begin with the newest entries. `seq` events were ever appended; `is_all`: the stream has no earlier ones."""
        self.last = b""
        """The newest entry's id; empty before the first."""
        self.seconds: dict[int, Second] = {}
        self.covered_from_ms: int | None = None if is_all or not entries else EntryId.parse(entries[0][0].decode()).ms
        """All events since this time are counted; None: all events."""
        self._moves: deque[Move] = deque()
        self._known_after = int(entries[0][1][5]) - 1 if entries else seq
        self.extend(entries)

    @property
    def newest_ms(self) -> int | None:
        """When the newest event was appended."""
        return EntryId.parse(self.last.decode()).ms if self.last else None

    def extend(self, entries: Iterable[RawEntry]) -> None:
        """Add the entries that follow."""
        for entry_id, flat in entries:
            self.last = entry_id
            try:
                self._add(EntryId.parse(entry_id.decode()).ms // 1000, flat)
            except (ValueError, TypeError, IndexError, KeyError, AttributeError):
                continue

    def forget(self, now_s: int) -> None:
        """Drop the seconds that are no longer shown."""
        for second in [second for second in self.seconds if second <= now_s - HISTORY_S - 1]:
            del self.seconds[second]

    def moves_after(self, seq: int) -> list[Move] | None:
        """Return the movements after event `seq`, and forget earlier ones; None if they were not all read."""
        if seq < self._known_after:
            return None
        while self._moves and self._moves[0].seq <= seq:
            self._moves.popleft()
        self._known_after = seq
        return list(self._moves)

    def _add(self, second: int, flat: list[Any]) -> None:
        kind, move = flat[1], partial(Move, int(flat[5]), flat[7].decode(), flat[9].decode())
        amount, payload = int(flat[15]), json.loads(flat[19])
        counts = self.seconds.setdefault(second, Second())
        match kind:
            case b"budget-reserved":
                is_call = payload["hold"] == 1 and payload.get("kind") != "extension"
                cap, plan = payload["cap_nanousd"], payload.get("assigned_plan", payload["plan"])
                self._keep(move(held_nanousd=amount, calls=int(is_call), cap_nanousd=cap, plan=plan))
            case b"cost-recorded":
                outcome = payload["outcome"]
                counts.finished += outcome in _ENDED
                counts.failed += outcome in _FAILED
                counts.cost_nanousd += amount
                held = -payload.get("hold_nanousd", 0)
                self._keep(move(settled_nanousd=amount, held_nanousd=held, calls=int(outcome == "recorded")))
            case b"cost-adjusted":
                counts.cost_nanousd += amount
                self._keep(move(settled_nanousd=amount))
            case b"budget-denied":
                counts.denied += 1
                self._keep(move(denied=1))
            case b"fallback-used":
                counts.fallbacks += 1
                self._keep(move(fallbacks=1))
            case _:
                self._keep(move())

    def _keep(self, move: Move) -> None:
        if not (move.user_id and move.period):
            return
        self._moves.append(move)
        if len(self._moves) > _MAX_MOVES:
            self._known_after = self._moves.popleft().seq


def rates(tails: Sequence[Tail], now_ms: int) -> RateFigures:
    """Add up the last 60 s of all partitions. Sums include the current second, rates do not."""
    now_s = now_ms // 1000
    first = now_s - HISTORY_S
    for tail in tails:
        tail.forget(now_s)
        if tail.covered_from_ms is not None:
            # A second that was read only in part is left out.
            first = max(first, -(-tail.covered_from_ms // 1000))
    window_s = max(1, now_s - first)
    shown = range(now_s - window_s, now_s)
    found = [(second, counts) for tail in tails for second, counts in tail.seconds.items() if second >= shown.start]
    finished = tuple(sum(counts.finished for at, counts in found if at == second) for second in shown)
    costs = tuple(sum(counts.cost_nanousd for at, counts in found if at == second) for second in shown)
    latest, latest_costs = finished[-_RATE_S:], costs[-_RATE_S:]
    cost = sum(counts.cost_nanousd for _, counts in found)
    newest = max((tail.newest_ms for tail in tails if tail.newest_ms is not None), default=None)
    return RateFigures(
        age_s=0.0,
        window_s=window_s,
        finished=sum(counts.finished for _, counts in found),
        failed=sum(counts.failed for _, counts in found),
        denied=sum(counts.denied for _, counts in found),
        fallbacks=sum(counts.fallbacks for _, counts in found),
        cost_nanousd=cost,
        calls_per_s=sum(latest) / len(latest),
        nanousd_per_min=sum(latest_costs) * 60 // len(latest_costs),
        finished_by_second=finished,
        cost_by_second=costs,
        newest_event_s=None if newest is None else max(0.0, (now_ms - newest) / 1000),
    )
