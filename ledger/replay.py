"""Rebuilding the projection from archive and stream, and comparing two projections row for row (G5)."""

import asyncio
import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import duckdb
import pyarrow as pa
from redis.asyncio import Redis

from ledger.keys import Keys
from ledger.segments import Archive, ArchiveDamaged
from ledger.source import ROWS, LedgerSource
from ledger.store import Store
from ledger.stream import lifted
from schemas.identifiers import EntryId

TABLES: Final = ("events", "budgets", "counters", "calls", "spend", "position", "discrepancies")
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows of one table that only one of two projections has; `examples` are some of them, as text."""

    table: str
    only_first: int
    only_second: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReplayLimits:
    """What to replay: up to an entry, that one included; and only what is a user's own."""

    until: EntryId | None = None
    user_id: str | None = None


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
            async for events in source.events(keys.partition):
                wanted = events if limits.until is None else _up_to(events, limits.until)
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
