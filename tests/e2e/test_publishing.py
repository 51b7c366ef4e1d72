"""What publishers may send, in every spelling, and how malformed messages end."""

import json
from collections.abc import AsyncIterator
from itertools import count
from typing import Any, Final

import pytest
import pytest_asyncio
from faststream.redis import RedisBroker
from redis.asyncio import Redis

from tests.quick import first_quick
from tests.servers import wait_until
from tests.system import REPLIES, RunningSystem, running_system
from tollbook.consumers.dead_letters import DeadLetters
from tollbook.ledger.keys import GROUP, Keys
from tollbook.ledger.server.connection import connect
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus

# One system for the whole module: that it still runs after every bad message is part of what is tested.
pytestmark = pytest.mark.asyncio(loop_scope="module")

STREAM: Final = "generation"
# Published before any worker has ever been started.
EARLY: Final = {"task": "score_post", "task_id": "early", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
_numbers = count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningSystem]:
    async with connect(server_url) as client:
        await client.flushall()
        await client.function_flush()
        await client.xadd("scraping", EARLY)  # pyright: ignore[reportArgumentType]
    async with running_system(tmp_path_factory.mktemp("publishing") / "data", server_url) as system:
        await result_of(system, "early")
        yield system


def new_id() -> str:
    return f"task-{next(_numbers)}"


async def result_of(running: RunningSystem, task_id: str) -> InferenceResult:
    result = await running.system.handle.results.wait(task_id, 10)
    assert result is not None, f"no result for {task_id}"
    return result


async def test_tasks_published_before_the_first_worker_are_executed(running: RunningSystem) -> None:
    assert (await running.answers(["early"]))[0].status is TaskStatus.DONE


async def test_ping_answers_pong_and_costs_nothing(running: RunningSystem) -> None:
    requests = running.provider.requests
    await running.publish("monitoring", [{"task": "ping", "task_id": "ping-1", "reply_to": REPLIES}])
    answer = (await running.answers(["ping-1"]))[0]
    assert (answer.status, answer.content, answer.cost_usd) == (TaskStatus.DONE, "pong", 0)
    assert running.provider.requests == requests
    assert await running.query("FROM events WHERE call_id = 'ping-1'") == []


async def answers_to(running: RunningSystem, task_id: str, *, number: int) -> list[InferenceResult]:
    """Return the answers to one task once there are so many, repeats and all."""

    async def find() -> list[InferenceResult]:
        entries: Any = await running.redis.xrange(REPLIES)
        texts = [fields[b"result"] for _, fields in entries if fields[b"task_id"].decode() == task_id]
        return [InferenceResult.model_validate_json(text) for text in texts] if len(texts) >= number else []

    return await wait_until(find, what=f"{number} answers to {task_id}")


async def test_a_ping_that_is_published_twice_gets_the_same_answer(running: RunningSystem) -> None:
    """G4."""
    ping = {"task": "ping", "task_id": new_id(), "reply_to": REPLIES}
    await running.publish("monitoring", [ping])
    await result_of(running, ping["task_id"])
    await running.publish("monitoring", [ping])
    first, second = await answers_to(running, ping["task_id"], number=2)
    assert first == second == await result_of(running, ping["task_id"])


async def test_a_malformed_task_that_is_delivered_twice_gets_the_same_answer(running: RunningSystem) -> None:
    """G4."""
    task = {"task": "score_post", "task_id": new_id(), "user_id": "u42", "prompt": "", "reply_to": REPLIES}
    await running.publish("monitoring", [task])
    await result_of(running, task["task_id"])
    await running.publish("monitoring", [task])
    first, second = await answers_to(running, task["task_id"], number=2)
    assert first == second == await result_of(running, task["task_id"])


