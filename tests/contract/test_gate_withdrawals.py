"""Taking back: assumed charges, credit, plans; each once, and never more than there is."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.gate_bench import CAP, GateBench, open_bench
from tollbook.ledger.errors import CallUnknown, CreditTooLow, IdempotencyConflict, NoPlanAssigned
from tollbook.ledger.gate.requests import Reserved, Waiting
from tollbook.schemas.identifiers import EntryId


@pytest.fixture
async def bench(every_redis_client: Redis) -> AsyncIterator[GateBench]:
    async with open_bench(every_redis_client) as bench:
        yield bench


async def test_an_attempt_is_given_back_once_even_if_the_reply_was_lost(bench: GateBench) -> None:
    await bench.reserve("a", 4)
    await bench.settle("a", 3, assumed=3)
    assert await bench.release("a", 1, stands=(3, 3)) == "released"
    events = await bench.events()
    assert (events[-1]["amount"], events[-1]["committed"]) == ("-1", "2")
    for stands in ((3, 3), (2, 2)):
        assert await bench.release("a", 1, stands=stands) == "before"
    assert await bench.release("a", 2, stands=(2, 2), attempt=2) == "released"
    assert len(await bench.events()) == len(events) + 1


async def test_a_hold_that_changed_since_is_left_as_it_is(bench: GateBench) -> None:
    await bench.reserve("a", 4)
    await bench.settle("a", 3, assumed=1)
    await bench.adjust("a", 2, assumed=1)
    events = await bench.events()
    assert await bench.release("a", 1, stands=(3, 1)) == "changed"
    assert await bench.release("a", 2, stands=(2, 1)) == "changed"  # More than is assumed.
    with pytest.raises(CallUnknown):
        await bench.release("nobody")
    assert await bench.events() == events
    assert await bench.release("a", 1, stands=(2, 1)) == "released"


async def test_released_money_is_available_to_waiting_calls(bench: GateBench) -> None:
    await bench.reserve("a", CAP)
    await bench.settle("a", 4, assumed=4)
    await bench.reserve("b", 5)
    assert isinstance(await bench.reserve("c", 3), Waiting)
    async with bench.redis.pubsub() as subscriber:
        await subscriber.subscribe(bench.keys.waiters)
        assert await subscriber.get_message(timeout=5.0)
        assert await bench.release("a", 4, stands=(4, 4)) == "released"
        announced = await subscriber.get_message(timeout=5.0)
    assert announced
    assert announced["data"] == b"user:u:2026-11"
    assert isinstance(await bench.reserve("c", 3), Reserved)


async def test_a_release_finds_its_budgets_and_a_lost_tail(bench: GateBench) -> None:
    day = ("day:u:2026-11-05", CAP)
    await bench.reserve("a", 4, further=[day])
    await bench.settle("a", 3, assumed=3, budgets=("user:u:2026-11", day[0]))
    done = await bench.do("release", call="a", stands=(3, 3), amount=3, budgets=())
    assert done[0] == "MISMATCH"
    await bench.release("a", 3, stands=(3, 3), budgets=("user:u:2026-11", day[0]))
    assert '"budgets":[{"budget":"day:u:2026-11-05","committed_nanousd":0}]' in (await bench.events())[-1]["payload"]


async def test_credit_is_never_below_zero_and_a_plan_is_cleared_once(bench: GateBench) -> None:
    await bench.assign("grant", 5, kind="credit-granted")
    with pytest.raises(CreditTooLow) as low:
        await bench.withdraw("k1", 6)
    assert low.value.credit_nanousd == 5
    assert await bench.withdraw("k1", 5)
    assert not await bench.withdraw("k1", 5)
    with pytest.raises(IdempotencyConflict):
        await bench.withdraw("k1", 5, content="other")
    with pytest.raises(NoPlanAssigned):
        await bench.withdraw("k2", kind="plan-cleared")
    await bench.assign("plan", 20)
    assert await bench.withdraw("k2", kind="plan-cleared")
    assert await bench.redis.hgetall(bench.keys.account("u")) == {b"credit:2026-11": b"0"}
    assert [event["type"] for event in await bench.events()] == [
        "credit-granted",
        "credit-revoked",
        "plan-assigned",
        "plan-cleared",
    ]


async def test_a_revoked_credit_lets_no_further_hold_pass(bench: GateBench) -> None:
    """G1 at the next hold, whatever is spent or held already."""
    await bench.assign("grant", CAP, kind="credit-granted")
    assert isinstance(await bench.reserve("a", CAP + 2), Reserved)
    await bench.withdraw("k", CAP)
    assert isinstance(await bench.reserve("b", 1), Waiting)
    await bench.settle("a", CAP + 2)
    assert (await bench.do("reserve", call="c", amount=1))[0] == "DENIED"
    assert bench.gate.seen > EntryId(0, 0)
