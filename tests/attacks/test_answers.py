"""No answer goes to another user, into Tollbook's own keys, or under another task's id."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.quick import first_quick
from tests.servers import wait_until
from tests.system import REPLIES, running_system
from tollbook import CostTracker, Publisher
from tollbook.consumers.service import build_worker, serve_worker
from tollbook.inference.setting_tables import CapTable
from tollbook.inference.settings import Settings
from tollbook.ledger.keys import projector_lease
from tollbook.ledger.stream_owners import STREAM_OWNERS
from tollbook.schemas.identifiers import check_id, partition_of
from tollbook.schemas.results import ErrorCode, TaskStatus
from tollbook.schemas.tasks import InvalidTask

STREAM = "generation"


def make_task(task_id: str, user: str, **fields: str) -> dict[str, str]:
    return {
        "task": "score_post",
        "task_id": task_id,
        "user_id": user,
        "prompt": "a post",
        "reply_to": REPLIES,
        **fields,
    }


async def test_no_user_gets_the_answer_to_another_users_task(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G4: a model without a price is refused before the gate looks at the content; the id is another's all the same."""
    async with running_system(tmp_path / "data", server_url) as running:
        await running.publish(STREAM, [make_task("t1", "alice", metadata='{"secret": 1}')])
        assert (await running.answers(["t1"]))[0].status is TaskStatus.DONE
        await running.publish(STREAM, [make_task("t1", "mallory", model="no/price", reply_to="elsewhere")])
        reply: Any = await running.redis.xread({"elsewhere": "0"}, block=60_000)
        text = reply[0][1][0][1][b"result"].decode()
        assert ErrorCode.IDEMPOTENCY_CONFLICT.value in text
        assert "alice" not in text
        assert "secret" not in text


OTHERS = [{}, {"task": "ping"}, {"plan": "gold"}, {"model": "no/price"}]


@pytest.mark.parametrize("other", first_quick(1, OTHERS), ids=str)
async def test_a_task_id_of_users_in_two_partitions_is_one_task(
    redis_client: Redis, server_url: str, tmp_path: Path, other: dict[str, str]
) -> None:
    """G4: the second is no second charge and no second result, whatever it asks for."""
    first, second = (next(n for n in map(str, range(99)) if partition_of(n, 3) == part) for part in (2, 0))
    async with running_system(tmp_path / "data", server_url, partitions=3) as running:
        await running.publish(STREAM, [make_task("t1", first)])
        done = (await running.answers(["t1"]))[0]
        assert done.status is TaskStatus.DONE
        await running.publish(STREAM, [make_task("t1", second, **{"reply_to": "second", **other})])
        reply: Any = await running.redis.xread({"second": "0"}, block=60_000)
        text = reply[0][1][0][1][b"result"].decode()
        code = ErrorCode.INVALID_TASK if "plan" in other else ErrorCode.IDEMPOTENCY_CONFLICT
        assert code.value in text
        assert f'"user_id":"{second}"' in text
        assert await running.system.handle.results.get("t1") == done
        assert running.provider.requests == 1
        # The first user's own repeat is still answered.
        await running.publish(STREAM, [make_task("t1", first, reply_to="again")])
        reply = await running.redis.xread({"again": "0"}, block=60_000)
        assert reply[0][1][0][1][b"result"].decode() == done.model_dump_json()


@pytest.mark.parametrize("squatter", [{"task": "ping", "task_id": "t1"}, {"task": "nothing", "task_id": "t1"}])
async def test_a_denial_is_answered_even_if_another_result_has_its_id(
    redis_client: Redis, server_url: str, tmp_path: Path, squatter: dict[str, str]
) -> None:
    async with running_system(tmp_path / "data", server_url, caps=CapTable(users={"u1": 0})) as running:
        await running.publish(STREAM, [{**squatter, "reply_to": "before"}])
        assert await running.redis.xread({"before": "0"}, block=60_000)
        await running.publish(STREAM, [make_task("t1", "u1")])
        (answer,) = await running.answers(["t1"])
        assert (answer.status, answer.error_code) == (TaskStatus.DENIED, ErrorCode.PLAN_LIMIT_REACHED)
        stored = await running.system.handle.results.get("t1")
        assert stored == answer


