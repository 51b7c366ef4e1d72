"""The publisher of applications: against a running system, and over connections that break."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from pydantic import BaseModel
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tests.servers import PATIENCE_S, wait_until
from tests.system import RunningSystem, running_system
from tollbook import InvalidTask, LedgerUnavailable, OutputInvalid, Publisher, ResultTimeout, TaskUnconfirmed
from tollbook.inference.publisher import new_entry
from tollbook.inference.settings import Settings
from tollbook.inference.structured_output import response_format_of
from tollbook.ledger import results
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.endpoint import Endpoint, write_endpoint
from tollbook.schemas.identifiers import check_id
from tollbook.schemas.results import ErrorCode, TaskStatus
from tollbook.standin import FaultPlan

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningSystem]:
    async with connect(server_url) as client:
        await client.flushall()
        await client.function_flush()
    async with running_system(tmp_path_factory.mktemp("publisher") / "data", server_url) as system:
        yield system


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def publisher(running: RunningSystem) -> AsyncIterator[Publisher]:
    async with Publisher(settings_of(running)) as publisher:
        yield publisher


def settings_of(running: RunningSystem, **changes: Any) -> Settings:
    return running.system.runtime.settings.model_copy(update=changes)


async def test_a_task_is_published_and_its_result_awaited(running: RunningSystem, publisher: Publisher) -> None:
    task_id = await publisher.publish("generation", "generate_draft", "Write", user_id="u1", metadata={"post": 18})
    result = await publisher.wait(task_id, timeout_s=PATIENCE_S)
    assert (result.status, result.user_id, result.metadata) == (TaskStatus.DONE, "u1", {"post": 18})
    assert result.task_id == task_id == check_id(task_id)
    assert await publisher.result(task_id) == result
    again = await publisher.publish_and_wait(
        "generation", "generate_draft", "Write", user_id="u1", task_id=task_id, timeout_s=PATIENCE_S
    )
    assert again == result, "the same task is not executed twice"
    assert sum(entry.user == "u1" for entry in running.provider.book.entries.values()) == 1


@pytest.mark.slow
async def test_a_thousand_tasks_at_once_share_few_round_trips_and_one_subscription(running: RunningSystem) -> None:
    async with (
        faulty_proxy(running.system.redis_url) as proxy,
        Publisher(settings_of(running, redis_url=proxy.url)) as publisher,
    ):
        proxy.sent.clear()
        ids = await asyncio.gather(*(publisher.publish("monitoring", "ping") for _ in range(1_000)))
        # A batch of 512 commands arrives in several network chunks; one round trip per command would be 1,000.
        assert len(proxy.sent) < 100
        before = await subscribers(running.redis)
        late = asyncio.create_task(publisher.wait("never", timeout_s=PATIENCE_S))
        results = await asyncio.gather(*(publisher.wait(task_id, timeout_s=PATIENCE_S) for task_id in ids))
        assert [result.task_id for result in results] == ids
        assert {result.content for result in results} == {"pong"}
        assert await subscribers(running.redis) == before + 1
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        await wait_until(lambda: is_subscribed(running.redis, before), what="the subscription closed")


async def subscribers(redis: Redis) -> int:
    """Return how many connections are subscribed to anything."""
    return len(await redis.client_list(_type="pubsub"))


async def is_subscribed(redis: Redis, number: int) -> bool:
    return await subscribers(redis) == number


@pytest.mark.slow
async def test_a_waiting_publisher_is_notified_of_its_result_and_does_not_poll(
    running: RunningSystem, publisher: Publisher
) -> None:
    await running.provider.shut("slow")
    task_id = await publisher.publish("generation", "score_post", "a post", user_id="slow")
    waiting = asyncio.create_task(publisher.wait(task_id, timeout_s=PATIENCE_S))
    await running.provider.wait_for_arrivals(1, user="slow")
    before = await commands_of(running.redis, "get")
    with pytest.raises(ResultTimeout) as late:
        await publisher.wait(task_id, timeout_s=2.2)
    assert (late.value.task_id, late.value.timeout_s) == (task_id, 2.2)
    assert isinstance(late.value, TimeoutError)
    await running.provider.open()
    # Two wait for 2.2 s: each looks at the start, when subscribed, every second, and at the end.
    assert await commands_of(running.redis, "get") - before <= 2 * 6
    assert (await waiting).status is TaskStatus.DONE


async def commands_of(redis: Redis, name: str) -> int:
    statistics: Any = await redis.info("commandstats")
    return statistics.get(f"cmdstat_{name}", {"calls": 0})["calls"]


async def test_a_denied_task_is_a_result_and_not_an_error(running: RunningSystem, publisher: Publisher) -> None:
    dear = {"max_tokens": 200_000, "model": "anthropic/claude-opus-4"}
    result = await publisher.publish_and_wait(
        "generation", "generate_draft", "Write", user_id="poor", timeout_s=PATIENCE_S, **dear
    )
    assert (result.status, result.error_code) == (TaskStatus.DENIED, ErrorCode.PLAN_LIMIT_REACHED)


async def test_a_task_that_a_worker_would_refuse_is_not_sent(running: RunningSystem, publisher: Publisher) -> None:
    length = await running.redis.xlen("generation")
    wrong: list[tuple[str, str, str | None, dict[str, Any], str]] = [
        ("generation", "write_novel", "x", {"user_id": "u1"}, "'task' must be one of"),
        ("nowhere", "ping", None, {}, "unknown stream 'nowhere'"),
        ("generation", "score_post", "x", {}, "'user_id' is missing"),
        ("generation", "score_post", "", {"user_id": "u1"}, "'prompt' must not be empty"),
        ("generation", "score_post", "x", {"user_id": "u\t1"}, "'user_id' must have"),
        ("generation", "score_post", "x" * 1_000_001, {"user_id": "u1"}, "at most 1000000 bytes, not 1000001"),
        (
            "generation",
            "score_post",
            "x",
            {"user_id": "u1", "metadata": {"at": object()}},
            "'metadata' must contain only JSON",
        ),
        ("generation", "score_post", "x", {"user_id": "u1", "color": "red"}, "unknown field 'color'"),
    ]
    for stream, task, prompt, fields, words in wrong:
        with pytest.raises(InvalidTask, match=words):
            await publisher.publish(stream, task, prompt, **fields)
    assert await running.redis.xlen("generation") == length


async def test_a_task_whose_confirmation_was_lost_is_sent_again_and_executed_once(running: RunningSystem) -> None:
    """G4: the connection breaks after Redis has the task and before it could say so."""
    async with (
        faulty_proxy(running.system.redis_url) as proxy,
        Publisher(settings_of(running, redis_url=proxy.url)) as publisher,
    ):
        await publisher.publish("monitoring", "ping")
        proxy.hold_replies()
        publishing = asyncio.create_task(publisher.publish("generation", "score_post", "a post", user_id="torn"))
        await proxy.next_chunk()
        await wait_until(lambda: published(running.redis, "torn"), what="the task on the stream")
        proxy.break_connections()
        proxy.let_replies_pass()
        result = await publisher.wait(await publishing, timeout_s=PATIENCE_S)
        assert result.status is TaskStatus.DONE
        assert len(await published(running.redis, "torn")) == 2, "it was sent twice"
        await wait_until(lambda: is_acknowledged(running), what="both acknowledged")
    assert sum(entry.user == "torn" for entry in running.provider.book.entries.values()) == 1


async def test_a_task_that_cannot_be_confirmed_says_under_which_id_to_repeat_it(running: RunningSystem) -> None:
    async with (
        faulty_proxy(running.system.redis_url) as proxy,
        Publisher(settings_of(running, redis_url=proxy.url)) as publisher,
    ):
        await publisher.publish("monitoring", "ping")
        await proxy.stop()
        with pytest.raises(TaskUnconfirmed) as lost:
            await publisher.publish("generation", "score_post", "a post", user_id="away")
        assert isinstance(lost.value, LedgerUnavailable)
        assert lost.value.task_id in str(lost.value)
        with pytest.raises(LedgerUnavailable):
            await publisher.wait("t1", timeout_s=PATIENCE_S)
        await proxy.start()
        result = await publisher.publish_and_wait(
            "generation", "score_post", "a post", user_id="away", task_id=lost.value.task_id, timeout_s=PATIENCE_S
        )
    assert (result.task_id, result.status) == (lost.value.task_id, TaskStatus.DONE)


async def test_a_publisher_opens_without_redis_and_connects_once_there_is_one(running: RunningSystem) -> None:
    async with faulty_proxy(running.system.redis_url) as proxy:
        await proxy.stop()
        async with Publisher(settings_of(running, redis_url=proxy.url)) as publisher:
            refusals = await asyncio.gather(
                *(publisher.publish("monitoring", "ping") for _ in range(3)),
                publisher.result("t1"),
                publisher.wait("t1", timeout_s=5),
                return_exceptions=True,
            )
            assert [type(refusal) for refusal in refusals] == [LedgerUnavailable] * 5, "nothing was sent"
            await proxy.start()
            assert (await publisher.publish_and_wait("monitoring", "ping", timeout_s=60)).content == "pong"


@pytest.mark.slow
async def test_a_waiting_publisher_gets_its_result_after_its_subscription_broke(running: RunningSystem) -> None:
    await running.provider.shut("broken")
    async with Publisher(settings_of(running)) as publisher:
        task_id = await publisher.publish("generation", "score_post", "a post", user_id="broken")
        waiting = asyncio.create_task(publisher.wait(task_id, timeout_s=PATIENCE_S))
        await running.provider.wait_for_arrivals(1, user="broken")
        channel = running.keys.result(task_id)
        await wait_until(lambda: has_listeners(running.redis, channel, 1), what="the subscription")
        await running.redis.client_kill_filter(_type="pubsub")
        await wait_until(lambda: has_listeners(running.redis, channel, 0), what="the subscription broken")
        await wait_until(lambda: has_listeners(running.redis, channel, 1), what="the subscription made anew")
        await running.provider.open()
        assert (await waiting).status is TaskStatus.DONE


@pytest.mark.slow
async def test_who_waits_outlasts_an_outage(running: RunningSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "_READ_AGAIN_S", 0.01)
    await running.provider.shut("patient")
    async with (
        faulty_proxy(running.system.redis_url) as proxy,
        Publisher(settings_of(running, redis_url=proxy.url)) as publisher,
    ):
        task_id = await publisher.publish("generation", "score_post", "a post", user_id="patient")
        waiting = asyncio.create_task(publisher.wait(task_id, timeout_s=PATIENCE_S))
        channel = running.keys.result(task_id)
        await wait_until(lambda: has_listeners(running.redis, channel, 1), what="the subscription")
        proxy.loses_replies = True
        proxy.break_connections()
        proxy.sent.clear()
        await wait_until(lambda: waiting.done() or len(proxy.sent) > 20, what="the end of the wait, or many tries")
        proxy.loses_replies = False
        await running.provider.open()
        assert (await waiting).status is TaskStatus.DONE


async def has_listeners(redis: Redis, channel: str, number: int) -> bool:
    ((_, listeners),) = await redis.pubsub_numsub(channel)
    return listeners == number


async def test_a_publisher_that_is_not_open_says_so(running: RunningSystem) -> None:
    publisher = Publisher(settings_of(running))
    with pytest.raises(LedgerUnavailable, match="async with"):
        await publisher.publish("monitoring", "ping")
    async with publisher:
        assert await publisher.publish_and_wait("monitoring", "ping", timeout_s=PATIENCE_S)
    with pytest.raises(LedgerUnavailable, match="async with"):
        await publisher.publish("monitoring", "ping")


async def test_a_refusal_of_the_server_is_raised_and_not_retried(running: RunningSystem) -> None:
    other = running.system.redis_url.rpartition("/")[0] + "/1"
    async with connect(other) as redis, Publisher(settings_of(running, redis_url=other)) as publisher:
        await redis.set("scraping", "no stream")
        with pytest.raises(LedgerUnavailable, match="WRONGTYPE") as refused:
            await publisher.publish("scraping", "ping")
        await redis.flushdb()
    assert not isinstance(refused.value, TaskUnconfirmed)


async def test_a_server_is_found_in_the_data_directory_or_reported_missing(
    running: RunningSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Publisher(settings_of(running, redis_url=None, data_dir=tmp_path)) as publisher:
        with pytest.raises(LedgerUnavailable, match="start `tollbook up`"):
            await publisher.publish("monitoring", "ping")
    async with Publisher(settings_of(running, redis_url="redis://:secret@127.0.0.1:1/0")) as publisher:
        with pytest.raises(LedgerUnavailable, match=r"Redis did not answer .*127\.0\.0\.1:1") as refused:
            await publisher.publish("monitoring", "ping")
    assert "secret" not in str(refused.value)
    write_endpoint(
        tmp_path / "data",
        Endpoint(
            redis_url=running.system.redis_url, namespace="tollbook", pid=os.getpid(), started_at=datetime.now(UTC)
        ),
    )
    for name in [name for name in os.environ if name.startswith(("TOLLBOOK_", "REDIS_URL"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    async with Publisher() as publisher:
        assert (await publisher.publish_and_wait("monitoring", "ping", timeout_s=PATIENCE_S)).content == "pong"


async def published(redis: Redis, user_id: str) -> list[dict[bytes, bytes]]:
    """Return a user's entries on the stream `generation`."""
    entries: Any = await redis.xrange("generation")
    return [fields for _, fields in entries if fields.get(b"user_id") == user_id.encode()]


async def is_acknowledged(running: RunningSystem) -> bool:
    return await running.pending() == 0


class Score(BaseModel):
    """Not what the stand-in answers."""

    points: int


async def test_an_answer_that_does_not_fit_the_model_is_an_error_with_its_result(
    running: RunningSystem, publisher: Publisher
) -> None:
    running.provider.faults = FaultPlan(script=("text_parts",))
    with pytest.raises(OutputInvalid) as refused:
        await publisher.publish_and_wait(
            "generation", "score_post", "x", user_id=42, timeout_s=PATIENCE_S, response_model=Score
        )
    result = refused.value.result
    assert (result.user_id, result.status) == ("42", TaskStatus.DONE)
    assert result.cost_usd > 0
    assert await publisher.wait(result.task_id, timeout_s=PATIENCE_S) == result
    with pytest.raises(InvalidTask):
        new_entry("generation", "score_post", "x", user_id="u", response_format={"type": "json_schema"})
    entry = new_entry("generation", "score_post", "x", user_id="u", response_format=Score)
    assert json.loads(entry.fields["response_format"]) == response_format_of(Score)
