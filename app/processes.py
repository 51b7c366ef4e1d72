"""Composition root of the processes: projection, worker, and both in one (`tollbook up`).

It says what is opened, in which order, and how it ends; the work itself is done in the rooms below.
"""

import asyncio
import math
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

import structlog

from tollbook.app.alerting import open_alerts
from tollbook.app.supervisor import Child, Supervisor
from tollbook.audit.opening_balances import spent_reader
from tollbook.consumers.backlog import DroppedTasks
from tollbook.consumers.projection import ProjectionService, open_projection
from tollbook.consumers.service import build_worker, pause, serve_worker
from tollbook.consumers.throttled_warning import ThrottledWarning
from tollbook.inference.archive_place import archive_of
from tollbook.inference.heads_on_disk import heads_on_disk
from tollbook.inference.opening_balances import ReadSpent
from tollbook.inference.policy_changes import start_policy
from tollbook.inference.provider_access import check_providers
from tollbook.inference.runtime import (
    InferenceRuntime,
    LedgerHandle,
    build_gates,
    build_ledger,
    now_ms,
    open_ledger,
    open_runtime,
)
from tollbook.inference.settings import Settings
from tollbook.inference.stated_policy import chosen_streams
from tollbook.inference.user_keys import keep_key_copy
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.errors import LedgerError, LedgerReplaced, LedgerUnavailable, LedgerWentBack
from tollbook.ledger.gate.ledger import Patience
from tollbook.ledger.gate.probe import check_permissions
from tollbook.ledger.private_files import make_private_folder
from tollbook.ledger.projection.database import stored_ledger_id
from tollbook.ledger.projection.store_errors import StoreLocked
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.embedded import EmbeddedServer, EmbeddedServerError
from tollbook.ledger.server.endpoint import Endpoint, clear_endpoint, read_endpoint, write_endpoint
from tollbook.observability.process import describe_ports, observe_process, port_setting, ports_of_processes
from tollbook.observability.process_state import Part, ProcessState

_SERVER_POLL_S: Final = 0.2
_SERVER_PAUSE_S: Final = 2.0
_MIN_CATCH_UP_S: Final = 0.5
_POLICY_S: Final = 2.0
# Of the grace, for what comes after the last fold.
_CLOSING_S: Final = 1.0
# After its grace a process has ended, or ends itself; its parent gives it a little more.
_KILLED_AFTER_S: Final = 5.0
# A worker that gave up settling would forget an answer that is paid for. While Redis is away it has no other work.
PATIENCE: Final = Patience(settle_s=math.inf)
_log = structlog.get_logger(__name__)


@asynccontextmanager
async def open_redis_url(settings: Settings) -> AsyncGenerator[str]:
    """Yield the URL of the configured server, or run the embedded one for as long as this is open."""
    if settings.redis_url is not None:
        yield settings.redis_url
        return
    async with EmbeddedServer(settings.data_dir, settings.port) as server:
        keeping = asyncio.create_task(_keep_running(server))
        try:
            yield server.url
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


async def _keep_running(server: EmbeddedServer) -> None:
    """Start the server again whenever it has died; clients find it at the same address."""
    while True:
        await asyncio.sleep(_SERVER_POLL_S)
        if server.is_running:
            continue
        _log.error("embedded_server.died", problem=server.problem)
        try:
            await server.start()
        except EmbeddedServerError as exc:
            _log.error("embedded_server.not_started", problem=str(exc))
            await asyncio.sleep(_SERVER_PAUSE_S)


@dataclass(frozen=True, slots=True)
class System:
    """The open parts of `tollbook up` in one process. `folding` ends only if the projection cannot go on."""

    redis_url: str
    handle: LedgerHandle
    projection: ProjectionService
    runtime: InferenceRuntime
    folding: asyncio.Task[None]
    state: ProcessState


@asynccontextmanager
async def open_system(settings: Settings, *, state: ProcessState | None = None) -> AsyncGenerator[System]:
    """Open server, projection and runtime, fold in the background; `state` shows it to metrics and health.

    Errors: EmbeddedServerError; LedgerUnavailable; LedgerRefused.
    """
    state = state or ProcessState("up", settings)
    async with (
        open_redis_url(settings) as redis_url,
        _open_projection(settings, redis_url, state, part="up") as (handle, projection),
    ):
        folding = asyncio.create_task(projection.run())
        try:
            async with open_runtime(
                settings, handle, projection.read, patience=PATIENCE, observer=state.tracing
            ) as runtime:
                with state.open(handle, runtime.ledger, runtime.prices), state.folding(projection, folding):
                    async with open_alerts(settings, handle, state):
                        yield System(redis_url, handle, projection, runtime, folding, state)
            await _catch_up(projection, handle)
        finally:
            folding.cancel()
            await asyncio.gather(folding, return_exceptions=True)


