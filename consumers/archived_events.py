"""What was trimmed off the stream is folded from the archive, before the stream is followed."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from tollbook.inference.runtime import LedgerHandle
from tollbook.ledger.archive.replay import fold_archive
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.archive.storage_errors import ArchiveUnavailable
from tollbook.ledger.projection.store import Store


async def fold_archived(store: Store, archive: Archive, handle: LedgerHandle) -> None:
    """Fold the archive's events that the file lacks.

    While everything is on the stream, an archive that is down can wait.

    Errors: ArchiveUnavailable; ArchiveDamaged; LedgerGap; LedgerUnavailable; as `fold_archive`.
    """
    for keys in handle.keys:
        try:
            await to_its_end(asyncio.to_thread(fold_archive, store, archive, keys.partition))
        except ArchiveUnavailable:
            removed: bytes | None = await handle.pipeline.execute("HGET", keys.meta, "removed")
            if store.position(keys.partition).seq < int(removed or 0):
                raise


async def to_its_end(work: Coroutine[Any, Any, Any]) -> None:
    """Wait for a thread that works on the file also where this task is cancelled: the file is closed next."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    finally:
        await asyncio.wait([working])
