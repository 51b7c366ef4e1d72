"""Claims on a real server: renewed by their owner, taken over when it is silent, and never taken back.

Idle times are set with XCLAIM ... IDLE, so that nothing has to be waited for.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.servers import wait_until
from tollbook.consumers.claims import Claims
from tollbook.consumers.messages import Delivery
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.keys import GROUP
from tollbook.ledger.server.pipeline import CommandPipeline

STREAM: Final = "generation"
OTHER: Final = "analysis"
CLAIM_AFTER_S: Final = 30.0
LONG_MS: Final = 60_000
TASK: Final = {b"task": b"ping"}


@pytest.fixture
async def pipeline(every_redis_client: Redis) -> AsyncIterator[CommandPipeline]:
    await load_library(every_redis_client)
    pipeline = CommandPipeline(every_redis_client)
    yield pipeline
    await pipeline.aclose()


def make_claims(pipeline: CommandPipeline, consumer: str, *, claim_after_s: float = CLAIM_AFTER_S) -> Claims:
    return Claims(
        pipeline, namespace="tollbook", consumer=consumer, streams=(STREAM, OTHER), claim_after_s=claim_after_s
    )


async def take_abandoned(claims: Claims) -> list[Delivery]:
    """Claim what is abandoned on `STREAM`."""
    return [delivery async for delivery in claims.abandoned(STREAM)]


class Group:
    """One consumer group and what is pending in it."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    async def deliver(self, consumer: str, number: int = 1, *, stream: str = STREAM) -> list[Delivery]:
        """Publish entries and have them delivered to a consumer."""
        for _ in range(number):
            await self.redis.xadd(stream, TASK)  # pyright: ignore[reportArgumentType]
        reply: Any = await self.redis.xreadgroup(GROUP, consumer, {stream: ">"}, count=number)
        return [Delivery(stream, entry_id.decode(), fields) for entry_id, fields in reply[0][1]]

    async def age(self, *deliveries: Delivery) -> None:
        """Let the owners have been silent for long."""
        for delivery in deliveries:
            owner = (await self.pending(delivery))[0]
            await self.redis.xclaim(delivery.stream, GROUP, owner, 0, [delivery.entry_id], idle=LONG_MS, justid=True)

    async def pending(self, delivery: Delivery) -> tuple[str, int, int]:
        """Return the owner, its silence in milliseconds and the number of deliveries."""
        rows: Any = await self.redis.xpending_range(
            delivery.stream, GROUP, min=delivery.entry_id, max=delivery.entry_id, count=1
        )
        row = rows[0]
        return row["consumer"].decode(), row["time_since_delivered"], row["times_delivered"]

    async def count(self, stream: str = STREAM) -> int:
        reply: Any = await self.redis.xpending(stream, GROUP)
        return reply["pending"]


