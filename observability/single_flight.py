"""Computes an answer once for all concurrent callers, and caches it for a while."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Caches the result of `make` for `keep_s` seconds. Callers get it, or wait together for the next one."""

    def __init__(
        self, make: Callable[[], Awaitable[T]], *, keep_s: float = 1.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._make = make
        self._keep_s = keep_s
        self._monotonic = monotonic
        self._kept: tuple[float, T] | None = None
        self._making: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """Return an answer that is at most `keep_s` old. Errors: those of `make`, to all who wait for it."""
        if self._kept is not None and self._monotonic() - self._kept[0] < self._keep_s:
            return self._kept[1]
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._renew())
        # Shielded: a cancelled caller must not cancel the answer of the others.
        return await asyncio.shield(self._making)

    async def _renew(self) -> T:
        answer = await self._make()
        self._kept = (self._monotonic(), answer)
        return answer
