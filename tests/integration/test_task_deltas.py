"""Answers that are read while they come: the worker's deltas, and how a publisher reads them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.calling import PROMPT
from tests.servers import wait_until
from tests.system import RunningSystem, running_system
from tollbook import Publisher, ResultTimeout, TaskUpdate
from tollbook.inference.calls.call import Call, RunId
from tollbook.inference.calls.holds import Hold
from tollbook.inference.settings import load_settings
from tollbook.inference.task_deltas import KEPT_S, DeltaStream
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.schemas.results import TaskStatus
from tollbook.schemas.tasks import Task
from tollbook.standin import FaultPlan


@asynccontextmanager
async def opened(server_url: str, data: Path, **values: Any) -> AsyncIterator[tuple[RunningSystem, Publisher]]:
    async with running_system(data, server_url, **values) as running:
        settings = load_settings(env_file=None, redis_url=server_url, data_dir=data)
        running.provider.config = replace(running.provider.config, chunk_ms=0)
        async with Publisher(settings) as publisher:
            yield running, publisher


async def order(publisher: Publisher, task_id: str = "t1", **fields: Any) -> str:
    values: dict[str, Any] = {"user_id": "u1", "streamed": True, **fields}
    return await publisher.publish("generation", "generate_draft", PROMPT, task_id=task_id, **values)


async def read(publisher: Publisher, task_id: str = "t1") -> list[TaskUpdate]:
    return [update async for update in publisher.stream(task_id, timeout_s=60)]


async def has_ended(redis_client: Redis, key: str) -> bool:
    entries = [fields async for _, fields in each_entry(redis_client, key)]
    return entries[-1] == {b"end": b"done"}


async def each_entry(redis_client: Redis, key: str) -> AsyncIterator[tuple[bytes, dict[bytes, bytes]]]:
    entries: Any = await redis_client.xrange(key)
    for entry in entries:
        yield entry


def text_of(updates: list[TaskUpdate]) -> str:
    return "".join(update.text for update in updates)


async def test_answer_is_read_while_it_comes_and_ends_with_its_result(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with opened(server_url, tmp_path / "data") as (running, publisher):
        await order(publisher)
        updates = await read(publisher)
        key = running.keys.deltas("t1")
        await wait_until(lambda: has_ended(redis_client, key), what="the end of the stream")
        again = await read(publisher)
        assert 0 < await redis_client.ttl(key) <= KEPT_S
    *deltas, end = updates
    assert {update.kind for update in deltas} == {"delta"}
    assert end.kind == "result"
    assert end.result is not None
    assert (end.result.status, text_of(deltas)) == (TaskStatus.DONE, end.result.content)
    assert (text_of(again), again[-1]) == (text_of(updates), end), "who comes late reads the same"


@pytest.mark.slow
async def test_first_delta_is_read_before_the_answer_has_ended(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with opened(server_url, tmp_path / "data") as (running, publisher):
        running.provider.faults = FaultPlan(script=["stream_hang"])
        reading = publisher.stream(await order(publisher), timeout_s=60)
        first = await anext(reading)
        assert await publisher.result("t1") is None
        await reading.aclose()
    assert (first.kind, first.text.split()[0]) == ("delta", "[stand-in]")


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"streamed": None}, {"streamed": False}])
async def test_task_without_a_stream_has_its_result_alone(
    redis_client: Redis, server_url: str, tmp_path: Path, fields: dict[str, Any]
) -> None:
    async with opened(server_url, tmp_path / "data") as (running, publisher):
        await order(publisher, **fields)
        updates = await read(publisher)
        assert await redis_client.exists(running.keys.deltas("t1")) == 0
    assert [update.kind for update in updates] == ["result"]


async def test_refusal_and_ping_end_the_stream(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with opened(server_url, tmp_path / "data", caps={"plans": {"trial": "0.000001"}}) as (running, publisher):
        await order(publisher)
        await publisher.publish("generation", "ping", task_id="p1", streamed=True)
        refused, ping = await read(publisher), await read(publisher, "p1")
        for task_id, status in (("t1", b"denied"), ("p1", b"done")):
            key = running.keys.deltas(task_id)
            await wait_until(lambda key=key: redis_client.exists(key), what="the end of the stream")
            assert [fields async for _, fields in each_entry(redis_client, key)] == [{b"end": status}]
    assert [update.result and update.result.status for update in (*refused, *ping)] == ["denied", "done"]


@pytest.mark.slow
async def test_a_wait_for_deltas_times_out(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with opened(server_url, tmp_path / "data") as (_, publisher):
        with pytest.raises(ResultTimeout):
            await anext(publisher.stream("no such task", timeout_s=0))


async def test_new_run_after_a_death_announces_a_restart(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with opened(server_url, tmp_path / "data") as (running, publisher):
        running.provider.faults = FaultPlan(script=["stream_hang", None])
        reading = publisher.stream(await order(publisher), timeout_s=60)
        first = await anext(reading)
        (worker,) = running.workers
        await worker.drain(0.0)
        kinds, text, end = [first.kind], first.text, first
        runtime = running.system.runtime
        task = Task(task="generate_draft", user_id="u1", prompt=PROMPT, stream=True)
        policy = runtime.policies.of("u1")
        call = Call.of_task(task, call_id="t1", run_id=RunId("test", "2"), policy=policy, stream="generation")
        hold = await runtime.reservations.reserve(call)
        assert isinstance(hold, Hold)
        await worker._run(call, hold, None)  # As the next worker would.
        async for update in reading:
            kinds.append(update.kind)
            text = update.text if update.kind == "restarted" else text + update.text
            end = update
    assert "restarted" in kinds
    assert end.result is not None
    assert text == end.result.content


class SlowPipeline:
    """Redis that is asked and answers when the test lets it; `asked` are the commands."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answers = asyncio.Event()
        self.problem: Exception | None = None

    async def execute(self, *command: Any) -> Any:
        self.asked.append(command)
        await self.answers.wait()
        if self.problem is not None:
            raise self.problem

    @property
    def entries(self) -> list[tuple[str, str]]:
        return [(command[-2], command[-1]) for command in self.asked if command[0] == "XADD"]


def delta(text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish, "logprobs": None}
    return {"choices": [choice]}


async def test_what_comes_while_an_entry_is_under_way_shares_the_next() -> None:
    pipeline = SlowPipeline()
    stream = DeltaStream(pipeline, "k")  # pyright: ignore[reportArgumentType]
    await stream.take(delta("a"))
    await wait_until(lambda: pipeline.entries)
    for each in (delta("b"), delta("c"), delta("", "stop")):
        await stream.take(each)
    pipeline.answers.set()
    await stream.end("done")
    fields = [(name, json.loads(value) if name == "delta" else value) for name, value in pipeline.entries]
    assert fields == [("delta", delta("a")), ("delta", delta("bc", "stop")), ("end", "done")]


@pytest.mark.parametrize("problem", [None, LedgerUnavailable("away")])
async def test_slow_redis_loses_deltas_and_the_reader_gets_a_gap(problem: Exception | None) -> None:
    pipeline = SlowPipeline()
    pipeline.problem = problem
    stream = DeltaStream(pipeline, "k", patience_s=0.01)  # pyright: ignore[reportArgumentType]
    with capture_logs() as lines:
        await stream.take(delta("a"))
        await wait_until(lambda: pipeline.entries)
        if problem is not None:
            pipeline.answers.set()
        await wait_until(lambda: lines)
    pipeline.problem = None
    pipeline.answers.set()
    await stream.take(delta("b"))
    await stream.end("done")
    assert [name for name, _ in pipeline.entries] == ["delta", "gap", "delta", "end"]
