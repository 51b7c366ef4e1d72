"""The projection in DuckDB: one file, one writer, many readers.

Rows and position are written in one transaction and read in one statement, so that no
reader sees them from different moments. The file is derived data: one that cannot be
opened, or is of an older layout, is set aside and built anew from the ledger.

All methods block; call them through asyncio.to_thread. They may be called from any thread.
"""

import hashlib
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import duckdb
import pyarrow as pa
import structlog

from tollbook.ledger.errors import BaselineUnavailable, LedgerRefused, WrongPartitions
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.private_files import make_private_folder
from tollbook.ledger.projection.fold import LAYOUT_VERSION, Folded, LedgerMismatch, fold_incoming, statement
from tollbook.ledger.stream import Batch
from tollbook.schemas.identifiers import EntryId

_log = structlog.get_logger(__name__)
# A checkpoint rewrites much of the file: it is made when the projector is idle, not in the middle of catching up.
_WAL_LIMIT: Final = "1GB"
# With a second thread, DuckDB (1.5, November 2026) writes what an INSERT was given twice, and the thread that waits
# spins, taking Python's lock each time round. Readers still run beside the fold, each query on its caller's thread.
_THREADS: Final = 1
# The first that has Zstandard for text.
_STORAGE: Final = "v1.2.0"
_WANT_OF_ROOM: Final = ("No space", "quota", "File too large", "Read-only", "Permission denied", "Out of Memory")


