"""Rebuilding the projection from archive and stream: all of it, up to a point, or one user's (G5)."""

import asyncio
import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
from redis.asyncio import Redis

from ledger.keys import Keys
from ledger.segments import Archive, ArchiveDamaged
from ledger.source import ROWS, LedgerSource
from ledger.store import Store
from ledger.stream import lifted
from schemas.identifiers import ZERO_ENTRY, EntryId


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """What to replay: up to an entry, that one included, or one a partition; and only what is a user's own."""

    until: EntryId | Mapping[int, EntryId] | None = None
    user_id: str | None = None

    def end_of(self, partition: int) -> EntryId | None:
        """Return the last entry of a partition that counts, or None for all of them."""
        return self.until.get(partition, ZERO_ENTRY) if isinstance(self.until, Mapping) else self.until


async def replay(
    source: LedgerSource,
    into: Path,
    limits: ReplayLimits | None = None,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Store:
    """Fold a ledger into a new file; the caller closes the store. `progress` is told of events as they are folded.

    Errors: LedgerUnavailable; LedgerGap where the stream was trimmed and the archive lacks what is missing;
        ArchiveDamaged; UnreadableEvent; StoreFailed.
    """
    limits = limits or ReplayLimits()
    store = await asyncio.to_thread(Store.open, into, source.ledger_id, len(source.keys))
    try:
        for keys in source.keys:
            end = limits.end_of(keys.partition)
            async for events in source.events(keys.partition):
                wanted = events if end is None else _up_to(events, end)
                await asyncio.to_thread(store.fold_table, wanted, partition=keys.partition, only_user_id=limits.user_id)
                progress(wanted.num_rows)
                if wanted.num_rows < events.num_rows:
                    break
    except BaseException:
        await asyncio.to_thread(store.close)
        raise
    return store


def _up_to(events: pa.Table, until: EntryId) -> pa.Table:
    times = cast("list[int]", events["ms"].to_pylist())
    count = bisect.bisect_left(times, until.ms)
    while count < events.num_rows and EntryId.parse(cast("str", events["id"][count].as_py())) <= until:
        count += 1
    return events.slice(0, count)


async def rebuild(
    redis: Redis, keys: Sequence[Keys], ledger_id: str, into: Path, *, archive: Archive | None = None
) -> Store:
    """Fold the whole ledger, archive first and then the stream, into a new file. Errors: as `replay`."""
    return await replay(LedgerSource(ledger_id, tuple(keys), archive, redis), into)


def fold_archive(store: Store, archive: Archive, partition: int) -> int:
    """Fold what the archive holds beyond the store's position; return how many events that were.

    Errors: ArchiveDamaged; LedgerGap; UnreadableEvent; StoreFailed. Blocks.
    """
    folded = 0
    for segment in archive.segments(partition):
        if segment.manifest.ledger_id != store.ledger_id:
            raise ArchiveDamaged(segment.path, f"belongs to ledger {segment.manifest.ledger_id}")
        after_seq = store.position(partition).seq
        if segment.manifest.last_seq <= after_seq:
            continue
        for events in segment.batches(ROWS, after_seq=after_seq):
            store.fold_table(lifted(events), partition=partition)
            folded += events.num_rows
    return folded
