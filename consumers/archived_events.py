"""Folding the events that were trimmed off the stream, from the archive, before the stream is followed."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from tollbook.inference.runtime import LedgerHandle
from tollbook.ledger.archive.replay import fold_archive
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.archive.storage_errors import ArchiveUnavailable
from tollbook.ledger.projection.store import Store


async def fold_archived(store: Store, archive: Archive, handle: LedgerHandle) -> None:
    """Fold the archived events that the projection's file does not have.

    An unreachable archive is an error only if events are missing from the stream.

    Errors: ArchiveUnavailable; ArchiveDamaged; LedgerGap; LedgerUnavailable; as `fold_archive`.
    """
    for keys in handle.keys:
        try:
            await finish_shielded(asyncio.to_thread(fold_archive, store, archive, keys.partition))
        except ArchiveUnavailable:
            removed: bytes | None = await handle.pipeline.execute("HGET", keys.meta, "removed")
            if store.position(keys.partition).seq < int(removed or 0):
                raise


async def finish_shielded(work: Coroutine[Any, Any, Any]) -> None:
    """Wait for work in a thread, even if this task is cancelled: the file that the thread uses is closed next."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.shield(working)
    finally:
        await asyncio.wait([working])
