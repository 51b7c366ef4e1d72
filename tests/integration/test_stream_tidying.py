"""Tidying on real servers: only tasks that every consumer group has read and acknowledged are removed."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.servers import wait_until
from tests.system import REPLIES, running_system
from tollbook.consumers.claims import Claims
from tollbook.consumers.dead_letters import DeadLetters
from tollbook.consumers.stream_tidying import StreamTidying
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.keys import GROUP
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream_owners import own_streams

STREAM: Final = "generation"
OTHERS: Final = "somebody-elses"
# The server removes whole nodes of a stream, which have up to 100 entries; so many finished ones may stay.
NODE: Final = 100
TASK: Final[Any] = {"task": "ping"}
# Entries have ids of the year 2001 where they are to be old.
OLD_MS: Final = 1_000_000_000_000


class Tidied:
    """A task stream with its groups, and what tidies it."""

    def __init__(self, redis: Redis, pipeline: CommandPipeline) -> None:
        self.redis = redis
        self.pipeline = pipeline
        self._ms = OLD_MS

    def tidying(self, *, keep_s: float | None = 0.0, namespace: str = "tollbook") -> StreamTidying:
        return StreamTidying(self.pipeline, DeadLetters(self.pipeline, namespace), namespace=namespace, keep_s=keep_s)

    async def tidy(self, *, keep_s: float | None = 0.0) -> int:
        return await self.tidying(keep_s=keep_s).tidy()

    async def add(self, number: int, *, stream: str = STREAM) -> list[bytes]:
        """Publish tasks that look old."""
        pipe = self.redis.pipeline(transaction=False)
        for _ in range(number):
            self._ms += 1
            pipe.xadd(stream, TASK, id=f"{self._ms}-0")
        return await pipe.execute()

    async def group(self, name: str = GROUP, start: str = "0") -> None:
        await self.redis.xgroup_create(STREAM, name, start, mkstream=True)

    async def read(self, number: int, *, group: str = GROUP) -> list[bytes]:
        reply: Any = await self.redis.xreadgroup(group, "c1", {STREAM: ">"}, count=number)
        return [entry_id for entry_id, _ in reply[0][1]] if reply else []

    async def finish(self, ids: Sequence[bytes], *, group: str = GROUP) -> None:
        if ids:
            await self.redis.xack(STREAM, group, *ids)

    async def ids(self) -> list[bytes]:
        entries: Any = await self.redis.xrange(STREAM)
        return [entry_id for entry_id, _ in entries]


@pytest.fixture
async def tidied(every_redis_client: Redis) -> AsyncIterator[Tidied]:
    await load_library(every_redis_client)
    pipeline = CommandPipeline(every_redis_client)
    await own_streams(pipeline, [STREAM, "analysis"], "tollbook")
    yield Tidied(every_redis_client, pipeline)
    await pipeline.aclose()


async def test_finished_tasks_are_removed_and_open_ones_stay(tidied: Tidied) -> None:
    await tidied.group()
    ids = await tidied.add(3_000)
    await tidied.finish(await tidied.read(2_500))
    open_ids = await tidied.read(100)
    removed = await tidied.tidy()
    left = await tidied.ids()
    assert removed == 3_000 - len(left)
    assert left[-500:] == ids[-500:]
    assert len(left) <= 500 + NODE
    await tidied.finish(open_ids)
    await tidied.finish(await tidied.read(1_000))
    await tidied.tidy()
    assert len(await tidied.ids()) <= NODE
    # What `top` and the metrics show as unread stays exact.
    groups: Any = await tidied.redis.xinfo_groups(STREAM)
    assert groups[0]["lag"] == 0
    await tidied.add(7)
    groups = await tidied.redis.xinfo_groups(STREAM)
    assert groups[0]["lag"] == 7


async def test_another_group_keeps_what_it_has_not_read_or_not_acknowledged(tidied: Tidied) -> None:
    await tidied.group()
    await tidied.group(OTHERS)
    ids = await tidied.add(1_000)
    await tidied.finish(await tidied.read(1_000))
    with capture_logs() as logs:
        tidying = tidied.tidying()
        assert await tidying.tidy() == 0
        assert await tidying.tidy() == 0
    assert [(line["event"], line["group"]) for line in logs] == [("stream.kept_for_group", OTHERS)]
    read = await tidied.read(600, group=OTHERS)
    await tidied.finish(read[:300], group=OTHERS)
    await tidied.tidy()
    left = await tidied.ids()
    assert left[-700:] == ids[-700:]
    assert len(left) <= 700 + NODE
    await tidied.finish(read[300:], group=OTHERS)
    await tidied.finish(await tidied.read(1_000, group=OTHERS), group=OTHERS)
    await tidied.tidy()
    assert len(await tidied.ids()) <= NODE


async def test_a_task_that_was_taken_over_stays_until_it_is_acknowledged(tidied: Tidied) -> None:
    await tidied.group()
    ids = await tidied.add(1_000)
    read = await tidied.read(1_000)
    await tidied.finish(read[:200] + read[201:])
    claims = Claims(tidied.pipeline, namespace="tollbook", consumer="c2", streams=(STREAM,), claim_after_s=1.0)
    await tidied.redis.xclaim(STREAM, GROUP, "c1", 0, [ids[200]], idle=60_000, justid=True)
    await tidied.tidy()
    deliveries = [delivery async for delivery in claims.abandoned(STREAM)]
    assert [(delivery.entry_id.encode(), delivery.fields) for delivery in deliveries] == [
        (ids[200], {b"task": b"ping"})
    ]
    await tidied.tidy()
    assert ids[200] in await tidied.ids()
    await claims.acknowledge(deliveries[0])
    await tidied.tidy()
    assert len(await tidied.ids()) <= NODE


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
async def test_no_task_is_removed_that_any_group_still_needs(tidied: Tidied, seed: int) -> None:
    draw = random.Random(seed)
    groups = [GROUP, OTHERS, "third"]
    for name in groups:
        await tidied.group(name)
    open_ids: dict[str, set[bytes]] = {name: set() for name in groups}
    unread: dict[str, list[bytes]] = {name: [] for name in groups}
    for _ in range(40):
        added = await tidied.add(draw.randrange(120))
        for name in groups:
            unread[name] += added
            read = await tidied.read(draw.randrange(1, 150), group=name)
            assert read == unread[name][: len(read)]
            del unread[name][: len(read)]
            open_ids[name].update(read)
            done = [each for each in sorted(open_ids[name]) if draw.random() < 0.8]
            open_ids[name].difference_update(done)
            await tidied.finish(done, group=name)
        await tidied.tidy()
        left = set(await tidied.ids())
        for name in groups:
            assert left >= open_ids[name] | set(unread[name])


async def test_in_doubt_no_task_is_removed(tidied: Tidied) -> None:
    """Without Tollbook's own group, under another owner, or while it is switched off."""
    await tidied.group(OTHERS)
    ids = await tidied.add(500)
    await tidied.finish(await tidied.read(500, group=OTHERS), group=OTHERS)
    assert await tidied.tidy() == 0
    await tidied.group()
    await tidied.finish(await tidied.read(500))
    assert await tidied.tidying(namespace="other").tidy() == 0
    assert await tidied.tidy(keep_s=None) == 0
    assert await tidied.ids() == ids
    assert await tidied.tidy() > 0


