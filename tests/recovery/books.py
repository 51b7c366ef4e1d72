"""What must be true of every ledger on which no call is open, whatever has happened before."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from tests.servers import wait_until
from tests.system import RunningSystem
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.projection.comparison import compare
from tollbook.schemas.events import BudgetReserved, CostAdjusted, CostRecorded, Event
from tollbook.schemas.upcasters import event_from_entry


async def events_of(running: RunningSystem, call_id: str | None = None) -> list[Event]:
    """Return the ledger's events, or those of one call, as they stand in Redis."""
    events: list[Event] = []
    for keys in running.system.handle.keys:
        entries: Any = await running.redis.xrange(keys.ledger)
        events += [
            event_from_entry(entry_id.decode(), {name.decode(): value.decode() for name, value in fields.items()})
            for entry_id, fields in entries
        ]
    return [event for event in events if call_id in (None, event.call_id)]


async def is_at_rest(running: RunningSystem) -> None:
    """Return once every task is acknowledged and every hold is settled."""

    async def is_done() -> bool:
        held = [await running.redis.zcard(keys.holds) for keys in running.system.handle.keys]
        return not any(held) and await running.pending() == 0

    await wait_until(is_done, what="every task acknowledged and every hold settled")


async def check_books(running: RunningSystem, directory: Path) -> None:
    """Assert the guarantees; the stand-in's book has what was really spent."""
    await is_at_rest(running)
    opened, closed = list[tuple[str, int]](), list[tuple[str, int]]()
    spent, assumed = Counter[str](), Counter[str]()
    for event in await events_of(running):
        match event.payload:
            case BudgetReserved() as payload:
                # G1
                assert event.committed is not None
                assert event.committed <= payload.cap_nanousd
                if payload.kind == "hold":
                    opened.append((event.call_id, payload.hold))
            case CostRecorded() | CostAdjusted() as payload:
                spent[event.user_id] += event.amount
                assumed[event.user_id] += payload.assumed_nanousd
                if isinstance(payload, CostRecorded) and payload.outcome != "recorded":
                    closed.append((event.call_id, payload.hold))
            case _:
                pass
    # G2: each hold is opened once and settled once.
    assert len(set(opened)) == len(opened)
    assert sorted(opened) == sorted(closed)
    # G3: no user is charged less than the provider took, and only assumed charges may exceed it.
    booked = running.provider.book.totals()
    for user_id in spent.keys() | booked.keys():
        assert spent[user_id] >= booked.get(user_id, 0) >= spent[user_id] - assumed[user_id], user_id
    # The gate's numbers and the projector's agree, event by event.
    assert await running.query("FROM discrepancies") == []
    await check_projection(running, directory)


async def check_projection(running: RunningSystem, directory: Path) -> None:
    """G5: the projection equals one that is rebuilt from nothing."""
    handle = running.system.handle
    again = directory / "again.duckdb"
    while True:
        await running.fold_all()
        head = await newest_events(running)
        rebuilt = await rebuild(running.redis, handle.keys, handle.ledger_id, again)
        try:
            differences = await asyncio.to_thread(compare, running.system.projection.store, rebuilt)
        finally:
            await asyncio.to_thread(rebuilt.close)
            again.unlink()
        if not differences:
            return
        # `segment-sealed` is an event too; one may have come during the comparison.
        assert await newest_events(running) != head, differences


async def newest_events(running: RunningSystem) -> list[Any]:
    """Return the newest entry of each ledger stream."""
    return [await running.redis.xrevrange(keys.ledger, count=1) for keys in running.system.handle.keys]