async def _catch_up(projection: ProjectionService, handle: LedgerHandle) -> None:
    """Fold what is left, as far as the grace allows; the next start folds the rest."""
    limit_s = max(_MIN_CATCH_UP_S, handle.pipeline.remaining_s - _CLOSING_S)
    try:
        async with asyncio.timeout(limit_s):
            await projection.catch_up()
    except TimeoutError:
        problem = f"not within {limit_s:.1f} s; the next start folds the rest"
        _log.warning("projection.left_behind", problem=problem)


class StoppedWhileOpening(Exception):
    """A signal came before everything was open; nothing was begun."""


@asynccontextmanager
async def ending_at(stop: asyncio.Event) -> AsyncGenerator[None]:
    """End at `stop` what is opened in here, whatever it waits for. Errors: StoppedWhileOpening."""

    async def end() -> None:
        await stop.wait()
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            ending = asyncio.create_task(end())
            try:
                yield
            finally:
                ending.cancel()
    except TimeoutError as exc:
        if not stop.is_set():
            raise
        _log.info("process.stopped_while_opening")
        raise StoppedWhileOpening from exc


async def run_up(
    settings: Settings,
    streams: Sequence[str],
    stop: asyncio.Event,
    announce: Callable[[str, str, str], Awaitable[None]],
    open_gateway: Callable[["System", asyncio.Event], AbstractAsyncContextManager[str]] | None = None,
) -> None:
    """Run everything in this process until `stop`; `announce` as of `run_processes`. Errors: as `open_system`.

    `open_gateway` serves the HTTP gateway for as long as it is open, and yields its address.
    """
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(observe_process(settings, "up"))
        try:
            async with ending_at(stop):
                system = await stack.enter_async_context(open_system(settings, state=state))
        except StoppedWhileOpening:
            return
        # Before anything is announced.
        chosen_streams(streams, system.runtime.rules)
        check_providers(system.runtime.rules, settings)
        gateway = await stack.enter_async_context(open_gateway(system, stop)) if open_gateway else ""
        await announce(system.redis_url, f"{state.url}/metrics, {state.url}/health/ready" if state.url else "", gateway)
        await run_system(system, streams, stop)


async def run_system(system: System, streams: Sequence[str], stop: asyncio.Event) -> None:
    """Work until `stop`, or until the projection ends; calls in flight are finished first.

    Without `streams`, on all of the policy's. Errors: SettingsError for a stream that the policy does not have, and for
    a provider whose key is not set; what ended it.
    """
    system.folding.add_done_callback(lambda _: stop.set())
    with _ends_with(system.handle, system.runtime.settings, stop):
        await _run_worker(system.runtime, streams, stop, redis_url=system.redis_url, state=system.state)
    if system.folding.done():
        await system.folding


@contextmanager
def _ends_with(handle: LedgerHandle, settings: Settings, stop: asyncio.Event) -> Generator[None]:
    """See that no answer of Redis is waited for longer than the grace, counted from `stop`."""

    async def end() -> None:
        await stop.wait()
        handle.pipeline.end_within(max(settings.stop_grace_s - _CLOSING_S, _CLOSING_S))

    ending = asyncio.create_task(end())
    try:
        yield
    finally:
        ending.cancel()


async def _run_worker(
    runtime: InferenceRuntime, streams: Sequence[str], stop: asyncio.Event, *, redis_url: str, state: ProcessState
) -> None:
    chosen = chosen_streams(streams, runtime.rules)
    check_providers(runtime.rules, runtime.settings)
    worker = build_worker(runtime, chosen, runtime.name, observer=state.tracing)
    await serve_worker(runtime, worker, stop, redis_url=redis_url, observer=state, takes_all=not streams)


async def run_projector(settings: Settings, stop: asyncio.Event, *, is_standby: bool = False) -> None:
    """Fold and serve DuckDB until `stop`; where Redis does not answer, from when it does.

    Errors: what stops the fold, and those of `open_system` but for LedgerUnavailable.
    """
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(observe_process(settings, "projector"))
        try:
            async with ending_at(stop):
                redis_url = await stack.enter_async_context(open_redis_url(settings))
                handle, projection = await _enter_projection(stack, settings, redis_url, state, is_standby=is_standby)
        except StoppedWhileOpening:
            return
        _log.info("projector.started", redis_url=hide_password(redis_url))
        folding = asyncio.create_task(projection.run())
        folding.add_done_callback(lambda _: stop.set())
        try:
            ledger = build_ledger(handle, settings, lambda _: projection.read)
            prices = handle.policies.newest.prices
            with (
                state.open(handle, ledger, prices),
                state.folding(projection, folding),
                _ends_with(handle, settings, stop),
            ):
                async with open_alerts(settings, handle, state):
                    await stop.wait()
                await asyncio.sleep(0)  # So that the end is set before anything is closed.
            if folding.done():
                await folding
            await _catch_up(projection, handle)
        finally:
            folding.cancel()
            await asyncio.gather(folding, return_exceptions=True)


