"""Publishing a copy of the projection to an object store at intervals, for analysts elsewhere.

The copy is a snapshot: a complete DuckDB file, which replaces the previous copy in one step. It is no backup and no
part of the ledger: a fault here never stops a call, and is retried at the next interval.
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
    """Publishes the projection at `path`; `positions` returns the folded position of each partition."""

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
            except Exception:  # noqa: BLE001 - a fault of the copy must not end the projector, which would stop calls.
                _log.exception("copy.failed")
            await asyncio.sleep(self._every_s)

    async def publish(self) -> bool:
        """Publish a copy, unless the last copy has the same events; return whether a copy was published.

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
    """Return the publisher of the copy, or None if the settings want no copy. Errors: ArchiveRefused."""
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
