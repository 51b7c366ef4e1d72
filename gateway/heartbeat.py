"""Signs that a gateway works, renewed every second: whose has ended has no calls under way any more."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from redis.exceptions import RedisError

from tollbook.inference.calls.call import RunId
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.requests import OpenCall
from tollbook.ledger.keys import worker_key
from tollbook.ledger.server.pipeline import CommandPipeline

_RENEWED_S: Final = 1.0
SILENT_S: Final = 4.0
"""A gateway that was silent for so long has ended."""
_GAP_S: Final = SILENT_S - 2 * _RENEWED_S
"""From such a gap between its own signs on, another gateway's may have run out meanwhile."""
PATIENCE_S: Final = SILENT_S + 2 * _RENEWED_S
"""How long a retry waits to learn whether another gateway has ended."""


class Heartbeat:
    """The sign of one gateway, and a look at those of others. `monotonic` is a clock in seconds."""

    def __init__(
        self, pipeline: CommandPipeline, namespace: str, name: str, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._pipeline = pipeline
        self._namespace = namespace
        self._name = name
        self._monotonic = monotonic
        self._shown_s = self._unbroken_since_s = -math.inf

    @asynccontextmanager
    async def shown(self) -> AsyncGenerator[None]:
        """Show the sign for as long as this is open."""
        await self._show()
        showing = asyncio.create_task(self._keep_showing())
        try:
            yield
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
            with suppress(LedgerError, RedisError):
                await self._pipeline.execute("DEL", worker_key(self._namespace, self._name))

    async def is_alive(self, name: str) -> bool:
        """Whether a process, by its name, may still work. Errors: LedgerUnavailable.

        While Redis was away nobody could show a sign. So the silence of others counts only once this gateway's own sign
        has stood for as long: else a call that runs would be taken over, and paid twice.
        """
        if name == self._name or await self._pipeline.execute("EXISTS", worker_key(self._namespace, name)):
            return True
        now_s = self._monotonic()
        return now_s - self._shown_s > _GAP_S or now_s - self._unbroken_since_s < SILENT_S  # G4

    async def is_dead(self, found: OpenCall) -> bool:
        """Whether the run that holds money for a call has ended with its process."""
        return not await self.is_alive(RunId.parse(found.worker).process)

    async def _keep_showing(self) -> None:
        while True:
            await asyncio.sleep(_RENEWED_S)
            with suppress(LedgerError, RedisError):
                await self._show()

    async def _show(self) -> None:
        key = worker_key(self._namespace, self._name)
        await self._pipeline.execute("SET", key, "1", "PX", round(1000 * SILENT_S))
        now_s = self._monotonic()
        if now_s - self._shown_s > _GAP_S:
            self._unbroken_since_s = now_s
        self._shown_s = now_s
