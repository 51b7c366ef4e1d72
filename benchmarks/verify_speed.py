"""Verification of a ledger of a million events: archive, unsealed stream, and the projection in use.

Each round is a separate process, like `tollbook verify`, so that its peak memory is measured alone.
"""

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks.ledger import MadeLedger, as_entries
from benchmarks.measure import Result, Sizes, Target, Work, in_process, median_of, peak_memory
from tests.archive_files import directory_of
from tollbook.audit.verification.live_projection import LiveProjection
from tollbook.audit.verification.verification import Options, verify
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.replay import replay
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import create_ledger
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline

_KEYS: Final = Keys("bench")
_PAGE: Final = 1_000
_ACCOUNTS: Final = """
    SELECT user_id, 'plan' AS field, arg_max(plan, seq) AS value FROM events WHERE type = 'plan-assigned' GROUP BY ALL
    UNION ALL
    SELECT user_id, 'cap_nanousd', arg_max(nanousd(cap_usd), seq)::VARCHAR FROM events WHERE type = 'plan-assigned'
    GROUP BY ALL
    UNION ALL
    SELECT user_id, 'credit:' || period, sum(nanousd(amount_usd))::VARCHAR FROM events
    WHERE type = 'credit-granted' AND budget IS NULL
    GROUP BY user_id, period
"""
_CREDITS: Final = r"""
    -- Grants alone, of budgets from which nothing is spent: nothing of them is used.
    SELECT budget AS field, sum(nanousd(amount_usd))::VARCHAR AS value
    FROM events
    WHERE type = 'credit-granted' AND budget IS NOT NULL
    GROUP BY budget
    UNION ALL
    SELECT
        budget || ' lots',
        '0' || string_agg(format(E'\n{0} {1} {1} 0', payload->>'credit', nanousd(amount_usd)), '' ORDER BY seq)
    FROM events
    WHERE type = 'credit-granted' AND budget IS NOT NULL
    GROUP BY budget
"""
# The newest entry of each budget with an open hold.
_TAILS: Final = """
    SELECT b.budget, format('{} {} {} {} {}', e.id,
        CASE WHEN e.type = 'budget-reserved' THEN 0 ELSE nanousd(e.amount_usd) END,
        CASE e.type WHEN 'budget-reserved' THEN nanousd(e.amount_usd) WHEN 'cost-recorded' THEN -nanousd(e.hold_usd)
            ELSE 0 END,
        nanousd(b.settled_usd), nanousd(b.held_usd)) AS entry
    FROM budgets AS b
    JOIN events AS e ON e.seq = b.last_seq
    WHERE b.held_usd <> 0
"""
_OPEN: Final = """
    WITH holds AS (
        SELECT
            call_id, any_value(user_id) AS user_id, any_value(period) AS period, hold,
            sum(nanousd(amount_usd)) FILTER (type = 'budget-reserved') AS held,
            sum(nanousd(amount_usd)) FILTER (type IN ('cost-recorded', 'cost-adjusted')) AS cost,
            sum(nanousd(assumed_usd)) FILTER (type IN ('cost-recorded', 'cost-adjusted')) AS assumed,
            count(*) FILTER (type = 'cost-recorded') = 0 AS is_open,
            max((payload->>'$.deadline_ms')::BIGINT) FILTER (kind = 'hold') AS deadline
        FROM events
        WHERE hold > 0
        GROUP BY call_id, hold
        HAVING count(*) FILTER (type = 'budget-reserved') > 0
    ),
    attempts AS (
        SELECT call_id, string_agg(CASE type WHEN 'model-called' THEN 'm' ELSE 'f' END || attempt || ' ', '') AS marks
        FROM events
        WHERE type IN ('model-called', 'fallback-used')
        GROUP BY call_id
    )
    SELECT
        o.call_id, any_value(o.deadline) AS deadline,
        format(E'open h {} {} w {} {} {} 0 1 0 0 0 -\n{}\n {}\n\nuser:{}:{}', any_value(o.hold), any_value(o.held),
            any_value(o.deadline), any_value(o.user_id), any_value(o.period),
            coalesce(string_agg(format(' {}={},{}', c.hold, c.cost, c.assumed), '' ORDER BY c.hold), ''),
            coalesce(any_value(a.marks), ''), any_value(o.user_id), any_value(o.period)) AS record
    FROM holds AS o
    LEFT JOIN holds AS c ON c.call_id = o.call_id AND NOT c.is_open
    LEFT JOIN attempts AS a ON a.call_id = o.call_id
    WHERE o.is_open
    GROUP BY o.call_id
"""


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    events, rounds = sizes.of(1_000_000, 30_000), sizes.of(2, 1)
    archive, live = Archive(directory / "archive"), directory / "live.duckdb"
    made = await asyncio.to_thread(MadeLedger.draw, events, segment=sizes.of(75_000, 8_000))
    rest = await asyncio.to_thread(made.write, archive)
    async with EmbeddedServer(directory / "server", fsync="everysec") as server, connect(server.url) as redis:
        await put_on_stream(redis, _KEYS, made, archive, rest)
        store = await replay(LedgerSource(made.ledger_id, (_KEYS,), archive, redis), live)
        await put_gate_state(redis, _KEYS, store)
        await asyncio.to_thread(store.close)
        given = (directory_of(archive), server.url, live)
        figures = [await in_process("benchmarks.verify_speed", *given, "whole") for _ in range(rounds)]
        head = archive.segments(0)[-2].manifest.chain_after
        since = await in_process("benchmarks.verify_speed", *given, head)
    return [
        Result(
            benchmark="verify",
            what=f"{events:,} events, {rest.num_rows:,} of them not sealed, and the projection",
            subject=median_of(figures, "seconds"),
            reference=None,
            unit="s",
            floor=Target("<=", 30),
            details={"processes": figures},
        ),
        Result(
            benchmark="verify",
            what="the same, trusting the head of the last segment but one",
            subject=since["seconds"],
            reference=median_of(figures, "seconds"),
            unit="s",
            details={"processes": [since]},
        ),
        peak_memory("verify", figures, max_mb=2_000),
    ]


