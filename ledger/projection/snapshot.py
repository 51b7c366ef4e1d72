"""Snapshots: copies of the projection, on which people's queries run in a process of their own.

A heavy query must not delay a budget check or the fold, and within one process DuckDB shares processors and memory
among all queries. So such a query never runs in the projector: the file is copied, which takes 0.2 s for two million
events, and the copy is opened read-only, with limits, and without access to files and network. The projector is not
involved, and nothing here can change the projection.

All functions block.
"""

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

import duckdb

from tollbook.ledger.errors import LedgerError, LedgerUnavailable
from tollbook.ledger.projection.database import connect
from tollbook.ledger.projection.fold import statement
from tollbook.ledger.projection.store_errors import is_out_of_memory

_T = TypeVar("_T")
_PREFIX: Final = ".snapshot-"
_TRIES: Final = 20
_LEFT_BEHIND_S: Final = 600.0
# The file's header and the two headers of the database; each checkpoint writes one of the two in turn.
_HEADERS_BYTES: Final = 3 * 4096
# The log of about a hundred thousand events; the projector checkpoints it when it is idle.
_LONG_LOG_BYTES: Final = 32 * 2**20
_ROOM_BYTES: Final = 64 * 2**20


class QueryRefused(LedgerError):
    """The statement is not one plain SELECT over the projection."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"only one SELECT over the projection's tables and views is answered: {problem}")


class QueryCutOff(LedgerError):
    """The query exceeded its limit of time or memory."""


@contextmanager
def naming_memory_limit(limit: str, setting: str) -> Generator[None]:
    """Errors: QueryCutOff, which names limit and setting, if DuckDB or Arrow cannot get more memory."""
    try:
        yield
    except (duckdb.Error, MemoryError) as exc:
        if not is_out_of_memory(exc):
            raise
        raise QueryCutOff(
            f"DuckDB cannot get the memory that this needs, its limit is {limit}: raise {setting}, "
            "or give this machine more free memory"
        ) from exc


class QueryFailed(LedgerError):
    """DuckDB cannot run the query as it is written."""


def check_select(sql: str) -> None:
    """Check that a statement only reads tables and calls functions that only compute. Errors: QueryRefused."""
    with _guard().cursor() as cursor:
        row = cursor.execute("SELECT refusal(?)", [sql]).fetchone()
    problem = row[0] if row else "it could not be checked"
    if problem is not None:
        raise QueryRefused(" ".join(str(problem).split()))


@contextmanager
def open_snapshot(path: Path, *, memory_limit: str = "512MB", threads: int = 1) -> Generator[duckdb.DuckDBPyConnection]:
    """Copy the projection at `path` as it is now and open the copy: read-only, no files, no other databases.

    Works whether a projector runs or not; reading the file itself would keep a projector from starting.
    Errors: LedgerUnavailable if there is no projection, no room for a copy, or it is damaged;
        duckdb.OutOfMemoryException if the limit is too low to open it.
    """
    _check_exists(path)
    limits: dict[str, Any] = {"memory_limit": memory_limit, "threads": threads, "temp_directory": ""}
    _remove_left_behind(path.parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=path.parent) as folder:
        connection = _copied(path, Path(folder) / path.name, lambda copy: _open_copy(copy, limits))
    # The folder is removed already: the system frees the open files when the process ends, however it ends.
    try:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET python_enable_replacements = false")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection
    finally:
        connection.close()


def take_snapshot(path: Path, copy: Path) -> None:
    """Copy the projection at `path`, even while it is written, to the single file `copy`. The copy is of one moment.

    Errors: LedgerUnavailable.
    """
    _check_exists(path)
    _copied(path, copy, _merge)
    copy.chmod(0o600)  # As the projection itself; change it to share the file.


@contextmanager
def snapshot_file(path: Path) -> Generator[Path]:
    """Yield a copy as `take_snapshot` makes it, beside the projection; it is removed after the block.

    Errors: LedgerUnavailable.
    """
    _check_exists(path)
    _remove_left_behind(path.parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=path.parent) as folder:
        copy = Path(folder) / path.name
        take_snapshot(path, copy)
        yield copy


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise LedgerUnavailable(f"there is no projection at {path}; start `tollbook up`, or set TOLLBOOK_DATA_DIR")


def _copied(path: Path, copy: Path, use: Callable[[Path], _T]) -> _T:
    """Copy file and write-ahead log of one moment, and return the result of `use` for the copy.

    The log is copied first: what it refers to is in the file by then, and stays there until a checkpoint writes a new
    header. A record that is cut off at its end was not committed yet; DuckDB leaves it out.
    """
    problem: Exception | None = None
    for _ in range(_TRIES):
        try:
            _check_room(path, copy.parent)
            if _copy(path, copy):
                return use(copy)
        except duckdb.OutOfMemoryException:
            raise
        except (FileNotFoundError, duckdb.Error) as exc:
            problem = exc
        except OSError as exc:
            raise LedgerUnavailable(f"the projection at {path} could not be copied: {exc}") from exc
        time.sleep(0.05)  # A checkpoint is being made just now.
    if isinstance(problem, duckdb.CatalogException) or "not a valid DuckDB database" in str(problem):
        raise LedgerUnavailable(
            f"{path} is empty or not a projection: move it away and start `tollbook up`, which rebuilds it"
        ) from problem
    reason = "it is being written all the time" if problem is None else str(problem).partition("\n")[0]
    raise LedgerUnavailable(f"the projection at {path} could not be copied: {reason}") from problem


def _check_room(path: Path, folder: Path) -> None:
    """Check that a copy leaves enough room for the projector and Redis. Errors: LedgerUnavailable."""
    size = path.stat().st_size + _size_of_log(path)
    free = shutil.disk_usage(folder).free
    if free < 2 * size + _ROOM_BYTES:
        raise LedgerUnavailable(
            f"the projection at {path} is not copied, since the disk is nearly full: "
            f"{free / 1e6:,.0f} MB are free, the copy takes {size / 1e6:,.0f} MB"
        )


def _copy(path: Path, copy: Path) -> bool:
    """Copy log and file; return whether the copy is of one moment."""
    log, log_copy = _log_of(path), _log_of(copy)
    log_copy.unlink(missing_ok=True)
    before = _headers(path)
    if log.exists():
        shutil.copyfile(log, log_copy)
    shutil.copyfile(path, copy)
    return _headers(path) == before


def _open_copy(copy: Path, limits: dict[str, Any]) -> duckdb.DuckDBPyConnection:
    """Open a copy with its log: merging the log first would sync it to disk, and Redis would wait for the disk.

    Only a long log is merged, since DuckDB would keep its content in the query's memory.
    """
    if _size_of_log(copy) > _LONG_LOG_BYTES:
        _merge(copy)
    connection = connect(copy, read_only=True, config=limits)
    try:
        connection.execute("FROM position").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def _merge(copy: Path) -> None:
    """Merge the log into the copy, which also shows that the copy can be read."""
    with connect(copy, config={"threads": 1}) as connection:
        connection.execute("FROM position").fetchall()
        connection.execute("CHECKPOINT")
    # DuckDB keeps a log without a complete commit, since it has nothing to merge.
    _log_of(copy).unlink(missing_ok=True)


def _size_of_log(path: Path) -> int:
    log = _log_of(path)
    return log.stat().st_size if log.exists() else 0


def _headers(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADERS_BYTES)


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def _remove_left_behind(folder: Path) -> None:
    """Remove copies of processes that were killed during the copy."""
    for left in folder.glob(f"{_PREFIX}*"):
        try:
            is_old = time.time() - left.stat().st_mtime > _LEFT_BEHIND_S
        except FileNotFoundError:
            continue
        if is_old:
            shutil.rmtree(left, ignore_errors=True)


@cache
def _guard() -> duckdb.DuckDBPyConnection:
    connection = connect(config={"threads": 1, "memory_limit": "256MB", "temp_directory": ""})
    connection.execute(statement("select_guard"))
    return connection


def memory_bytes(text: str) -> int:
    """Return a size such as 512MB or 2GB in bytes. Errors: ValueError."""
    units = {"MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"(\d+)\s*(MB|GB)", text.strip().upper())
    if found is None or int(found[1]) == 0:
        raise ValueError(f"a size must be written like 512MB or 2GB, not {text!r}")
    return int(found[1]) * units[found[2]]
