"""Rebuilding the projection from the ledger, and comparing two projections row for row (G5)."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duckdb
from redis.asyncio import Redis

from ledger.keys import Keys
from ledger.store import Store
from ledger.stream import StreamReader
from schemas.identifiers import ZERO_ENTRY

TABLES: Final = ("events", "budgets", "counters", "calls", "spend", "position", "discrepancies")
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """Rows of one table that only one of two projections has; `examples` are some of them, as text."""

    table: str
    only_first: int
    only_second: int
    examples: tuple[str, ...]


async def rebuild(
    redis: Redis, keys: Sequence[Keys], ledger_id: str, into: Path, *, batch_events: int = 10_000
) -> Store:
    """Fold the whole ledger, as Redis holds it now, into a new file; the caller closes the store.

    Errors: LedgerUnavailable; LedgerGap where the stream was trimmed; UnreadableEvent; StoreFailed.
    """
    store = await asyncio.to_thread(Store.open, into, ledger_id, len(keys))
    try:
        for partition in keys:
            await _fold_all(StreamReader(redis, partition), store, batch_events)
    except BaseException:
        await asyncio.to_thread(store.close)
        raise
    return store


async def _fold_all(reader: StreamReader, store: Store, batch_events: int) -> None:
    after = ZERO_ENTRY
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
