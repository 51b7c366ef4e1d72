"""The projector's service: lease, DuckDB file, server and fold; reopened when the file is lost.

DuckDB is derived data. A file that is deleted, truncated, damaged or changed by hand is set aside and rebuilt from
the ledger; until it has caught up, calls whose baseline it does not have yet fail closed (G8). It is checked before
anybody reads it, and from time to time. With a full disk it waits for room. What a person must decide (another ledger,
a ledger older than the fold, an unreadable event) ends the projection and stops calls wherever workers run, until a
projector has found the stores in order.
"""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import duckdb
import structlog
from redis.exceptions import RedisError

from tollbook.inference.runtime import LedgerHandle, build_gates, process_name
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.replay import fold_archive
from tollbook.ledger.archive.sealing import Sealer, SealingSettings
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.errors import BaselineUnavailable, LedgerError, LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.gate.stops import CallSwitch, ProjectorFenced, read_stop
from tollbook.ledger.keys import Keys
from tollbook.ledger.private_files import read_private, write_private
from tollbook.ledger.projection.database import StoreChanged, StoreFailed, StoreOutOfMemory, set_aside
from tollbook.ledger.projection.lease import Lease, ProjectorRunning
from tollbook.ledger.projection.projector import Projector, ProjectorSettings
from tollbook.ledger.projection.quack import QuackServer, QuackUnavailable
from tollbook.ledger.projection.store import Store
from tollbook.schemas.identifiers import EntryId

_WATCH_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 30.0
_CATCH_UP_LIMIT_S: Final = 10.0
# A check of the file takes about a second for a million events; at most one part in fifty of the time is spent on it.
_CHECK_EVERY_S: Final = 60.0
_CHECK_SHARE: Final = 50
# A projection that was open for this long was in order.
_STABLE_S: Final = 10.0
_STOP_TRIES: Final = 10
_STOP_PAUSE_S: Final = 0.5
_RESUME_S: Final = 1.0
_DATA_ID_FILE: Final = "projection.id"
# What ends a projector and is no matter of the ledger: another one works, or this machine has no room or no answer.
_OPERATIONAL: Final = (
    ProjectorRunning,
    ProjectorFenced,
    LedgerUnavailable,
    StoreFailed,
    QuackUnavailable,
    OSError,
    MemoryError,
    duckdb.Error,
)
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Projection:
    """An opened projection: the file, its fold, and where other processes read it."""

    store: Store
    projector: Projector
    quack_url: str

    async def read(self, names: Sequence[str], /) -> BaselinePage:
        """Read baselines in this process, off the event loop."""
        return await asyncio.to_thread(self.store.baselines, names)


def duckdb_path(settings: Settings) -> Path:
    """Return where the projection is."""
    return settings.projection_path