class StoreLocked(LedgerRefused):
    """Another process has the DuckDB file open; one projector at a time."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path} is open in another process: stop the other projector, or ask with `tollbook sql` ({problem})"
        )
        self.path = path


class StoreFailed(LedgerRefused):
    """DuckDB could not do its work: the disk is full or the file is damaged. Nothing was folded."""

    @property
    def is_for_want_of_room(self) -> bool:
        """Whether the same file may serve again once there is room on the disk, or permission to write."""
        return any(words in str(self) for words in _WANT_OF_ROOM)


class StoreClosed(BaselineUnavailable):
    """The store was closed."""


class Store:
    """The projection of one ledger. Make it with `Store.open`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: Path, ledger_id: str, partitions: int) -> None:
        self.path = path
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
        make_private_folder(path.parent)
        if not path.exists() and path.with_name(path.name + ".wal").exists():
            set_aside(path, now())  # A log without its file; a new file must not be given it.
        config: dict[str, Any] = {
            "memory_limit": memory_limit,
            "threads": threads,
            "storage_compatibility_version": _STORAGE,
        }
        connection = _connect(path, config)
        if connection is None:
            set_aside(path, now())
            connection = _connect(path, config)
        if connection is None:
            raise StoreFailed(f"{path} cannot be made: a new file is not readable either")
        try:
            _prepare(connection, ledger_id, partitions)
        except BaseException:
            connection.close()
            raise
        return cls(connection, path, ledger_id, partitions)

    def close(self) -> None:
        """Fold everything into the file and close it; reads in progress end with StoreClosed."""
        with self._writing:
            if self._is_closed:
                return
            self._is_closed = True
            for cursor in (self._writer, *self._idle, self._connection):
                cursor.close()

    def fold(self, batch: Batch) -> Folded | None:
        """Fold a batch read from the stream; None when it is empty.

        Errors: UnreadableEvent; LedgerGap; LedgerMismatch; StoreFailed. Nothing is folded then.
        """
        return self.fold_table(batch.to_table(), partition=batch.partition)

    def fold_table(self, table: pa.Table, *, partition: int, only_user_id: str | None = None) -> Folded | None:
        """Fold a table of envelope columns, as `Batch.to_table` makes it; or only what is one user's own.

        Errors: as `fold`.
        """
        with self._writing:
            self._check_writable()
            self._writer.register("incoming", table)
            try:
                with self.folding(self._writer) as cursor:
                    return fold_incoming(
                        cursor, partition=partition, ledger_id=self.ledger_id, only_user_id=only_user_id
                    )
            finally:
                self._writer.unregister("incoming")

    @contextmanager
    def folding(self, cursor: duckdb.DuckDBPyConnection) -> Generator[duckdb.DuckDBPyConnection]:
        """Begin a transaction and commit it. Errors: StoreFailed."""
        try:
            cursor.begin()
            yield cursor
            cursor.commit()
        except duckdb.Error as exc:
            _roll_back(cursor)
            raise StoreFailed(f"DuckDB cannot fold into {self.path}: {exc}") from exc
        except BaseException:
            _roll_back(cursor)
            raise

    def checkpoint(self) -> None:
        """Move the write-ahead log into the file, unless somebody reads just now. Errors: StoreFailed."""
        with self._writing:
            self._check_writable()
            try:
                self._writer.execute("CHECKPOINT")
            except duckdb.TransactionException as exc:
                # A client of the Quack server has a transaction open. Nothing is lost: the log stays, the next
                # checkpoint takes it.
                _log.debug("store.checkpoint_put_off", problem=str(exc))
            except duckdb.Error as exc:
                raise StoreFailed(f"DuckDB cannot write {self.path}: {exc}") from exc

    def baselines(self, names: Sequence[str]) -> BaselinePage:
        """Read budgets and positions of one moment. Errors: BaselineUnavailable."""
        with self.reading() as cursor:
            return baseline_page(cursor.execute(baselines_sql(names)).fetchall())

    def position(self, partition: int = 0) -> Position:
        """Return where a partition's fold stands."""
        return self.baselines(()).positions[partition]

    def query(self, sql: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Run a query and return its rows; money comes back as Decimal. Errors: duckdb.Error; StoreClosed."""
        # Through Arrow, since DuckDB's own conversion of timestamps needs pytz.
        return self.table(sql, params).to_pylist()

    def table(self, sql: str, params: Sequence[Any] = ()) -> pa.Table:
        """Run a query and return what it gives. Errors: as `query`."""
        with self.reading() as cursor:
            return cursor.execute(sql, list(params)).to_arrow_table()

    @contextmanager
    def reading(self) -> Generator[duckdb.DuckDBPyConnection]:
        """Lend a connection for reading. Errors: BaselineUnavailable where DuckDB gives up."""
        self._check_open()
        try:
            cursor = self._idle.pop()
        except IndexError:
            cursor = self._connection.cursor()
        try:
            yield cursor
        except (duckdb.ConnectionException, duckdb.FatalException) as exc:
            cursor.close()
            raise BaselineUnavailable(f"DuckDB cannot be read: {exc}") from exc
        except BaseException:
            cursor.close()
            raise
        if self._is_closed:
            cursor.close()
        else:
            self._idle.append(cursor)

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The database itself, for the Quack server."""
        return self._connection

    def _check_writable(self) -> None:
        if self._is_closed:
            raise StoreFailed(f"{self.path} is closed")

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosed(f"{self.path} is closed")


def stored_ledger_id(path: Path) -> str | None:
    """Return the ledger that the projection at `path` was folded from; None where there is none to be read.

    Errors: StoreLocked.
    """
    if not path.exists():
        return None
    try:
        with duckdb.connect(str(path), read_only=True) as connection:
            row = connection.execute("SELECT any_value(ledger_id) FROM position").fetchone()
            return row[0] if row else None
    except duckdb.IOException as exc:
        if "Could not set lock" in str(exc):
            raise StoreLocked(path, str(exc)) from exc
        return None  # Damaged: `Store.open` sets it aside.
    except duckdb.Error:
        return None  # An older layout, or no projection: likewise.


def baselines_sql(names: Sequence[str]) -> str:
    """Return one statement that reads the positions and these budgets of one moment.

    The names stand in the text: with parameters DuckDB (1.5, November 2026) does not use the index, and takes
    9 ms instead of 2 for a hundred names.
    """
    quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names) or "NULL"
    return (
        "SELECT partition, id, seq, NULL::VARCHAR AS budget, NULL::BIGINT AS settled, NULL::BIGINT AS held "  # noqa: S608 - quoted.
        "FROM position UNION ALL SELECT NULL, NULL, NULL, budget, nanousd(settled_usd), nanousd(held_usd) "
        f"FROM budgets WHERE budget IN ({quoted})"
    )


def baseline_page(rows: Sequence[Sequence[Any]]) -> BaselinePage:
    """Make a page of the rows that `baselines_sql` asks for."""
    return BaselinePage(
        positions={row[0]: Position(EntryId.parse(row[1]), row[2]) for row in rows if row[3] is None},
        balances={row[3]: (row[4], row[5]) for row in rows if row[3] is not None},
    )


