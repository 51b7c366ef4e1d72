"""`tollbook sql`: one SELECT over a copy of the projection, in this process and within limits.

The process gives way to others, has a bounded memory, and ends itself where DuckDB does not
let a query be interrupted, so that no query can hold up a budget check or take the machine's memory.
"""

import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from tollbook.ledger.errors import LedgerError

_NICE: Final = 15
_YIELD_EVERY_S: Final = 0.001
_GRACE_S: Final = 2.0
# What reading and printing needs beside the memory of the query itself.
_HEADROOM_BYTES: Final = 512 * 2**20


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


def sql(
    query: Annotated[str | None, typer.Argument(help="One SELECT; `-` reads it from standard input.")] = None,
    form: Annotated[Format, typer.Option("--format", help="How the rows are written.")] = Format.TABLE,
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds until the query is cut off.")] = 30.0,
    memory: Annotated[str, typer.Option(help="Memory of the query, for example 512MB or 2GB.")] = "512MB",
    snapshot: Annotated[Path | None, typer.Option(help="Copy the whole projection to this DuckDB file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> int:
    """Ask the projection a question, while Tollbook runs or at rest; it cannot hold up a call.

    Example: tollbook sql "SELECT user_id, spent_usd FROM spend ORDER BY spent_usd DESC LIMIT 10"
    """
    from tollbook.cli.options import data_settings

    _give_way()
    path = data_settings().data_dir / "tollbook.duckdb"
    if (query is None) == (snapshot is None):
        raise typer.BadParameter("give one SELECT, or --snapshot FILE", param_hint="query")
    for file, option in ((snapshot, "--snapshot"), (output, "--output")):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"there is no directory {file.parent}", param_hint=option)
    if snapshot is not None:
        return _copy(path, snapshot)
    form = Format.JSON if as_json else form
    if form is Format.PARQUET and output is None and sys.stdout.isatty():
        raise typer.BadParameter("Parquet needs --output FILE", param_hint="--format")
    text = sys.stdin.read() if query == "-" else query or ""
    _run(path, text, form, output, timeout_s=timeout, memory=memory)
    return 0


def _give_way() -> None:
    """Take what processor time others leave, so that a budget check that wakes up need not wait for a query.

    Priority alone does not do it on Linux: it counts within a session only (autogroup), and whoever wakes up in another
    one waits for the next tick, 4 ms on many machines. So the query offers its processor a thousand times a second.
    """
    os.nice(_NICE)
    if sys.platform != "linux":
        return
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # Straight to the C library: a handler in Python would not run before DuckDB has done its work.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGALRM, ctypes.cast(libc.sched_yield, ctypes.c_void_p))
    signal.setitimer(signal.ITIMER_REAL, _YIELD_EVERY_S, _YIELD_EVERY_S)


def _copy(path: Path, target: Path) -> int:
    from tollbook.ledger.projection.snapshot import take_snapshot
    from tollbook.views.files import replacing

    with replacing(target) as part:
        take_snapshot(path, part)
    typer.echo(f"{target}: the projection as it is now; open it with any DuckDB 1.5, for example duckdb {target}")
    return 0


def _run(path: Path, text: str, form: Format, output: Path | None, *, timeout_s: float, memory: str) -> None:
    """Errors: QueryRefused; QueryCutOff; QueryFailed; LedgerUnavailable; OSError."""
    import duckdb

    from tollbook.ledger.projection.snapshot import check_select, memory_bytes, open_snapshot
    from tollbook.views.rows import write_rows

    try:
        limit_bytes = memory_bytes(memory)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--memory") from None
    check_select(text)
    too_long = f"the query was cut off after {timeout_s:g} s: narrow it, or allow more with --timeout"
    try:
        with open_snapshot(path, memory_limit=memory) as connection:
            _limit_memory(limit_bytes)
            with _time_limit(connection, timeout_s, too_long, output):
                write_rows(_rows(connection, text), form.value, output)
    except (duckdb.Error, MemoryError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise  # Of what is written to, and not of the query: Arrow makes an OSError of that too.
        raise _told(exc, too_long=too_long, memory=memory) from exc


def _told(exc: Exception, *, too_long: str, memory: str) -> "LedgerError":
    from tollbook.ledger.projection.snapshot import QueryCutOff, QueryFailed

    text = str(exc).strip().partition("\n")[0]
    if text.startswith("INTERRUPT"):
        return QueryCutOff(too_long)
    if isinstance(exc, MemoryError) or text.startswith("Out of Memory") or "allocation failure" in text:
        return QueryCutOff(f"the query was cut off at {memory} of memory: narrow it, or allow more with --memory")
    return QueryFailed(text)


def _rows(connection: "duckdb.DuckDBPyConnection", text: str) -> "pa.RecordBatchReader":
    return connection.execute(text).to_arrow_reader(2_048)


@contextmanager
def _time_limit(
    connection: "duckdb.DuckDBPyConnection", timeout_s: float, message: str, output: Path | None
) -> Generator[None]:
    """Interrupt the query when its time is over; end the process where that changes nothing."""
    from tollbook.views.files import remove_parts

    def give_up() -> None:
        # Some functions look for an interrupt only when they have done their work.
        if output is not None:
            remove_parts(output)
        os.write(2, f"tollbook: {message}\n".encode())
        os._exit(1)

    timers = (threading.Timer(timeout_s, connection.interrupt), threading.Timer(timeout_s + _GRACE_S, give_up))
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _limit_memory(limit_bytes: int) -> None:
    """Bound this process's memory, since DuckDB's own limit does not count what some functions take."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return  # Linux only; elsewhere DuckDB's own limit and the time limit hold.
    limit = used + limit_bytes + _HEADROOM_BYTES
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
