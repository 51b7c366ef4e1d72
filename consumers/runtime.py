"""Composition root of the processes: projection, worker, and both in one (`tollbook up`).

Small enough to read in one sitting: what is opened, in which order, and how it ends.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from consumers.app import build_app
from consumers.claims import Claims
from consumers.dead_letters import DeadLetters
from consumers.sweeper import Sweeper
from consumers.worker import Worker, WorkerLimits
from inference.runtime import InferenceRuntime, LedgerHandle, build_gates, now_ms, open_ledger, open_runtime
from inference.settings import Settings
from ledger.baselines import BaselinePage
from ledger.embedded import EmbeddedServer
from ledger.endpoint import Endpoint, clear_endpoint, write_endpoint
from ledger.projector import Projector, ProjectorSettings
from ledger.quack import TOKEN_FILE, QuackServer
from ledger.store import Store, stored_ledger_id

_CATCH_UP_S: Final = 10.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Projection:
    """The DuckDB side of a running system."""

    store: Store
    projector: Projector
    quack_url: str

    async def read(self, names: Sequence[str], /) -> BaselinePage:
        """Read baselines in this process, off the event loop."""
        return await asyncio.to_thread(self.store.baselines, names)


@asynccontextmanager
async def open_redis_url(settings: Settings) -> AsyncGenerator[str]:
    """Yield the URL of the configured server, or start the embedded one for as long as this is open."""
    if settings.redis_url is not None:
        yield settings.redis_url
        return
    async with EmbeddedServer(settings.data_dir, settings.port) as server:
        yield server.url


def duckdb_path(settings: Settings) -> Path:
    """Return where the projection is."""
    return settings.data_dir / "tollbook.duckdb"


@asynccontextmanager
async def open_projection(settings: Settings, handle: LedgerHandle) -> AsyncGenerator[Projection]:
    """Open DuckDB, serve it to other processes and follow the ledger.

    Errors: StoreLocked; LedgerMismatch; WrongPartitions; StoreFailed.
    """
    async with AsyncExitStack() as stack:
        store = await asyncio.to_thread(Store.open, duckdb_path(settings), handle.ledger_id, len(handle.keys))
        stack.callback(store.close)
        server = await asyncio.to_thread(QuackServer.start, store, settings.data_dir, port=settings.quack_port or 0)
        stack.callback(server.stop)
        gates = build_gates(handle, settings)
        projector = Projector(
            store,
            handle.redis,
            handle.keys,
            trim=lambda partition, watermark, budgets: gates[partition].trim(watermark, budgets),
            settings=ProjectorSettings(tail_keep_ms=round(1000 * settings.tail_keep_s)),
        )
        yield Projection(store, projector, server.uri)


def build_worker(runtime: InferenceRuntime, streams: Sequence[str], name: str) -> Worker:
    """Put a worker together for the given streams."""
    settings, pipeline = runtime.settings, runtime.handle.pipeline
    claims = Claims(
        pipeline,
        namespace=settings.namespace,
        consumer=name,
        streams=streams,
        claim_after_s=settings.claim_after_s,
    )
    limits = WorkerLimits(
        concurrency={stream: settings.concurrency_of(stream) for stream in streams},
        hold_wait_s=settings.hold_wait_s,
        most_holds=settings.max_task_attempts,
    )
    return Worker(
        name=name,
        runner=runtime.runner,
        routes=runtime.routes,
        pipeline=pipeline,
        claims=claims,
        freed=runtime.freed,
        dead_letters=DeadLetters(pipeline, settings.namespace),
        limits=limits,
        now_ms=now_ms,
    )


async def run_worker(runtime: InferenceRuntime, streams: Sequence[str], stop: asyncio.Event, *, redis_url: str) -> None:
    """Work until `stop`; then finish what is in flight within the grace period."""
    worker = build_worker(runtime, streams, runtime.name)
    await serve_worker(runtime, worker, stop, redis_url=redis_url)


async def serve_worker(runtime: InferenceRuntime, worker: Worker, stop: asyncio.Event, *, redis_url: str) -> None:
    """Feed a worker until `stop`; then finish what is in flight within the grace period."""
    claims = worker.claims
    sweeper = Sweeper(runtime.ledger, runtime.ledger.gates)
    await claims.show_life()
    background = [asyncio.create_task(claims.run(worker.take_claimed)), asyncio.create_task(sweeper.run())]
    _log.info("worker.started", worker=worker.name, streams=claims.streams)
    try:
        while not stop.is_set():
            await claims.ensure_groups()
            app = build_app(redis_url, worker, claims.streams)
            await app.start()
            await _first_of(stop, app.ended)
            await app.stop()
        _log.info("worker.stopping", worker=worker.name, in_flight=worker.in_flight)
        await worker.drain(runtime.settings.stop_grace_s)
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
    await claims.resign()
    _log.info("worker.stopped", worker=worker.name)


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


@dataclass(frozen=True, slots=True)
class System:
    """Everything of `tollbook up` in one process."""

    redis_url: str
    handle: LedgerHandle
    projection: Projection
    runtime: InferenceRuntime


@asynccontextmanager
async def open_system(settings: Settings) -> AsyncGenerator[System]:
    """Open server, projection and runtime, fold in the background.

    Errors: EmbeddedServerError; LedgerUnavailable; LedgerRefused.
    """
    async with open_redis_url(settings) as redis_url, _open_folding(settings, redis_url) as (handle, projection):
        folding = asyncio.create_task(projection.projector.run())
        try:
            async with open_runtime(settings, handle, projection.read) as runtime:
                yield System(redis_url, handle, projection, runtime)
            await _catch_up(projection.projector)
        finally:
            folding.cancel()
            await asyncio.gather(folding, return_exceptions=True)


async def _catch_up(projector: Projector) -> None:
    """Fold what the last calls wrote, so that DuckDB at rest shows it; the next start folds what this leaves."""
    try:
        async with asyncio.timeout(_CATCH_UP_S):
            await projector.catch_up()
    except Exception as exc:  # noqa: BLE001 - nothing that is wrong with the projection may keep the system from stopping.
        _log.warning("projection.left_behind", problem=str(exc) or type(exc).__name__)


async def run_projector(settings: Settings, stop: asyncio.Event) -> None:
    """Fold and serve DuckDB until `stop`. Errors: what stops the fold, and those of `open_system`."""
    async with open_redis_url(settings) as redis_url, _open_folding(settings, redis_url) as (_, projection):
        _log.info("projector.started", redis_url=redis_url, quack_url=projection.quack_url)
        folding, stopped = asyncio.create_task(projection.projector.run()), asyncio.create_task(stop.wait())
        await asyncio.wait({folding, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if folding.done():
            await folding
        await _catch_up(projection.projector)
        folding.cancel()
        await asyncio.gather(folding, return_exceptions=True)


@asynccontextmanager
async def _open_folding(settings: Settings, redis_url: str) -> AsyncGenerator[tuple[LedgerHandle, Projection]]:
    """Open ledger and projection and tell the other commands on this machine where they are."""
    expected_id = await asyncio.to_thread(stored_ledger_id, duckdb_path(settings))
    async with (
        open_ledger(settings, redis_url, expected_id=expected_id) as handle,
        open_projection(settings, handle) as projection,
    ):
        write_endpoint(
            settings.data_dir,
            Endpoint(
                redis_url=redis_url,
                namespace=settings.namespace,
                quack_url=projection.quack_url,
                token_file=settings.data_dir / TOKEN_FILE,
                pid=os.getpid(),
                started_at=datetime.now(UTC),
            ),
        )
        try:
            yield handle, projection
        finally:
            clear_endpoint(settings.data_dir)
