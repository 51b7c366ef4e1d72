"""Waiting for results: the announcement wakes every waiting reader, however many come, go and give up meanwhile."""

import asyncio
import random
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.servers import PATIENCE_S, wait_until
from tollbook.ledger import results as module
from tollbook.ledger.errors import ResultUnreadable
from tollbook.ledger.keys import Keys
from tollbook.ledger.results import Results
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.results import InferenceResult, TaskStatus


def result(task_id: str) -> InferenceResult:
    return InferenceResult(task_id=task_id, status=TaskStatus.DONE, content=task_id)


async def passes(draw: random.Random) -> None:
    for _ in range(draw.randrange(30)):
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(3))
async def test_no_waiting_reader_misses_an_announcement(
    redis_client: Redis, server_url: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    # No reader polls: one missed announcement fails the test.
    monkeypatch.setattr(module, "_READ_AGAIN_S", 3_600)
    draw, tasks = random.Random(seed), [f"t{number}" for number in range(100)]
    async with connect(server_url) as client:
        pipeline = CommandPipeline(client)
        found = Results(client, pipeline, namespace="test", partitions=3, ttl_s=60, id_ttl_s=60)

        async def wait(task_id: str) -> InferenceResult | None:
            await passes(draw)
            return await found.wait(task_id, 3_600)

        async def give_up() -> None:
            await passes(draw)
            waiting = asyncio.create_task(found.wait(draw.choice([*tasks, "never"]), draw.choice((0, 0.001, 3_600))))
            await passes(draw)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

        async def put(task_id: str) -> None:
            await passes(draw)
            if task_id in late:
                await wait_until(lambda: is_subscribed(redis_client, task_id), what=f"a subscription to {task_id}")
            await found.put(result(task_id))

        # Some results come whenever they come, the others when somebody is known to wait; as many give up as wait.
        late = draw.sample(tasks, 50)
        waits: list[Any] = [wait(task_id) for task_id in tasks for _ in range(2)]
        others: list[Any] = [put(task_id) for task_id in tasks] + [give_up() for _ in range(200)]
        draw.shuffle(others)
        async with asyncio.timeout(PATIENCE_S):
            got = await asyncio.gather(*waits, *others)
        assert got[: len(waits)] == [result(task_id) for task_id in tasks for _ in range(2)]
        await wait_until(lambda: nobody_subscribed(redis_client), what="the subscription closed")
        await pipeline.aclose()


async def is_subscribed(redis: Redis, task_id: str) -> bool:
    ((_, listeners),) = await redis.pubsub_numsub(Keys("test", 0).result(task_id))
    return listeners > 0


async def nobody_subscribed(redis: Redis) -> bool:
    return not await redis.client_list(_type="pubsub")


async def test_a_foreign_value_under_a_results_key_is_reported_and_not_shown(
    redis_client: Redis, server_url: str
) -> None:
    """G10: it may be anything."""
    key = Keys("test", 0).result("t1")
    async with connect(server_url) as client:
        pipeline = CommandPipeline(client)
        results = Results(client, pipeline, namespace="test", partitions=1, ttl_s=60, id_ttl_s=60)
        for text, problem in (
            ("{", "is not JSON"),
            ('{"task_id": "t1", "status": "a secret"}', "'status' must be one of"),
        ):
            await redis_client.set(key, text)
            with pytest.raises(ResultUnreadable, match=problem) as refused:
                await results.get("t1")
            with pytest.raises(ResultUnreadable):
                await results.get_of("t1", None)
            assert key in str(refused.value)
            assert "a secret" not in str(refused.value)
        await pipeline.aclose()