async def test_an_id_that_no_number_of_the_server_holds_exactly_is_not_guessed(tidied: Tidied) -> None:
    await tidied.group()
    await tidied.add(300)
    await tidied.redis.xadd(STREAM, TASK, id=f"{2**63}-5")
    await tidied.finish(await tidied.read(301))
    assert await tidied.tidy() == 0


async def test_finished_tasks_stay_for_as_long_as_the_setting_says(tidied: Tidied) -> None:
    await tidied.group()
    await tidied.add(300)
    for _ in range(300):
        await tidied.redis.xadd(STREAM, TASK)
    await tidied.finish(await tidied.read(600))
    await tidied.tidy(keep_s=3_600.0)
    assert 300 <= len(await tidied.ids()) <= 300 + NODE
    await tidied.tidy()
    assert len(await tidied.ids()) <= NODE


async def test_a_stream_that_cannot_be_trimmed_does_not_keep_the_others_from_it(tidied: Tidied) -> None:
    await tidied.redis.set("analysis", "no stream")
    await tidied.group()
    await tidied.add(500)
    await tidied.finish(await tidied.read(500))
    with capture_logs() as logs:
        assert await tidied.tidy() > 0
    assert [line["stream"] for line in logs if line["event"] == "stream.not_trimmed"] == ["analysis"]


