"""The queue of alerts: a Redis stream with a consumer group for each receiver.

An alert stays pending for a receiver until the receiver has taken it, even if the delivering process dies.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.ledger.keys import alert_receivers, alerts
from tollbook.ledger.server.connection import as_map
from tollbook.schemas.alerts import Alert

_MAX_ALERTS: Final = 10_000
_CONSUMER: Final = "tollbook"
"""Every delivering process uses this name, so that a new process finds the unfinished deliveries of the last one."""


@dataclass(frozen=True, slots=True)
class Queued:
    """An alert and its entry in the queue. `alert` is None if the entry cannot be read."""

    entry_id: str
    alert: Alert | None


@dataclass(frozen=True, slots=True)
class ReceiverState:
    """State of the deliveries to one receiver. Moments are milliseconds since the epoch, None if there was none."""

    name: str
    waiting: int = 0
    """Alerts that it has not taken yet."""
    delivered: int = 0
    dropped: int = 0
    """Alerts given up after a day of failures."""
    delivered_at_ms: int | None = None
    failing_since_ms: int | None = None
    problem: str | None = None
    """Why the last delivery failed; None once one has succeeded."""


@dataclass(slots=True)
class AlertQueue:
    """The alerts of one Tollbook. Errors of every method: redis.RedisError."""

    redis: Redis
    namespace: str
    _key: str = field(init=False)
    _states: str = field(init=False)

    def __post_init__(self) -> None:
        """Set the names of the keys."""
        self._key, self._states = alerts(self.namespace), alert_receivers(self.namespace)

    async def put(self, alert: Alert) -> None:
        """Queue an alert for every receiver. Beyond 10,000 alerts, the oldest are dropped."""
        fields = {b"alert": alert.model_dump_json(exclude_none=True).encode()}
        await self.redis.xadd(self._key, cast(Any, fields), maxlen=_MAX_ALERTS, approximate=True)

    async def add_receiver(self, name: str) -> None:
        """Create the group of a receiver; the receiver gets the alerts raised from now on."""
        try:
            await self.redis.xgroup_create(self._key, name, id="$", mkstream=True)
        except ResponseError as exc:
            if not str(exc).startswith("BUSYGROUP"):
                raise

    async def keep_receivers(self, names: set[str]) -> None:
        """Forget the receivers that are no longer configured."""
        for state in await self.states():
            if state.name not in names:
                with suppress(ResponseError):  # There is no queue (yet).
                    await self.redis.xgroup_destroy(self._key, state.name)
                await self.redis.hdel(self._states, state.name)

    async def read(self, receiver: str, *, after: str, count: int, block_ms: int | None = None) -> list[Queued]:
        """Return alerts for a receiver: new ones if `after` is `>`, else its pending ones after that entry id."""
        found = cast(
            "list[Any] | dict[Any, Any] | None",
            await self.redis.xreadgroup(receiver, _CONSUMER, {self._key: after}, count=count, block=block_ms),
        )
        entries: list[Queued] = []
        for _, items in found.items() if isinstance(found, dict) else found or []:
            # redis-py nests the entries of one stream once more in RESP3.
            flat = items[0] if items and isinstance(items[0], list) else items
            entries += [Queued(entry_id.decode(), _alert(fields)) for entry_id, fields in flat]
        return entries

    async def take(self, receiver: str, entry_id: str) -> None:
        """Note that a receiver has taken an alert."""
        await self.redis.xack(self._key, receiver, entry_id)

    async def write_state(self, state: ReceiverState) -> None:
        """Store the state of a receiver, for commands and metrics."""
        document = {
            name: getattr(state, name) for name in ReceiverState.__dataclass_fields__ if name not in ("name", "waiting")
        }
        await self.redis.hset(self._states, state.name, json.dumps(document))

    async def states(self) -> list[ReceiverState]:
        """Return the state of every receiver, sorted by name."""
        return await receiver_states(self.redis.execute_command, self.namespace)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


async def receiver_states(execute: Callable[..., Awaitable[Any]], namespace: str) -> list[ReceiverState]:
    """Return the state of every receiver, sorted by name. Errors: those of `execute`, which sends a Redis command."""
    stored = {
        name.decode(): json.loads(value)
        for name, value in as_map(await execute("HGETALL", alert_receivers(namespace))).items()
    }
    waiting = await _waiting(execute, namespace)
    return [
        replace(ReceiverState(name), **stored.get(name, {}), waiting=waiting.get(name, 0))
        for name in sorted(stored.keys() | waiting.keys())
    ]


async def _waiting(execute: Callable[..., Awaitable[Any]], namespace: str) -> dict[str, int]:
    """Return, by receiver, how many alerts it has not taken."""
    try:
        groups = [as_map(reply) for reply in await execute("XINFO", "GROUPS", alerts(namespace))]
    except ResponseError:
        return {}  # There is no queue (yet).
    return {group[b"name"].decode(): int(group[b"pending"]) + int(group.get(b"lag") or 0) for group in groups}


def _alert(fields: Mapping[bytes, bytes] | None) -> Alert | None:
    try:
        return Alert.model_validate_json((fields or {})[b"alert"])
    except (KeyError, ValueError):
        return None  # The entry was trimmed off the stream, or written by hand.
