"""The projector's service: lease, DuckDB file, baseline answers and fold; reopens the file when it is lost.

DuckDB is derived data. A file that is deleted, truncated, damaged or changed by hand is set aside and rebuilt from
the ledger; until the new file has caught up, calls whose baseline is missing fail closed (G8). If the disk or the
memory is full, the service waits. A problem that a person must decide (another ledger, a ledger older than the fold,
an unreadable event) ends the projection and stops the calls of all workers. The only events that the service causes
are those of sealing and of expired credits.
"""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import structlog

from tollbook.consumers.alert_tidying import AlertTidying
from tollbook.consumers.archived_events import fold_archived
from tollbook.consumers.baseline_answers import BaselineAnswers
from tollbook.consumers.call_stops import CallStops
from tollbook.consumers.credit_expiry import CreditExpiry
from tollbook.consumers.published_copy import published_copy
from tollbook.consumers.sealers import build_sealers
from tollbook.consumers.standby import Standby
from tollbook.inference.archive_place import archive_of
from tollbook.inference.process_name import process_name
from tollbook.inference.runtime import LedgerHandle, build_gates
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.storage_errors import ArchiveUnavailable
from tollbook.ledger.errors import BaselineUnavailable, LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.projection.database import set_aside
from tollbook.ledger.projection.file_checks import CHECK_EVERY_S, check_forever, open_checked, watch_file
from tollbook.ledger.projection.lease import Lease
from tollbook.ledger.projection.projector import Projector, ProjectorSettings
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreChanged, StoreFailed, StoreOutOfMemory
from tollbook.schemas.identifiers import EntryId

_FIRST_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 30.0
_CATCH_UP_LIMIT_S: Final = 10.0
# A projection that stayed open for this long counts as healthy.
_STABLE_S: Final = 10.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Projection:
    """An opened projection: the file and its fold."""

    store: Store
    projector: Projector

    async def read(self, names: Sequence[str], /) -> BaselinePage:
        """Read baselines in this process, off the event loop."""
        return await asyncio.to_thread(self.store.baselines, names)