async def test_only_one_of_several_workers_tidies(tidied: Tidied) -> None:
    await tidied.group()
    rounds: list[int] = []

    async def no_pause(_: float) -> None:
        rounds.append(1)
        await asyncio.Event().wait()

    def made() -> StreamTidying:
        letters = DeadLetters(tidied.pipeline, "tollbook")
        return StreamTidying(tidied.pipeline, letters, namespace="tollbook", keep_s=0.0, sleep=no_pause)

    await tidied.add(500)
    await tidied.finish(await tidied.read(500))
    first, second = asyncio.create_task(made().run()), None
    try:
        assert await wait_until(lambda: len(rounds) == 1, what="the first round")
        assert len(await tidied.ids()) <= NODE
        await tidied.add(500)
        await tidied.finish(await tidied.read(500))
        second = asyncio.create_task(made().run())
        assert await wait_until(lambda: len(rounds) == 2, what="the second worker's round")
        assert len(await tidied.ids()) >= 500
    finally:
        for task in (first, second):
            if task is not None:
                task.cancel()


async def test_a_worker_tidies_by_itself_and_a_task_answered_before_stays_answered(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    tasks = [{"task": "ping", "task_id": f"p{number}", "user_id": "u1", "reply_to": REPLIES} for number in range(400)]
    async with running_system(tmp_path / "data", server_url, task_keep_s=0.0) as running:
        await running.publish(STREAM, tasks)
        await running.answers(task["task_id"] for task in tasks)

        async def is_finished() -> bool:
            return await running.pending() == 0

        await wait_until(is_finished, what="every task acknowledged")
        await redis_client.delete("tollbook:tidying")
    # The next worker begins with it.
    async with running_system(tmp_path / "data", server_url, task_keep_s=0.0) as running:

        async def is_tidied() -> bool:
            return await running.redis.xlen(STREAM) <= NODE

        assert await wait_until(is_tidied, what="the finished tasks removed")
        again = {"task": "ping", "task_id": "p0", "user_id": "u1", "reply_to": "again"}
        await running.publish(STREAM, [again])

        async def is_answered() -> bool:
            return await running.redis.xlen("again") == 1

        assert await wait_until(is_answered, what="the answer")


@pytest.mark.slow
async def test_a_reply_stream_is_kept_to_its_limit(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    tasks = [{"task": "ping", "task_id": f"p{number}", "user_id": "u1", "reply_to": REPLIES} for number in range(1_000)]
    async with running_system(tmp_path / "data", server_url, reply_stream_max=50) as running:
        await running.publish(STREAM, tasks)

        async def is_answered() -> bool:
            info: Any = await running.redis.xinfo_stream(REPLIES) if await running.redis.exists(REPLIES) else {}
            return info.get("entries-added") == len(tasks)

        assert await wait_until(is_answered, what="every answer")
        assert 50 <= await running.redis.xlen(REPLIES) <= 50 + NODE
