"""A clock of the running event loop that a test can set forward, so that timers of hours are due at once."""

import asyncio


class LoopClock:
    """Sets the clock forward that `asyncio.sleep`, `asyncio.timeout` and `call_later` of one loop use."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._ahead_s = 0.0
        real_time = loop.time
        # An event loop asks itself for the time, so this is the only clock that it has.
        loop.time = lambda: real_time() + self._ahead_s

    def advance(self, seconds: float) -> None:
        """Let time pass. Timers that are due then run at the next turn of the loop."""
        self._ahead_s += seconds
