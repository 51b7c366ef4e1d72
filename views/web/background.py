"""Runs long work of a page (audits, `doctor`) in a thread with an event loop of its own, with a timeout.

Audits read a user's whole history, and `doctor` reads disks; in the event loop of the calls, they would block these.
Only a few run at the same time, and the others wait.
"""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from tollbook.ledger.errors import LedgerUnavailable

_T = TypeVar("_T")
_LIMIT_S: Final = 30.0
_AT_A_TIME: Final = 2
_MAX_WAITING: Final = 8


class Background:
    """Runs at most `_AT_A_TIME` pieces of work at the same time."""

    def __init__(self, *, limit_s: float = _LIMIT_S) -> None:
        self._limit_s = limit_s
        self._threads = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="web-view-audit")
        self._waiting = 0

    async def run(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Return the result of `work`. Errors: those of `work`; LedgerUnavailable if it takes too long."""
        if self._waiting >= _MAX_WAITING:
            raise LedgerUnavailable("too many pages are requested at the same time: reload this one")
        self._waiting += 1
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._run, work)
        running.add_done_callback(self._end)
        return await asyncio.shield(running)

    def close(self) -> None:
        """Accept no more work. Running work ends by its timeout."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _end(self, running: "asyncio.Future[Any]") -> None:
        self._waiting -= 1
        if not running.cancelled():
            running.exception()  # Retrieved, so that asyncio logs nothing if no page waits any more.

    def _run(self, work: Callable[[], Awaitable[_T]]) -> _T:
        async def limited() -> _T:
            async with asyncio.timeout(self._limit_s):
                return await work()

        try:
            return asyncio.run(limited())
        except TimeoutError:
            raise LedgerUnavailable(f"this took longer than {self._limit_s:.0f} s; the command has no limit") from None