async def test_a_malformed_task_under_the_id_of_a_call_is_told_what_is_wrong(running: RunningSystem) -> None:
    call = {"task": "score_post", "task_id": new_id(), "user_id": "u42", "prompt": "a post", "reply_to": REPLIES}
    await running.publish("monitoring", [call])
    done = await result_of(running, call["task_id"])
    await running.publish("monitoring", [call | {"prompt": ""}])
    answers = await answers_to(running, call["task_id"], number=2)
    assert [answer.error_code for answer in answers] == [None, ErrorCode.INVALID_TASK]
    assert await result_of(running, call["task_id"]) == done


async def test_a_ping_under_the_id_of_a_call_is_a_conflict(running: RunningSystem) -> None:
    """G4."""
    call = {"task": "score_post", "task_id": new_id(), "user_id": "u42", "prompt": "a post", "reply_to": REPLIES}
    await running.publish("monitoring", [call])
    done = await result_of(running, call["task_id"])
    await running.publish("monitoring", [{"task": "ping", "task_id": call["task_id"], "reply_to": REPLIES}])
    answers = await answers_to(running, call["task_id"], number=2)
    assert [answer.error_code for answer in answers] == [None, ErrorCode.IDEMPOTENCY_CONFLICT]
    assert await result_of(running, call["task_id"]) == done


