"""Waiting for results: one subscription for all waiting tasks of a process.

Each result is announced on a channel with the name of its key. A waiting task is woken when the
subscription is in place (earlier announcements were missed), and at each announcement; it then
reads the key. An announcement can still be missed during a reconnect, since pub/sub keeps
nothing; so a waiting task must also read the key from time to time.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.refusals import reason_of

_RECONNECT_S: Final = 1.0
_log = LazyLogger(__name__)


class Arrivals:
    """The channels with waiting tasks, over one connection that is open while there are any."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._listener: asyncio.Task[None] | None = None
        self._pubsub: PubSub | None = None
        # Commands of one subscription must not overlap while its connection is made.
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def expected(self, channels: Sequence[str]) -> AsyncGenerator[asyncio.Event]:
        """Yield an event that is set when a result may have arrived; clear it before reading the key."""
        woken = asyncio.Event()
        for channel in channels:
            self._waiting.setdefault(channel, set()).add(woken)
        try:
            await self._listen_to(channels)
            yield woken
        finally:
            await self._leave(channels, woken)

    async def _listen_to(self, channels: Sequence[str]) -> None:
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen())
            return
        async with self._lock:
            if self._pubsub is not None:
                # The listener repairs a lost connection, and then subscribes to all channels again.
                with contextlib.suppress(RedisError, OSError):
                    await self._pubsub.subscribe(*channels)

    async def _leave(self, channels: Sequence[str], woken: asyncio.Event) -> None:
        for channel in channels:
            self._waiting[channel].discard(woken)
        unused = [channel for channel in channels if not self._waiting[channel]]
        for channel in unused:
            del self._waiting[channel]
        if not self._waiting:
            listener, self._listener = self._listener, None
            if listener is not None:
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)
        elif unused:
            async with self._lock:
                if self._pubsub is not None:
                    # Another task may wait for the same channel by now.
                    left = [channel for channel in unused if channel not in self._waiting]
                    with contextlib.suppress(RedisError, OSError):
                        if left:
                            await self._pubsub.unsubscribe(*left)  # pyright: ignore[reportUnknownMemberType]

    async def _listen(self) -> None:
        last_problem = ""
        while True:
            pubsub = self._redis.pubsub()  # pyright: ignore[reportUnknownMemberType]
            try:
                async with self._lock:
                    await pubsub.subscribe(*self._waiting)
                    self._pubsub = pubsub
                last_problem = ""
                while True:
                    self._wake(cast("dict[str, Any] | None", await pubsub.get_message(timeout=None)))
            except (RedisError, OSError) as exc:
                # Logged once, not at each try: a Redis user without rights on channels never gets a message.
                if (problem := reason_of(exc)) != last_problem:
                    _log.warning("arrivals.connection_lost", problem=problem)
                last_problem = problem
                await asyncio.sleep(_RECONNECT_S)
            finally:
                if self._pubsub is pubsub:
                    self._pubsub = None
                await pubsub.aclose()

    def _wake(self, message: dict[str, Any] | None) -> None:
        if message is None or message["type"] not in ("subscribe", "message"):
            return
        channel = message["channel"]
        name = channel.decode() if isinstance(channel, bytes) else str(channel)
        for event in self._waiting.get(name, ()):
            event.set()
