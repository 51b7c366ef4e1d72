"""Budget check: does a reserve that reads DuckDB take longer with more events in the projection?

Every reserve is for a user whose baseline is not cached, so it reads DuckDB first: directly, as in `tollbook up`, and
with a request over Redis, as in workers. One at a time, in turn on the small and the large projection. Then only the
baseline is read, by one reader and by many at once.
"""

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import cast

from redis.asyncio import Redis

from benchmarks.load import EVENTS_A_CALL, now_ms, reserve_request, typical_entries, user_of
from benchmarks.measure import Result, Sizes, Target
from tollbook.consumers.baseline_answers import BaselineAnswers
from tollbook.ledger.gate.asking import AskedBaselines
from tollbook.ledger.gate.baselines import BaselinePage, BaselineReader, Baselines
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import Reserved, ReserveRequest
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream import Batch
from tollbook.schemas.identifiers import budget_name, month_at

_BATCH = 50_000
_EVENTS_A_USER = 15
_READERS = 16
_MAX_P99_MS = 15


@dataclass(frozen=True, slots=True)
class Projection:
    """A projection of `events` events, and the ledgers that read it: directly, and over Redis, as `ask` does."""

    events: int
    users: int
    local: Ledger
    remote: Ledger
    ask: BaselineReader


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    small_events, large_events = 999, sizes.of(1_000_000, 20_000) // EVENTS_A_CALL * EVENTS_A_CALL
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(directory, fsync="always"))
        redis = await stack.enter_async_context(connect(server.url))
        await load_library(redis)
        pipeline = CommandPipeline(redis)
        stack.push_async_callback(pipeline.aclose)
        small = await open_projection(stack, redis, pipeline, directory / "small", small_events)
        large = await open_projection(stack, redis, pipeline, directory / "large", large_events)
        results: list[Result] = []
        for where, times in (("in the projector's process", sizes.of(3_000, 50)), ("over Redis", sizes.of(3_000, 50))):
            is_local = where.startswith("in")
            sides = [(projection, projection.local if is_local else projection.remote) for projection in (large, small)]
            seconds = await latencies(sides, times)
            results += _lines(where, large_events, small_events, *seconds)
        return results + await _fresh_baselines(large, sizes.of(3_000, 60))


async def _fresh_baselines(projection: Projection, times: int) -> list[Result]:
    """Measure how long a process without the file waits for a baseline, alone and beside other readers."""
    alone = await _reading_s(projection, times, at_once=1)
    together = await _reading_s(projection, times, at_once=_READERS)
    what = f"fresh baseline over Redis, {projection.events:,} events, one reader against {_READERS} at once"
    return [
        Result(
            benchmark="budget_check",
            what=f"{what}, {name}",
            subject=1000 * of(alone),
            reference=1000 * of(together),
            unit="ms",
            floor=Target("<=", _MAX_P99_MS) if name == "p99" else None,
        )
        for name, of in (("median", median), ("p99", _p99))
    ]


async def _reading_s(projection: Projection, times: int, *, at_once: int) -> list[float]:
    draw = random.Random(2)
    seconds: list[float] = []

    async def read() -> None:
        name = budget_name("user", user_of(draw.randrange(projection.users)), "2026-11")
        started = time.perf_counter()
        await projection.ask([name])
        seconds.append(time.perf_counter() - started)

    for _ in range(times // at_once):
        await asyncio.gather(*(read() for _ in range(at_once)))
    return seconds


def _p99(seconds: Sequence[float]) -> float:
    return quantiles(seconds, n=100)[98]


def _lines(
    where: str, large_events: int, small_events: int, large: Sequence[float], small: Sequence[float]
) -> list[Result]:
    what = f"reserve with a fresh baseline, {where}, {large_events:,} against {small_events:,} events"
    kinds: tuple[tuple[str, Callable[[Sequence[float]], float]], ...] = (("median", median), ("p99", _p99))
    return [
        Result(
            benchmark="budget_check",
            what=f"{what}, {name}",
            subject=1000 * of(large),
            reference=1000 * of(small),
            unit="ms",
            # A high percentile mostly shows the machine's delays, so it has no target.
            target=Target("<=", 1.3) if name == "median" else None,
        )
        for name, of in kinds
    ]


async def latencies(sides: Sequence[tuple[Projection, Ledger]], times: int) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in sides]
    draw = random.Random(1)
    run_id = uuid.uuid4().hex[:8]
    for n in range(-times // 10, times):
        for (projection, ledger), seen in zip(sides, seconds, strict=True):
            user = user_of(draw.randrange(projection.users))
            started = time.perf_counter()
            reply = await ledger.reserve(_request_maker(f"{run_id}-{n}", user, n), now_ms())
            elapsed = time.perf_counter() - started
            if not isinstance(reply, Reserved):
                raise TypeError(f"not reserved: {reply}")
            if n >= 0:  # The first tenth is to warm up.
                seen.append(elapsed)
    return seconds


def _request_maker(call_id: str, user: str, n: int) -> Callable[[int], ReserveRequest]:
    return lambda at_ms: reserve_request(call_id, user, month_at(at_ms), n)


async def open_projection(
    stack: AsyncExitStack, redis: Redis, pipeline: CommandPipeline, directory: Path, events: int
) -> Projection:
    """Fold events into a new file, and make a ledger in Redis of which they are the archived part."""
    ledger_id, users = str(uuid.uuid4()), max(1, events // _EVENTS_A_USER)
    store = await asyncio.to_thread(Store.open, directory / "tollbook.duckdb", ledger_id)
    stack.callback(store.close)
    entries = typical_entries(events // EVENTS_A_CALL, users=users)
    while page := list(islice(entries, _BATCH)):
        await asyncio.to_thread(store.fold, Batch(0, page))
    await asyncio.to_thread(store.checkpoint)
    keys = Keys(f"bench-{events}")
    await create_ledger(pipeline, keys, ledger_id=ledger_id, partitions=1)
    await cast("Awaitable[int]", redis.hset(keys.meta, "removed", str(events)))
    gate = Gate(pipeline, keys, ledger_id, idempotency_ttl_s=3_000_000, result_ttl_s=600_000)

    async def read(names: Sequence[str], /) -> BaselinePage:
        return await asyncio.to_thread(store.baselines, names)

    answers = BaselineAnswers(redis, [keys], read, ledger_id=ledger_id)
    stack.push_async_callback(answers.stop)
    await answers.start()
    asked = AskedBaselines(redis, pipeline, [keys], ledger_id=ledger_id, process="benchmark")
    stack.push_async_callback(asked.aclose)

    def ledger_with(reader: BaselineReader) -> Ledger:
        # No cached baseline is used again.
        return Ledger(redis, [gate], [Baselines(reader, 0, monotonic=time.monotonic, max_age_s=-1.0)])

    return Projection(events, users, ledger_with(read), ledger_with(asked.reader(0)), asked.reader(0))