class ProjectionService:
    """Keeps the projection of one ledger open and folding."""

    def __init__(
        self,
        settings: Settings,
        handle: LedgerHandle,
        *,
        now: Callable[[], datetime] | None = None,
        check_every_s: float = _CHECK_EVERY_S,
    ) -> None:
        self._check_every_s = check_every_s
        self._settings = settings
        self._handle = handle
        self._now = now or (lambda: datetime.now(UTC))
        self._path = duckdb_path(settings)
        self._archive = Archive(settings.archive_path)
        self._opened: Projection | None = None
        self._refusal: LedgerRefused | None = None
        # Why it is not open now; readiness shows it.
        self._problem: StoreFailed | LedgerUnavailable | None = None
        self._parts = AsyncExitStack()
        place = f"{socket.gethostname()}:{self._path.resolve()}"
        self._lease = Lease(handle.pipeline, namespace=settings.namespace, owner=process_name(), place=place)
        self._data_id = place

    @property
    def store(self) -> Store:
        """The file that is open now. Errors: BaselineUnavailable."""
        return self._current().store

    @property
    def problem(self) -> str | None:
        """Why the file is not open now; None while it is."""
        return None if self._problem is None else str(self._problem)

    @property
    def projector(self) -> Projector:
        """The fold that runs now. Errors: BaselineUnavailable."""
        return self._current().projector

    @property
    def quack_url(self) -> str:
        """Where other processes read it now. Errors: BaselineUnavailable."""
        return self._current().quack_url

    async def read(self, names: Sequence[str], /) -> BaselinePage:
        """Read baselines.

        Errors: BaselineUnavailable, also while the file is being reopened; the LedgerRefused that ended the fold.
        """
        if self._refusal is not None:
            raise self._refusal
        return await self._current().read(names)

    async def start(self, *, is_standby: bool = False, on_waiting: Callable[[str], None] = lambda _: None) -> None:
        """Take the lease and open the projection; `is_standby` waits for the lease.

        Without memory for DuckDB it waits: a process that ends would only be started again. `on_waiting` is told why.

        Errors: ProjectorRunning; StoreLocked; LedgerMismatch; WrongPartitions; StoreFailed; LedgerUnavailable;
            LedgerReplaced, LedgerAhead or LedgerRewritten where the file is not of the ledger as it is now.
        """
        if is_standby:
            await self._lease.wait()
        try:
            await self._open_with_memory(on_waiting)
        except BaseException:
            await self.stop()
            raise

    async def _open_with_memory(self, on_waiting: Callable[[str], None]) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._open()
            except StoreOutOfMemory as exc:
                _log.error("projection.not_opened", problem=str(exc))
                on_waiting(f"it waits for memory: {exc}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def run(self) -> None:
        """Fold until cancelled. Errors: what a person must decide; ProjectorRunning when another has taken over."""
        parts = [
            self._fold_forever(),
            self._lease.keep(),
            self._resume_calls(),
            *(sealer.run() for sealer in self.sealers()),
        ]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        except Exception as exc:
            if isinstance(exc, LedgerRefused):
                self._refusal = exc
            await self._stop_calls(exc, self._opened.store if self._opened else None)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def sealers(self) -> list[Sealer]:
        """Return what seals the partitions into the archive."""
        handle, settings = self._handle, self._settings
        limits = SealingSettings(
            segment_events=settings.segment_events,
            segment_age_s=settings.segment_age_s,
            keep_s=settings.stream_keep_s,
            keep_events=settings.stream_keep_events,
        )

        def make(keys: Keys) -> Sealer:
            async def folded() -> Position:
                return await asyncio.to_thread(self.store.position, keys.partition)

            return Sealer(
                handle.redis,
                handle.pipeline,
                keys,
                self._archive,
                ledger_id=handle.ledger_id,
                settings=limits,
                folded=folded,
            )

        return [make(keys) for keys in handle.keys]

    async def catch_up(self) -> None:
        """Fold what the last calls wrote, so that DuckDB shows it after the stop; the next start folds what is left."""
        try:
            async with asyncio.timeout(_CATCH_UP_LIMIT_S):
                await self.projector.catch_up()
        except Exception as exc:  # noqa: BLE001 - no fault of the projection may keep the system from stopping.
            _log.warning("projection.left_behind", problem=str(exc) or type(exc).__name__)

    async def stop(self) -> None:
        """Close the file and release the lease."""
        await self._close()
        await self._lease.release()

    def _current(self) -> Projection:
        if self._opened is None:
            reason = f" ({self._problem})" if self._problem else ""
            raise BaselineUnavailable(f"the projection in DuckDB is being reopened; try again later{reason}")
        return self._opened

    async def _fold_forever(self) -> None:
        has_failed, pause_s = False, _FIRST_PAUSE_S
        while True:
            opened, opened_at = self._current(), time.monotonic()
            problem = await self._fold_until_lost(opened)
            # A file that folds but cannot be read, or is lost again at once, is no better than one that cannot fold.
            is_stuck = not opened.projector.has_folded or time.monotonic() - opened_at < _STABLE_S
            _log.error("projection.lost", problem=str(problem))
            self._problem = problem
            await self._close()
            if isinstance(problem, StoreChanged) or (is_stuck and has_failed and not problem.is_recoverable):
                await asyncio.to_thread(set_aside, self._path, self._now())
            has_failed, pause_s = is_stuck, min(2 * pause_s, _MAX_PAUSE_S) if is_stuck else _FIRST_PAUSE_S
            await self._reopen(pause_s)

    async def _fold_until_lost(self, opened: Projection) -> StoreFailed:
        """Fold until the file fails; return what is wrong with it. Errors: whatever else stops the fold."""
        folding = asyncio.create_task(opened.projector.run())
        watching = asyncio.create_task(self._watch(opened.store))
        checking = asyncio.create_task(self._check_again(opened.store))
        tasks = (folding, watching, checking)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task in done:
                    await task
        except StoreFailed as exc:
            return exc
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise AssertionError("neither the fold nor the watch ends by itself")

    async def _check_again(self, store: Store) -> None:
        """Recompute the file's balances from its events from time to time. Errors: StoreFailed."""
        pause_s = self._check_every_s
        while True:
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            try:
                await asyncio.to_thread(store.check)  # G8
            except BaselineUnavailable as exc:
                raise StoreFailed(str(exc)) from exc
            took_s = time.monotonic() - began
            _log.debug("projection.checked", seconds=round(took_s, 3))
            pause_s = max(self._check_every_s, _CHECK_SHARE * took_s)

    async def _watch(self, store: Store) -> None:
        """Errors: StoreFailed when the file is gone, replaced, or cannot be read."""
        file = await asyncio.to_thread(_identity, self._path)
        while True:
            await asyncio.sleep(_WATCH_S)
            if await asyncio.to_thread(_identity, self._path) != file:
                raise StoreFailed(f"{self._path} was deleted or replaced while it was open")
            try:
                await asyncio.to_thread(store.baselines, [f"user:{time.monotonic()}:none"])
            except (BaselineUnavailable, duckdb.Error) as exc:
                raise StoreFailed(f"{self._path} cannot be read: {exc}") from exc

    async def _open(self) -> None:
        """Errors: StoreLocked; LedgerMismatch; WrongPartitions; StoreFailed; QuackUnavailable; as `Projector.check`."""
        settings, handle = self._settings, self._handle
        async with AsyncExitStack() as parts:
            store = await asyncio.to_thread(self._open_checked)
            parts.push_async_callback(asyncio.to_thread, store.close)
            self._data_id = await asyncio.to_thread(_data_id, self._path.parent, self._lease.owner)
            gates = build_gates(handle, settings)

            def trim(partition: int, watermark: EntryId, budgets: Sequence[str]) -> Awaitable[object]:
                gates[partition].see(watermark)  # It was folded, so it must be there (G8).
                return gates[partition].trim(watermark, budgets)

            projector = Projector(
                store,
                handle.redis,
                handle.keys,
                trim=trim,
                settings=ProjectorSettings(tail_keep_ms=round(1000 * settings.tail_keep_s)),
            )
            try:
                await self._check(store, projector)
            except Exception as exc:
                await self._stop_calls(exc, store, is_alone=True)
                raise
            server = await asyncio.to_thread(QuackServer.start, store, settings.data_dir, port=settings.quack_port or 0)
            parts.push_async_callback(asyncio.to_thread, server.stop)
            self._parts = parts.pop_all()
        self._opened, self._problem = Projection(store, projector, server.uri), None

    async def _check(self, store: Store, projector: Projector) -> None:
        """See that file, archive and ledger agree, before anything is served or written, and take the lease.

        Errors: ProjectorRunning; ArchiveDamaged; LedgerGap; as `Projector.check`.
        """
        for keys in self._handle.keys:
            # What was trimmed off the stream is folded from the archive first.
            await asyncio.to_thread(fold_archive, store, self._archive, keys.partition)
        # Only one process can open the file, so the lease of a projector that died here need not be waited for.
        await self._lease.take(is_alone=True)
        await projector.check()
        await self._say(lambda switch: switch.claim())

    async def _say(self, say: Callable[[CallSwitch], Awaitable[object]], *, is_alone: bool = False) -> None:
        """Say something of calls in every partition, as the owner of the lease; `is_alone` as in `Lease.take`.

        Errors: ProjectorRunning and ProjectorFenced where another has the lease; as `CallSwitch`.
        """
        handle, lease = self._handle, self._lease
        await lease.take(is_alone=is_alone)
        for keys in handle.keys:

            def switch(keys: Keys = keys) -> CallSwitch:
                return CallSwitch(
                    handle.pipeline,
                    keys,
                    handle.ledger_id,
                    projector=lease.owner,
                    epoch=lease.epoch,
                    place=self._data_id,
                )

            try:
                await say(switch())
            except ProjectorFenced as exc:
                # Another has the lease now, and that is said here; or the clock of Redis was put back since the last.
                await lease.take(is_alone=is_alone, min_epoch=exc.epoch + 1)
                await say(switch())

    async def _stop_calls(self, problem: Exception, store: Store | None, *, is_alone: bool = False) -> None:
        """Let no call begin anywhere while nothing is folded for this reason, if a person must look at it (G8).

        `is_alone` as in `Lease.take`: whoever has lost the lease says nothing of calls.
        """
        if isinstance(problem, _OPERATIONAL):
            return
        reason = f"the projector has stopped: {str(problem) or type(problem).__name__}"
        positions = await asyncio.to_thread(_positions, store)
        for _ in range(_STOP_TRIES):
            try:
                await load_library(self._handle.redis)  # Redis may have been put back without it.
                await self._say(
                    lambda switch: switch.stop(reason, positions.get(switch.keys.partition, Position()).entry),  # G8
                    is_alone=is_alone,
                )
            except LedgerUnavailable as exc:
                _log.warning("calls.not_stopped", problem=str(exc))
                await asyncio.sleep(_STOP_PAUSE_S)
            except (LedgerError, RedisError) as exc:
                # Another projector has the lease, or Redis holds another ledger, whose calls are not ours to stop.
                _log.warning("calls.not_stopped", problem=str(exc))
                return
            else:
                _log.error("calls.stopped", reason=reason)
                return

    async def _resume_calls(self) -> None:
        """Let calls begin again that were stopped, once all is folded that was there when this was looked at.

        Errors: ProjectorRunning; ProjectorFenced.
        """
        problem = ""
        while True:
            try:
                await self._resume_stopped()
                problem = ""
            except (ProjectorRunning, ProjectorFenced):
                raise
            except (LedgerError, RedisError) as exc:
                # What is wrong with the fold ends the fold. Until that is mended, calls stay stopped.
                if problem != (problem := str(exc)):
                    _log.warning("calls.not_resumed", problem=problem)
            await asyncio.sleep(_RESUME_S)

    async def _resume_stopped(self) -> None:
        reason = await read_stop(self._handle.pipeline, self._handle.keys)
        if reason is None:
            return
        projector = self.projector
        await self._say(lambda switch: switch.claim())
        heads = await projector.heads()
        for partition, head in heads.items():
            await projector.wait_for(partition, head)
        await self._say(lambda switch: switch.resume(heads[switch.keys.partition]))  # G8
        _log.info("calls.resumed", reason=reason)

    def _open_checked(self) -> Store:
        """Open the file and check it before anybody reads it; one that was changed is set aside. Blocks."""
        ledger_id, partitions = self._handle.ledger_id, len(self._handle.keys)
        opening = partial(Store.open, self._path, ledger_id, partitions, memory_limit=self._settings.duckdb_memory)
        store = opening()
        try:
            store.check()  # G8
        except StoreFailed as exc:
            store.close()
            if exc.is_recoverable:
                raise
            _log.error("projection.changed", problem=str(exc))
            set_aside(self._path, self._now())
            return opening()
        except BaseException:
            store.close()
            raise
        return store

    async def _reopen(self, pause_s: float) -> None:
        while True:
            await asyncio.sleep(pause_s)
            try:
                return await self._open()
            except (StoreFailed, LedgerUnavailable) as exc:
                self._problem = exc
                _log.error("projection.not_opened", problem=str(exc))
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _close(self) -> None:
        self._opened = None
        try:
            await self._parts.aclose()
        except Exception as exc:  # noqa: BLE001 - a lost file may fail to close, too.
            _log.warning("projection.close_failed", problem=str(exc))


@asynccontextmanager
async def open_projection(
    settings: Settings,
    handle: LedgerHandle,
    *,
    is_standby: bool = False,
    on_waiting: Callable[[str], None] = lambda _: None,
) -> AsyncGenerator[ProjectionService]:
    """Open DuckDB, serve it to other processes; `run` folds. Errors: as `ProjectionService.start`."""
    service = ProjectionService(settings, handle)
    await service.start(is_standby=is_standby, on_waiting=on_waiting)
    try:
        yield service
    finally:
        await service.stop()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _positions(store: Store | None) -> Mapping[int, Position]:
    """Return what is folded; nothing where the file cannot be read."""
    try:
        return store.baselines(()).positions if store is not None else {}
    except LedgerError:
        return {}


def _data_id(folder: Path, new_id: str) -> str:
    """Return the name of a data directory, which it keeps on another host, too: a new container has a new name."""
    path = folder / _DATA_ID_FILE
    try:
        return read_private(path)
    except FileNotFoundError:
        write_private(path, new_id)
        return new_id
