"""Heavy query: does a budget check take longer while heavy queries run on the projection?

One side reserves with a baseline read from DuckDB each time, over Redis, as workers do, while `tollbook sql`
runs one query after the other in a separate process, each on a separate copy; on the other side that process is
stopped. In turn, on a projection of a million events.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import cycle
from pathlib import Path
from statistics import quantiles

from benchmarks.budget_check import Projection, latencies, open_projection
from benchmarks.load import EVENTS_A_CALL
from benchmarks.measure import Result, Sizes, Target, compare, in_turn
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline

# The first query only computes and would take days; the second sorts and prints all events.
_QUERIES = (
    "SELECT count(*) FROM events AS a, events AS b WHERE hash(a.payload, b.id) = 0",
    "SELECT id, payload FROM events ORDER BY payload DESC, id",
)
_QUERY_S = 20


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    events = sizes.of(1_000_000, 20_000) // EVENTS_A_CALL * EVENTS_A_CALL
    times, rounds = sizes.of(600, 20), sizes.of(7, 2)
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer(directory, fsync="always"))
        redis = await stack.enter_async_context(connect(server.url))
        await load_library(redis)
        pipeline = CommandPipeline(redis)
        stack.push_async_callback(pipeline.aclose)
        data = directory / "large"
        projection = await open_projection(stack, redis, pipeline, data, events)
        queries = await stack.enter_async_context(_heavy_queries(data))

        async def beside_queries() -> float:
            queries.resume()
            try:
                return await _p99(projection, times)
            finally:
                queries.pause()

        async def alone() -> float:
            return await _p99(projection, times)

        await in_turn(1, beside_queries, alone)
        beside, without = await in_turn(rounds, beside_queries, alone)
    return [
        compare(
            "heavy_query",
            f"reserve with a fresh baseline over Redis, {events:,} events, beside heavy queries against alone, p99",
            beside,
            without,
            unit="ms",
            target=Target("<=", 2),
            queries_begun=queries.begun,
        )
    ]


async def _p99(projection: Projection, times: int) -> float:
    (seconds,) = await latencies([(projection, projection.remote)], times)
    return 1000 * quantiles(seconds, n=100)[98]


class _HeavyQueries:
    """Runs `tollbook sql` again and again. While stopped, it takes no processor time; it begins stopped."""

    def __init__(self, data_dir: Path) -> None:
        self.begun = 0
        self._data_dir = data_dir
        self._process: asyncio.subprocess.Process | None = None
        self._may_run = asyncio.Event()

    def resume(self) -> None:
        self._may_run.set()
        self._signal(signal.SIGCONT)

    def pause(self) -> None:
        self._may_run.clear()
        self._signal(signal.SIGSTOP)

    async def run(self) -> None:
        """Run until cancelled. Errors: RuntimeError if a query fails, since the figures would be void."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TOLLBOOK_", "OPENROUTER_"))}
        environment = {**clean, "TOLLBOOK_DATA_DIR": str(self._data_dir)}
        tollbook = Path(sys.executable).with_name("tollbook")
        for query in cycle(_QUERIES):
            await self._may_run.wait()
            self._process = await asyncio.create_subprocess_exec(
                *(tollbook, "sql", query, "--timeout", str(_QUERY_S), "--format", "csv"),
                cwd=self._data_dir,
                env=environment,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            self.begun += 1
            _, errors = await self._process.communicate()
            if self._process.returncode and b"the query was cut off after" not in errors:
                raise RuntimeError(f"a heavy query failed: {errors.decode()}")

    async def end(self) -> None:
        """End the running query."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)


@asynccontextmanager
async def _heavy_queries(data_dir: Path) -> AsyncIterator[_HeavyQueries]:
    queries = _HeavyQueries(data_dir)
    running = asyncio.create_task(queries.run())
    try:
        yield queries
        if running.done():
            await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await queries.end()
