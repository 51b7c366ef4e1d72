"""Rebuilding the projection from archive and stream: all of it, up to a point, or one user's (G5)."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from redis.asyncio import Redis

from ledger.keys import Keys
from ledger.rebuilding import Rebuild
from ledger.segments import Archive, ArchiveDamaged
from ledger.source import ROWS, LedgerSource, Regrouping
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
        with _folding(store, limits.user_id) as fold:
            for keys in source.keys:
                tables = _tables(source, keys.partition, limits.end_of(keys.partition))
                async for events in _read_ahead(tables):
                    await asyncio.to_thread(fold, events, partition=keys.partition)
                    progress(events.num_rows)
    except BaseException:
        await asyncio.to_thread(store.close)
        raise
    return store


@contextmanager
def _folding(store: Store, user_id: str | None) -> Generator[Callable[..., object]]:
    """Yield what folds a table: the fastest way that fits."""
    if user_id is not None:
        yield partial(store.fold_table, only_user_id=user_id)
    elif any(position.seq for position in store.baselines(()).positions.values()):
        yield store.fold_table
    else:
        with Rebuild.of(store) as rebuild:
            yield rebuild.fold


async def _tables(source: LedgerSource, partition: int, end: EntryId | None) -> AsyncGenerator[pa.Table]:
    """Yield a partition's events up to an entry in tables that fold well."""
    regrouping = Regrouping()
    async with aclosing(source.events(partition, until=end)) as tables:
        async for events in tables:
            for table in regrouping.add(events):
                yield table
    for table in regrouping.rest():
        yield table


async def _read_ahead(tables: AsyncGenerator[pa.Table]) -> AsyncGenerator[pa.Table]:
    """Yield the tables, each while the next one is being read."""
    async with aclosing(tables):
        ahead = asyncio.create_task(anext(tables, None))
        try:
            while (events := await ahead) is not None:
                ahead = asyncio.create_task(anext(tables, None))
                yield events
        finally:
            if not ahead.done():
                ahead.cancel()
                await asyncio.wait([ahead])


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
    for events in _archived(store, archive, partition):
        store.fold_table(events, partition=partition)
        folded += events.num_rows
    return folded


def _archived(store: Store, archive: Archive, partition: int) -> Generator[pa.Table]:
    regrouping, after_seq = Regrouping(), store.position(partition).seq
    for segment in archive.segments(partition):
        if segment.manifest.ledger_id != store.ledger_id:
            raise ArchiveDamaged(segment.path, f"belongs to ledger {segment.manifest.ledger_id}")
        if segment.manifest.last_seq <= after_seq:
            continue
        for events in segment.batches(ROWS, after_seq=after_seq):
            yield from regrouping.add(lifted(events))
    yield from regrouping.rest()
