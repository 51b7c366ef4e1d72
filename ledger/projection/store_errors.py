"""The meaning of DuckDB's errors, for the projection's file and for other databases.

Owns the classification: a lock, a full disk, no memory, a damaged or a changed file. It opens and changes nothing.
"""

from pathlib import Path
from typing import Final

import duckdb

from tollbook.ledger.errors import BaselineUnavailable, LedgerError, LedgerRefused

_NO_ROOM: Final = ("No space", "quota", "File too large", "Read-only", "Permission denied", "Out of Memory")
_DATABASE_ERRORS: Final = (
    duckdb.ConnectionException,
    duckdb.FatalException,
    duckdb.InternalException,
    duckdb.InterruptException,
    duckdb.IOException,
)


class StoreLocked(LedgerRefused):
    """Another process has the DuckDB file open; one projector at a time."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path} is open in another process: stop the other projector, or query it with `tollbook sql` ({problem})"
        )
        self.path = path


class StoreFailed(LedgerRefused):
    """DuckDB could not write: the disk is full or the file is damaged. Nothing was folded."""

    @property
    def is_recoverable(self) -> bool:
        """Whether the same file can be used again once there is room on the disk, or permission to write."""
        return any(words in str(self) for words in _NO_ROOM)


class StoreOutOfMemory(StoreFailed):
    """DuckDB could not get more memory, because of its own limit or the machine's. The file is unchanged."""

    def __init__(self, path: Path, limit: str, problem: object) -> None:
        super().__init__(f"{path}: {no_memory(limit)} ({str(problem).splitlines()[0]:.200})")

    @property
    def is_recoverable(self) -> bool:
        """True: the file is intact."""
        return True


class StoreChanged(StoreFailed):
    """The file differs from what was folded into it: somebody changed it. It is set aside and rebuilt."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"the DuckDB file was changed, but not by the fold: {problem}")


class StoreClosed(BaselineUnavailable):
    """The store was closed."""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether DuckDB, Arrow or Python could not get memory. Any error of DuckDB may say so in its text."""
    texts = ("Out of Memory", "bad_alloc", "llocation failure", "failed to allocate")
    return isinstance(exc, duckdb.OutOfMemoryException | MemoryError) or any(text in str(exc) for text in texts)


def no_memory(limit: str) -> str:
    """Return the sentence that the projector has too little memory, and what to do."""
    return (
        f"DuckDB cannot get the memory that it needs, its limit is {limit}: raise TOLLBOOK_DUCKDB_MEMORY, "
        "or give this machine more free memory"
    )


def read_error(
    exc: duckdb.Error, what: str, *, is_closed: bool, memory_limit: str | None = None
) -> LedgerError | duckdb.Error:
    """Return the error to raise when reading `what` failed; `memory_limit` is that of the projector's database.

    StoreClosed if it was closed meanwhile, whatever DuckDB then says (`No open result set` for a running query);
    BaselineUnavailable if the database itself fails; otherwise `exc`, since the query is wrong.
    """
    if is_closed:
        return StoreClosed(f"{what} is closed")
    if memory_limit is not None and is_out_of_memory(exc):
        return BaselineUnavailable(f"DuckDB cannot read {what}: {no_memory(memory_limit)} (Out of Memory)")
    if isinstance(exc, _DATABASE_ERRORS):
        return BaselineUnavailable(f"DuckDB cannot read {what}: {exc}")
    return exc