@pytest.mark.parametrize(
    "reply_to",
    first_quick(2, [
        projector_lease("tollbook"),
        "tollbook:worker:w9",
        "tollbook:dead-letters",
        "analysis",
        "tollbook:what-may-come",
        # Of another Tollbook in the same database.
        "acme:dead-letters",
        "acme:what-may-come",
        "acme-tasks",
    ]),
)  # fmt: skip
async def test_a_reply_is_never_written_into_a_key_of_tollbook(
    redis_client: Redis, server_url: str, tmp_path: Path, reply_to: str
) -> None:
    """A stream in place of the lease would keep every projector from starting, a worker's key would keep it alive."""
    async with running_system(tmp_path / "data", server_url, workers=0) as running:
        if reply_to == projector_lease("tollbook"):
            await redis_client.delete(reply_to)
        await redis_client.hset(STREAM_OWNERS, mapping={"scraping": "acme", "acme-tasks": "acme"})
        # A worker that serves none of the streams that a task might name for its reply.
        runtime, stop = running.system.runtime, asyncio.Event()
        worker = build_worker(runtime, [STREAM], "worker-0")
        serving = asyncio.create_task(serve_worker(runtime, worker, stop, redis_url=running.system.redis_url))
        await running.publish(STREAM, [{"task": "ping", "task_id": "p1", "reply_to": reply_to}])

        async def is_acknowledged() -> bool:
            return worker.finished[TaskStatus.INVALID] == 1

        try:
            assert await wait_until(is_acknowledged, what="the task refused")
        finally:
            stop.set()
            await serving
        letters = await running.dead_letters()
        assert [letter["reason"] for letter in letters] == ["invalid_task"]
        assert f"'reply_to' must not be a stream or a key of a Tollbook, as '{reply_to}' is" in letters[0]["error"]
        if reply_to != "tollbook:dead-letters":
            assert await redis_client.type(reply_to) != b"stream"


@pytest.mark.slow
async def test_no_reply_is_written_into_a_key_of_a_later_tollbook(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(tmp_path / "data", server_url) as running:
        (worker,) = running.workers
        assert not worker.replies.is_reserved("acme:dead-letters")
        await redis_client.hset(STREAM_OWNERS, "acme-tasks", "acme")

        async def is_reserved() -> bool:
            return worker.replies.is_reserved("acme:dead-letters") and worker.replies.is_reserved("acme-tasks")

        assert await wait_until(is_reserved, what="the other Tollbook noticed")


async def test_a_publisher_refuses_a_key_of_a_tollbook_before_anything_is_sent(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    await redis_client.hset(STREAM_OWNERS, mapping={"scraping": "acme", "acme-tasks": "acme"})
    async with Publisher(Settings(redis_url=server_url)) as publisher:
        for reply_to in ("tollbook:what-may-come", "acme:what-may-come", "acme:task:t1", "acme-tasks", "analysis"):
            with pytest.raises(InvalidTask, match="'reply_to' must not be a stream or a key of a Tollbook"):
                await publisher.publish(STREAM, "score_post", "a post", user_id="u1", reply_to=reply_to)
    assert not await redis_client.exists(STREAM)


async def test_two_spellings_of_a_user_are_one_user_with_one_cap(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G1: through the stream, the Python API, and the setting that names the user."""
    spellings = ("rene\u0301", "ren\u00e9")
    caps = CapTable(users={check_id(spellings[0]): 0})
    async with running_system(tmp_path / "data", server_url, caps=caps) as running:
        await running.publish(STREAM, [make_task(f"t-{n}", user) for n, user in enumerate(spellings)])
        answers = await running.answers(["t-0", "t-1"])
        assert [(each.status, each.user_id) for each in answers] == [(TaskStatus.DENIED, spellings[1])] * 2
        tracker = CostTracker(running.system.runtime)
        for user in spellings:
            await tracker.record_usage(user, 1)
        for user in spellings:
            summary = await tracker.get_usage_summary(user)
            assert (summary.user_id, summary.spent_usd, summary.cap_usd) == (spellings[1], 2, 0)
        assert await running.query("SELECT DISTINCT user_id FROM spend") == [{"user_id": spellings[1]}]
