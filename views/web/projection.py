"""Runs the web view's queries on copies of the projection, as `tollbook sql` and `top` do.

A query of a page must not delay a budget check, so none runs on the projector's own file. A copy is reused while the
file does not change, or for at most `_FRESH_S` seconds. Copies and queries run one after the other, in one thread of
their own, with a timeout for each page.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb

from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.projection.snapshot import open_snapshot

_FRESH_S: Final = 2.0
_LIMIT_S: Final = 10.0
# A page may wait this many times its own limit, because it also waits for the pages before it.
_WAITS: Final = 2
_MAX_WAITING: Final = 16
_POSITIONS: Final = "SELECT ledger_id, seq FROM position"

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """A SELECT, and the values of its `$names`."""

    sql: str
    values: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """The rows of each query, all from one snapshot, and the number of events folded in it."""

    rows: tuple[list[Row], ...]
    ledger_id: str
    seq: int


class Projection:
    """The projection at a path, whether a projector runs in this process, in another, or nowhere."""

    def __init__(
        self, path: Path, *, limit_s: float = _LIMIT_S, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        """`limit_s`: the timeout of one page's queries."""
        self._limit_s = limit_s
        self._path = path
        self._monotonic = monotonic
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="web-view")
        self._waiting = 0
        self._copy: duckdb.DuckDBPyConnection | None = None
        self._signature: tuple[str, ...] = ()
        self._copied_s = 0.0
        self._parts = ExitStack()

    async def read(self, *queries: Query) -> Answer:
        """Run queries, all on one snapshot.

        Errors: LedgerUnavailable if there is no projection, it takes too long, or too many pages wait.
        """
        if self._waiting >= _MAX_WAITING:
            raise LedgerUnavailable("too many pages are requested at the same time: reload this one")
        self._waiting += 1
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._read, queries)
        running.add_done_callback(self._end)
        try:
            async with asyncio.timeout(_WAITS * self._limit_s):
                return await asyncio.shield(running)
        except TimeoutError:
            raise _too_long(self._limit_s) from None

    async def aclose(self) -> None:
        """Close the copy, after the running query."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._parts.close)
        self._thread.shutdown(wait=False)

    def _end(self, running: "asyncio.Future[Answer]") -> None:
        self._waiting -= 1
        if not running.cancelled():
            running.exception()  # Retrieved, so that asyncio logs nothing if no page waits any more.

    def _read(self, queries: Sequence[Query]) -> Answer:
        try:
            connection = self._newest_copy()
            with _time_limit(connection, self._limit_s):
                positions = _rows(connection, Query(_POSITIONS, {}))
                rows = tuple(_rows(connection, query) for query in queries)
        except duckdb.InterruptException:
            raise _too_long(self._limit_s) from None
        except (duckdb.Error, OSError) as exc:
            raise LedgerUnavailable(f"the projection cannot be read: {str(exc).partition(chr(10))[0]}") from exc
        return Answer(rows, positions[0]["ledger_id"] if positions else "", sum(row["seq"] for row in positions))

    def _newest_copy(self) -> duckdb.DuckDBPyConnection:
        now_s, signature = self._monotonic(), _signature(self._path)
        if self._copy is not None and (signature == self._signature or now_s - self._copied_s < _FRESH_S):
            return self._copy
        self._parts.close()
        self._copy, self._parts = None, ExitStack()
        self._copy = self._parts.enter_context(open_snapshot(self._path))
        self._signature, self._copied_s = signature, now_s
        return self._copy


def _rows(connection: duckdb.DuckDBPyConnection, query: Query) -> list[Row]:
    # Not with a cursor, because an interrupt of the connection would not reach it. Through Arrow, because DuckDB's own
    # conversion of timestamps needs pytz.
    return connection.execute(query.sql, query.values).to_arrow_table().to_pylist()


@contextmanager
def _time_limit(connection: duckdb.DuckDBPyConnection, limit_s: float) -> Generator[None]:
    timer = threading.Timer(limit_s, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _too_long(limit_s: float) -> LedgerUnavailable:
    return LedgerUnavailable(f"the query took longer than {limit_s:g} s: narrow it")


def _signature(path: Path) -> tuple[str, ...]:
    """Return a value that changes with the file or its log."""
    parts: list[str] = []
    for file in (path, path.with_name(path.name + ".wal")):
        try:
            status = file.stat()
        except OSError:
            parts.append("")
        else:
            parts.append(f"{status.st_ino} {status.st_size} {status.st_mtime_ns}")
    return tuple(parts)
