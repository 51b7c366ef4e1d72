"""A call under way for one client: its deltas, its end, and what happens when the client leaves.

The call is a task of its own. Whole answers are finished although the client has left: the provider bills them in full,
and a retry finds the answer. A stream that has begun is cut off upstream, since nobody reads on.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from tollbook.gateway.problems import Problem
from tollbook.inference.deltas import OnDelta
from tollbook.schemas.results import InferenceResult

_MAX_UNREAD: Final = 16
"""Deltas that wait for a slow reader; then the provider waits."""
RETRY_GRACE_S: Final = 15.0
"""How long a stream whose client left before its first byte goes on, for its retry to join it."""
WhileWaiting = Callable[[], AbstractAsyncContextManager[None]]
Make = Callable[[OnDelta | None, WhileWaiting], Awaitable[InferenceResult]]
"""Makes a call; what the second argument returns is open while the call waits for other calls' holds."""


class RunningCall:
    """One call, begun at once. With `is_streamed`, its deltas are to be read by `next_delta`."""

    def __init__(self, call_id: str, make: Make, *, is_streamed: bool) -> None:
        self.call_id = call_id
        # The end has room beside the deltas: it must not wait for a client that never reads.
        self._deltas: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MAX_UNREAD)
        self._has_left = False
        self._waits = 0
        self._begun: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._is_read = is_streamed
        self.task = asyncio.create_task(self._run(make, is_streamed=is_streamed))

    @property
    def has_left(self) -> bool:
        """Whether its client has gone."""
        return self._has_left

    @property
    def unread(self) -> int:
        """Deltas that its client has not read."""
        return self._deltas.qsize()

    async def result(self) -> InferenceResult:
        """Wait for the result; whoever is cancelled meanwhile leaves the call running.

        Errors: those of the call; Problem (503) where it was ended because the gateway stops.
        """
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            if self.task.cancelled():
                raise stopping() from None
            raise

    async def begun(self) -> bool:
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
        """End the call: the connection to the provider is closed, and what it cost is found out."""
        self.task.cancel()

    def leave(self) -> None:
        """Let the call go on without its client; one that waits for money ends, since nobody would have its answer.

        A retry asks for the money itself.
        """
        self._has_left, self._is_read = True, False
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
        if self._has_left:
            self.end()  # With the next step.
        self._waits += 1
        try:
            yield
        finally:
            self._waits -= 1

    def _tell(self, *, has_delta: bool) -> None:
        if not self._begun.done():
            self._begun.set_result(has_delta)


def stopping() -> Problem:
    """Return that the gateway stops."""
    message = "the gateway stops; send the request again"
    return Problem(503, "gateway_stopping", message, kind="server_error", retry_after_s=1)
