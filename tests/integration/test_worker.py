"""Workers on a running system: slots, waiting, stopping, and how tasks end whose worker dies or is paused."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.servers import wait_until
from tests.system import REPLIES, BackgroundCommand, RunningSystem, running_system, serving
from tollbook.consumers.dead_letters import DeadLetters
from tollbook.consumers.messages import Delivery
from tollbook.consumers.service import build_worker, serve_worker
from tollbook.inference.runtime import open_runtime
from tollbook.inference.setting_tables import CapTable, ConcurrencyTable
from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.keys import GROUP
from tollbook.schemas.results import ErrorCode, TaskStatus

STREAM: Final = "analysis"
USER: Final = "u1"
# claude-3-haiku at $0.25 and $1.25 a million; the bound counts every byte, 32 for the message and 128 for the request.
PROMPT: Final = "a post [[completion_tokens=100]]"
COST: Final = (len(PROMPT) // 4 + 4) * 250 + 100 * 1_250
BOUND: Final = (len(PROMPT) + 32 + 128) * 250 + 500 * 1_250


def make_task(task_id: str, *, user: str = USER) -> dict[str, str]:
    return {"task": "score_post", "task_id": task_id, "user_id": user, "prompt": PROMPT, "reply_to": REPLIES}


async def costs_of(running: RunningSystem, task_id: str) -> list[dict[str, Any]]:
    """Return what the ledger has on a call's money, in order."""
    rows = await running.query("FROM events WHERE type IN ('cost-recorded', 'cost-adjusted') ORDER BY seq")
    return [
        {
            "type": row["type"],
            "nanousd": int(row["amount_usd"] * 10**9),
            "basis": row["basis"],
            "assumed_nanousd": int((row["assumed_usd"] or 0) * 10**9),
        }
        for row in rows
        if row["call_id"] == task_id
    ]


async def assert_nothing_is_left(running: RunningSystem) -> None:
    async def is_acknowledged() -> bool:
        return await running.pending() == 0

    assert await wait_until(is_acknowledged, what="every task acknowledged")
    assert await running.redis.zcard(running.keys.holds) == 0
    assert await running.query("FROM discrepancies") == []


