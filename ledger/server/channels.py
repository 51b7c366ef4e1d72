"""Channels: messages between processes over Redis pub/sub, which stores none of them.

For baselines and for calls that wait for money; `arrivals.py` listens for results, on many short-lived channels. On a
cluster a subscription can be at any node, since nodes forward messages to each other.

A message can be lost: during a reconnect, or when no process listens. So requests must be repeated.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import reason_of

_FIRST_PAUSE_S: Final = 0.1
_MAX_PAUSE_S: Final = 1.0
_SILENCE_S: Final = 5.0
_log = LazyLogger(__name__)


async def publish(pipeline: CommandPipeline, channel: str, message: str) -> int:
    """Send a message; return how many processes received it, as far as is known.

    On a cluster at least 1: a node forwards messages to the others, but counts only its own listeners.

    Errors: as `CommandPipeline.execute`.
    """
    heard = int(await pipeline.execute("PUBLISH", channel, message))
    return heard or int(pipeline.is_on_cluster)


class Subscription:
    """Some channels over one connection, which reconnects whenever it is lost.

    `in_place` is set while all channels are subscribed. `problem` is why they are not, or empty.
    """

    def __init__(
        self,
        redis: Redis,
        channels: Sequence[str],
        on_message: Callable[[str, bytes], None],
        *,
        max_silence_s: float = _SILENCE_S,
    ) -> None:
        """`on_message` is called with a channel and a message, and must not raise.

        `max_silence_s`: after this time without a message, the server is pinged; the connection is closed if no answer
        comes within the same time again.
        """
        self.in_place = asyncio.Event()
        self.problem = ""
        self._redis = redis
        self._channels = tuple(channels)
        self._on_message = on_message
        self._max_silence_s = max_silence_s

    async def run(self) -> None:
        """Listen until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            pubsub = self._redis.pubsub()  # pyright: ignore[reportUnknownMemberType]
            try:
                await pubsub.subscribe(*self._channels)
                await self._receive(pubsub)
            except (RedisError, OSError) as exc:
                if self.in_place.is_set():
                    pause_s = _FIRST_PAUSE_S
                # Logged once, not at each try: a Redis user without rights on channels never gets a message.
                if (problem := reason_of(exc)) != self.problem:
                    _log.warning("channels.connection_lost", problem=problem, channel=self._channels[0])
                self.problem = problem
            finally:
                self.in_place.clear()
                await pubsub.aclose()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _receive(self, pubsub: PubSub) -> None:
        """Errors: RedisError, OSError when the connection is lost; TimeoutError, an OSError, when it is silent."""
        confirmed: set[bytes] = set()
        is_asked = False
        while True:
            message = cast("dict[str, Any] | None", await pubsub.get_message(timeout=self._max_silence_s))
            if message is None:
                # A connection that a firewall has dropped looks like an idle one.
                if is_asked:
                    raise TimeoutError(f"no answer within {self._max_silence_s:g} s")
                await pubsub.ping()  # pyright: ignore[reportUnknownMemberType]
                is_asked = True
                continue
            is_asked = False
            if message["type"] == "subscribe":
                confirmed.add(message["channel"])
                if len(confirmed) == len(self._channels):
                    self.problem = ""
                    self.in_place.set()
            elif message["type"] == "message":
                self._on_message(message["channel"].decode(), message["data"])
