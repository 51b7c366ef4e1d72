"""The copy of the projection that analysts elsewhere read: published to an object store at intervals.

It is a whole DuckDB file of one moment, which takes the place of the one before in a single step. It is no backup and
no part of the ledger: a fault here never stops a call, and the next interval tries again.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from tollbook.inference.settings import Settings
from tollbook.ledger.archive.storage import ObjectStore, open_object_store
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.projection.snapshot import snapshot_file

_log = structlog.get_logger(__name__)


class PublishedCopy:
    """Publishes the projection at `path`; `positions` returns up to where its partitions are folded."""

    def __init__(
        self,
        path: Path,
        store: ObjectStore,
        name: str,
        *,
        every_s: float,
        positions: Callable[[], dict[int, Position]],
    ) -> None:
        self._path = path
        self._store = store
        self._name = name
        self._every_s = every_s
        self._positions = positions
        self._published: dict[int, Position] | None = None

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            try:
                await self.publish()
            except (LedgerError, OSError) as exc:
                _log.warning("copy.postponed", problem=str(exc))
            except Exception:  # noqa: BLE001 - whatever it is, the projector goes on: else calls would stop.
                _log.exception("copy.failed")
            await asyncio.sleep(self._every_s)

    async def publish(self) -> bool:
        """Publish a copy, unless the last one has the same events; return whether one was published.

        Errors: LedgerUnavailable; ArchiveUnavailable; ArchiveRefused; OSError.
        """
        positions = await asyncio.to_thread(self._positions)
        if positions == self._published:
            return False
        size = await asyncio.to_thread(self._copy)
        self._published = positions
        _log.info("copy.published", place=self._store.located(self._name), bytes=size)
        return True

    def _copy(self) -> int:
        with snapshot_file(self._path) as copy:
            self._store.replace(self._name, copy)
            return copy.stat().st_size


def published_copy(settings: Settings, positions: Callable[[], dict[int, Position]]) -> PublishedCopy | None:
    """Return what publishes the settings' copy, None where none is wanted. Errors: ArchiveRefused."""
    if settings.publish_url is None:
        return None
    folder, _, name = settings.publish_url.rpartition("/")
    return PublishedCopy(
        settings.projection_path,
        open_object_store(folder),
        name,
        every_s=settings.publish_every_s,
        positions=positions,
    )
