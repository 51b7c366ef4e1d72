"""Serving a worker: its streams are registered and read until `stop`, and its claims are renewed meanwhile.

Pending entries must belong to a live consumer (see claims.py), so the claims are renewed as long as the worker works.
A background task ends only by a fault; then the worker stops.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import structlog
from redis.exceptions import RedisError

from tollbook.consumers.app import TaskApp, build_app
from tollbook.consumers.claims import Claims
from tollbook.consumers.dead_letters import DeadLetterLimits, DeadLetters
from tollbook.consumers.observer import TaskObserver
from tollbook.consumers.policy_following import PolicyFollowing
from tollbook.consumers.reply_streams import ReplyStreams
from tollbook.consumers.stream_tidying import StreamTidying
from tollbook.consumers.sweeper import Sweeper
from tollbook.consumers.throttled_warning import ThrottledWarning
from tollbook.consumers.worker import Worker, WorkerLimits
from tollbook.inference.calls.reservations import WaitLimits
from tollbook.inference.runtime import InferenceRuntime, now_ms
from tollbook.inference.stated_policy import concurrency_of
from tollbook.inference.task_deltas import DeltaStream
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.probe import check_permissions
from tollbook.ledger.server.servers import cluster_of
from tollbook.ledger.stream_owners import own_streams

_RECONNECT_S: Final = 0.5
# The part of TOLLBOOK_STOP_GRACE_S for settling calls that were cut off, and for closing.
_MAX_SETTLING_S: Final = 3.0
# Without its resignation, a stopped worker is seen as silent a little later.
_RESIGN_S: Final = 1.0
# How many tasks of one process may wait for money. Further tasks are left on their streams.
_MAX_PARKED: Final = 20_000
_log = structlog.get_logger(__name__)


class ServiceObserver(Protocol):
    """Observes the serving of a worker."""

    @property
    def middlewares(self) -> Sequence[Any]:
        """FastStream middlewares around reading."""
        ...

    @property
    def reads_traces(self) -> bool:
        """Whether the middlewares want the publishers' trace contexts."""
        ...

    def working(self, worker: Worker, tasks: dict[str, asyncio.Task[None]]) -> AbstractContextManager[None]:
        """Observe a worker while it is served, with its background tasks by name."""
        ...


class _Unobserved:
    middlewares = ()
    reads_traces = False

    def working(self, worker: Worker, tasks: dict[str, asyncio.Task[None]]) -> AbstractContextManager[None]:  # noqa: ARG002
        return contextlib.nullcontext()


def build_worker(
    runtime: InferenceRuntime, streams: Sequence[str], name: str, *, observer: TaskObserver | None = None
) -> Worker:
    """Return a worker for the given streams; `observer` follows its tasks."""
    settings, handle = runtime.settings, runtime.handle
    claims = Claims(
        handle.pipeline,
        namespace=settings.namespace,
        consumer=name,
        streams=streams,
        claim_after_s=settings.claim_after_s,
    )
    limits = WorkerLimits(
        concurrency=concurrency_of(settings, runtime.rules),
        waiting=WaitLimits(
            hold_wait_s=settings.hold_wait_s, max_attempts=settings.max_task_attempts, max_parked=_MAX_PARKED
        ),
    )
    return Worker(
        name=name,
        reservations=runtime.reservations,
        runner=runtime.runner,
        policies=runtime.policies,
        replies=ReplyStreams(
            handle.pipeline,
            namespace=settings.namespace,
            task_streams=lambda: runtime.rules.streams,
            max_length=settings.reply_stream_max,
        ),
        open_deltas=lambda task_id, user_id: DeltaStream(handle.pipeline, handle.results.deltas_key(task_id, user_id)),
        results=handle.results,
        claims=claims,
        dead_letters=DeadLetters(
            handle.pipeline,
            settings.namespace,
            limits=DeadLetterLimits(settings.dead_letters_max, settings.dead_letters_keep_s),
        ),
        user_ids=handle.user_ids,
        limits=limits,
        now_ms=now_ms,
        observer=observer,
        on_held_back=handle.sign.hold_back,
    )


