"""Heartbeats of gateways: a Redis key per gateway, renewed every second. A gateway without one has no running calls."""

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

_INTERVAL_S: Final = 1.0
SILENT_S: Final = 4.0
"""The expiry of a heartbeat: a gateway that was silent for this long has ended."""
_MAX_GAP_S: Final = SILENT_S - 2 * _INTERVAL_S
"""If the gap between two own heartbeats is longer, another gateway's heartbeat may have expired in it."""
PATIENCE_S: Final = SILENT_S + 2 * _INTERVAL_S
"""How long a retry waits to learn whether another gateway has ended."""


class Heartbeat:
    """Sends the heartbeat of one gateway, and checks those of others. `monotonic` is a clock in seconds."""

    def __init__(
        self, pipeline: CommandPipeline, namespace: str, name: str, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._pipeline = pipeline
        self._namespace = namespace
        self._name = name
        self._monotonic = monotonic
        self._last_beat_s = self._unbroken_since_s = -math.inf

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Send heartbeats for as long as this is open."""
        await self._beat()
        beating = asyncio.create_task(self._keep_beating())
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            with suppress(LedgerError, RedisError):
                await self._pipeline.execute("DEL", worker_key(self._namespace, self._name))

    async def is_alive(self, name: str) -> bool:
        """Whether a process, by its name, may still run. Errors: LedgerUnavailable.

        While Redis is down, no gateway can send a heartbeat. So a missing heartbeat counts only after this gateway's
        own heartbeat was unbroken for `SILENT_S`. Otherwise a running call would be taken over, and paid twice.
        """
        if name == self._name or await self._pipeline.execute("EXISTS", worker_key(self._namespace, name)):
            return True
        now_s = self._monotonic()
        return now_s - self._last_beat_s > _MAX_GAP_S or now_s - self._unbroken_since_s < SILENT_S  # G4

    async def is_dead(self, found: OpenCall) -> bool:
        """Whether the process of a run that holds money for a call has ended."""
        return not await self.is_alive(RunId.parse(found.worker).process)

    async def _keep_beating(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL_S)
            with suppress(LedgerError, RedisError):
                await self._beat()

    async def _beat(self) -> None:
        key = worker_key(self._namespace, self._name)
        await self._pipeline.execute("SET", key, "1", "PX", round(1000 * SILENT_S))
        now_s = self._monotonic()
        if now_s - self._last_beat_s > _MAX_GAP_S:
            self._unbroken_since_s = now_s
        self._last_beat_s = now_s
