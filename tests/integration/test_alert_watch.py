"""Alerts about the system: raised when a condition begins, and again only after it has ended."""

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.gate_bench import open_bench
from tollbook.consumers.alert_tidying import AlertTidying, is_over
from tollbook.consumers.alerts.queue import AlertQueue
from tollbook.inference.settings import load_settings
from tollbook.ledger.projection.follower import Lag
from tollbook.observability.alert_watch import AlertWatch, Spend, conditions
from tollbook.observability.facts import Facts
from tollbook.observability.metrics import MetricsPage
from tollbook.observability.process_state import ProcessState
from tollbook.schemas.policy import AlertRule

QUIET = Facts(
    backlogs={}, dead_letters=0, dead_letters_dropped=0, lag=Lag(0, 0.0), discrepancies=0, totals=None,
    are_calls_stopped=False,
)  # fmt: skip
LITTLE = Spend(Decimal(10), Decimal("0.5"))
HOUR_MS = 3600 * 1000


class World:
    """What the watch sees; a test changes it."""

    def __init__(self) -> None:
        self.facts = QUIET
        self.spend: Spend | None = LITTLE
        self.unpriced: list[str] = []
        self.now_ms = 1_795_000_000_000

    async def read(self) -> Facts:
        return self.facts

    def watch(self, redis: Redis) -> AlertWatch:
        facts: Any = self
        return AlertWatch(
            redis,
            "tollbook",
            AlertRule(),
            facts,
            read_spend=lambda: self.spend,
            read_unpriced=lambda: self.unpriced,
            now_ms=lambda: self.now_ms,
        )


async def raised(redis: Redis) -> list[tuple[str, str]]:
    """Take every alert from the queue: kind and text."""
    queue = AlertQueue(redis, "tollbook")
    found = await queue.read("test", after=">", count=100)
    return [(each.alert.kind, each.alert.text) for each in found if each.alert]


@pytest.fixture
async def redis(redis_client: Redis) -> Redis:
    await AlertQueue(redis_client, "tollbook").add_receiver("test")
    return redis_client


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"facts": replace(QUIET, lag=Lag(1_200, 61.0))}, "projector-behind", "61 s and 1,200 events behind"),
        ({"facts": replace(QUIET, dead_letters=3)}, "dead-letters", "3 tasks are dead-lettered"),
        ({"spend": Spend(Decimal(10), Decimal("1.01"))}, "assumed-spend", "10% of this month's spend is assumed"),
        ({"unpriced": ["score_post: no price is known for its model a/b"]}, "price-unknown", "model a/b"),
    ],
)
async def test_a_condition_raises_one_alert_until_it_has_ended(
    redis: Redis, changes: dict[str, Any], kind: str, words: str
) -> None:
    world = World()
    quiet = dict(vars(world))
    await world.watch(redis).look()
    assert await raised(redis) == []
    vars(world).update(changes)
    await world.watch(redis).look()
    ((told_kind, text),) = await raised(redis)
    assert told_kind == kind
    assert words in text
    # Another process looks next: what was raised is kept in Redis.
    await world.watch(redis).look()
    assert await raised(redis) == []
    vars(world).update(quiet)
    await world.watch(redis).look()
    vars(world).update(changes)
    await world.watch(redis).look()
    assert [each_kind for each_kind, _ in await raised(redis)] == [kind]


async def test_further_dead_letters_are_reported_at_most_once_an_hour(redis: Redis) -> None:
    world = World()
    watch = world.watch(redis)
    for letters, later_ms, number in ((1, 0, 1), (2, HOUR_MS - 1, 0), (2, 1, 1), (2, 2 * HOUR_MS, 0), (5, 0, 1)):
        world.facts = replace(QUIET, dead_letters=letters)
        world.now_ms += later_ms
        await watch.look()
        assert len(await raised(redis)) == number, letters


def test_a_condition_that_cannot_be_read_neither_raises_nor_ends_an_alert() -> None:
    unread = Facts(None, None, None, None, None, None, None)
    assert [each.kind for each in conditions(unread, AlertRule(), spend=None, unpriced=[])] == ["price-unknown"]


def test_a_single_assumed_call_raises_no_alert() -> None:
    found = conditions(QUIET, AlertRule(), spend=Spend(Decimal("0.02"), Decimal("0.02")), unpriced=[])
    assert all(each.text is None for each in found)


@pytest.mark.parametrize(
    ("budget", "is_told"),
    [
        ("day:u1:2026-08-30", True),
        ("day:u1:2026-10-30", False),
        ("team:a:b,c:2026-W34", True),
        ("team:red:2026-W48", False),
        ("user:u1:2026-08", True),
        ("user:u1:2026-10", False),
        ("client:acme:total", False),
    ],
)
def test_only_alerts_of_windows_that_are_long_over_are_forgotten(budget: str, is_told: bool) -> None:
    assert is_over(budget, datetime(2026, 11, 29, tzinfo=UTC)) is is_told


async def test_the_record_of_raised_alerts_is_bounded(redis_client: Redis) -> None:
    async with open_bench(redis_client) as bench:
        keys = bench.gate.keys
        old = {f"day:u{number}:2020-01-{number % 28 + 1:02} 0.5": "1-0" for number in range(1_500)}
        new = {"client:acme:total 1": "1-0", "day:u1:2999-01-01 0.5": "1-0"}
        await redis_client.hset(keys.alerts, items=[text for pair in (old | new).items() for text in pair])
        tidying = AlertTidying([bench.gate], keep_s=86_400)
        assert [await tidying.tidy(), await tidying.tidy()] == [1_500, 0]
        assert set(await bench.gate.raised_alerts()) == set(new)


def test_a_process_has_one_reader_for_metrics_and_alerts() -> None:
    state = ProcessState("up", load_settings(env_file=None))
    assert state.facts is state.facts
    readiness: Any = None
    assert MetricsPage(state, readiness)._facts is state.facts
