"""Reads spend from a copy of the projection, made in this process.

The next copy is made a few seconds after the last one, later if copying takes long, and not at all while the file does
not change.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import duckdb

from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.projection.snapshot import open_snapshot
from tollbook.schemas.identifiers import EntryId
from tollbook.views.top.figures import BudgetFigures, SpendFigures, UserFigures
from tollbook.views.top.redis_reader import Seen

_COPY_EVERY_S: Final = 5.0
# Copying a large projection takes long; it may take at most 1/20 of the time.
_COPY_SHARE: Final = 20
_FIRST_COPY_S: Final = 1.0
_USERS: Final = 50

_TOTALS: Final = """
SELECT count(*), coalesce(sum(nanousd(spent_usd)), 0), coalesce(sum(nanousd(reserved_usd)), 0),
    coalesce(sum(calls), 0), coalesce(sum(denied), 0), coalesce(sum(fallbacks), 0)
FROM spend WHERE period = $period
"""
_TOP: Final = """
SELECT user_id, plan, nanousd(spent_usd), nanousd(reserved_usd), nanousd(cap_usd), calls, denied, fallbacks
FROM spend WHERE period = $period
"""
_BY_SPEND: Final = f"{_TOP} ORDER BY spent_usd DESC, user_id LIMIT {_USERS}"
# Compared as floats: these are estimates for display, and no decision uses them.
_BY_USE: Final = (
    f"{_TOP} ORDER BY spent_usd::DOUBLE / nullif(cap_usd, 0)::DOUBLE DESC NULLS LAST, user_id LIMIT {_USERS}"
)

_BUDGETS: Final = """
SELECT name, value, nanousd(spent_usd), nanousd(cap_usd)
FROM (FROM budget_use WHERE name <> 'user' AND cap_usd > 0)
QUALIFY "window" = max("window") OVER (PARTITION BY name)
ORDER BY spent_usd::DOUBLE / cap_usd::DOUBLE DESC, name, value
LIMIT 3
"""

_Signature = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Copy:
    """The contents of a copy of the projection. While the file has this `signature`, the copy is current."""

    at_s: float
    took_s: float
    signature: _Signature
    spend: SpendFigures
    positions: dict[int, Position]
    seen: Seen | None
    """What Redis said right before the copy."""


class ProjectionReader:
    """Copies and reads the projection from time to time; `problem` says why there is no newer copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._copy: Copy | None = None
        self._copying: asyncio.Task[Copy] | None = None
        self._next_s = 0.0

    async def read(self, period: str, seen: Seen | None, *, must_copy: bool) -> Copy | None:
        """Return the latest copy, of this billing period.

        It waits a little for the first copy only; later copies are made in the background.
        """
        copy, now_s = self._copy, time.monotonic()
        if copy is not None and copy.signature == _signature(self.path, period):
            # The file has not changed, so the copy is current.
            self._copy = copy = replace(copy, at_s=now_s, seen=seen)
        elif self._copying is None and (must_copy or now_s >= self._next_s):
            self._copying = asyncio.create_task(asyncio.to_thread(read_copy, self.path, period, seen))
        if self._copying is not None:
            is_first = copy is None and self.problem is None
            await asyncio.wait([self._copying], timeout=None if must_copy else _FIRST_COPY_S if is_first else 0)
            if self._copying.done():
                self._take(self._copying)
                self._copying = None
        return self._copy

    async def aclose(self) -> None:
        """Wait for a running copy."""
        if self._copying is not None:
            await asyncio.wait([self._copying])
            self._take(self._copying)

    def _take(self, copying: asyncio.Task[Copy]) -> None:
        try:
            self._copy, self.problem = copying.result(), None
        except (LedgerError, duckdb.Error, OSError) as exc:
            self.problem, took_s = str(exc).partition("\n")[0], 0.0
        else:
            took_s = self._copy.took_s
        self._next_s = time.monotonic() + max(_COPY_EVERY_S, _COPY_SHARE * took_s)


def read_copy(path: Path, period: str, seen: Seen | None) -> Copy:
    """Copy the projection and read the copy. Blocks. Errors: LedgerUnavailable; duckdb.Error; OSError."""
    at_s, signature = time.monotonic(), _signature(path, period)
    with open_snapshot(path) as connection:
        rows = connection.execute("SELECT partition, id, seq, ledger_id FROM position").fetchall()
        positions = {partition: Position(EntryId.parse(entry), seq) for partition, entry, seq, _ in rows}
        discrepancies = connection.execute("SELECT count(*) FROM discrepancies").fetchall()[0][0]
        totals = connection.execute(_TOTALS, {"period": period}).fetchall()[0]
        budgets = connection.execute(_BUDGETS).fetchall()
        by_spend, by_use = (connection.execute(sql, {"period": period}).fetchall() for sql in (_BY_SPEND, _BY_USE))
    users, spent, held, calls, denied, fallbacks = map(int, totals)
    spend = SpendFigures(
        age_s=0.0,
        period=period,
        ledger_id=rows[0][3] if rows else "",
        seq=sum(position.seq for position in positions.values()),
        is_current=False,
        newer_events=0,
        users=users,
        spent_nanousd=spent,
        held_nanousd=held,
        calls=calls,
        denied=denied,
        fallbacks=fallbacks,
        discrepancies=int(discrepancies),
        by_spend=tuple(UserFigures(*row) for row in by_spend),
        by_use=tuple(UserFigures(*row) for row in by_use),
        lag_events=None,
        lag_s=None,
        budgets=tuple(BudgetFigures(*row) for row in budgets),
    )
    return Copy(at_s, time.monotonic() - at_s, signature, spend, positions, seen)


def _signature(path: Path, period: str) -> _Signature:
    """Return a value that changes with the file, its log or the period."""
    parts = [period]
    for file in (path, path.with_name(path.name + ".wal")):
        try:
            status = file.stat()
        except OSError:
            parts.append("")
        else:
            parts.append(f"{status.st_ino} {status.st_size} {status.st_mtime_ns}")
    return tuple(parts)
