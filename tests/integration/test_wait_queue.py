"""Waiting for money: in the order of arrival, woken by the gate's announcements, else by the clock."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.gate_bench import GateBench, open_bench
from tests.proxy import faulty_proxy
from tests.servers import PATIENCE_S, wait_until
from tollbook.ledger.gate.wait_queue import BudgetWaitQueue
from tollbook.ledger.server.connection import connect

OWN = "user:u:2026-11"
NEVER_S = 3_600.0


@pytest.fixture
async def bench(redis_client: Redis) -> AsyncIterator[GateBench]:
    async with open_bench(redis_client) as bench:
        yield bench


@pytest.fixture
async def queue(bench: GateBench) -> AsyncIterator[BudgetWaitQueue]:
    """Listens to announcements only."""
    queue = BudgetWaitQueue(bench.redis, [bench.keys.waiters], retry_every_s=NEVER_S)
    queue.start()
    await _wait_until_heard(bench)
    yield queue
    await queue.aclose()


async def _wait_until_heard(bench: GateBench) -> None:
    await wait_until(lambda: bench.redis.publish(bench.keys.waiters, "nobody"), what="the subscription")


async def _queued(queue: BudgetWaitQueue, *names: str, budget: str = OWN) -> tuple[list[str], list[asyncio.Task[None]]]:
    """Let waiters queue up; the list tells who had a turn."""
    turns: list[str] = []

    async def wait(name: str) -> None:
        await queue.wait(budget, is_first=False)
        turns.append(name)

    tasks = [asyncio.create_task(wait(name)) for name in names]
    await asyncio.sleep(0)
    return turns, tasks


async def _settled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_turns_are_given_in_the_order_of_arrival(bench: GateBench) -> None:
    queue = BudgetWaitQueue(bench.redis, [])
    turns, tasks = await _queued(queue, "first", "second", "third")
    assert queue.waiting == 3
    for _ in tasks:
        queue.next(OWN)
    await asyncio.gather(*tasks)
    assert turns == ["first", "second", "third"]
    assert queue.waiting == 0


async def test_one_budget_does_not_wake_calls_that_wait_for_another(bench: GateBench) -> None:
    """G9: waiting does not block other users."""
    queue = BudgetWaitQueue(bench.redis, [])
    turns, tasks = await _queued(queue, "mine")
    others, other_tasks = await _queued(queue, "other", budget="user:v:2026-11")
    queue.next("user:v:2026-11")
    queue.next("user:nobody:2026-11")
    await asyncio.gather(*other_tasks)
    assert (turns, others) == ([], ["other"])
    await _settled(tasks)


async def test_a_call_that_tried_in_vain_keeps_the_first_place(bench: GateBench) -> None:
    queue = BudgetWaitQueue(bench.redis, [])
    turns, tasks = await _queued(queue, "second")

    async def again() -> None:
        await queue.wait(OWN, is_first=True)
        turns.append("first")

    tasks.append(asyncio.create_task(again()))
    await asyncio.sleep(0)
    queue.next(OWN)
    queue.next(OWN)
    await asyncio.gather(*tasks)
    assert turns == ["first", "second"]


async def test_a_call_that_left_the_queue_is_skipped(bench: GateBench) -> None:
    queue = BudgetWaitQueue(bench.redis, [])
    turns, tasks = await _queued(queue, "first", "second")
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    assert queue.waiting == 1
    queue.next(OWN)
    await tasks[1]
    assert turns == ["second"]


async def test_a_turn_that_is_no_longer_taken_goes_to_the_next(bench: GateBench) -> None:
    """Otherwise the money of a departed first call would help no other until the next retry."""
    queue = BudgetWaitQueue(bench.redis, [])
    turns, tasks = await _queued(queue, "first", "second")
    queue.next(OWN)
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert turns == ["second"]


async def test_a_settlement_wakes_the_first_waiting_call(bench: GateBench, queue: BudgetWaitQueue) -> None:
    """G9: the money that comes back is used at once."""
    await bench.reserve(amount=8)
    assert (await bench.do("reserve", call="b"))[0] == "WAIT"
    turns, tasks = await _queued(queue, "first", "second")
    await bench.settle(cost=2)
    await asyncio.wait_for(tasks[0], PATIENCE_S)
    assert turns == ["first"]
    assert (await bench.do("reserve", call="b"))[0] == "OK"
    await _settled(tasks[1:])


async def test_a_cost_corrected_downwards_wakes_too(bench: GateBench, queue: BudgetWaitQueue) -> None:
    await bench.reserve(amount=5)
    await bench.settle(cost=5)
    await bench.reserve(call="b", amount=4)
    assert (await bench.do("reserve", call="c", amount=3))[0] == "WAIT"
    turns, tasks = await _queued(queue, "first")
    await bench.adjust(cost=1)
    await asyncio.wait_for(tasks[0], PATIENCE_S)
    assert turns == ["first"]
    assert (await bench.do("reserve", call="c", amount=3))[0] == "OK"


async def test_a_missed_announcement_is_made_up_for_by_the_clock(bench: GateBench) -> None:
    queue = BudgetWaitQueue(bench.redis, ["a channel where nothing is announced"], retry_every_s=0.01)
    queue.start()
    turns, tasks = await _queued(queue, "first", "second")
    await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S)
    assert turns == ["first", "second"]
    await queue.aclose()


async def test_listening_goes_on_after_a_lost_connection(bench: GateBench, server_url: str) -> None:
    async with faulty_proxy(server_url) as proxy, connect(proxy.url) as client:
        queue = BudgetWaitQueue(client, [bench.keys.waiters], retry_every_s=0.01)
        queue.start()
        await _wait_until_heard(bench)
        proxy.break_connections()
        await wait_until(lambda: sum(b"SUBSCRIBE" in chunk for chunk in proxy.sent) == 2, what="a new subscription")
        await _wait_until_heard(bench)
        await queue.aclose()


async def test_after_the_end_of_listening_calls_still_retry_by_themselves(queue: BudgetWaitQueue) -> None:
    turns, tasks = await _queued(queue, "first")
    await queue.aclose()
    assert (turns, queue.waiting) == ([], 1)
    await _settled(tasks)
    assert queue.waiting == 0
