"""The demo's proof: compares the ledger with the provider's own bill, and checks the guarantees on every event."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tollbook.app.processes import System
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.projection.comparison import compare
from tollbook.schemas.money import nanousd_from_usd

_SPENT: Final = "SELECT user_id, sum(spent_usd)::DECIMAL(18, 9) AS spent_usd FROM spend GROUP BY user_id"
_OVER_CAP: Final = """
SELECT
    (SELECT count(*) FROM events WHERE type = 'budget-reserved' AND committed_usd > cap_usd AND amount_usd > 0)
    + (SELECT count(*) FROM discrepancies WHERE kind = 'cap') AS bad
"""
_UNSETTLED: Final = """
WITH opened AS (SELECT call_id, hold, count(*) AS n FROM events WHERE kind = 'hold' GROUP BY ALL),
settled AS (SELECT call_id, hold, count(*) AS n FROM events WHERE type = 'cost-recorded' GROUP BY ALL)
SELECT count(*) AS bad FROM opened FULL JOIN settled USING (call_id, hold)
WHERE opened.n IS DISTINCT FROM 1 OR settled.n IS DISTINCT FROM 1
"""
_DISAGREEING: Final = "SELECT count(*) AS bad FROM discrepancies"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the proof."""

    claim: str
    is_true: bool
    detail: str


async def prove(system: System, book: Mapping[str, int], published: int, answered: int) -> list[Check]:
    """Check every claim. `book` is the provider's own bill: nano-dollars by user."""
    query = system.projection.store.query
    rows = await asyncio.to_thread(query, _SPENT)
    ledger = {row["user_id"]: nanousd_from_usd(row["spent_usd"]) for row in rows if row["spent_usd"]}
    charged = {user: nanousd for user, nanousd in book.items() if nanousd}
    wrong = sorted(user for user in ledger.keys() | charged.keys() if ledger.get(user) != charged.get(user))
    return [
        Check("every task has one result", answered == published, f"{answered:,} of {published:,}"),
        Check(
            "the ledger equals the provider's book, user by user, to the nano-dollar",
            not wrong,
            f"{len(charged):,} users, {sum(ledger.values()):,} nano-dollars in the ledger, "
            f"{sum(charged.values()):,} in the book" + (f"; wrong: {', '.join(wrong[:5])}" if wrong else ""),
        ),
        await _count(query, _OVER_CAP, "no hold ever passed its cap, at any event", "holds over the cap"),
        await _count(query, _UNSETTLED, "every hold was settled exactly once", "holds not settled once"),
        await _count(query, _DISAGREEING, "the gate's sums equal the projector's, event by event", "differences"),
        await _rebuilt(system),
    ]


async def _count(query: Any, sql: str, claim: str, what: str) -> Check:
    bad = (await asyncio.to_thread(query, sql))[0]["bad"]
    return Check(claim, bad == 0, f"{bad} {what}")


async def _rebuilt(system: System) -> Check:
    """Fold the ledger again into another file, and compare row by row."""
    live = system.projection.store
    path: Path = live.path.with_name("rebuilt.duckdb")
    other = await rebuild(system.handle.redis, system.handle.keys, system.handle.ledger_id, path)
    try:
        differences = await asyncio.to_thread(compare, live, other)
    finally:
        await asyncio.to_thread(other.close)
        await asyncio.to_thread(path.unlink, missing_ok=True)
    tables = ", ".join(difference.table for difference in differences)
    return Check(
        "the projection rebuilt from the ledger equals the live one, row for row",
        not differences,
        f"differences in {tables}" if differences else "all tables equal",
    )