async def test_groups_begin_at_the_streams_beginning_and_are_made_once(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    await every_redis_client.xadd(STREAM, TASK)  # pyright: ignore[reportArgumentType]
    claims = make_claims(pipeline, "w1")
    await claims.ensure_groups()
    reply: Any = await every_redis_client.xreadgroup(GROUP, "w1", {STREAM: ">"})
    assert len(reply[0][1]) == 1, "what was published before the first start counts"
    await claims.ensure_groups()
    assert await Group(every_redis_client).count() == 1


async def test_renewal_keeps_claims_without_counting_a_delivery(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    claims, group = make_claims(pipeline, "w1"), Group(every_redis_client)
    await claims.ensure_groups()
    # More than one page, on two streams.
    held = [*await group.deliver("w1", 250), *await group.deliver("w1", 3, stream=OTHER)]
    dropped = held[7]
    for delivery in held:
        assert claims.add(delivery)
    claims.drop(dropped)
    await group.age(*held)
    await claims.renew()
    silences = {delivery.entry_id: await group.pending(delivery) for delivery in held}
    late = [entry_id for entry_id, (_, silence_ms, _) in silences.items() if silence_ms >= LONG_MS]
    assert late == [dropped.entry_id]
    assert {deliveries for _, _, deliveries in silences.values()} == {1}
    assert len(claims) == len(held) - 1


async def test_a_live_workers_tasks_are_not_taken(every_redis_client: Redis, pipeline: CommandPipeline) -> None:
    owner, rival, group = make_claims(pipeline, "w1"), make_claims(pipeline, "w2"), Group(every_redis_client)
    await owner.ensure_groups()
    delivery = (await group.deliver("w1"))[0]
    owner.add(delivery)
    assert await take_abandoned(rival) == []
    await group.age(delivery)
    await owner.renew()
    assert await take_abandoned(rival) == []
    assert (await group.pending(delivery))[0] == "w1"


async def test_a_silent_workers_tasks_are_taken_once_with_the_number_of_their_deliveries(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    rivals = [make_claims(pipeline, "w2"), make_claims(pipeline, "w3")]
    group = Group(every_redis_client)
    await rivals[0].ensure_groups()
    silent, fresh = await group.deliver("w1"), await group.deliver("w1")
    await group.age(*silent)
    taken = await asyncio.gather(*(take_abandoned(rival) for rival in rivals))
    assert sorted(len(deliveries) for deliveries in taken) == [0, 1]
    delivery = next(deliveries[0] for deliveries in taken if deliveries)
    assert delivery == Delivery(STREAM, silent[0].entry_id, TASK, deliveries=2)
    assert delivery.is_claimed
    assert (await group.pending(fresh[0]))[0] == "w1"

    await group.age(delivery)
    again = await take_abandoned(rivals[0]) or await take_abandoned(rivals[1])
    assert again[0].deliveries == 3


async def test_all_of_a_silent_workers_tasks_are_taken_at_once(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    claims, group = make_claims(pipeline, "w2"), Group(every_redis_client)
    await claims.ensure_groups()
    # More than two pages; the second page has nothing for this worker, since it holds that already.
    silent = await group.deliver("w1", 250)
    for delivery in silent[100:200]:
        claims.add(delivery)
    await group.age(*silent)
    assert await take_abandoned(claims) == [
        Delivery(STREAM, delivery.entry_id, TASK, deliveries=2) for delivery in silent[:100] + silent[200:]
    ]


class Steps:
    """Clock and sleep of a worker's claims: the test decides when the next scan begins, and how late it is."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._begin = asyncio.Event()
        self._is_asleep = asyncio.Event()

    def monotonic(self) -> float:
        return self._now_s

    async def sleep(self, _seconds: float) -> None:
        self._is_asleep.set()
        await self._begin.wait()
        self._begin.clear()

    async def scan(self, *, after_s: float = 0.0) -> None:
        """Let so many seconds pass, and one scan be made."""
        await self._is_asleep.wait()
        self._is_asleep.clear()
        self._now_s += after_s
        self._begin.set()
        await self._is_asleep.wait()


async def test_a_worker_with_a_late_heartbeat_gives_others_time_for_theirs(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    """After Redis was away or the machine slept, every worker looks dead to every other."""
    steps, group, accepted = Steps(), Group(every_redis_client), list[Delivery]()
    claims = Claims(
        pipeline,
        namespace="tollbook",
        consumer="w2",
        streams=[STREAM],
        claim_after_s=CLAIM_AFTER_S,
        monotonic=steps.monotonic,
        sleep=steps.sleep,
    )
    other = make_claims(pipeline, "w1")
    await claims.ensure_groups()
    held, abandoned = await group.deliver("w1", 2)
    other.add(held)
    running = asyncio.create_task(claims.run(accepted.append))

    try:
        await steps.scan()
        # All slept meanwhile: both entries are silent for longer than they may be.
        await group.age(held, abandoned)
        await every_redis_client.delete("tollbook:worker:w2")
        await steps.scan(after_s=LONG_MS / 1000)
        assert await claims.is_alive("w2")
        for _ in range(2):
            await steps.scan()
            assert accepted == []
        # The other one wakes up a moment later, and renews what it has in hand.
        await other.renew()
        await steps.scan()
        assert [delivery.entry_id for delivery in accepted] == [abandoned.entry_id]
        assert (await group.pending(held))[0] == "w1"
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_worker_does_not_take_over_what_it_has_in_hand(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    claims, group = make_claims(pipeline, "w1"), Group(every_redis_client)
    await claims.ensure_groups()
    held, lost = await group.deliver("w1", 2)
    claims.add(held)
    await group.age(held, lost)
    assert [delivery.entry_id for delivery in await take_abandoned(claims)] == [lost.entry_id]
    assert not claims.add(held), "it is in hand already"


async def test_a_claim_that_others_took_is_not_taken_back(every_redis_client: Redis, pipeline: CommandPipeline) -> None:
    """A process that was stopped for a while must not run beside the one that took over (G4)."""
    sleeper, rival, group = make_claims(pipeline, "w1"), make_claims(pipeline, "w2"), Group(every_redis_client)
    await sleeper.ensure_groups()
    taken, done, kept = await group.deliver("w1", 3)
    for delivery in (taken, done, kept):
        sleeper.add(delivery)
    await group.age(taken, done)
    for delivery in await take_abandoned(rival):
        rival.add(delivery)
    await rival.acknowledge(done)
    await sleeper.renew()
    assert [sleeper.holds(delivery) for delivery in (taken, done, kept)] == [False, False, True]
    assert (await group.pending(taken))[0] == "w2"
    assert rival.holds(taken)
    assert await group.count() == 2


async def test_only_a_claim_that_is_still_in_hand_can_be_lost(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    """A renewal that overtakes the reply to an acknowledgement warns of nothing."""
    claims, rival, group = make_claims(pipeline, "w1"), make_claims(pipeline, "w2"), Group(every_redis_client)
    await claims.ensure_groups()
    done, taken, kept = await group.deliver("w1", 3)
    for delivery in (done, taken, kept):
        claims.add(delivery)
    await group.age(taken)
    await take_abandoned(rival)
    with capture_logs() as lines:
        await asyncio.gather(claims.acknowledge(done), claims.renew())
    assert [(line["event"], line["entry_id"]) for line in lines] == [("claim.lost", taken.entry_id)]
    assert [claims.holds(delivery) for delivery in (done, taken, kept)] == [False, False, True]


async def test_a_returned_claim_counts_no_delivery_and_is_not_taken_from_others(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    sleeper, rival, group = make_claims(pipeline, "w1"), make_claims(pipeline, "w2"), Group(every_redis_client)
    await sleeper.ensure_groups()
    given, taken = await group.deliver("w1", number=2)
    for delivery in (given, taken):
        sleeper.add(delivery)
    await group.age(taken)
    (now_rivals,) = await take_abandoned(rival)
    rival.add(now_rivals)
    await sleeper.renew()
    for delivery in (given, taken):
        await sleeper.give_back(delivery)
    assert (await group.pending(given))[::2] == ("w1", 0)
    assert (await group.pending(taken))[::2] == ("w2", 2)


async def test_acknowledged_entries_are_neither_pending_nor_held(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    claims, group = make_claims(pipeline, "w1"), Group(every_redis_client)
    await claims.ensure_groups()
    delivery = (await group.deliver("w1"))[0]
    claims.add(delivery)
    await claims.acknowledge(delivery)
    assert (len(claims), await group.count()) == (0, 0)


async def test_an_entry_that_was_deleted_is_not_executed(every_redis_client: Redis, pipeline: CommandPipeline) -> None:
    claims, group = make_claims(pipeline, "w2"), Group(every_redis_client)
    await claims.ensure_groups()
    gone, there = await group.deliver("w1", 2)
    await group.age(gone, there)
    await every_redis_client.xdel(STREAM, gone.entry_id)
    assert [delivery.entry_id for delivery in await take_abandoned(claims)] == [there.entry_id]


async def test_a_heartbeat_expires_and_resigning_removes_it_at_once(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    claims = make_claims(pipeline, "w1")
    assert not await claims.is_alive("w1")
    await claims.heartbeat()
    assert await claims.is_alive("w1")
    assert not await claims.is_alive("w2")
    assert 0 < await every_redis_client.pttl("tollbook:worker:w1") <= 1000 * CLAIM_AFTER_S
    await claims.resign()
    assert not await claims.is_alive("w1")


async def test_claims_go_on_after_the_groups_have_vanished(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    """A stream that somebody deleted comes back; without renewal, every later call would be taken over."""
    claims, group = make_claims(pipeline, "w1", claim_after_s=0.03), Group(every_redis_client)
    await claims.ensure_groups()
    accepted: list[Delivery] = []
    running = asyncio.create_task(claims.run(accepted.append))
    try:
        await every_redis_client.delete(STREAM)
        lives = await wait_until(lambda: claims.is_alive("w1"), what="a sign of life")
        assert lives
        await every_redis_client.delete("tollbook:worker:w1")
        await wait_until(lambda: claims.is_alive("w1"), what="another sign of life, without the group")
        await claims.ensure_groups()
        delivery = (await group.deliver("w0"))[0]
        await group.age(delivery)
        await wait_until(lambda: accepted, what="the take-over")
        assert accepted[0].entry_id == delivery.entry_id
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def consumers(redis: Redis) -> set[str]:
    return {each["name"].decode() for each in await redis.xinfo_consumers(STREAM, GROUP)}


async def test_consumers_of_workers_that_are_gone_are_removed_once_nothing_is_pending(
    every_redis_client: Redis, pipeline: CommandPipeline
) -> None:
    """G3: never with something pending, which would be forgotten."""
    group, claims = Group(every_redis_client), make_claims(pipeline, "mine", claim_after_s=0.001)
    await claims.ensure_groups()
    (held,) = await group.deliver("gone")
    (finished,) = await group.deliver("alive")
    await every_redis_client.set("tollbook:worker:alive", "1")
    await every_redis_client.xack(STREAM, GROUP, finished.entry_id)
    await wait_until(lambda: is_idle(every_redis_client), what="consumers that were idle for a moment")
    await claims.remove_gone()
    assert await consumers(every_redis_client) == {"gone", "alive"}, "one has something pending, one lives"
    # Taken over and finished by another.
    await every_redis_client.xclaim(STREAM, GROUP, "mine", 0, [held.entry_id])
    await claims.remove_gone()
    assert await consumers(every_redis_client) == {"mine", "alive"}
    assert (await group.pending(held))[0] == "mine"
    await claims.resign()
    assert await consumers(every_redis_client) == {"mine", "alive"}, "it has something pending itself"
    await every_redis_client.xack(STREAM, GROUP, held.entry_id)
    await claims.resign()
    assert await consumers(every_redis_client) == {"alive"}


async def is_idle(redis: Redis) -> bool:
    return all(each["idle"] > 10 for each in await redis.xinfo_consumers(STREAM, GROUP))


async def test_a_stream_of_the_wrong_type_is_named(every_redis_client: Redis, pipeline: CommandPipeline) -> None:
    await every_redis_client.set(STREAM, "no stream")
    with pytest.raises(LedgerUnavailable, match=f"the task stream {STREAM} cannot be read: WRONGTYPE"):
        await make_claims(pipeline, "mine").ensure_groups()