async def put_on_stream(redis: Redis, keys: Keys, made: MadeLedger, archive: Archive, rest: Any) -> None:
    """Make the ledger's state in Redis: the stream has only the events that are not sealed."""
    await load_library(redis)
    pipeline = CommandPipeline(redis)
    await create_ledger(pipeline, keys, ledger_id=made.ledger_id, partitions=1)
    await pipeline.aclose()
    last = archive.segments(keys.partition)[-1].manifest
    sealed = ["removed", last.last_seq, "sealed_seq", last.last_seq, "sealed_chain", last.chain_after]
    await redis.hset(keys.meta, items=sealed)
    await append(redis, keys, rest)
    await redis.zadd(keys.holds, dict(made.open_holds()))


async def put_gate_state(redis: Redis, keys: Keys, store: Store) -> None:
    """Write the gate's state beside the stream into Redis, with tails trimmed as far as possible."""
    pipe = redis.pipeline(transaction=False)
    pipe.execute_command("HSET", keys.meta, "trimmed_to", str(store.position().entry))
    for row in await asyncio.to_thread(store.query, _ACCOUNTS):
        pipe.execute_command("HSET", keys.account(row["user_id"]), row["field"], row["value"])
    for row in await asyncio.to_thread(store.query, _CREDITS):
        pipe.execute_command("HSET", keys.credits, row["field"], row["value"])
    for row in await asyncio.to_thread(store.query, _TAILS):
        pipe.execute_command("RPUSH", keys.tail(row["budget"]), row["entry"])
    for row in await asyncio.to_thread(store.query, _OPEN):
        pipe.execute_command("SET", keys.call(row["call_id"]), row["record"])
        pipe.execute_command("ZADD", keys.holds, row["deadline"], row["call_id"])
    await pipe.execute()


async def append(redis: Redis, keys: Keys, events: Any) -> None:
    """Append events to the stream as they are."""
    entries = list(as_entries(events))
    for start in range(0, len(entries), _PAGE):
        pipe = redis.pipeline(transaction=False)
        for entry_id, fields in entries[start : start + _PAGE]:
            pipe.execute_command("XADD", keys.ledger, entry_id, *fields)
        await pipe.execute()


async def _verify(archive: Path, url: str, live: Path, since: str) -> dict[str, Any]:
    work = Work()
    source = LedgerSource.of_archive(Archive(archive), namespace=_KEYS.namespace)
    store = await asyncio.to_thread(Store.open, live, source.ledger_id)
    directory = live.with_name("verify")
    async with connect(url) as redis:
        whole = LedgerSource(source.ledger_id, (_KEYS,), source.archive, redis)
        options = Options(directory, since=None if since == "whole" else since)
        verdict = await verify(whole, options, live=await asyncio.to_thread(LiveProjection.look, store))
    figures = work.figures(verdict.events)
    shutil.rmtree(directory)
    store.close()
    if verdict.findings:
        raise ValueError(f"the generated ledger is not valid: {verdict.findings[:3]}")
    return {**figures, "projection_rows": verdict.projection_rows}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_verify(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]))))