SPELLINGS: Final = {
    "plain fields": {"task": "generate_draft", "user_id": "u42", "plan": "trial", "prompt": "Write"},
    "every optional field": {
        "task": "generate_draft", "user_id": "u42", "plan": "growth", "campaign_id": "c1", "system": "Be brief.",
        "prompt": "Write", "max_tokens": "50", "temperature": "0.5", "model": "gpt-4o-mini", "metadata": '{"a": [1]}',
    },
    "messages instead of a prompt": {
        "task": "generate_draft", "user_id": "u42", "messages": '[{"role": "user", "content": "Write"}]'
    },
    "task_type as the name of the field": {"task_type": "generate_draft", "user_id": "u42", "prompt": "Write"},
    "empty optional fields": {"task": "score_post", "user_id": "u42", "prompt": "é", "system": "", "max_tokens": ""},
    "JSON in data": {"data": '{"task": "generate_draft", "user_id": "u42", "prompt": "Write", "max_tokens": 50}'},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_every_spelling_of_a_task_is_executed(running: RunningSystem, spelling: str) -> None:
    entry_id = (await running.publish(STREAM, [SPELLINGS[spelling]]))[0]
    # The task's id, where the publisher gives none, follows from the entry's.
    result = await result_of(running, f"{STREAM}-{entry_id}")
    assert result.status is TaskStatus.DONE
    assert result.cost_usd > 0
    assert running.provider.book.totals()["u42"] > 0


async def test_what_the_task_says_wins_over_the_route_and_metadata_come_back(running: RunningSystem) -> None:
    task = SPELLINGS["every optional field"] | {"task_id": new_id(), "prompt": "[[completion_tokens=900]]"}
    await running.publish(STREAM, [task])
    result = await result_of(running, task["task_id"])
    assert result.model_used == "openai/gpt-4o-mini"
    entry = list(running.provider.book.entries.values())[-1]
    assert (entry.completion_tokens, entry.user) == (50, "u42")
    assert result.metadata == {"a": [1]}
    await running.fold_all()
    call = (await running.query(f"FROM calls WHERE call_id = '{task['task_id']}'"))[0]
    assert (call["campaign_id"], call["plan"], call["stream"]) == ("c1", "growth", STREAM)


async def test_faststreams_broker_publishes_and_is_replied_to(running: RunningSystem) -> None:
    task: dict[str, Any] = {"task": "score_post", "user_id": "u7", "task_id": new_id(), "prompt": "ein Gedicht: äöü"}
    async with RedisBroker(running.system.redis_url) as broker:
        await broker.publish(task, stream=STREAM, reply_to=REPLIES)
    assert (await running.answers([task["task_id"]]))[0].status is TaskStatus.DONE


async def test_a_reply_to_that_is_not_a_stream_does_not_delay_the_task(running: RunningSystem) -> None:
    await running.redis.set("not-a-stream", "1")
    task = EARLY | {"task_id": new_id(), "reply_to": "not-a-stream"}
    await running.publish(STREAM, [task])
    assert (await result_of(running, task["task_id"])).status is TaskStatus.DONE
    await assert_nothing_is_left(running)


async def test_a_reply_to_that_names_a_task_stream_is_refused(running: RunningSystem) -> None:
    """A result must not come back as a task, for ever."""
    length = await running.redis.xlen("monitoring")
    task = EARLY | {"task_id": new_id(), "reply_to": "monitoring"}
    await running.publish(STREAM, [task])
    assert (await result_of(running, task["task_id"])).status is TaskStatus.INVALID
    await assert_nothing_is_left(running)
    assert await running.redis.xlen("monitoring") == length


GOOD: Final[dict[bytes, bytes]] = {b"task": b"score_post", b"user_id": b"u1", b"prompt": b"a post"}
DEEP: Final = b"[" * 100_000 + b"]" * 100_000


def without(*names: bytes) -> dict[bytes, bytes]:
    return {name: value for name, value in GOOD.items() if name not in names}


# What is wrong -> the message, and a word of the reason.
MALFORMED: Final[dict[str, tuple[dict[bytes, bytes], str]]] = {
    "no task type": (without(b"task"), "task"),
    "unknown task type": (GOOD | {b"task": b"write_novel"}, "task"),
    "unknown plan": (GOOD | {b"plan": b"enterprise"}, "plan"),
    "no user": (without(b"user_id"), "user_id"),
    "no prompt": (without(b"prompt"), "prompt"),
    "empty prompt": (GOOD | {b"prompt": b""}, "prompt"),
    "prompt and messages": (GOOD | {b"messages": b'[{"role": "user", "content": "x"}]'}, "prompt"),
    "unknown field": (GOOD | {b"max_token": b"5"}, "max_token"),
    "unknown field with half a character": ({b"data": b'{"task": "ping", "\\ud800": 1}'}, "name of a field"),
    "unknown field of 1 MB": (GOOD | {b"x" * 1_000_000: b"1"}, "unknown field of 1000000 characters"),
    "messages are not JSON": (without(b"prompt") | {b"messages": b"[{"}, "messages"),
    "messages are no list": (without(b"prompt") | {b"messages": b'{"role": "user"}'}, "messages"),
    "a message with an image": (
        without(b"prompt") | {b"messages": b'[{"role": "user", "content": [{"type": "image_url"}]}]'}, "messages"
    ),
    "prompt is not UTF-8": (GOOD | {b"prompt": b"caf\xe9"}, "UTF-8"),
    "a field's name is not UTF-8": (GOOD | {b"\xff\xfe": b"x"}, "UTF-8"),
    "negative max_tokens": (GOOD | {b"max_tokens": b"-1"}, "max_tokens"),
    "max_tokens is no number": (GOOD | {b"max_tokens": b"NaN"}, "max_tokens"),
    "absurd max_tokens": (GOOD | {b"max_tokens": b"9" * 40}, "max_tokens"),
    "max_tokens of 10,000 digits": (GOOD | {b"max_tokens": b"9" * 10_000}, "max_tokens"),
    "infinite max_tokens": (GOOD | {b"max_tokens": b"1e999"}, "max_tokens"),
    "temperature is no number": (GOOD | {b"temperature": b"nan"}, "temperature"),
    "negative temperature": (GOOD | {b"temperature": b"-0.1"}, "temperature"),
    "infinite temperature": (GOOD | {b"temperature": b"inf"}, "temperature"),
    "a prompt of 10 MB": (GOOD | {b"prompt": b"x" * 10_000_000}, "bytes"),
    "a prompt just over the limit": (GOOD | {b"prompt": b"x" * 1_000_001}, "bytes"),
    "deep JSON in messages": (without(b"prompt") | {b"messages": DEEP}, "messages"),
    "deep JSON in metadata": (GOOD | {b"metadata": b'{"a": ' + DEEP + b"}"}, "metadata"),
    "metadata nested 40 levels": (GOOD | {b"metadata": b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}"}, "metadata"),
    "large metadata": (GOOD | {b"metadata": b'{"a": "' + b"x" * 20_000 + b'"}'}, "metadata"),
    "metadata with NaN": (GOOD | {b"metadata": b'{"a": NaN}'}, "metadata"),
    "a user id with half a character": (
        {b"data": json.dumps({"task": "score_post", "user_id": "\ud800", "prompt": "x"}).encode()}, "user_id"
    ),
    "a user id of 10,000 characters": (GOOD | {b"user_id": b"u" * 10_000}, "user_id"),
    "a user id with a line break": (GOOD | {b"user_id": b"u1\nINFO forged"}, "user_id"),
    "reply_to is a key of the ledger": (GOOD | {b"reply_to": b"{tollbook:0}:ledger"}, "reply_to"),
    "data is not JSON": ({b"data": b"{"}, "data"),
    "data is a list": ({b"data": b"[1]"}, "data"),
    "deep JSON in data": ({b"data": DEEP}, "data"),
    "a broken FastStream envelope": ({b"__data__": b"\x89BIN\r\n\x1a\n\x00\x01garbage"}, "envelope"),
    "an empty FastStream envelope": ({b"__data__": b""}, "envelope"),
}  # fmt: skip


@pytest.mark.parametrize("case", first_quick(12, MALFORMED))
async def test_a_malformed_task_is_dead_lettered_and_delays_no_other(running: RunningSystem, case: str) -> None:
    fields, word = MALFORMED[case]
    requests, task_id = running.provider.requests, new_id()
    # Where the message has fields of its own, the task id can be read whatever is wrong with the others.
    has_id = b"data" not in fields and b"__data__" not in fields
    message = fields | {b"task_id": task_id.encode()} if has_id else fields
    added: Any = await running.redis.xadd(STREAM, message)  # pyright: ignore[reportArgumentType]
    entry_id = added.decode()
    good = {"task": "score_post", "user_id": "u1", "prompt": "a post", "task_id": f"after-{task_id}"}
    await running.publish(STREAM, [good])

    result = await result_of(running, task_id if has_id else f"{STREAM}-{entry_id}")
    assert (result.status, result.error_code, result.cost_usd) == (TaskStatus.INVALID, ErrorCode.INVALID_TASK, 0)
    assert word in (result.error or "")
    letter = await letter_of(running, entry_id)
    assert (letter.reason, letter.stream) == ("invalid_task", STREAM)
    assert word in letter.error
    assert letter.fields == message, "nothing of it is lost"
    assert (await result_of(running, good["task_id"])).status is TaskStatus.DONE
    await assert_nothing_is_left(running)
    assert running.provider.requests == requests + 1


async def test_a_malformed_task_is_answered_where_its_reply_stream_can_be_read(running: RunningSystem) -> None:
    task_id = new_id()
    await running.publish(STREAM, [{"task": "nonsense", "task_id": task_id, "reply_to": REPLIES}])
    assert (await running.answers([task_id]))[0].error_code is ErrorCode.INVALID_TASK


async def test_the_same_task_id_with_other_content_is_a_conflict_and_not_a_second_charge(
    running: RunningSystem,
) -> None:
    """G4: the first task's result stands; the second publisher gets the conflict."""
    first = {"task": "score_post", "user_id": "u9", "prompt": "a post", "task_id": new_id()}
    await running.publish(STREAM, [first])
    result = await result_of(running, first["task_id"])
    entry_id = (await running.publish(STREAM, [first | {"prompt": "another post", "reply_to": REPLIES}]))[0]
    answer = (await running.answers([first["task_id"]]))[0]
    assert (answer.status, answer.error_code) == (TaskStatus.INVALID, ErrorCode.IDEMPOTENCY_CONFLICT)
    letter = await letter_of(running, entry_id)
    assert (letter.reason, letter.task_id) == ("idempotency_conflict", first["task_id"])
    assert await result_of(running, first["task_id"]) == result
    assert sum(entry.user == "u9" for entry in running.provider.book.entries.values()) == 1
    await assert_nothing_is_left(running)


async def test_the_same_task_twice_is_executed_once_and_answered_twice(running: RunningSystem) -> None:
    """G4, with both in flight at once."""
    task = {"task": "score_post", "user_id": "twice", "prompt": "a post", "task_id": new_id()}
    await running.publish(STREAM, [task | {"reply_to": "twice"}, task | {"reply_to": "twice"}])
    assert await wait_until(lambda: has_length(running.redis, "twice", 2), what="two answers")
    entries: Any = await running.redis.xrange("twice")
    answers = [json.loads(fields[b"result"]) for _, fields in entries]
    assert answers[0] == answers[1]
    assert sum(entry.user == "twice" for entry in running.provider.book.entries.values()) == 1


async def test_a_repeat_whose_result_is_gone_is_answered_under_its_id_too(running: RunningSystem) -> None:
    """G4: it expired, or Redis went back in time. A waiting publisher gets an answer; nothing is paid again."""
    task = {"task": "score_post", "task_id": new_id(), "user_id": "u42", "prompt": "a post", "reply_to": REPLIES}
    await running.publish("monitoring", [task])
    await result_of(running, task["task_id"])
    paid = running.provider.requests
    await running.redis.delete(running.keys.result(task["task_id"]))
    for number in (2, 3):
        await running.publish("monitoring", [task])
        answers = await answers_to(running, task["task_id"], number=number)
    assert [(answer.status, answer.content) for answer in answers[1:]] == [(TaskStatus.DONE, None)] * 2
    assert "has expired" in (answers[1].error or "")
    assert answers[1] == answers[2] == await result_of(running, task["task_id"])
    assert running.provider.requests == paid


async def test_no_prompt_is_on_the_ledger_and_the_dead_letters_reason_quotes_none(running: RunningSystem) -> None:
    """G10: the whole message stands in the dead letter's `fields`, and nowhere else."""
    secret = "zzsecretzz"
    good = {"task": "score_post", "user_id": "u1", "prompt": secret, "system": secret, "task_id": new_id()}
    bad = good | {"task_id": new_id(), "plan": secret, "max_tokens": secret, "messages": secret, "metadata": secret}
    entries = await running.publish(STREAM, [good, bad])
    assert (await result_of(running, good["task_id"])).status is TaskStatus.DONE
    refused = await result_of(running, bad["task_id"])
    letter = await letter_of(running, entries[1])
    assert secret not in refused.model_dump_json() + letter.error
    ledger = str(await running.redis.xrange(Keys().ledger))
    assert good["task_id"] in ledger
    assert secret not in ledger
    assert secret not in str(await running.query("FROM events"))


async def letter_of(running: RunningSystem, entry_id: str) -> Any:
    letters = DeadLetters(running.system.handle.pipeline, "tollbook")

    async def find() -> Any:
        return next((letter for letter in await letters.list(count=10_000) if letter.entry_id == entry_id), None)

    return await wait_until(find, what="the dead letter")


async def assert_nothing_is_left(running: RunningSystem) -> None:
    """No hold is open, every entry of the stream is delivered and acknowledged."""

    async def is_done() -> bool:
        group = next(g for g in await running.redis.xinfo_groups(STREAM) if g["name"] == GROUP.encode())
        return not group["pending"] and not group["lag"]

    assert await wait_until(is_done, what="every task acknowledged")
    assert await running.redis.zcard(running.keys.holds) == 0


async def has_length(redis: Redis, stream: str, length: int) -> bool:
    return await redis.xlen(stream) == length
