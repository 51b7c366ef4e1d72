"""Projection: folding the ledger into DuckDB, compared with only reading it.

One side is a projector with its own reader, transactions, checkpoints and trimming, from an
empty file to the last event. The other side reads the same stream in batches of the same size
and discards it: with redis-py, as any program would, and with the projector's own reader, which
makes no dictionaries and is part of the projector's work.
"""

import asyncio
import gc
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from benchmarks.load import EVENTS_A_CALL, tails_of, typical_entries
from benchmarks.measure import Result, Sizes, Target, compare, in_turn
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.projector import Projector, ProjectorSettings
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

_USERS = 2_000
_PAGE = 1_000
_ROUND_TIMEOUT_S = 120.0
_BATCH = ProjectorSettings().batch_events


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    events, rounds = EVENTS_A_CALL * sizes.of(100_000, 2_000), sizes.of(5, 2)
    gc.collect()
    gc.freeze()  # For every side, as in the processes of `tollbook`.
    async with EmbeddedServer(directory, fsync="everysec") as server, connect(server.url) as redis:
        await load_library(redis)
        pipeline = CommandPipeline(redis)
        keys = Keys("bench")
        ledger_id = str(uuid.uuid4())
        await create_ledger(pipeline, keys, ledger_id=ledger_id, partitions=1)
        last = await _fill(redis, keys, events)
        tails = tails_of(typical_entries(events // EVENTS_A_CALL, users=_USERS))
        gate = Gate(pipeline, keys, ledger_id, idempotency_ttl_s=3_000_000, result_ttl_s=600_000)
        numbers = count()

        async def fold() -> float:
            path = directory / f"round-{next(numbers)}" / "tollbook.duckdb"
            await _fill_tails(redis, keys, tails)
            store = await asyncio.to_thread(Store.open, path, ledger_id)
            projector = Projector(
                store, redis, [keys], trim=lambda _, watermark, budgets: gate.trim(watermark, budgets)
            )
            started = time.perf_counter()
            folding = asyncio.create_task(projector.run())
            async with asyncio.timeout(_ROUND_TIMEOUT_S):
                await projector.wait_for(0, last)
            seconds = time.perf_counter() - started
            folding.cancel()
            await asyncio.gather(folding, return_exceptions=True)
            await asyncio.to_thread(store.close)
            shutil.rmtree(path.parent)
            return events / seconds

        async def read_plainly() -> float:
            after, seen = b"0", 0
            started = time.perf_counter()
            while entries := await _xread(redis, keys.ledger, after):
                seen, after = seen + len(entries), entries[-1][0]
            seconds = time.perf_counter() - started
            if seen != events:
                raise ValueError(f"read {seen} events of {events}")
            return events / seconds

        async def read(*, converts: bool = False) -> float:
            reader, after, seen = StreamReader(redis, keys), ZERO_ENTRY, 0
            started = time.perf_counter()
            while batch := await reader.read_after(after, count=_BATCH):
                seen, after = seen + len(batch), batch.last_id
                if converts:
                    batch.to_table()
            seconds = time.perf_counter() - started
            await reader.aclose()
            if seen != events:
                raise ValueError(f"read {seen} events of {events}")
            return events / seconds

        async def read_and_convert() -> float:
            return await read(converts=True)

        await in_turn(1, fold, read_plainly)
        folded, plainly, own, converted = await in_turn(rounds, fold, read_plainly, read, read_and_convert)
        await pipeline.aclose()
    gc.unfreeze()
    return [
        compare(
            "projection",
            f"folding {events:,} events from the stream against reading them with redis-py",
            folded,
            plainly,
            unit="events/s",
            target=Target(">=", 0.5),
        ),
        compare(
            "projection", "the same against reading them with the projector's reader", folded, own, unit="events/s"
        ),
        compare("projection", "the same against reading them so into columns", folded, converted, unit="events/s"),
    ]


async def _xread(redis: Redis, key: str, after: bytes) -> list[Any]:
    """Read entries as a program without Tollbook does."""
    reply: Any = await redis.xread({key: after}, count=_BATCH)
    streams = dict(reply or ())  # A mapping in RESP3, pairs in RESP2.
    return next(iter(streams.values()), [])


async def _fill_tails(redis: Redis, keys: Keys, tails: Mapping[str, Sequence[str]]) -> None:
    """Restore the tails that the previous round has trimmed."""
    pipe = redis.pipeline(transaction=False)
    pipe.execute_command("HSET", keys.meta, "trimmed_to", "0-0")
    for budget, entries in tails.items():
        pipe.execute_command("DEL", keys.tail(budget))
        pipe.execute_command("RPUSH", keys.tail(budget), *entries)
    await pipe.execute()


async def _fill(redis: Redis, keys: Keys, events: int) -> EntryId:
    """Append the events and return the id of the last."""
    entries = typical_entries(events // EVENTS_A_CALL, users=_USERS)
    replies: list[Any] = []
    while page := list(islice(entries, _PAGE)):
        pipe = redis.pipeline(transaction=False)
        for entry_id, fields in page:
            pipe.execute_command("XADD", keys.ledger, entry_id, *fields)
        replies = await pipe.execute()
    return EntryId.parse(replies[-1].decode())
