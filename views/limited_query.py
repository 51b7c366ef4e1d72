"""Runs a user's query on a copy of the projection, in this process, with limits on time and memory.

The process has the lowest priority and limited memory, and it exits if DuckDB does not interrupt a query. So no query
can slow a budget check or use up the machine's memory.
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
# Memory for reading and printing, in addition to that of the query.
_HEADROOM_BYTES: Final = 512 * 2**20


def give_way() -> None:
    """Use only processor time that others leave, so that a budget check does not wait for a query.

    Priority alone is not enough on Linux: it applies only within a session (autogroup), and a process that wakes up in
    another session waits for the next tick, 4 ms on many machines. So the query yields its processor 1,000 times a
    second.
    """
    os.nice(_NICE)
    if sys.platform != "linux":
        return
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # A handler of the C library: one in Python would run only after DuckDB has finished.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGALRM, ctypes.cast(libc.sched_yield, ctypes.c_void_p))
    signal.setitimer(signal.ITIMER_REAL, _YIELD_EVERY_S, _YIELD_EVERY_S)


def write_query(path: Path, query: str, form: Format, output: Path | None, *, timeout_s: float, memory: str) -> None:
    """Write the rows of one SELECT over the projection at `path`.

    Errors: QueryRefused; QueryCutOff; QueryFailed; LedgerUnavailable; OSError if the output cannot be written;
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
            raise  # An error of the output. Arrow also raises OSError for errors of the query, but without errno.
        raise _translate(exc, too_long=too_long, memory=memory) from exc


def _translate(exc: Exception, *, too_long: str, memory: str) -> LedgerError:
    # DuckDB's hints (Did you mean, Candidate bindings) come between the problem and the place in the query.
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
    """Interrupt the query at its timeout; if that has no effect, exit the process."""

    def give_up() -> None:
        # Some functions of DuckDB check for an interrupt only when they have finished.
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
    """Limit this process's memory, because DuckDB's own limit does not include the memory of some functions."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as status:
            used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    except (OSError, StopIteration):
        return  # Linux only; elsewhere, DuckDB's own limit and the timeout apply.
    limit = used + limit_bytes + _HEADROOM_BYTES
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
