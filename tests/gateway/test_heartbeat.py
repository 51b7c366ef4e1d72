"""Which gateways count as ended: those without a heartbeat, while this gateway's own heartbeat is kept in Redis."""

from typing import Any, cast

import pytest

from tollbook.gateway.heartbeat import SILENT_S, Heartbeat
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import worker_key


class Signs:
    """The heartbeats in Redis, which can be away."""

    def __init__(self) -> None:
        self.shown: set[str] = set()
        self.is_away = False

    async def execute(self, command: str, key: str, *_: object) -> int:
        if self.is_away:
            raise LedgerUnavailable("away")
        if command == "SET":
            self.shown.add(key)
        return int(key in self.shown)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def keep_showing(heartbeat: Heartbeat, clock: Clock) -> None:
    for _ in range(round(SILENT_S) + 1):
        clock.now_s += 1
        await heartbeat._beat()


async def test_silence_of_others_counts_only_while_the_own_heartbeat_is_kept() -> None:
    """G4: after an outage every heartbeat has expired, also of working gateways; their calls must not be taken over."""
    redis, clock = Signs(), Clock()
    heartbeat = Heartbeat(cast("Any", redis), "tollbook", "here", monotonic=clock)
    await heartbeat._beat()
    redis.shown.add(worker_key("tollbook", "works"))

    assert await heartbeat.is_alive("here")
    assert await heartbeat.is_alive("works")
    assert await heartbeat.is_alive("gone"), "this gateway has just begun: the other may not have had the time"
    await keep_showing(heartbeat, clock)
    assert not await heartbeat.is_alive("gone")

    redis.is_away = True
    clock.now_s += 3 * SILENT_S
    redis.shown.clear()
    with pytest.raises(LedgerUnavailable):
        await heartbeat.is_alive("works")
    redis.is_away = False
    assert await heartbeat.is_alive("works"), "asked before this one could show its own sign again"
    await heartbeat._beat()
    assert await heartbeat.is_alive("works"), "its sign ran out with the outage"
    await keep_showing(heartbeat, clock)
    assert not await heartbeat.is_alive("works")


async def test_an_outage_that_just_outlasts_another_heartbeat_is_seen_too() -> None:
    """Two gateways do not renew their heartbeats at the same moment: the other's may expire first."""
    redis, clock = Signs(), Clock()
    heartbeat = Heartbeat(cast("Any", redis), "tollbook", "here", monotonic=clock)
    await keep_showing(heartbeat, clock)
    clock.now_s += SILENT_S - 0.4
    await heartbeat._beat()
    assert await heartbeat.is_alive("works")
