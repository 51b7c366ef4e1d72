"""Rebuilding the projection from archive and stream, and comparing two projections row for row (G5)."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
from redis.asyncio import Redis

from ledger.keys import Keys
from ledger.segments import Archive, ArchiveDamaged
from ledger.store import Store
from ledger.stream import StreamReader, lifted

TABLES: Final = ("events", "budgets", "counters", "calls", "spend", "position", "discrepancies")
_SHOWN: Final = 5
# Large batches fold faster; this many stay within the store's memory limit.
_FOLD_ROWS: Final = 200_000


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows of one table that only one of two projections has; `examples` are some of them, as text."""

    table: str
    only_first: int
    only_second: int
    examples: tuple[str, ...]


async def rebuild(
    redis: Redis,
    keys: Sequence[Keys],
    ledger_id: str,
    into: Path,
    *,
    archive: Archive | None = None,
    batch_events: int = 10_000,
) -> Store:
    """Fold the whole ledger, archive first and then the stream, into a new file; the caller closes the store.

    Errors: LedgerUnavailable; LedgerGap where the stream was trimmed and the archive lacks what is missing;
        ArchiveDamaged; UnreadableEvent; StoreFailed.
    """
    store = await asyncio.to_thread(Store.open, into, ledger_id, len(keys))
    try:
        for partition in keys:
            if archive is not None:
                await asyncio.to_thread(fold_archive, store, archive, partition.partition)
            await _fold_all(StreamReader(redis, partition), store, batch_events)
    except BaseException:
        await asyncio.to_thread(store.close)
        raise
    return store


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
        for events in segment.batches(_FOLD_ROWS, after_seq=after_seq):
            store.fold_table(lifted(events), partition=partition)
            folded += events.num_rows
    return folded


async def _fold_all(reader: StreamReader, store: Store, batch_events: int) -> None:
    after = store.position(reader.partition).entry
    try:
        while batch := await reader.read_after(after, count=batch_events):
            await asyncio.to_thread(store.fold, batch)
            after = batch.last_id
    finally:
        await reader.aclose()


def compare(first: Store, second: Store) -> list[Difference]:
    """Compare two projections, every table and view, row for row; an empty list means that they are equal.

    Both are copied into memory a table at a time. Blocks; call it through asyncio.to_thread.
    """
    connection = duckdb.connect()
    try:
        return [difference for table in TABLES if (difference := _compare_table(connection, table, first, second))]
    finally:
        connection.close()


def _compare_table(connection: duckdb.DuckDBPyConnection, table: str, first: Store, second: Store) -> Difference | None:
    for name, store in (("first", first), ("second", second)):
        with store.reading() as cursor:
            connection.register(name, cursor.table(table).to_arrow_table())
    only_first = connection.execute("FROM first EXCEPT ALL FROM second").to_arrow_table()
    only_second = connection.execute("FROM second EXCEPT ALL FROM first").to_arrow_table()
    if not only_first.num_rows and not only_second.num_rows:
        return None
    examples = [*only_first.slice(0, _SHOWN).to_pylist(), *only_second.slice(0, _SHOWN).to_pylist()]
    return Difference(table, only_first.num_rows, only_second.num_rows, tuple(str(row) for row in examples))
