"""A projector on standby: a file of its own follows the ledger, so that it takes over within seconds.

It trims and seals nothing, answers nobody and appends no event, until it has the lease. All that it writes to Redis is
the mark by which replicas are waited for, where they are (ledger/server/replication.py).
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
    """Waits for the lease, and follows meanwhile."""

    settings: Settings
    handle: LedgerHandle
    lease: Lease
    archive: Archive
    now: Callable[[], datetime]

    async def wait(self) -> None:
        """Return with the lease, and the file closed."""
        following: list[asyncio.Task[None]] = []

        def on_held(holder: ProjectorRunning) -> None:
            # At the same place the file is the running projector's own.
            if not following and holder.place != self.lease.place:
                following.append(asyncio.create_task(self._follow_forever()))

        try:
            await self.lease.wait(on_held)
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    async def _follow_forever(self) -> None:
        """Follow until cancelled, or until the file is seen not to be of the ledger as it is."""
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
            projector = Projector(store, handle.redis, handle.keys, trim=_leave_alone, pipeline=handle.pipeline)
            await projector.check()
            _log.info("standby.following", path=str(settings.projection_path))
            in_step = asyncio.create_task(_say_in_step(projector))
            try:
                await projector.run()
            finally:
                in_step.cancel()
                await asyncio.gather(in_step, return_exceptions=True)
        finally:
            # Whoever has the lease opens the file next.
            await asyncio.wait([opening])
            if opening.exception() is None:
                await asyncio.to_thread(opening.result().close)


async def _say_in_step(projector: Projector) -> None:
    """Log once that all which stood on the ledger is folded: from here on a takeover takes seconds."""
    await projector.catch_up()
    _log.info("standby.in_step")


async def _leave_alone(*_: Any) -> None:
    """Trim no tail: the running projector may not have folded it."""
