"""Sends event streams at their own pace, or only a part of one if a fault says so.

The generated part is charged, even if the client disconnects in mid-answer. The charge is in the book before the client
can see the end.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(kw_only=True)
class PacedStream:
    """A stream that has begun. `pause_s` is the pause after each event; `charge` is called with the sent share.

    `stopping` ends a hanging stream; `error` is the event that reports an error.
    """

    request: web.Request
    response: web.StreamResponse
    events: Sequence[bytes]
    error: bytes
    charge: Callable[[float], None]
    stopping: asyncio.Event
    pause_s: float = 0.0
    _sent: int = field(default=0, init=False)

    async def send(self, fault: str | None = None) -> web.StreamResponse:
        """Send the events; with a fault, send half of them and play the fault."""
        # The last but one event has the cost of the whole answer, so the whole answer is charged before it is sent.
        last, total = len(self.events) - 1, len(self.events) - 2
        is_charged = False
        try:
            for event in self.events[: last // 2 + 1] if fault else self.events:
                if self._sent >= total and not fault and not is_charged:
                    is_charged = True
                    self.charge(1.0)
                await self.response.write(event)
                self._sent += 1
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
            if fault:
                await self._break_off(fault)
        finally:
            if not is_charged and fault != "stream_error":
                self.charge(self._sent / len(self.events))
        if fault != "stream_reset":
            await self.response.write_eof()
        return self.response

    async def _break_off(self, fault: str) -> None:
        match fault:
            case "stream_half_event":
                following = self.events[self._sent]
                await self.response.write(following[: len(following) // 2])
            case "stream_error":
                await self.response.write(self.error)
            case "stream_hang":
                await self.stopping.wait()
            case "stream_reset" if self.request.transport is not None:
                self.request.transport.abort()
            case _:
                pass  # The stream just ends.