async def _enter_projection(
    stack: AsyncExitStack, settings: Settings, redis_url: str, state: ProcessState, *, is_standby: bool
) -> tuple[LedgerHandle, ProjectionService]:
    """Open ledger and projection on the stack, as soon as Redis answers."""
    not_ready = ThrottledWarning("projector.not_ready", now_ms)
    while True:
        if is_standby:
            state.waiting_for = "it is on standby, and folds once the current projector has ended"
        opening = _open_projection(settings, redis_url, state, part="projector", is_standby=is_standby)
        try:
            return await stack.enter_async_context(opening)
        except LedgerUnavailable as exc:
            state.waiting_for = str(exc)
            not_ready.warn(exc)
            await asyncio.sleep(_SERVER_PAUSE_S)


async def run_remote_worker(settings: Settings, streams: Sequence[str], stop: asyncio.Event, *, redis_url: str) -> None:
    """Work until `stop`, with baselines from the projector's process, which also makes the ledger.

    `streams` and errors as of `run_system`.
    """

    async def work(runtime: InferenceRuntime, state: ProcessState) -> None:
        await _run_worker(runtime, streams, stop, redis_url=redis_url, state=state)

    await run_beside_projector(settings, "worker", work, stop, redis_url=redis_url)


async def run_beside_projector(
    settings: Settings,
    part: Part,
    work: Callable[[InferenceRuntime, ProcessState], Awaitable[None]],
    stop: asyncio.Event,
    *,
    redis_url: str,
    max_call_s: float | None = None,
) -> None:
    """Open the ledger and a runtime of these settings, as soon as they can be, and work until `stop`.

    `max_call_s` as of `open_runtime`. Errors: LedgerRefused; SettingsError; what `work` raises.
    """
    try:
        # On a machine without a projector too: charges that the ledger cannot take are noted here.
        await asyncio.to_thread(make_private_folder, settings.data_dir)
    except OSError as exc:
        _log.warning(f"{part}.no_data_directory", problem=str(exc))
    not_ready = ThrottledWarning(f"{part}.not_ready", now_ms)
    async with observe_process(settings, part) as state:
        while not stop.is_set():
            try:
                async with AsyncExitStack() as stack:
                    async with ending_at(stop):
                        opening = open_ledger(settings, redis_url, may_create=False, part=part)
                        handle = await stack.enter_async_context(opening)
                        runtime = await stack.enter_async_context(
                            open_runtime(
                                settings,
                                handle,
                                patience=PATIENCE,
                                observer=state.tracing,
                                max_call_s=max_call_s,
                            )
                        )
                    with state.open(handle, runtime.ledger, runtime.prices), _ends_with(handle, settings, stop):
                        return await work(runtime, state)
            except StoppedWhileOpening:
                return None
            except LedgerUnavailable as exc:
                state.waiting_for = str(exc)
                not_ready.warn(exc)
                await pause(stop, _SERVER_PAUSE_S)
    return None


async def run_processes(
    settings: Settings,
    streams: Sequence[str],
    workers: int,
    stop: asyncio.Event,
    announce: Callable[[str, str, str], Awaitable[None]],
    gateway: tuple[Child, str] | None = None,
) -> None:
    """Run server, projector and workers as processes of their own until `stop`; `gateway` with its address too.

    `announce` is awaited with the URL of Redis, the addresses of their metrics, and that of the gateway.

    Errors: SettingsError; EmbeddedServerError; PolicyDiffers.
    """
    ports = ports_of_processes(settings, workers + (1 if gateway is None else 2))
    async with open_redis_url(settings) as redis_url, announced_endpoint(settings, redis_url):
        await _settle_policy(settings, redis_url)
        environment = dict(os.environ) | {
            "REDIS_URL": redis_url,
            "OPENROUTER_BASE_URL": settings.openrouter_base_url,
            "TOLLBOOK_DIALECT": settings.dialect,
            "TOLLBOOK_STAND_IN_URL": settings.stand_in_url or "",
        }
        children = [Child("projector", ("projector",), port_setting(ports[0]))]
        named = ("--streams", ",".join(streams)) if streams else ()
        children += [
            Child(f"worker {number}", ("worker", *named), port_setting(ports[number]))
            for number in range(1, workers + 1)
        ]
        if gateway is not None:
            child = gateway[0]
            children.append(replace(child, environment={**child.environment, **port_setting(ports[-1])}))
        described = describe_ports(settings, ports, has_gateway=gateway is not None)
        await announce(redis_url, described, "" if gateway is None else gateway[1])
        await Supervisor(children, environment, stop_timeout_s=settings.stop_grace_s + _KILLED_AFTER_S).run(stop)


