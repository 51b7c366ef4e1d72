"""Slots: they limit how many calls of a stream run at the same time."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Slot:
    """One delivery's slot of a stream."""

    def __init__(self, slots: asyncio.Semaphore, *, is_held: bool) -> None:
        self._slots = slots
        self._is_held = is_held

    async def acquire(self) -> None:
        """Take a slot unless this delivery has one; wait until one is free."""
        if not self._is_held:
            await self._slots.acquire()
            self._is_held = True

    def release(self) -> None:
        """Give the slot back, if this delivery has one."""
        if self._is_held:
            self._is_held = False
            self._slots.release()

    @asynccontextmanager
    async def released(self) -> AsyncGenerator[None]:
        """Release the slot for the duration of the context, then wait for a slot again."""
        self.release()
        yield
        await self.acquire()
