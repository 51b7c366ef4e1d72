"""A query of one's own over a copy of the projection, in this process and within limits of time and memory.

The process gives way to others, has a bounded memory, and ends itself if DuckDB does not let a query be interrupted,
so that no query can slow a budget check or take the machine's memory.
"""

import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import duckdb

from tollbook.ledger.errors import LedgerError
from tollbook.ledger.projection.snapshot import QueryCutOff, QueryFailed, check_select, memory_bytes, open_snapshot
from tollbook.views.files import remove_parts
from tollbook.views.rows import Format, write_rows

_NICE: Final = 15
_YIELD_EVERY_S: Final = 0.001
_GRACE_S: Final = 2.0
# What reading and printing need beside the memory of the query itself.
_HEADROOM_BYTES: Final = 512 * 2**20


def give_way() -> None:
    """Use only processor time that others leave, so that a budget check does not wait for a query.

    Priority alone is not enough on Linux: it counts within a session only (autogroup), and a process that wakes up in
    another session waits for the next tick, 4 ms on many machines. So the query offers its processor a thousand times
    a second.
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


def write_query(path: Path, query: str, form: Format, output: Path | None, *, timeout_s: float, memory: str) -> None:
    """Write the rows of one SELECT over the projection at `path`.

    Errors: QueryRefused; QueryCutOff; QueryFailed; LedgerUnavailable; OSError where the output cannot be written;
        ValueError if `memory` is not a size (see `memory_bytes`).
    """
    limit_bytes = memory_bytes(memory)
    check_select(query)
    too_long = f"the query was cut off after {timeout_s:g} s: narrow it, or allow more with --timeout"
    try:
        with open_snapshot(path, memory_limit=memory) as connection:
            _limit_memory(limit_bytes)
            with _time_limit(connection, timeout_s, too_long, output):
                write_rows(connection.execute(query).to_arrow_reader(2_048), form, output)
    except (duckdb.Error, MemoryError, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:
            raise  # Of what is written to, and not of the query: Arrow makes an OSError of that too.
        raise _translate(exc, too_long=too_long, memory=memory) from exc


def _translate(exc: Exception, *, too_long: str, memory: str) -> LedgerError:
    # DuckDB's hints (Did you mean, Candidate bindings) stand between the problem and the place in the query.
    text = " ".join(str(exc).partition("\n\nLINE ")[0].split())
    if text.startswith("INTERRUPT"):
        return QueryCutOff(too_long)
    if isinstance(exc, MemoryError) or text.startswith("Out of Memory") or "allocation failure" in text:
        return QueryCutOff(f"the query was cut off at {memory} of memory: narrow it, or allow more with --memory")
    return QueryFailed(text)


@contextmanager
def _time_limit(
    connection: duckdb.DuckDBPyConnection, timeout_s: float, message: str, output: Path | None
) -> Generator[None]:
    """Interrupt the query when its time is over; end the process where that changes nothing."""

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
