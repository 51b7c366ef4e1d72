"""Rebuilding the projection from archive and stream: whole, up to an event, or for one user (G5)."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Final

import pyarrow as pa
from redis.asyncio import Redis

from tollbook.ledger.archive.history import ROWS, LedgerSource, Regrouping
from tollbook.ledger.archive.manifests import ArchiveDamaged
from tollbook.ledger.archive.rebuilding import Rebuild, are_current
from tollbook.ledger.archive.segments import Archive, Segment
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import upcast_table
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

_BEGINNING: Final = Position()


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """What to replay: up to an entry (inclusive), for all partitions or each of them; optionally one user's events."""

    until: EntryId | Mapping[int, EntryId] | None = None
    user_id: str | None = None

    def end_of(self, partition: int) -> EntryId | None:
        """Return the last entry of a partition to replay, or None for all of them."""
        return self.until.get(partition, ZERO_ENTRY) if isinstance(self.until, Mapping) else self.until


async def replay(
    source: LedgerSource,
    into: Path,
    limits: ReplayLimits | None = None,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Store:
    """Fold a ledger into a new file; the caller closes the store. `progress` gets the number of events just folded.

    Errors: LedgerUnavailable; LedgerGap if the stream was trimmed and the archive lacks the trimmed events;
        ArchiveDamaged; UnreadableEvent; StoreFailed.
    """
    limits = limits or ReplayLimits()
    store = await asyncio.to_thread(Store.open, into, source.ledger_id, len(source.keys))
    try:
        is_empty = not any(position.seq for position in store.baselines(()).positions.values())
        if limits.user_id is None and is_empty:
            await _rebuild(source, store, limits, progress)
        else:
            fold = partial(store.fold_table, only_user_id=limits.user_id)
            for keys in source.keys:
                await _fold_tables(_tables(source, keys.partition, limits), fold, keys.partition, progress)
    except BaseException:
        await asyncio.to_thread(store.close)
        raise
    return store


async def _rebuild(source: LedgerSource, store: Store, limits: ReplayLimits, progress: Callable[[int], None]) -> None:
    """Fold everything in the fastest way: DuckDB reads the segments itself; the rest is folded as tables."""
    with Rebuild.of(store) as rebuild:
        for keys in source.keys:
            partition, end = keys.partition, limits.end_of(keys.partition)
            segments = await asyncio.to_thread(_readable_segments, source, partition)
            if segments:
                reading = partial(rebuild.fold_segments, segments, partition=partition, until=end, progress=progress)
                await asyncio.to_thread(reading)
                last = segments[-1].manifest
                if store.position(partition).seq < last.last_seq:
                    continue
            reached = store.position(partition)
            tables = _tables(source, partition, limits, after=reached)
            await _fold_tables(tables, rebuild.fold, partition, progress)
        await asyncio.to_thread(rebuild.finish)


def _readable_segments(source: LedgerSource, partition: int) -> list[Segment]:
    """Return the archive's segments before the first that has events of another version. Errors: ArchiveDamaged."""
    segments = source.segments(partition)
    return list(takewhile(are_current, segments))


async def _fold_tables(
    tables: AsyncGenerator[pa.Table], fold: Callable[..., object], partition: int, progress: Callable[[int], None]
) -> None:
    async for events in _read_ahead(tables):
        await asyncio.to_thread(fold, events, partition=partition)
        progress(events.num_rows)


async def _tables(
    source: LedgerSource, partition: int, limits: ReplayLimits, *, after: Position = _BEGINNING
) -> AsyncGenerator[pa.Table]:
    """Yield a partition's events after a position in tables of the best size for folding."""
    regrouping, end = Regrouping(), limits.end_of(partition)
    async with aclosing(source.events(partition, after_seq=after.seq, after=after.entry, until=end)) as tables:
        async for events in tables:
            for table in regrouping.add(events):
                yield table
    for table in regrouping.rest():
        yield table


async def _read_ahead(tables: AsyncGenerator[pa.Table]) -> AsyncGenerator[pa.Table]:
    """Yield the tables; the next table is read while the caller uses the current one."""
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
    """Fold the archive's events after the store's position; return how many.

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
            raise ArchiveDamaged(segment.place, f"belongs to ledger {segment.manifest.ledger_id}")
        if segment.manifest.last_seq <= after_seq:
            continue
        for events in segment.batches(ROWS, after_seq=after_seq):
            yield from regrouping.add(upcast_table(events))
    yield from regrouping.rest()
