"""`tollbook dead-letters` and `tollbook reconcile` on a running system: what people do after something went wrong."""

from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.recovery.books import check_books, events_of, is_at_rest
from tests.servers import wait_until
from tests.system import REPLIES, Finished, RunningSystem, run_cli, running_system, serving
from tollbook.consumers.dead_letters import DeadLetter, DeadLetterLimits, DeadLetters, Reason
from tollbook.consumers.messages import Delivery
from tollbook.ledger.keys import GROUP
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus

STREAM: Final = "analysis"
NOT_UTF8: Final = {b"task": b"score_post", b"user_id": b"u1", b"prompt": b"caf\xe9 \x00\xff", b"task_id": b"latin"}
NO_USER: Final = {b"task": b"score_post", b"prompt": "né [bold]".encode(), b"task_id": b"nobodys"}
TASK: Final = {"task": "score_post", "user_id": "u1", "prompt": "a post", "task_id": "deadly", "reply_to": REPLIES}

Cli = Callable[..., Awaitable[Finished]]


@pytest.fixture
async def idle(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    """A system without a worker."""
    async with running_system(tmp_path / "data", server_url, workers=0, claim_after_s=1.0, retries=0) as running:
        yield running


@pytest.fixture
async def running(idle: RunningSystem) -> AsyncIterator[RunningSystem]:
    async with serving(idle, 1):
        yield idle


@pytest.fixture
def cli(idle: RunningSystem, tmp_path: Path) -> Cli:
    async def run(*arguments: str) -> Finished:
        variables = {
            "REDIS_URL": idle.system.redis_url,
            "TOLLBOOK_DATA_DIR": str(tmp_path / "data"),
            "OPENROUTER_BASE_URL": idle.provider.base_url,
            "TOLLBOOK_DIALECT": "openrouter",
        }
        return await run_cli(*arguments, cwd=tmp_path, env=variables)

    return run


def letters_of(running: RunningSystem) -> DeadLetters:
    return DeadLetters(running.system.handle.pipeline, "tollbook")


async def letters_arrive(running: RunningSystem, number: int) -> list[DeadLetter]:
    letters = letters_of(running)

    async def are_there() -> bool:
        return await letters.count() == number

    await wait_until(are_there, what=f"{number} dead letters")
    await is_at_rest(running)
    return await letters.list()


async def result_of(running: RunningSystem, task_id: str) -> InferenceResult:
    result = await running.system.handle.results.get(task_id)
    assert result is not None
    return result


@pytest.mark.slow
async def test_malformed_tasks_are_listed_shown_retried_and_dropped(running: RunningSystem, cli: Cli) -> None:
    for fields in (NOT_UTF8, NO_USER):
        await running.redis.xadd(STREAM, fields)  # pyright: ignore[reportArgumentType]
    latin, nobodys = await letters_arrive(running, 2)
    for task_id in ("latin", "nobodys"):
        assert (await result_of(running, task_id)).error_code is ErrorCode.INVALID_TASK

    listed = await cli("dead-letters", "list", "--json")
    assert [(letter["id"], letter["reason"], letter["task_id"]) for letter in listed.json()] == [
        (latin.id, "invalid_task", "latin"),
        (nobodys.id, "invalid_task", "nobodys"),
    ]
    # G10: a prompt is shown only with a single letter.
    assert "prompt" not in listed.stdout
    table = await cli("dead-letters", "list", "--count", "1")
    assert latin.id in table.stdout
    assert "1 of 2 dead letters; --all shows all" in table.stdout

    shown = (await cli("dead-letters", "show", nobodys.id, "--json")).json()
    assert shown["fields"] == {name.decode(): value.decode() for name, value in NO_USER.items()}
    assert "prompt: né [bold]" in (await cli("dead-letters", "show", nobodys.id)).stdout
    assert "caf\ufffd" in (await cli("dead-letters", "show", latin.id)).stdout

    refused = await cli("dead-letters", "retry", latin.id, nobodys.id)
    assert (refused.code, refused.stdout) == (1, "")
    assert f"{latin.id} is not retried: it is malformed (the message is not UTF-8)" in refused.stderr
    assert "2 of 2 dead letters would fail again" in refused.stderr
    assert [letter.id for letter in await letters_of(running).list()] == [latin.id, nobodys.id]

    retried = await cli("dead-letters", "retry", latin.id, "--unchanged", "--json")
    assert retried.code == 0, retried.stderr
    answer = retried.json()
    assert (answer["letter"], answer["stream"], answer["task_id"]) == (latin.id, STREAM, "latin")
    entries: Any = await running.redis.xrange(STREAM, min=answer["entry_id"], max=answer["entry_id"])
    assert entries[0][1] == NOT_UTF8
    # It is as malformed as before, and so dead-lettered again.
    kept, again = await letters_arrive(running, 2)
    assert (kept.id, again.entry_id, again.fields) == (nobodys.id, answer["entry_id"], NOT_UTF8)

    dropped = await cli("dead-letters", "drop", kept.id, again.id)
    assert (dropped.code, dropped.stdout.splitlines()) == (0, [f"{kept.id}: dropped", f"{again.id}: dropped"])
    assert (await cli("dead-letters", "list")).stdout == "no dead letters\n"
    assert (await cli("dead-letters", "list", "--json")).json() == []


@pytest.mark.parametrize(
    ("letter_id", "says"), [("5-5", "there is no dead letter 5-5"), ("latest", "'latest' is not an id")]
)
async def test_a_missing_letter_is_reported_and_nothing_is_done(
    running: RunningSystem, cli: Cli, letter_id: str, says: str
) -> None:
    await running.redis.xadd(STREAM, NO_USER)  # pyright: ignore[reportArgumentType]
    there = (await letters_arrive(running, 1))[0]
    refused = await cli("dead-letters", "drop", there.id, letter_id)
    assert refused.code == 2
    assert says in refused.stderr
    assert await letters_of(running).count() == 1


async def test_the_list_shows_how_many_letters_were_dropped(idle: RunningSystem, cli: Cli) -> None:
    few = DeadLetters(idle.system.handle.pipeline, "tollbook", limits=DeadLetterLimits(2, 3_600.0))
    for number in range(5):
        delivery = Delivery(STREAM, f"{number}-1", {b"task": b"score_post"})
        await few.put(delivery, reason="invalid_task", error="why", task_id=f"t{number}")
    listed = await cli("dead-letters", "list", "--json")
    assert [letter["task_id"] for letter in listed.json()] == ["t3", "t4"]
    assert "3 dead letters were dropped, the oldest first" in listed.stderr
    assert "TOLLBOOK_DEAD_LETTERS_MAX" in (await cli("dead-letters", "list")).stderr


@pytest.mark.slow
async def test_dead_letters_are_chosen_by_filters_and_changed_only_when_that_is_confirmed(
    idle: RunningSystem, cli: Cli
) -> None:
    letters = letters_of(idle)
    uuid = "0b8f3a3e-6a6f-4d0e-9a55-1f7f5a1c9e77"
    put: list[tuple[str, Reason, str]] = [
        ("analysis", "attempts_exhausted", uuid),
        ("generation", "attempts_exhausted", "u2"),
        ("analysis", "invalid_task", "u2"),
    ]
    for number, (stream, reason, user) in enumerate(put):
        fields = {b"task": b"score_post", b"user_id": user.encode(), b"prompt": b"a post"}
        await letters.put(
            Delivery(stream, f"{number + 1}-0", fields), reason=reason, error="why", task_id=f"t{number}", user_id=user
        )
    first, second, third = await letters.list()
    listed: dict[tuple[str, ...], list[DeadLetter]] = {
        (): [first, second, third],
        ("--stream", "analysis"): [first, third],
        ("--reason", "attempts_exhausted", "--user", "u2"): [second],
        ("--since", "2001-01-01"): [first, second, third],
        ("--since", "2101-01-01T00:00:00Z"): [],
    }
    for filters, expected in listed.items():
        found = await cli("dead-letters", "list", *filters, "--json")
        assert [letter["id"] for letter in found.json()] == [letter.id for letter in expected], filters
    shown = (await cli("dead-letters", "list", "--user", uuid)).stdout
    assert first.id in shown
    assert f"user {uuid}" in shown
    assert "1 dead letter\n" in shown

    for command in (("drop", "--all"), ("retry", "--all", "--user", "u2")):
        asked = await cli("dead-letters", *command)
        assert asked.code == 2
        assert (
            f"this would {command[0]} {3 if command[0] == 'drop' else 2} dead letters; add --yes to do it"
            in asked.stderr
        )
    for command in (("drop",), ("drop", first.id, "--all"), ("retry", first.id, "--user", "u2")):
        assert (await cli("dead-letters", *command)).code == 2
    assert await letters.count() == 3

    retried = await cli("dead-letters", "retry", "--all", "--stream", "generation", "--yes")
    assert retried.code == 0, retried.stderr
    assert f"{second.id}: on generation again as task t1~retry-{second.id}\n1 dead letter retried" in retried.stdout
    dropped = await cli("dead-letters", "drop", "--all", "--yes")
    assert dropped.stdout.splitlines() == [f"{first.id}: dropped", f"{third.id}: dropped", "2 dead letters dropped"]
    assert await letters.count() == 0


@pytest.mark.slow
async def test_a_task_whose_workers_died_is_retried_under_a_new_id_and_runs_once(
    idle: RunningSystem, cli: Cli, tmp_path: Path
) -> None:
    """G4: its old result stands; a retry that is repeated, as after a crash, is the same task."""
    redis = idle.redis
    await redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    entry_id = (await idle.publish(STREAM, [TASK]))[0]
    await redis.xreadgroup(GROUP, "ghost", {STREAM: ">"})
    # It was delivered to more workers than may die over it.
    await redis.xclaim(STREAM, GROUP, "ghost", 0, [entry_id], idle=600_000, retrycount=50, justid=True)
    async with serving(idle, 1):
        dead = (await letters_arrive(idle, 1))[0]
        assert (dead.reason, dead.task_id) == ("attempts_exhausted", "deadly")
        old = await result_of(idle, "deadly")
        assert (old.status, old.error_code) == (TaskStatus.FAILED, ErrorCode.ATTEMPTS_EXHAUSTED)

        retried = await cli("dead-letters", "retry", dead.id, "--json")
        assert retried.code == 0, retried.stderr
        task_id = retried.json()["task_id"]
        assert task_id != "deadly"
        assert (await idle.answers([task_id]))[0].status is TaskStatus.DONE
        # As if the first retry had died before it dropped the letter.
        assert (await letters_of(idle).retry(dead)).task_id == task_id
        await is_at_rest(idle)
        assert await result_of(idle, "deadly") == old
        assert idle.provider.requests == 1
        await check_books(idle, tmp_path)


@pytest.mark.slow
async def test_reconcile_corrects_what_the_provider_knows_and_lists_the_rest(
    running: RunningSystem, cli: Cli, tmp_path: Path
) -> None:
    """G3: what was assumed becomes what was charged; repeating changes nothing."""
    # A generation id arrives before the connection breaks, or not.
    prompts = {"known": "a [[fault=reset_mid_body]]", "unknown": "a [[fault=reset_after_charge]]", "plain": "a"}
    tasks = [
        {"task": "score_post", "user_id": task_id, "prompt": prompt, "task_id": task_id, "reply_to": REPLIES}
        for task_id, prompt in prompts.items()
    ]
    await running.publish(STREAM, tasks)
    await running.answers(prompts)
    await running.fold_all()
    rows = await running.query("SELECT call_id, assumed_usd FROM calls WHERE assumed_usd > 0")
    assumed = {row["call_id"]: row["assumed_usd"] for row in rows}
    assert assumed.keys() == {"known", "unknown"}

    first = await cli("reconcile", "--author", "ann", "--json")
    assert first.code == 0, first.stderr
    document = first.json()
    assert document["adjusted"] == 1
    assert [(row["call_id"], Decimal(row["assumed_usd"])) for row in document["still_assumed"]] == [
        ("unknown", assumed["unknown"])
    ]
    corrections = [event for event in await events_of(running) if event.type == "cost-adjusted"]
    assert {event.call_id for event in corrections} == {"known"}
    spent = {row["user_id"]: row["spent_usd"] for row in await running.query("FROM spend")}
    booked = running.provider.book.totals()
    assert {user: spent[user] * 10**9 for user in ("known", "plain")} == {
        user: booked[user] for user in ("known", "plain")
    }
    again = await cli("reconcile")
    assert "0 calls corrected" in again.stdout
    assert "unknown" in again.stdout
    assert [event for event in await events_of(running) if event.type == "cost-adjusted"] == corrections
    await check_books(running, tmp_path)