@pytest.mark.slow
async def test_a_worker_obeys_the_concurrency_of_a_stream(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    concurrency = ConcurrencyTable(default=32, streams={STREAM: 3})
    async with running_system(tmp_path / "data", server_url, concurrency=concurrency) as running:
        await running.provider.shut(USER)
        tasks = [make_task(f"t{n}") for n in range(40)]
        await running.publish(STREAM, tasks)
        await running.provider.wait_for_arrivals(3, user=USER)
        # The other streams are not held up by the full one.
        await running.publish("generation", [make_task("other", user="u2")])
        assert (await running.answers(["other"]))[0].status is TaskStatus.DONE
        assert running.provider.arrived[USER] == 3
        await running.provider.open()
        results = await running.answers(task["task_id"] for task in tasks)
        assert {result.status for result in results} == {TaskStatus.DONE}
        assert running.provider.book.totals()[USER] == len(tasks) * COST


async def test_a_call_that_waits_for_money_too_long_says_so(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G9: the wait is bounded by a setting, and its end is not called a reached limit."""
    caps = CapTable(users={USER: 2 * BOUND - 1})
    async with running_system(tmp_path / "data", server_url, caps=caps, hold_wait_s=0.0) as running:
        await running.provider.shut()
        await running.publish(STREAM, [make_task("first")])
        await running.provider.wait_for_arrivals(1, user=USER)
        await running.publish(STREAM, [make_task("second")])
        second = (await running.answers(["second"]))[0]
        assert (second.status, second.error_code) == (TaskStatus.DENIED, ErrorCode.BUDGET_WAIT_TIMEOUT)
        await running.provider.open()
        assert (await running.answers(["first"]))[0].status is TaskStatus.DONE


async def test_a_claim_is_renewed_while_its_call_runs(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with running_system(tmp_path / "data", server_url, claim_after_s=1.0) as running:
        await running.provider.shut()
        entry_id = (await running.publish(STREAM, [make_task("slow")]))[0]
        await running.provider.wait_for_arrivals(1, user=USER)

        async def silence_ms() -> int:
            rows: Any = await redis_client.xpending_range(STREAM, GROUP, min=entry_id, max=entry_id, count=1)
            assert (rows[0]["consumer"], rows[0]["times_delivered"]) == (b"worker-0", 1)
            return rows[0]["time_since_delivered"]

        async def is_renewed() -> bool:
            return await silence_ms() < 60_000

        await redis_client.xclaim(STREAM, GROUP, "worker-0", 0, [entry_id], idle=60_000, justid=True)
        assert await wait_until(is_renewed, what="the renewal")
        await running.provider.open()
        assert (await running.answers(["slow"]))[0].status is TaskStatus.DONE
        assert running.provider.requests == 1
        await assert_nothing_is_left(running)


@pytest.mark.slow
async def test_after_the_grace_period_a_worker_books_its_calls_and_leaves_their_tasks(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G2, G3: at the end of the grace period the hold is settled in full, and the task stays for the next."""
    async with running_system(tmp_path / "data", server_url, workers=0, stop_grace_s=0.0, claim_after_s=1.0) as running:
        async with serving(running, 1):
            await running.provider.shut()
            await running.publish(STREAM, [make_task("cut-off")])
            await running.provider.wait_for_arrivals(1, user=USER)
        assert await running.redis.zcard(running.keys.holds) == 0
        assert await running.pending() == 1
        assert [(cost["nanousd"], cost["basis"]) for cost in await costs_of(running, "cut-off")] == [(BOUND, "assumed")]
        await running.provider.open()
        async with serving(running, 1):
            assert (await running.answers(["cut-off"]))[0].status is TaskStatus.DONE
            await assert_nothing_is_left(running)
        costs = await costs_of(running, "cut-off")
        assert [cost["nanousd"] for cost in costs] == [BOUND, COST]


async def test_a_task_that_is_held_back_keeps_no_slot(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """G8: no baseline can be had of one user; with one slot, the others' tasks go on."""
    can_be_had = asyncio.Event()
    async with running_system(
        tmp_path / "data", server_url, workers=0, concurrency=ConcurrencyTable(default=1)
    ) as running:
        system = running.system

        async def read(names: Sequence[str], /) -> BaselinePage:
            if any(name.startswith("user:unread:") for name in names) and not can_be_had.is_set():
                raise BaselineUnavailable("it cannot be had")
            return await asyncio.to_thread(system.projection.store.baselines, names)

        stop = asyncio.Event()
        async with open_runtime(system.runtime.settings, system.handle, read) as runtime:
            worker = build_worker(runtime, [STREAM], "single")
            serving = asyncio.create_task(serve_worker(runtime, worker, stop, redis_url=server_url))
            await running.publish(STREAM, [make_task("held-back", user="unread"), make_task("other")])
            assert (await running.answers(["other"]))[0].status is TaskStatus.DONE
            assert await running.redis.exists(running.keys.result("held-back")) == 0
            can_be_had.set()
            assert (await running.answers(["held-back"]))[0].status is TaskStatus.DONE
            stop.set()
            await serving


async def test_a_worker_that_stops_begins_nothing_more(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """Neither what it has read nor what it could take over; both stay for others."""
    async with running_system(tmp_path / "data", server_url, workers=0) as running:
        worker = build_worker(running.system.runtime, [STREAM], "stopping")
        fields = {name.encode(): value.encode() for name, value in make_task("t1").items()}
        await worker.drain(0.0)
        await worker.take([Delivery(STREAM, "1-0", fields)])
        worker.take_claimed(Delivery(STREAM, "2-0", fields, deliveries=2))
        assert (worker.in_flight, len(worker.claims), running.provider.requests) == (0, 0, 0)


@pytest.mark.slow
async def test_a_worker_that_stops_with_all_slots_taken_logs_no_error(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """What was read and waits for a slot stays pending for others."""
    tasks = [make_task(f"t{number}") for number in range(8)]
    async with running_system(tmp_path / "data", server_url, workers=0) as running:
        await running.provider.shut(USER)
        await running.publish(STREAM, tasks)
        async with worker_process(running, tmp_path, TOLLBOOK_CONCURRENCY="2") as worker:
            await running.provider.wait_for_arrivals(2, user=USER)
            worker.terminate()
            await wait_until(lambda: "worker.stopping" in worker.stderr, what="a worker that stops")
            await running.provider.open()
            assert await worker.wait() == 0
        assert "[error" not in worker.stderr
        assert running.provider.arrived[USER] == 2


@asynccontextmanager
async def worker_process(running: RunningSystem, directory: Path, **further: str) -> AsyncIterator[BackgroundCommand]:
    """Run `tollbook worker` beside the system, with further settings; yields it once it works."""
    settings = running.system.runtime.settings
    command = await BackgroundCommand.start(
        "worker",
        cwd=directory,
        env={
            "REDIS_URL": running.system.redis_url,
            "TOLLBOOK_DATA_DIR": str(settings.data_dir),
            "OPENROUTER_BASE_URL": running.provider.base_url,
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_CLAIM_AFTER_S": str(settings.claim_after_s),
            **further,
        },
    )
    try:
        await wait_until(lambda: "worker.started" in command.stderr, what="`tollbook worker`")
        yield command
    finally:
        if command.process.returncode is None:
            command.process.send_signal(signal.SIGCONT)
        await command.end()


async def test_a_killed_workers_tasks_are_taken_over_and_its_calls_are_charged(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G3, G4: what the dead one may have spent is assumed in full; the task is done once, by another."""
    tasks = [make_task(f"t{n}") for n in range(5)]
    async with running_system(tmp_path / "data", server_url, workers=0, claim_after_s=1.0) as running:
        await running.provider.shut()
        async with worker_process(running, tmp_path) as command:
            await running.publish(STREAM, tasks)
            await running.provider.wait_for_arrivals(len(tasks), user=USER)
            command.process.kill()
            await command.wait()
        await running.provider.open()
        async with serving(running, 2):
            results = await running.answers(task["task_id"] for task in tasks)
            assert {(result.status, result.cost_usd * 10**9) for result in results} == {(TaskStatus.DONE, COST)}
            await assert_nothing_is_left(running)
        for task in tasks:
            assert await costs_of(running, task["task_id"]) == [
                {"type": "cost-recorded", "nanousd": BOUND, "basis": "assumed", "assumed_nanousd": BOUND},
                {"type": "cost-recorded", "nanousd": COST, "basis": "reported", "assumed_nanousd": 0},
            ]
        assert running.provider.arrived[USER] == 2 * len(tasks)


@pytest.mark.slow
async def test_a_task_that_kills_its_workers_is_dead_lettered_and_can_be_retried(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(
        tmp_path / "data", server_url, workers=0, claim_after_s=1.0, max_task_attempts=1
    ) as running:
        await running.provider.shut()
        async with worker_process(running, tmp_path) as command:
            await running.publish(STREAM, [make_task("deadly")])
            await running.provider.wait_for_arrivals(1, user=USER)
            command.process.kill()
            await command.wait()
        async with serving(running, 1):
            result = (await running.answers(["deadly"]))[0]
            assert (result.status, result.error_code) == (TaskStatus.FAILED, ErrorCode.ATTEMPTS_EXHAUSTED)
            await assert_nothing_is_left(running)
            assert [cost["basis"] for cost in await costs_of(running, "deadly")] == ["assumed"]

            letters = DeadLetters(running.system.handle.pipeline, "tollbook")
            letter = (await letters.list())[0]
            assert (letter.reason, letter.task_id) == ("attempts_exhausted", "deadly")
            await running.provider.open()
            retried = await letters.retry(letter)
            assert (await running.answers([retried.task_id]))[0].status is TaskStatus.DONE
            await assert_nothing_is_left(running)


@pytest.mark.slow
async def test_a_worker_that_lost_its_claims_corrects_costs_and_changes_no_result(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G2, G3, G4: the late answer replaces the assumed cost by the true one."""
    async with running_system(tmp_path / "data", server_url, workers=0, claim_after_s=1.0) as running:
        await running.provider.shut()
        async with worker_process(running, tmp_path) as command:
            await running.publish(STREAM, [make_task("slept")])
            await running.provider.wait_for_arrivals(1, user=USER)
            command.process.send_signal(signal.SIGSTOP)
            async with serving(running, 1):
                await running.provider.wait_for_arrivals(2, user=USER)
                await running.provider.open()
                result = (await running.answers(["slept"]))[0]
                assert (result.status, result.cost_usd * 10**9) == (TaskStatus.DONE, COST)
                command.process.send_signal(signal.SIGCONT)

                async def is_corrected() -> bool:
                    return len(await costs_of(running, "slept")) == 3

                assert await wait_until(is_corrected, what="the correction")
                await assert_nothing_is_left(running)
        assert await costs_of(running, "slept") == [
            {"type": "cost-recorded", "nanousd": BOUND, "basis": "assumed", "assumed_nanousd": BOUND},
            {"type": "cost-recorded", "nanousd": COST, "basis": "reported", "assumed_nanousd": 0},
            {"type": "cost-adjusted", "nanousd": COST - BOUND, "basis": "reported", "assumed_nanousd": -BOUND},
        ]
        spend = (await running.query("FROM spend"))[0]
        assert spend["spent_usd"] * 10**9 == running.provider.book.totals()[USER] == 2 * COST
        assert spend["assumed_usd"] == 0
        # Each run answers, but with the one result that stands.
        entries: Any = await running.redis.xrange(REPLIES)
        stored = await running.redis.get(running.keys.result("slept"))
        assert {fields[b"result"] for _, fields in entries} == {stored}


@pytest.mark.slow
async def test_tasks_are_done_after_their_stream_was_deleted_and_made_anew(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """The consumer group goes with the stream, and FastStream stops at that; the worker makes both anew."""
    async with running_system(tmp_path / "data", server_url) as running:
        await running.publish(STREAM, [make_task("before")])
        await running.answers(["before"])
        await redis_client.delete(STREAM)
        await running.publish(STREAM, [make_task("after")])
        assert (await running.answers(["after"]))[0].status is TaskStatus.DONE


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
async def test_every_worker_names_itself_on_the_ledger(
    redis_client: Redis, server_url: str, tmp_path: Path, workers: int
) -> None:
    async with running_system(tmp_path / "data", server_url, workers=workers) as running:
        tasks = [make_task(f"t{n}") for n in range(30)]
        await running.publish(STREAM, tasks)
        await running.answers(task["task_id"] for task in tasks)
        rows = await running.query("SELECT DISTINCT worker FROM events WHERE type = 'budget-reserved'")
        names = {row["worker"].rpartition(".")[0] for row in rows}
        assert names <= {f"worker-{number}" for number in range(workers)}
        assert sum(worker.finished.total() for worker in running.workers) == len(tasks)