async def _settle_policy(settings: Settings, redis_url: str) -> None:
    """Bring the ledger's policy and this process's own together before there are children, as the projector would.

    A ledger that is not there yet, not this directory's, or went back in time, is left to the projector.
    Errors: as `start_policy`.
    """
    expected_id = await asyncio.to_thread(_ledger_id_on_disk, settings)
    try:
        async with open_ledger(settings, redis_url, expected_id=expected_id, may_create=False, part="up") as handle:
            gates = build_gates(handle, settings)
            # The projector has not looked yet: nothing may be appended to a ledger that went back in time.
            heads = await asyncio.to_thread(heads_on_disk, settings, handle.ledger_id, len(gates))
            for gate in gates:
                gate.see(heads[gate.keys.partition])  # G8
            await start_policy(settings, gates, "tollbook up", read_spent=_spent_reader(settings, handle))
            await handle.policies.refresh()
            check_providers(handle.policy, settings)
    except (LedgerUnavailable, LedgerReplaced, LedgerWentBack):
        return


def _spent_reader(settings: Settings, handle: LedgerHandle) -> ReadSpent:
    archive = archive_of(settings)
    return spent_reader(LedgerSource(handle.ledger_id, tuple(handle.keys), archive, handle.redis))


def _ledger_id_on_disk(settings: Settings) -> str | None:
    return stored_ledger_id(settings.projection_path) or archive_of(settings).ledger_id()


@asynccontextmanager
async def _open_projection(
    settings: Settings, redis_url: str, state: ProcessState, *, part: Part, is_standby: bool = False
) -> AsyncGenerator[tuple[LedgerHandle, ProjectionService]]:
    """Open ledger and projection, and announce them to the other commands on this machine."""
    expected_id, may_create = None, True
    try:
        # What is on disk says which ledger belongs here: an emptied Redis must not get a new one beside it.
        expected_id = await asyncio.to_thread(_ledger_id_on_disk, settings)
    except StoreLocked:
        if not is_standby:
            raise
        may_create = False  # The projector that has the file open has created the ledger.
    opening = open_ledger(settings, redis_url, expected_id=expected_id, may_create=may_create, part=part)
    async with opening as handle:
        await check_permissions(handle.pipeline, handle.keys, is_projector=True)
        async with (
            open_projection(settings, handle, is_standby=is_standby, on_waiting=state.wait) as projection,
            announced_endpoint(settings, redis_url),
        ):
            await start_policy(
                settings, build_gates(handle, settings), f"tollbook {part}", read_spent=_spent_reader(settings, handle)
            )
            await handle.policies.refresh()
            if handle.user_ids.is_hashed:
                await asyncio.to_thread(keep_key_copy, settings.data_dir, handle.ledger_id, handle.user_key)
            # One process of a ledger counts what publishers drop from the task streams.
            counting = asyncio.create_task(
                DroppedTasks(handle.pipeline, settings.namespace, lambda: tuple(handle.policy.streams)).run()
            )
            following = asyncio.create_task(_follow_policy(handle))
            try:
                yield handle, projection
            finally:
                for task in (counting, following):
                    task.cancel()
                await asyncio.gather(counting, following, return_exceptions=True)


async def _follow_policy(handle: LedgerHandle) -> None:
    """Read the policy again and again: a projector makes no calls, and would hear of no change."""
    while True:
        await asyncio.sleep(_POLICY_S)
        try:
            await handle.policies.refresh()
        except LedgerError as exc:
            _log.debug("policy.not_read", problem=str(exc))


@asynccontextmanager
async def announced_endpoint(settings: Settings, redis_url: str) -> AsyncGenerator[None]:
    """Announce the address of Redis to the other commands on this machine, unless a parent process has."""
    if await asyncio.to_thread(read_endpoint, settings.data_dir) is not None:
        yield
        return
    endpoint = Endpoint(
        redis_url=redis_url,
        namespace=settings.namespace,
        provider_url=settings.openrouter_base_url,
        stand_in_url=settings.stand_in_url,
        pid=os.getpid(),
        started_at=datetime.now(UTC),
    )
    write_endpoint(settings.data_dir, endpoint)
    try:
        yield
    finally:
        clear_endpoint(settings.data_dir)
