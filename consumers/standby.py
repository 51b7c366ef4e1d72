"""A standby projector: it folds the ledger into its own file, so that it can take over within seconds.

Until it has the lease, it trims and seals nothing, answers no requests and appends no event. The only thing that it
writes to Redis is the mark for waiting for replicas, if there are replicas (ledger/server/replication.py).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog

from tollbook.consumers.archived_events import fold_archived
from tollbook.inference.runtime import LedgerHandle
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.errors import LedgerError, LedgerRefused
from tollbook.ledger.projection.file_checks import open_checked
from tollbook.ledger.projection.lease import Lease, ProjectorRunning
from tollbook.ledger.projection.projector import Projector

_PAUSE_S: Final = 5.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Standby:
    """Waits for the lease, and follows the ledger meanwhile."""

    settings: Settings
    handle: LedgerHandle
    lease: Lease
    archive: Archive
    now: Callable[[], datetime]

    async def wait(self) -> None:
        """Return once this process has the lease; the file is closed then."""
        following: list[asyncio.Task[None]] = []

        def on_held(holder: ProjectorRunning) -> None:
            # With the same place, the file is the running projector's.
            if not following and holder.place != self.lease.place:
                following.append(asyncio.create_task(self._follow_forever()))

        try:
            await self.lease.wait(on_held)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def _follow_forever(self) -> None:
        """Follow until cancelled, or until the ledger is refused, for example because the file is of another ledger."""
        while True:
            try:
                await self._follow()
            except LedgerRefused as exc:
                _log.error("standby.stopped_following", problem=str(exc))
                return
            except (LedgerError, OSError) as exc:
                _log.warning("standby.interrupted", problem=str(exc))
            await asyncio.sleep(_PAUSE_S)

    async def _follow(self) -> None:
        settings, handle = self.settings, self.handle
        opening = asyncio.ensure_future(
            asyncio.to_thread(
                open_checked,
                settings.projection_path,
                handle.ledger_id,
                len(handle.keys),
                memory_limit=settings.duckdb_memory,
                now=self.now,
            )
        )
        try:
            store = await asyncio.shield(opening)
            await fold_archived(store, self.archive, handle)
            projector = Projector(store, handle.redis, handle.keys, trim=_trim_nothing, pipeline=handle.pipeline)
            await projector.check()
            _log.info("standby.following", path=str(settings.projection_path))
            in_step = asyncio.create_task(_log_in_step(projector))
            try:
                await projector.run()
            finally:
                in_step.cancel()
                await asyncio.gather(in_step, return_exceptions=True)
        finally:
            # The file must be closed: it is opened again once the lease is taken.
            await asyncio.wait([opening])
            if opening.exception() is None:
                await asyncio.to_thread(opening.result().close)


async def _log_in_step(projector: Projector) -> None:
    """Log once that the file has caught up with the ledger: from now on a takeover takes seconds."""
    await projector.catch_up()
    _log.info("standby.in_step")


async def _trim_nothing(*_: Any) -> None:
    """Trim no tail: the running projector may not have folded it yet."""
