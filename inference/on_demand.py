"""A resource that is opened at its first use, so that an application can start before the servers that it uses."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Generic, TypeVar

T = TypeVar("T")


class OnDemand(Generic[T]):
    """Opens a resource at its first use, and closes it at the end.

    Concurrent callers share one attempt to open it; after a failure, the next caller tries again.
    """

    def __init__(self, open_resource: Callable[[AsyncExitStack], Awaitable[T]]) -> None:
        """`open_resource` pushes cleanups onto the stack; they run at the end, or at once if it raises."""
        self._open_resource = open_resource
        self._opening: asyncio.Task[T] | None = None
        self._stack = AsyncExitStack()

    async def get(self) -> T:
        """Return the resource, and open it first if needed. Errors: those of opening it."""
        opening = self._opening
        if opening is None or (opening.done() and (opening.cancelled() or opening.exception() is not None)):
            opening = self._opening = asyncio.create_task(self._open())
        # Shielded, since others may wait for the same attempt.
        return await asyncio.shield(opening)

    async def aclose(self) -> None:
        """Close the resource, if it was opened."""
        opening, self._opening = self._opening, None
        if opening is not None and not opening.done():
            opening.cancel()
            await asyncio.wait({opening})
        await self._stack.aclose()

    async def _open(self) -> T:
        async with AsyncExitStack() as stack:
            resource = await self._open_resource(stack)
            self._stack = stack.pop_all()
        return resource