class ProjectionService:
    """Keeps the projection of one ledger open and folding."""

    def __init__(
        self,
        settings: Settings,
        handle: LedgerHandle,
        *,
        now: Callable[[], datetime] | None = None,
        check_every_s: float = CHECK_EVERY_S,
    ) -> None:
        self._check_every_s = check_every_s
        self._settings = settings
        self._handle = handle
        self._now = now or (lambda: datetime.now(UTC))
        self._path = settings.projection_path
        self._archive = archive_of(settings)
        self._copy = published_copy(settings, self._positions)
        self._opened: Projection | None = None
        self._refusal: LedgerRefused | None = None
        # Why the file is not open now; the readiness check shows it.
        self._problem: StoreFailed | LedgerUnavailable | None = None
        self._parts = AsyncExitStack()
        place = f"{socket.gethostname()}:{self._path.resolve()}"
        self._lease = Lease(handle.pipeline, namespace=settings.namespace, owner=process_name(), place=place)
        self._calls = CallStops(handle, self._lease, self._path.parent)
        self._answers = BaselineAnswers(handle.redis, handle.keys, self.read, ledger_id=handle.ledger_id)

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

    async def read(self, names: Sequence[str], /) -> BaselinePage:
        """Read baselines.

        Errors: BaselineUnavailable, also while the file is being reopened; the LedgerRefused that ended the fold.
        """
        if self._refusal is not None:
            raise self._refusal
        return await self._current().read(names)

    async def start(self, *, is_standby: bool = False, on_waiting: Callable[[str], None] = lambda _: None) -> None:
        """Take the lease and open the projection; with `is_standby`, wait for the lease and fold into an own file.

        If DuckDB lacks memory, `start` waits, since a process that ends would only be restarted; `on_waiting` gets the
        reason.

        Errors: ProjectorRunning; StoreLocked; LedgerMismatch; WrongPartitions; StoreFailed; LedgerUnavailable;
            LedgerReplaced, LedgerAhead or LedgerRewritten if the file does not fit the ledger as it is now;
            ArchiveRefused.
        """
        await self._check_archive_access()
        if is_standby:
            await Standby(self._settings, self._handle, self._lease, self._archive, self._now).wait()
        try:
            await self._open_with_memory(on_waiting)
            # Answers run until `stop`, also while the file is being reopened: askers are then told the reason.
            await self._answers.start()
        except BaseException:
            await self.stop()
            raise

    async def _check_archive_access(self) -> None:
        """Check first for wrong settings of the archive. Errors: ArchiveRefused."""
        try:
            await asyncio.to_thread(self._archive.check_access)
        except (ArchiveUnavailable, OSError) as exc:
            _log.warning("archive.not_reached", problem=str(exc))

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
        """Fold until cancelled.

        Errors: a LedgerRefused that a person must decide; ProjectorRunning if another projector has taken over.
        """
        parts = [
            self._fold_forever(),
            self._lease.keep(),
            self._calls.resume_forever(lambda: self.projector),
            self._expire_credits(),
            self._tidy_alerts(),
            *([self._copy.run()] if self._copy else ()),
            *(sealer.run() for sealer in build_sealers(self._settings, self._handle, lambda: self.store)),
        ]
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        except Exception as exc:
            if isinstance(exc, LedgerRefused):
                self._refusal = exc
            await self._calls.stop(exc, self._opened.store if self._opened else None)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tidy_alerts(self) -> None:
        gates = build_gates(self._handle, self._settings)
        await AlertTidying(gates, keep_s=self._settings.idempotency_ttl_s).run()

    async def _expire_credits(self) -> None:
        gates = build_gates(self._handle, self._settings)
        await CreditExpiry(gates, self._handle.policies, lambda: self.store).run()

    async def catch_up(self) -> None:
        """Fold the last events, so that DuckDB shows them after the stop; the next start folds the rest."""
        try:
            async with asyncio.timeout(_CATCH_UP_LIMIT_S):
                await self.projector.catch_up()
        except Exception as exc:  # noqa: BLE001 - no fault of the projection may keep the system from stopping.
            _log.warning("projection.left_behind", problem=str(exc) or type(exc).__name__)

    async def stop(self) -> None:
        """Close the file and release the lease."""
        await self._answers.stop()
        await self._close()
        await self._lease.release()

    def _positions(self) -> dict[int, Position]:
        """Return the folded position of each partition. Errors: BaselineUnavailable. Blocks."""
        return {keys.partition: self.store.position(keys.partition) for keys in self._handle.keys}

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
            # A file that folds but cannot be read, or is lost again at once, is treated like one that cannot fold.
            is_stuck = not opened.projector.has_folded or time.monotonic() - opened_at < _STABLE_S
            _log.error("projection.lost", problem=str(problem))
            self._problem = problem
            await self._close()
            if isinstance(problem, StoreChanged) or (is_stuck and has_failed and not problem.is_recoverable):
                await asyncio.to_thread(set_aside, self._path, self._now())
            has_failed, pause_s = is_stuck, min(2 * pause_s, _MAX_PAUSE_S) if is_stuck else _FIRST_PAUSE_S
            await self._reopen(pause_s)

    async def _fold_until_lost(self, opened: Projection) -> StoreFailed:
        """Fold until the file fails; return the failure. Errors: any other exception that stops the fold."""
        folding = asyncio.create_task(opened.projector.run())
        watching = asyncio.create_task(watch_file(opened.store, self._path))
        checking = asyncio.create_task(check_forever(opened.store, every_s=self._check_every_s))
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

    async def _open(self) -> None:
        """Errors: StoreLocked; LedgerMismatch; WrongPartitions; StoreFailed; as `Projector.check`."""
        settings, handle = self._settings, self._handle
        async with AsyncExitStack() as parts:
            store = await asyncio.to_thread(
                open_checked,
                self._path,
                handle.ledger_id,
                len(handle.keys),
                memory_limit=settings.duckdb_memory,
                now=self._now,
            )
            parts.push_async_callback(asyncio.to_thread, store.close)
            await self._calls.identify()
            gates = build_gates(handle, settings)

            def trim(partition: int, watermark: EntryId, budgets: Sequence[str]) -> Awaitable[object]:
                gates[partition].see(watermark)  # It was folded, so it must be there (G8).
                return gates[partition].trim(watermark, budgets)

            projector = Projector(
                store,
                handle.redis,
                handle.keys,
                trim=trim,
                pipeline=handle.pipeline,
                settings=ProjectorSettings(tail_keep_ms=round(1000 * settings.tail_keep_s)),
            )
            try:
                await self._check(store, projector)
            except Exception as exc:
                await self._calls.stop(exc, store, is_alone=True)
                raise
            self._parts = parts.pop_all()
        self._opened, self._problem = Projection(store, projector), None

    async def _check(self, store: Store, projector: Projector) -> None:
        """Check that file, archive and ledger agree, before anything is served or written, and take the lease.

        Errors: ProjectorRunning; ArchiveDamaged; LedgerGap; as `Projector.check`.
        """
        await fold_archived(store, self._archive, self._handle)
        # Only one process can open the file, so there is no need to wait for the lease of a projector that died here.
        await self._lease.take(is_alone=True)
        await projector.check()
        await self._calls.claim()

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
    """Open DuckDB and answer requests for baselines; `run` folds. Errors: as `ProjectionService.start`."""
    service = ProjectionService(settings, handle)
    await service.start(is_standby=is_standby, on_waiting=on_waiting)
    try:
        yield service
    finally:
        await service.stop()
