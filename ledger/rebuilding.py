"""Folding a whole ledger into a new file, with both of two cores.

Half of a fold is to append events, the other half to add them up. Here each is a transaction of
its own, side by side, so that rows and position are of one moment only at the end. Until then
the file is marked as unfinished, and `Store.open` sets aside one that was cut off.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, Self

import duckdb
import pyarrow as pa

from ledger.fold import LAYOUT_VERSION, Folded, append_incoming
from ledger.store import Store, StoreFailed

_UNFINISHED: Final = 0


class Rebuild:
    """A store that is being filled. Make it with `Rebuild.of`; all methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cursor = store.connection.cursor()

    @classmethod
    @contextmanager
    def of(cls, store: Store) -> Generator[Self]:
        """Fill an empty store; it stays unfinished where that ends with an error. Errors: StoreFailed."""
        rebuild = cls(store)
        try:
            rebuild._mark(_UNFINISHED)
            yield rebuild
            rebuild._mark(LAYOUT_VERSION)
        finally:
            rebuild._cursor.close()

    def fold(self, table: pa.Table, *, partition: int) -> Folded | None:
        """Fold a table of envelope columns. Errors: as `Store.fold_table`."""
        with ThreadPoolExecutor(1) as beside:
            appending = beside.submit(self._append, table)
            # Its errors come first, since they name the event at fault.
            folded = self._store.fold_table(table, partition=partition, appends_events=False)
            appending.result()
        return folded

    def _append(self, table: pa.Table) -> None:
        with self._store.folding(self._cursor, table) as cursor:
            append_incoming(cursor)

    def _mark(self, version: int) -> None:
        try:
            self._cursor.execute("UPDATE position SET schema_version = ?", [version])
        except duckdb.Error as exc:
            raise StoreFailed(f"DuckDB cannot write {self._store.path}: {exc}") from exc
