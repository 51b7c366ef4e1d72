"""The places in which a stream's calls run at once."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Slot:
    """One place of a stream, taken and given back by one delivery."""

    def __init__(self, slots: asyncio.Semaphore, *, is_held: bool) -> None:
        self._slots = slots
        self._is_held = is_held

    async def acquire(self) -> None:
        """Take a place, if this delivery has none; wait for one."""
        if not self._is_held:
            await self._slots.acquire()
            self._is_held = True

    def release(self) -> None:
        """Give the place back, if this delivery has one."""
        if self._is_held:
            self._is_held = False
            self._slots.release()

    @asynccontextmanager
    async def given_back(self) -> AsyncGenerator[None]:
        """Let others have the place meanwhile; it is waited for at the end."""
        self.release()
        yield
        await self.acquire()
