"""Budget checks of other processes, through DuckDB's Quack extension.

While one process has a DuckDB file open for writing, no other can read it, so the projector
serves its database on the loopback interface. Clients need the token, and may only send the
reads of a budget check (sql/quack_guard.sql), since Quack by itself lets a client do anything;
queries that people write run on a copy (snapshot.py).

`QuackServer.start` and all methods of `RemoteStore` block; call them through asyncio.to_thread.
"""

import importlib.resources
import re
import secrets
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import duckdb
import structlog

from tollbook.ledger.errors import BaselineUnavailable, LedgerError
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.private_files import make_private_folder, read_private, write_private
from tollbook.ledger.projection.database import connect
from tollbook.ledger.projection.fold import statement
from tollbook.ledger.projection.store import Store, baseline_page, baselines_sql
from tollbook.ledger.projection.store_errors import read_error
from tollbook.schemas.identifiers import budget_name

_log = structlog.get_logger(__name__)
_HOST: Final = "127.0.0.1"
_PORT_TRIES: Final = 5
# They become part of a statement.
_ADDRESS: Final = re.compile(r"quack:[A-Za-z0-9.:\[\]-]{1,100}")
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{1,100}")
TOKEN_FILE: Final = "quack.token"  # noqa: S105 - the name of the file, not the token.
ADDRESS_FILE: Final = "quack.address"
# Stands for the names in the statement that the guard lets through.
_NAME: Final = budget_name("user", "anybody", "2026-11")


class QuackUnavailable(LedgerError):
    """The Quack extension is not installed, or not for this version of DuckDB."""


@dataclass(frozen=True, slots=True)
class QuackServer:
    """A running server. It ends with `stop`, or when the store is closed."""

    store: Store
    data_dir: Path
    uri: str

    @classmethod
    def start(cls, store: Store, data_dir: Path, *, port: int = 0) -> Self:
        """Serve a store, read-only, and write the files of address and token where clients look for them.

        From then on, this process's DuckDB reads and writes no file but its own database. Port 0: any free one.
        Errors: QuackUnavailable.
        """
        token = _token(data_dir)
        with store.reading() as cursor:
            load_extensions(cursor)
            _guard(cursor)
            uri = _listen(cursor, port, token)
        write_private(data_dir / ADDRESS_FILE, uri)
        _log.info("quack.started", uri=uri)
        return cls(store, data_dir, uri)

    def stop(self) -> None:
        """Stop listening."""
        (self.data_dir / ADDRESS_FILE).unlink(missing_ok=True)
        with self.store.reading() as cursor:
            cursor.execute("CALL quack_stop(?)", [self.uri]).fetchall()


class RemoteStore:
    """The projection of another process. Make it with `RemoteStore.open`; it connects when it is first read."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._connecting = threading.Lock()
        self._connection: duckdb.DuckDBPyConnection | None = None

    @classmethod
    def open(cls, data_dir: Path) -> Self:
        """Read from the projector of this data directory, whenever it runs."""
        return cls(data_dir)

    def close(self) -> None:
        """Close the connection."""
        with self._connecting:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def baselines(self, names: Sequence[str]) -> BaselinePage:
        """Read budgets and positions, all of one moment. Errors: BaselineUnavailable."""
        sql = baselines_sql(names)
        known = self._connection
        try:
            return self._read(sql)
        except BaselineUnavailable:
            if known is None:
                raise
            # The projector may have been restarted at another address.
            self.close()
            return self._read(sql)

    def position(self, partition: int = 0) -> Position:
        """Return a partition's position. Errors: BaselineUnavailable."""
        return self.baselines(()).positions[partition]

    def _read(self, sql: str) -> BaselinePage:
        connection = self._connect()
        try:
            with connection.cursor() as cursor:
                return baseline_page(cursor.execute("FROM quack_query_by_name('ledger', ?)", [sql]).fetchall())
        except duckdb.Error as exc:
            is_closed = connection is not self._connection
            problem = read_error(exc, "the connection to the projector", is_closed=is_closed)
            raise (problem if is_closed else BaselineUnavailable(f"the projector {_reason(exc)}")) from exc

    def _connect(self) -> duckdb.DuckDBPyConnection:
        with self._connecting:
            if self._connection is None:
                self._connection = self._attach()
            return self._connection

    def _attach(self) -> duckdb.DuckDBPyConnection:
        try:
            uri, token = (read_private(self._data_dir / name) for name in (ADDRESS_FILE, TOKEN_FILE))
        except OSError as exc:
            raise BaselineUnavailable(f"no projector runs in {self._data_dir} ({exc.strerror})") from exc
        if not _ADDRESS.fullmatch(uri) or not _TOKEN.fullmatch(token):
            raise BaselineUnavailable(f"{self._data_dir} has no address and token of a projector")
        connection = connect(config={"threads": 1})
        try:
            load_extensions(connection)
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute(f"ATTACH '{uri}' AS ledger (TYPE quack, TOKEN '{token}')")
        except duckdb.Error as exc:
            connection.close()
            raise BaselineUnavailable(f"the projector does not answer: {_first_line(exc)}") from exc
        except BaseException:
            connection.close()
            raise
        return connection


def load_extensions(connection: duckdb.DuckDBPyConnection) -> None:
    """Load Quack and what it needs from their wheels, without a download. Errors: QuackUnavailable."""
    for name in ("httpfs", "quack"):
        try:
            folder = importlib.resources.files(f"duckdb_extension_{name}")
            path = folder.joinpath("extensions", f"v{duckdb.__version__}", f"{name}.duckdb_extension")
            connection.execute(f"LOAD '{path}'")
        except (ModuleNotFoundError, duckdb.Error) as exc:
            raise QuackUnavailable(
                f"DuckDB's extension {name} {duckdb.__version__} cannot be loaded ({_first_line(exc)}): "
                f"install duckdb-extension-{name}=={duckdb.__version__}"
            ) from exc


def _guard(cursor: duckdb.DuckDBPyConnection) -> None:
    """Answer only budget checks from now on; set once per database."""
    attached = cursor.execute("SELECT count(*) FROM duckdb_databases() WHERE database_name = 'quack_guard'").fetchone()
    if attached == (0,):
        cursor.execute(statement("quack_guard"))
        head, tail = baselines_sql([_NAME]).split(f"'{_NAME}'")
        cursor.execute("INSERT INTO quack_guard.main.answered VALUES (?, ?)", [head, tail])


def _listen(cursor: duckdb.DuckDBPyConnection, port: int, token: str) -> str:
    problem: duckdb.Error | None = None
    for _ in range(1 if port else _PORT_TRIES):
        uri = f"quack:{_HOST}:{port or _free_port()}"
        try:
            cursor.execute("CALL quack_serve(?, token => ?)", [uri, token]).fetchall()
        except duckdb.Error as exc:
            problem = exc
        else:
            return uri
    raise QuackUnavailable(f"the projection cannot be served: {problem}") from problem


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return probe.getsockname()[1]


def _token(data_dir: Path) -> str:
    """Return the token, which is made at the first start in a file that only its owner can read."""
    path = data_dir / TOKEN_FILE
    make_private_folder(data_dir)
    if not path.exists():
        write_private(path, secrets.token_urlsafe(32))
    return read_private(path)


def _reason(problem: duckdb.Error) -> str:
    """Say why the projector did not answer, after "the projector"."""
    if "budget checks only" in str(problem):
        return "does not know this version's budget check: restart it together with the workers"
    if "connection id" in str(problem):
        return "was restarted"
    return f"does not answer: {_first_line(problem)}"


def _first_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0]
