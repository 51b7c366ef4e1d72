"""DuckDB databases: how they are opened, and the projection's file.

Every connection of Tollbook is made by `connect`. The projection is derived data: a file that cannot
be read, or has an older layout, is set aside and rebuilt from the ledger.

All functions block.
"""

import contextlib
import hashlib
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import duckdb

from tollbook.ledger.errors import WrongPartitions
from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.private_files import make_private_folder
from tollbook.ledger.projection.fold import LAYOUT_VERSION, LedgerMismatch, statement
from tollbook.ledger.projection.store_errors import StoreFailed, StoreLocked, StoreOutOfMemory, is_out_of_memory
from tollbook.schemas.identifiers import EntryId

_log = LazyLogger(__name__)
# A checkpoint rewrites much of the file, so it is made when the projector is idle and not while it catches up.
_WAL_LIMIT: Final = "1GB"
# The first storage version that compresses text with Zstandard.
_STORAGE: Final = "v1.2.0"


def connect(
    path: Path | None = None, *, read_only: bool = False, config: dict[str, Any] | None = None
) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB file, or a database in memory if `path` is None. Errors: duckdb.Error."""
    # DuckDB 2 recommends another call for Arrow results, which the older versions that we support lack.
    warnings.filterwarnings("ignore", message="Arrow output on a DB-API result", category=UserWarning)
    connection = duckdb.connect(":memory:" if path is None else str(path), read_only=read_only, config=config or {})
    # In a process without a main script, DuckDB (1.5, November 2026) draws a progress bar on stdout after two seconds.
    # The option belongs to one connection, and to the cursors made from it.
    # In a notebook without ipywidgets, DuckDB cannot draw one and refuses the option.
    with contextlib.suppress(duckdb.InvalidInputException):
        connection.execute("SET enable_progress_bar = false")
    return connection


def stored_ledger_id(path: Path) -> str | None:
    """Return the id of the ledger that the projection at `path` was folded from; None if it cannot be read.

    Errors: StoreLocked.
    """
    if not path.exists():
        return None
    try:
        with connect(path, read_only=True) as connection:
            row = connection.execute("SELECT any_value(ledger_id) FROM position").fetchone()
            return row[0] if row else None
    except duckdb.IOException as exc:
        if "Could not set lock" in str(exc):
            raise StoreLocked(path, str(exc)) from exc
        return None  # Damaged: `Store.open` sets it aside.
    except duckdb.Error:
        return None  # An older layout, or no projection: also set aside.


def stored_heads(path: Path, ledger_id: str) -> dict[int, EntryId]:
    """Return the newest event of a ledger that the projection at `path` has folded, by partition.

    Empty if the file is of another ledger or cannot be read: a projector that has it open makes the comparison itself.
    """
    try:
        with connect(path, read_only=True) as connection:
            sql = "SELECT partition, id FROM position WHERE ledger_id = ?"
            rows = connection.execute(sql, [ledger_id]).fetchall()
    except duckdb.Error:
        return {}
    return {partition: EntryId.parse(entry) for partition, entry in rows}


def open_database(
    path: Path, ledger_id: str, partitions: int, *, config: dict[str, Any], now: Callable[[], datetime]
) -> duckdb.DuckDBPyConnection:
    """Open the projection at `path`, or make it; a file that cannot be used is set aside first.

    Errors: StoreLocked; LedgerMismatch; WrongPartitions; StoreFailed.
    """
    limit = str(config.get("memory_limit", "DuckDB's own"))
    try:
        return _open_database(path, ledger_id, partitions, config=config, now=now)
    except StoreOutOfMemory:
        raise
    except (duckdb.Error, MemoryError, StoreFailed) as exc:
        if not is_out_of_memory(exc):
            raise
        raise StoreOutOfMemory(path, limit, exc) from exc


def _open_database(
    path: Path, ledger_id: str, partitions: int, *, config: dict[str, Any], now: Callable[[], datetime]
) -> duckdb.DuckDBPyConnection:
    make_private_folder(path.parent)
    for each in (path, path.with_name(path.name + ".wal")):
        # DuckDB would follow the link, and write to a place that somebody else chose.
        if each.is_symlink():
            raise StoreFailed(f"{each} is a symbolic link: put the file itself there, or set TOLLBOOK_DATA_DIR")
    if not path.exists() and path.with_name(path.name + ".wal").exists():
        set_aside(path, now())  # A log without its file: a new file must not get it.
    config = {"storage_compatibility_version": _STORAGE, **config}
    connection = _open_usable(path, config)
    if connection is None:
        set_aside(path, now())
        connection = _open_usable(path, config)
    if connection is None:
        raise StoreFailed(f"{path} cannot be made: a new file cannot be read either")
    try:
        _prepare(connection, ledger_id, partitions)
    except BaseException:
        connection.close()
        raise
    return connection


def set_aside(path: Path, now: datetime) -> Path:
    """Rename a file that cannot be used, and its write-ahead log, to `<name>.<utc>.bad`; return the new path."""
    bad = path.with_name(f"{path.name}.{now:%Y%m%dT%H%M%S%fZ}.bad")
    for suffix in ("", ".wal"):
        source = path.with_name(path.name + suffix)
        if source.exists():
            source.rename(bad.with_name(bad.name + suffix))
    _log.warning("store.set_aside", path=str(path), bad=str(bad))
    return bad


def _open_usable(path: Path, config: dict[str, Any]) -> duckdb.DuckDBPyConnection | None:
    """Open a file and check that it can be used; None if it is damaged or has another layout.

    Errors: StoreLocked; StoreFailed; duckdb.Error or MemoryError if there is too little memory to check.
    """
    try:
        connection = connect(path, config=config)
    except duckdb.IOException as exc:
        if "Could not set lock" in str(exc):
            raise StoreLocked(path, str(exc).splitlines()[0]) from exc
        if any(word in str(exc) for word in ("Permission denied", "No space", "Read-only", "Is a directory")):
            raise StoreFailed(f"{path} cannot be opened: {exc}") from exc
        if is_out_of_memory(exc):
            raise
        return None
    except duckdb.ConnectionException as exc:
        raise StoreLocked(path, str(exc)) from exc
    except duckdb.Error as exc:
        if is_out_of_memory(exc):
            raise  # The file may be intact, so it is not set aside.
        return None
    try:
        _set_up(connection)
        tables = {
            row[0]
            for row in connection.execute(
                "SELECT table_name FROM duckdb_tables() WHERE database_name = current_database()"
            ).fetchall()
        }
        if not tables:
            return connection
        versions = connection.execute("SELECT DISTINCT schema_version, duckdb_version FROM position").fetchall()
        # A damaged block is found only when it is read. So all tables that decisions and the next fold depend on are
        # read here. `events` is not: it takes a second or two per million, and later reads report the damage.
        for table in sorted(tables - {"events"}):
            connection.execute(f'SELECT max(hash(t)) FROM "{table}" AS t').fetchall()  # noqa: S608 - DuckDB's own names.
        if versions == [(LAYOUT_VERSION, duckdb.__version__)]:
            return connection
    except duckdb.Error as exc:
        if is_out_of_memory(exc):
            connection.close()
            raise
    connection.close()
    return None


def _set_up(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    connection.execute(f"SET wal_autocheckpoint = '{_WAL_LIMIT}'")


def _prepare(connection: duckdb.DuckDBPyConnection, ledger_id: str, partitions: int) -> None:
    # Results are read to their end: an open one keeps a transaction open, and that prevents checkpoints.
    exists = connection.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'position'").fetchall()
    if exists == [(0,)]:
        connection.begin()
        connection.execute(statement("macros"))
        connection.execute(statement("schema"))
        connection.execute(statement("comments"))
        connection.executemany(
            "INSERT INTO position VALUES (?, ?, '0-0', 0, 0, 0, ?, ?)",
            [(partition, ledger_id, LAYOUT_VERSION, duckdb.__version__) for partition in range(partitions)],
        )
        connection.commit()
        _make_views(connection)
        return
    stored_id, stored_partitions = connection.execute("SELECT any_value(ledger_id), count(*) FROM position").fetchall()[
        0
    ]
    if stored_id != ledger_id:
        raise LedgerMismatch(stored=stored_id, given=ledger_id)  # G8
    if stored_partitions != partitions:
        raise WrongPartitions(configured=partitions, stored=stored_partitions)
    try:
        connection.execute(statement("macros"))
        _make_views(connection)
    except duckdb.Error as exc:
        raise StoreFailed(f"DuckDB cannot write its views: {exc}") from exc


def _make_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the views of views.sql again if their text has changed; they hold no rows."""
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
        roll_back(connection)
        raise


def roll_back(cursor: duckdb.DuckDBPyConnection) -> None:
    """Roll back, if there is anything to roll back."""
    try:
        cursor.rollback()
    except duckdb.Error as exc:
        _log.debug("store.rollback_failed", problem=str(exc))
