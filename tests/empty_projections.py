"""Copies of empty projections, since the suite opens hundreds of them and DuckDB takes long to make one.

Making the tables, views and comments takes 0.1 s of processor time, a copy a sixth of that. A test of how a
projection is made uses the fixture `projections_made_anew`. A file that exists is always opened as users open it.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import duckdb

from tollbook.ledger.private_files import make_private_folder
from tollbook.ledger.projection import database

# The folder of the originals, which all processes of one run share.
_VARIABLE: Final = "TEST_EMPTY_PROJECTIONS"
_ANY_LEDGER: Final = "any-ledger"
_open_as_users_do: Final = database._open_database


def make_folder() -> Path | None:
    """Make the folder, unless the environment names one already; return a new one, which the caller must remove."""
    if _VARIABLE in os.environ:
        return None
    os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="empty-projections-")
    return Path(os.environ[_VARIABLE])


def copy_empty_projections() -> None:
    """Let this process copy each new projection that it opens."""
    database._open_database = _open


@contextmanager
def made_anew() -> Generator[None]:
    """Make new projections as users do."""
    database._open_database = _open_as_users_do
    try:
        yield
    finally:
        copy_empty_projections()


def _open(
    path: Path, ledger_id: str, partitions: int, *, config: dict[str, Any], now: Callable[[], datetime]
) -> duckdb.DuckDBPyConnection:
    if any(os.path.lexists(each) for each in (path, path.with_name(path.name + ".wal"))):
        return _open_as_users_do(path, ledger_id, partitions, config=config, now=now)
    make_private_folder(path.parent)
    shutil.copyfile(_original(partitions, now), path)
    connection = database.connect(path, config={"storage_compatibility_version": database._STORAGE, **config})
    database._set_up(connection)
    connection.execute("UPDATE position SET ledger_id = ?", [ledger_id])
    connection.execute("CHECKPOINT")  # The file alone, without its log, is then this ledger's.
    return connection


def _original(partitions: int, now: Callable[[], datetime]) -> Path:
    original = Path(os.environ[_VARIABLE], f"{partitions}.duckdb")
    if not original.exists():
        # Another process may make it at the same time. The last one stays, and all are equal.
        made = original.with_name(f"{partitions}.{os.getpid()}.duckdb")
        _open_as_users_do(made, _ANY_LEDGER, partitions, config={}, now=now).close()
        made.replace(original)
    return original