def set_aside(path: Path, now: datetime) -> Path:
    """Rename a file that cannot be used, and its write-ahead log, to `<name>.<utc>.bad`; return the new path."""
    bad = path.with_name(f"{path.name}.{now:%Y%m%dT%H%M%S%fZ}.bad")
    for suffix in ("", ".wal"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(bad.with_name(bad.name + suffix))
    _log.warning("store.set_aside", path=str(path), bad=str(bad))
    return bad


def _connect(path: Path, config: dict[str, Any]) -> duckdb.DuckDBPyConnection | None:
    """Open a file and see that it can be used; None when it is damaged or of another layout."""
    try:
        connection = duckdb.connect(str(path), config=config)
    except duckdb.IOException as exc:
        if "Could not set lock" in str(exc):
            raise StoreLocked(path, str(exc).splitlines()[0]) from exc
        if any(word in str(exc) for word in ("Permission denied", "No space", "Read-only", "Is a directory")):
            raise StoreFailed(f"{path} cannot be opened: {exc}") from exc
        return None
    except duckdb.ConnectionException as exc:
        raise StoreLocked(path, str(exc)) from exc
    except duckdb.Error:
        return None
    try:
        connection.execute("SET GLOBAL TimeZone = 'UTC'")
        connection.execute(f"SET wal_autocheckpoint = '{_WAL_LIMIT}'")
        tables = {
            row[0]
            for row in connection.execute(
                "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database()"
            ).fetchall()
        }
        if not tables:
            return connection
        versions = connection.execute("SELECT DISTINCT schema_version FROM position").fetchall()
        # Read, since a damaged block is only found then: what decisions and the next fold depend on. `events` takes a
        # second or two a million; who queries a damaged part of it is told so by DuckDB.
        for table in sorted(tables - {"events"}):
            connection.execute(f'SELECT max(hash(t)) FROM "{table}" AS t').fetchall()  # noqa: S608 - DuckDB's own names.
        if versions == [(LAYOUT_VERSION,)]:
            return connection
    except duckdb.Error:
        pass
    connection.close()
    return None


def _prepare(connection: duckdb.DuckDBPyConnection, ledger_id: str, partitions: int) -> None:
    # Results are read to their end: one that is left open keeps a transaction, and no checkpoint is made beside it.
    exists = connection.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'position'").fetchall()
    if exists == [(0,)]:
        connection.begin()
        connection.execute(statement("schema"))
        connection.execute(statement("comments"))
        connection.executemany(
            "INSERT INTO position VALUES (?, ?, '0-0', 0, 0, ?)",
            [(partition, ledger_id, LAYOUT_VERSION) for partition in range(partitions)],
        )
        connection.commit()
        _make_views(connection)
        return
    stored_id, stored_partitions = connection.execute("SELECT any_value(ledger_id), count(*) FROM position").fetchall()[
        0
    ]
    if stored_id != ledger_id:
        raise LedgerMismatch(stored=stored_id, given=ledger_id)
    if stored_partitions != partitions:
        raise WrongPartitions(configured=partitions, stored=stored_partitions)
    try:
        _make_views(connection)
    except duckdb.Error as exc:
        raise StoreFailed(f"DuckDB cannot write its views: {exc}") from exc


def _make_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Bring the views to what ledger/sql/views.sql says, in new and older files alike; they hold no rows."""
    text = statement("views") + statement("view_comments")
    digest = hashlib.sha256(text.encode()).hexdigest()
    found = connection.execute(
        "SELECT macro_definition FROM duckdb_functions() WHERE function_name = 'digest_of_views'"
    ).fetchall()
    if found == [(f"'{digest}'",)]:
        return
    connection.begin()
    try:
        connection.execute(text)
        connection.execute(f"CREATE OR REPLACE MACRO digest_of_views() AS '{digest}'")
        connection.commit()
    except duckdb.Error:
        _roll_back(connection)
        raise


def _roll_back(cursor: duckdb.DuckDBPyConnection) -> None:
    try:
        cursor.rollback()
    except duckdb.Error as exc:
        _log.debug("store.rollback_failed", problem=str(exc))
