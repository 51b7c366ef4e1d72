"""A running call of one client: its deltas, its end, and what happens when the client leaves.

The call is an asyncio task of its own. If the client of an unstreamed answer leaves, the call is finished anyway: the
provider bills it in full, and a retry finds the answer. A stream that has begun is cancelled, because nobody reads it.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from tollbook.gateway.problems import Problem
from tollbook.inference.deltas import OnDelta
from tollbook.schemas.results import InferenceResult

_MAX_UNREAD: Final = 16
"""Deltas that are buffered for a slow reader; after that, the provider has to wait."""
RETRY_GRACE_S: Final = 15.0
"""How long a stream goes on after its client left before the first byte, so that a retry can join it."""
WhileWaiting = Callable[[], AbstractAsyncContextManager[None]]
Make = Callable[[OnDelta | None, WhileWaiting], Awaitable[InferenceResult]]
"""Makes a call. The second argument returns a context that is open while the call waits for other calls' holds."""


class RunningCall:
    """One call, started at once. With `is_streamed`, read its deltas with `next_delta`."""

    def __init__(self, call_id: str, make: Make, *, is_streamed: bool) -> None:
        self.call_id = call_id
        # The queue is unbounded, so that the end mark never waits for a client that does not read.
        self._deltas: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MAX_UNREAD)
        self._is_abandoned = False
        self._waits = 0
        self._begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._is_read = is_streamed
        self.task = asyncio.create_task(self._run(make, is_streamed=is_streamed))

    @property
    def is_abandoned(self) -> bool:
        """Whether its client has left."""
        return self._is_abandoned

    @property
    def unread(self) -> int:
        """Deltas that its client has not read."""
        return self._deltas.qsize()

    async def result(self) -> InferenceResult:
        """Wait for the result. If the waiter is cancelled, the call goes on.

        Errors: those of the call; Problem (503) if the call was cancelled because the gateway stops.
        """
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self.task.cancelled():
                raise shutting_down() from None
            raise

    async def has_delta(self) -> bool:
        """Wait for the first delta or the end; return whether there is a delta. Errors: as of `result`."""
        if await asyncio.shield(self._begun):
            return True
        await self.result()
        return False

    async def next_delta(self) -> Mapping[str, Any] | None:
        """Return the next delta; None at the end."""
        delta = await self._deltas.get()
        if delta is not None:
            self._room.release()
        return delta

    def end(self) -> None:
        """Cancel the call: the connection to the provider is closed, and the cost is looked up."""
        self.task.cancel()

    def detach_client(self) -> None:
        """Let the call go on without its client. A call that still waits for money is cancelled.

        A retry waits for the money itself.
        """
        self._is_abandoned, self._is_read = True, False
        while not self._deltas.empty():
            self._deltas.get_nowait()
            self._room.release()
        if self._waits:
            self.end()

    async def _run(self, make: Make, *, is_streamed: bool) -> InferenceResult:
        try:
            return await make(self._put if is_streamed else None, self._waiting)
        finally:
            self._tell(has_delta=False)
            if self._is_read:
                self._deltas.put_nowait(None)

    async def _put(self, delta: Mapping[str, Any]) -> None:
        if self._is_read:
            self._tell(has_delta=True)
            await self._room.acquire()
            if self._is_read:
                self._deltas.put_nowait(delta)
            else:
                self._room.release()

    @asynccontextmanager
    async def _waiting(self) -> AsyncGenerator[None]:
        if self._is_abandoned:
            self.end()  # Takes effect at the next await.
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def _tell(self, *, has_delta: bool) -> None:
        if not self._begun.done():
            self._begun.set_result(has_delta)


def shutting_down() -> Problem:
    """Return the problem of a request that comes while the gateway shuts down."""
    message = "the gateway is shutting down; send the request again"
    return Problem(503, "gateway_stopping", message, kind="server_error", retry_after_s=1)
