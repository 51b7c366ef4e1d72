"""The dead-letter stream on a real server: whole tasks with the reason, and the way back."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from tests.servers import drop_functions, wait_until
from tests.system import REPLIES, running_system
from tollbook.consumers.dead_letters import DeadLetterLimits, DeadLetters, Reason
from tollbook.consumers.messages import Delivery, read_task
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.tasks import InvalidTask

NOW_MS: Final = 1_795_504_469_412
STREAM: Final = "generation"
# Every byte there is, in names and in values; and names that look like the way such bytes are written down.
ODD_FIELDS: Final = {
    bytes(range(256)): bytes(range(256)),
    b"base64:AAAA": b'{"base64": "AAAA"}',
    "prompt é 中 🙂".encode(): b"",
    b"": b"\x00",
}
TASK: Final = {
    b"task": b"score_post",
    b"user_id": b"u1",
    b"prompt": "a post é".encode(),
    b"task_id": b"t1",
    b"plan": b"growth",
    b"metadata": b'{"a": [1, null]}',
    b"reply_to": b"answers",
    b"max_tokens": b"50",
}


@pytest.fixture
async def letters(redis_client: Redis) -> AsyncIterator[DeadLetters]:
    await load_library(redis_client)
    pipeline = CommandPipeline(redis_client)
    yield DeadLetters(pipeline, "tollbook", now_ms=lambda: NOW_MS)
    await pipeline.aclose()


async def put(
    letters: DeadLetters,
    fields: dict[bytes, bytes],
    *,
    entry_id: str = "5-1",
    reason: Reason = "invalid_task",
    task_id: str = "t1",
) -> None:
    delivery = Delivery(STREAM, entry_id, fields, deliveries=3)
    await letters.put(delivery, reason=reason, error="why", task_id=task_id, user_id="u1")


async def test_a_letter_holds_the_whole_entry_and_the_reason(letters: DeadLetters) -> None:
    await put(letters, ODD_FIELDS)
    letter = (await letters.list())[0]
    assert letter.fields == ODD_FIELDS
    assert (letter.stream, letter.entry_id, letter.deliveries) == (STREAM, "5-1", 3)
    assert (letter.reason, letter.error, letter.task_id, letter.user_id) == ("invalid_task", "why", "t1", "u1")
    assert letter.at_ms == NOW_MS
    assert await letters.get(letter.id) == letter


async def test_a_letter_can_be_read_without_this_project(letters: DeadLetters, redis_client: Redis) -> None:
    await put(letters, TASK)
    entries: Any = await redis_client.xrange("tollbook:dead-letters")
    fields = entries[0][1]
    assert json.loads(fields[b"fields"]) == {name.decode(): value.decode() for name, value in TASK.items()}
    assert fields[b"reason"] == b"invalid_task"


async def test_a_letter_stays_where_its_task_cannot_be_published_again(
    letters: DeadLetters, redis_client: Redis
) -> None:
    """The task is on its stream first: whoever dies in between leaves it twice, not nowhere."""
    await put(letters, TASK)
    await redis_client.set(STREAM, "no stream")
    letter = (await letters.list())[0]
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await letters.retry(letter)
    assert await letters.list() == [letter]


async def test_a_long_reason_is_cut_and_the_task_is_not(letters: DeadLetters) -> None:
    fields = {b"prompt": b"x" * 3_000_000}
    await letters.put(Delivery(STREAM, "5-1", fields), reason="invalid_task", error="e" * 10_000, task_id="t1")
    letter = (await letters.list())[0]
    assert 100 <= len(letter.error) <= 1000
    assert letter.fields == fields
    assert letter.user_id == ""


async def test_letters_are_listed_oldest_first_page_by_page(letters: DeadLetters) -> None:
    for number in range(5):
        await put(letters, TASK, entry_id=f"{number}-0")
    assert await letters.count() == 5
    first = await letters.list(count=3)
    rest = await letters.list(count=3, after=first[-1].id)
    assert [letter.entry_id for letter in first + rest] == ["0-0", "1-0", "2-0", "3-0", "4-0"]
    assert await letters.list(after=rest[-1].id) == []


async def test_a_dropped_letter_is_gone_and_only_that(letters: DeadLetters) -> None:
    await put(letters, TASK, entry_id="1-0")
    await put(letters, TASK, entry_id="2-0")
    gone, kept = await letters.list()
    assert await letters.drop(gone.id) is True
    assert await letters.drop(gone.id) is False
    assert await letters.get(gone.id) is None
    assert [letter.id for letter in await letters.list()] == [kept.id]


async def test_a_malformed_task_goes_back_only_where_that_is_asked_for_and_byte_for_byte(
    letters: DeadLetters, redis_client: Redis
) -> None:
    await put(letters, ODD_FIELDS)
    letter = (await letters.list())[0]
    with pytest.raises(InvalidTask, match="not UTF-8"):
        await letters.retry(letter)
    assert await letters.list() == [letter]
    retried = await letters.retry(letter, unchanged=True)
    entries: Any = await redis_client.xrange(STREAM)
    assert entries == [(retried.entry_id.encode(), ODD_FIELDS)]
    assert (retried.stream, retried.task_id) == (STREAM, "t1")
    assert await letters.count() == 0


@pytest.mark.parametrize("reason", ["attempts_exhausted", "idempotency_conflict"])
async def test_a_task_that_has_a_result_goes_back_under_an_id_of_its_own(
    letters: DeadLetters, redis_client: Redis, reason: Reason
) -> None:
    """G4: the result under the old id stands, so the same work can only be done under another."""
    await put(letters, TASK, reason=reason)
    letter = (await letters.list())[0]
    retried = await letters.retry(letter)
    entries: Any = await redis_client.xrange(STREAM)
    task_id, task = read_task(Delivery(STREAM, retried.entry_id, entries[0][1]))
    _, original = read_task(Delivery(STREAM, letter.entry_id, TASK))
    assert task_id == retried.task_id != "t1"
    assert task.model_copy(update={"task_id": "t1"}) == original
    assert task.content_hash() == original.content_hash()
    assert await letters.count() == 0


async def test_a_retry_that_is_repeated_after_a_crash_is_the_same_task(
    letters: DeadLetters, redis_client: Redis
) -> None:
    """Between the new entry and the end of the letter a process can die; the task must not run twice."""
    await put(letters, TASK, reason="attempts_exhausted", task_id="t" * 200)
    letter = (await letters.list())[0]
    first, second = await letters.retry(letter), await letters.retry(letter)
    assert first.task_id == second.task_id
    assert first.entry_id != second.entry_id
    entries: Any = await redis_client.xrange(STREAM)
    assert {read_task(Delivery(STREAM, "1-1", fields))[0] for _, fields in entries} == {first.task_id}


@pytest.fixture
async def few(every_redis_client: Redis) -> AsyncIterator[DeadLetters]:
    """Dead letters of which at most five are kept, each for a minute."""
    await load_library(every_redis_client)
    pipeline = CommandPipeline(every_redis_client)
    yield DeadLetters(pipeline, "tollbook", limits=DeadLetterLimits(5, 60.0), now_ms=lambda: NOW_MS)
    await pipeline.aclose()


async def test_the_newest_letters_are_kept_and_the_others_counted(few: DeadLetters) -> None:
    for number in range(12):
        await put(few, TASK, entry_id=f"{number}-0")
    assert [letter.entry_id for letter in await few.list()] == [f"{number}-0" for number in range(7, 12)]
    assert await few.dropped() == 7
    # What a person drops or retries is not what was lost.
    await few.drop((await few.list())[0].id)
    assert await few.dropped() == 7


async def test_a_server_that_has_lost_its_functions_gets_them_again(
    few: DeadLetters, every_redis_client: Redis
) -> None:
    await drop_functions(every_redis_client)
    await put(few, TASK)
    assert await few.count() == 1


async def test_old_letters_go_even_when_no_new_one_comes(few: DeadLetters, every_redis_client: Redis) -> None:
    await every_redis_client.xadd(few.key, {"stream": "x"}, id="1000000000000-0")
    await put(few, TASK)
    assert await few.dropped() == 1
    await every_redis_client.delete(few.key)
    await every_redis_client.xadd(few.key, {"stream": "x"}, id="1000000000000-0")
    await few.tidy()
    assert (await few.count(), await few.dropped()) == (0, 2)


@pytest.mark.slow
async def test_a_flood_of_malformed_tasks_takes_little_memory_and_few_lines_and_delays_no_good_task(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    number, most = 4_000, 200
    bad = {"task": "score_post", "prompt": "x" * 300, "colour": "blue"}
    good = [
        {"task": "score_post", "task_id": f"g{n}", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
        for n in range(40)
    ]
    with capture_logs() as logs:
        async with running_system(tmp_path / "data", server_url, dead_letters_max=most) as running:
            for task in good:
                await running.publish(STREAM, [*([bad] * (number // len(good))), task])
            results = await running.answers(task["task_id"] for task in good)
            assert {result.status.value for result in results} == {"done"}
            letters = DeadLetters(running.system.handle.pipeline, "tollbook")

            async def is_over() -> bool:
                return await letters.dropped() == number - most and await running.pending() == 0

            assert await wait_until(is_over, what="every malformed task refused")
            assert await letters.count() == most
            kept = [letter.entry_id for letter in await letters.list(count=most)]
            entries: Any = await redis_client.xrange(STREAM)
            refused = [entry_id.decode() for entry_id, fields in entries if b"colour" in fields]
            assert set(kept) <= set(refused[-most - 200 :])  # As they were refused, some at once.
            # A result without a name is nobody's for a week.
            assert 0 < await redis_client.ttl(running.keys.result(f"{STREAM}-{refused[0]}")) <= 3_600
            assert await redis_client.ttl(running.keys.result("g0")) > 86_400
            size = await redis_client.memory_usage("tollbook:dead-letters", samples=0)
            assert size is not None
            assert size < 2_000 * most
    lines = [line for line in logs if line["event"].startswith(("task.dead_lettered", "dead_letters."))]
    assert len(lines) < 40
    logged = sum(line.get("times", 1) for line in lines if line["event"].startswith("task.dead_lettered"))
    dropped = sum(line["times"] for line in lines if line["event"] == "dead_letters.dropped")
    assert (logged, dropped) == (number, number - most)