async def serve_worker(
    runtime: InferenceRuntime,
    worker: Worker,
    stop: asyncio.Event,
    *,
    redis_url: str,
    observer: ServiceObserver | None = None,
    takes_all: bool = False,
) -> None:
    """Feed a worker until `stop`; then finish the tasks in flight within the grace period.

    With `takes_all`, streams that later policies add are read too. Errors: StreamTaken.
    """
    observer = observer or _Unobserved()
    claims, warning = worker.claims, ThrottledWarning("worker.not_connected", now_ms)
    # Before the claims run, since they take over pending entries of any ledger's stream.
    while not await _prepare_streams(runtime, worker, warning, is_first=True):
        await pause(stop, _RECONNECT_S)
        if stop.is_set():
            return
    is_cluster = await cluster_of(runtime.handle.redis) is not None
    sweeper = Sweeper(
        runtime.ledger, runtime.ledger.gates, is_alive=claims.is_alive, ask_cost=runtime.lost_requests.cost
    )
    following = PolicyFollowing(runtime, worker, takes_all=takes_all)
    tasks = {
        "policy": asyncio.create_task(following.run()),
        "claims": asyncio.create_task(claims.run(worker.take_claimed, worker.overtaken_calls.watch)),
        "sweeper": asyncio.create_task(sweeper.run()),
        "tidying": asyncio.create_task(_tidying(runtime, worker).run()),
    }
    for task in tasks.values():
        # A task ends only by a fault, and a worker that renews no claims must not go on.
        task.add_done_callback(lambda _: stop.set())

    def build(streams: Sequence[str]) -> TaskApp:
        return build_app(
            redis_url,
            worker,
            streams,
            middlewares=observer.middlewares,
            reads_traces=observer.reads_traces,
            is_cluster=is_cluster,
        )

    _log.info("worker.started", worker=worker.name, streams=claims.streams)
    try:
        with observer.working(worker, tasks):
            while not stop.is_set():
                if not await _prepare_streams(runtime, worker, warning) or not await _feed(
                    worker, stop, build, following.added, warning
                ):
                    await pause(stop, _RECONNECT_S)
            _log.info("worker.stopping", worker=worker.name, in_flight=worker.in_flight)
            grace_s = min(runtime.settings.stop_grace_s, runtime.handle.pipeline.remaining_s)
            await worker.drain(max(0.0, grace_s - _settling_s(grace_s)), settling_s=_settling_s(grace_s))
    finally:
        worker.overtaken_calls.close()
        for task in tasks.values():
            task.cancel()
        ends = await asyncio.gather(*tasks.values(), return_exceptions=True)
        worker.dead_letters.flush(is_last=True)
    with contextlib.suppress(LedgerUnavailable, TimeoutError):
        async with asyncio.timeout(_RESIGN_S):
            await claims.resign()
    _log.info("worker.stopped", worker=worker.name)
    for end in ends:
        if isinstance(end, Exception):
            raise end


def _tidying(runtime: InferenceRuntime, worker: Worker) -> StreamTidying:
    settings = runtime.settings
    return StreamTidying(
        runtime.handle.pipeline, worker.dead_letters, namespace=settings.namespace, keep_s=settings.task_keep_s
    )


def _settling_s(grace_s: float) -> float:
    """Return the part of the grace period for settling calls that were cut off, and for closing."""
    return min(_MAX_SETTLING_S, grace_s / 5)


async def pause(stop: asyncio.Event, seconds: float) -> None:
    """Return after `seconds`, or earlier at `stop`."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def _prepare_streams(
    runtime: InferenceRuntime, worker: Worker, warning: ThrottledWarning, *, is_first: bool = False
) -> bool:
    """Register the streams for this ledger, and create their groups; return False if Redis did not answer.

    Errors: StreamTaken; PermissionsMissing.
    """
    try:
        if is_first:
            await check_permissions(runtime.handle.pipeline, runtime.handle.keys, streams=worker.claims.streams)
        owners = await own_streams(runtime.handle.pipeline, worker.claims.streams, runtime.settings.namespace)
        worker.replies.share_database_with(owners)
        await worker.claims.heartbeat()
        await worker.claims.ensure_groups()
    except (LedgerUnavailable, RedisError) as exc:
        warning.warn(exc)
        return False
    return True


async def _feed(
    worker: Worker,
    stop: asyncio.Event,
    build: Callable[[Sequence[str]], TaskApp],
    added: asyncio.Event,
    warning: ThrottledWarning,
) -> bool:
    """Read the streams until `stop`, or until a group vanishes; return False if Redis did not answer.

    `added` is set when the worker gets more streams. They are read without interrupting the others.
    """
    apps, read = list[TaskApp](), set[str]()
    try:
        while not (stop.is_set() or any(app.ended.is_set() for app in apps)):
            added.clear()
            streams = [stream for stream in worker.claims.streams if stream not in read]
            apps.append(build(streams))
            if not await _start_app(apps[-1], stop):
                break
            read.update(streams)
            await _wait_for_any(stop, added, *(app.ended for app in apps))
    except (LedgerUnavailable, RedisError, OSError) as exc:
        warning.warn(exc)
        return False
    finally:
        await asyncio.gather(*(app.stop() for app in apps))
    return True


async def _start_app(app: TaskApp, stop: asyncio.Event) -> bool:
    """Start to read; return False if `stop` was set before Redis answered."""
    starting, stopping = asyncio.create_task(app.start()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
        return starting.done()
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


async def _wait_for_any(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
