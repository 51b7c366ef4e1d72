"""The projection in DuckDB: one file, one writer, many readers.

Rows and position are written in one transaction and read in one statement, so that no
reader sees them from different moments (G5).

All methods block; call them through asyncio.to_thread. They may be called from any thread.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import duckdb
import pyarrow as pa
import structlog

from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.policies import StoredPolicy
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.projection.database import open_database, roll_back
from tollbook.ledger.projection.fold import Folded, fold_incoming
from tollbook.ledger.projection.recomputation import recompute
from tollbook.ledger.projection.sql_text import quoted
from tollbook.ledger.projection.store_errors import (
    StoreClosed,
    StoreFailed,
    StoreOutOfMemory,
    is_out_of_memory,
    read_error,
)
from tollbook.ledger.stream import Batch
from tollbook.schemas.identifiers import EntryId

_log = structlog.get_logger(__name__)
# With a second thread, DuckDB (1.5, November 2026) writes the data of an INSERT twice, and the waiting thread spins and
# takes Python's lock each time. Readers still run beside the fold, each query on its caller's thread.
_THREADS: Final = 1

NEWEST_POLICY: Final = """
SELECT p.partition, p.version, p.digest, e.payload::VARCHAR AS payload
FROM policies AS p
JOIN events AS e ON e.partition = p.partition AND e.seq = p.seq
QUALIFY row_number() OVER (PARTITION BY p.partition ORDER BY p.seq DESC) = 1
"""
"""The policy in force of each partition, from its event."""


class Store:
    """The projection of one ledger. Make it with `Store.open`.

    `has_changed`: a balance was read that the fold did not write.
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, path: Path, ledger_id: str, partitions: int, memory_limit: str
    ) -> None:
        self.path = path
        self.has_changed = False
        self.memory_limit = memory_limit
        self.ledger_id = ledger_id
        self.partitions = partitions
        self._connection = connection
        self._writer = connection.cursor()
        self._writing = threading.Lock()
        self._idle: list[duckdb.DuckDBPyConnection] = []
        self._is_closed = False

    @classmethod
    def open(
        cls,
        path: Path,
        ledger_id: str,
        partitions: int = 1,
        *,
        memory_limit: str = "1GB",
        threads: int = _THREADS,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> Self:
        """Open the projection at `path`, or make it.

        Errors: StoreLocked; LedgerMismatch; WrongPartitions; StoreFailed.
        """
        config = {"memory_limit": memory_limit, "threads": threads}
        connection = open_database(path, ledger_id, partitions, config=config, now=now)
        return cls(connection, path, ledger_id, partitions, memory_limit)

    def close(self) -> None:
        """Close the file, with its write-ahead log merged; reads in progress end with StoreClosed."""
        with self._writing:
            if self._is_closed:
                return
            self._is_closed = True
            for cursor in (self._writer, *self._idle, self._connection):
                cursor.close()

    def fold(self, batch: Batch) -> Folded | None:
        """Fold a batch read from the stream; return None if it is empty.

        Errors: UnreadableEvent; LedgerGap; LedgerMismatch; StoreFailed. After an error, nothing is folded.
        """
        try:
            table = batch.to_table()
        except MemoryError as exc:  # Arrow's is one too.
            raise StoreOutOfMemory(self.path, self.memory_limit, exc) from exc
        return self.fold_table(table, partition=batch.partition)

    def fold_table(
        self,
        table: pa.Table,
        *,
        partition: int,
        only_user_id: str | None = None,
        confirm: Callable[[duckdb.DuckDBPyConnection, Folded], None] = lambda _, __: None,
    ) -> Folded | None:
        """Fold a table of envelope columns, as made by `Batch.to_table`; with `only_user_id`, only that user's events.

        `confirm` is called before the commit and may raise. Errors: as `fold`; those of `confirm`.
        """
        with self._writing:
            self._check_writable()
            self._writer.register("incoming", table)
            try:
                with self.folding(self._writer) as cursor:
                    folded = fold_incoming(
                        cursor, partition=partition, ledger_id=self.ledger_id, only_user_id=only_user_id
                    )
                    if folded is not None:
                        confirm(cursor, folded)
                    return folded
            finally:
                self._writer.unregister("incoming")

    @contextmanager
    def folding(self, cursor: duckdb.DuckDBPyConnection) -> Generator[duckdb.DuckDBPyConnection]:
        """Begin a transaction and commit it. Errors: StoreFailed."""
        try:
            cursor.begin()
            yield cursor
            cursor.commit()  # G5
        except (duckdb.Error, MemoryError) as exc:
            roll_back(cursor)
            raise self._failed(exc, f"DuckDB cannot fold into {self.path}: {exc}") from exc
        except BaseException:
            roll_back(cursor)
            raise

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file, unless a transaction is open. Errors: StoreFailed."""
        with self._writing:
            self._check_writable()
            try:
                self._writer.execute("CHECKPOINT")
            except duckdb.TransactionException as exc:
                # A reader has a transaction open. Nothing is lost: the log stays for the next checkpoint.
                _log.debug("store.checkpoint_postponed", problem=str(exc))
            except duckdb.Error as exc:
                raise self._failed(exc, f"DuckDB cannot write {self.path}: {exc}") from exc

    def check(self) -> None:
        """Recompute balances and counters from the events, and the events' checksums, while the fold goes on.

        Takes about a second for a million events.
        Errors: StoreChanged; StoreOutOfMemory; StoreFailed if the file cannot be read; StoreClosed.
        """
        try:
            with self.reading() as cursor:
                recompute(cursor)
        except StoreClosed:
            raise
        except (BaselineUnavailable, duckdb.Error) as exc:
            raise self._failed(exc.__cause__ or exc, f"{self.path} cannot be checked: {exc}") from exc

    def baselines(self, names: Sequence[str]) -> BaselinePage:
        """Read budgets and positions, all of one moment. Errors: BaselineUnavailable."""
        with self.reading() as cursor:
            rows = cursor.execute(baselines_sql(names)).fetchall()
        page = baseline_page(rows)
        self.has_changed = self.has_changed or bool(page.changed)
        return page

    def position(self, partition: int = 0) -> Position:
        """Return a partition's position."""
        return self.baselines(()).positions[partition]

    def newest_policy(self, partition: int = 0) -> StoredPolicy:
        """Return the newest policy of a partition, from its event; version 0 if there is none."""
        rows = self.query(
            f"SELECT version, digest, payload FROM ({NEWEST_POLICY}) WHERE partition = ?",  # noqa: S608 - a constant.
            [partition],
        )
        return StoredPolicy(**rows[0]) if rows else StoredPolicy()

    def query(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Run a query and return its rows; money is a Decimal. Errors: as `reading`."""
        # Through Arrow, since DuckDB's own conversion of timestamps needs pytz.
        return self.table(sql, params).to_pylist()

    def table(self, sql: str, params: Sequence[Any] = ()) -> pa.Table:
        """Run a query and return the result. Errors: as `reading`."""
        with self.reading() as cursor:
            return cursor.execute(sql, list(params)).to_arrow_table()

    @contextmanager
    def reading(self) -> Generator[duckdb.DuckDBPyConnection]:
        """Lend a connection for reading.

        Errors: StoreClosed, also if the store is closed meanwhile; BaselineUnavailable if the database fails;
            duckdb.Error if the query is wrong.
        """
        self._check_open()
        cursor: duckdb.DuckDBPyConnection | None = None
        try:
            try:
                cursor = self._idle.pop()
            except IndexError:
                cursor = self._connection.cursor()
            yield cursor
        except BaseException as exc:
            if cursor is not None:
                cursor.close()
            if isinstance(exc, duckdb.Error):
                problem = read_error(exc, str(self.path), is_closed=self._is_closed, memory_limit=self.memory_limit)
                if problem is not exc:
                    raise problem from exc
            raise
        if self._is_closed:
            cursor.close()
        else:
            self._idle.append(cursor)

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The database connection."""
        return self._connection

    def _failed(self, exc: BaseException, text: str) -> StoreFailed:
        return StoreOutOfMemory(self.path, self.memory_limit, exc) if is_out_of_memory(exc) else StoreFailed(text)

    def _check_writable(self) -> None:
        if self._is_closed:
            raise StoreFailed(f"{self.path} is closed")

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed(f"{self.path} is closed")


def baselines_sql(names: Sequence[str]) -> str:
    """Return one statement that reads the positions and these budgets, all of one moment.

    The names are part of the text: with parameters, DuckDB (1.5, November 2026) does not use the index, and a
    hundred names take 9 ms instead of 2.
    """
    listed = ", ".join(map(quoted, names)) or "NULL"
    return (
        "SELECT partition, id, seq, NULL::VARCHAR AS budget, NULL::BIGINT AS settled, NULL::BIGINT AS held, "  # noqa: S608 - quoted.
        "(SELECT sum(budgets) FROM position) = (SELECT count(*) FROM budgets) AS is_folded FROM position "
        "UNION ALL SELECT NULL, NULL, NULL, budget, nanousd(settled_usd), nanousd(held_usd), "
        "checksum = balance_hash(budget, settled_usd, held_usd) "
        f"FROM budgets WHERE budget IN ({listed})"
    )


def baseline_page(rows: Sequence[Sequence[Any]]) -> BaselinePage:
    """Return the rows of `baselines_sql` as a page.

    Errors: BaselineUnavailable if rows of budgets were added or deleted, but not by the fold.
    """
    if not all(row[6] for row in rows if row[3] is None):
        raise BaselineUnavailable("DuckDB has other budgets than the fold wrote: it was changed, and is rebuilt")  # G8
    return BaselinePage(
        positions={row[0]: Position(EntryId.parse(row[1]), row[2]) for row in rows if row[3] is None},
        balances={row[3]: (row[4], row[5]) for row in rows if row[3] is not None and row[6]},
        changed=frozenset(row[3] for row in rows if row[3] is not None and not row[6]),
    )
