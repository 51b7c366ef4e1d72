"""A projector that ends with an error stops calls wherever workers run, until one finds the stores in order (G8)."""

import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.recovery.apart import Apart, kill, running_apart, start_projector
from tests.recovery.test_going_back import Backup, finish, put_back, refusal_of_a_call, take_backup
from tests.servers import wait_until
from tests.system import BackgroundCommand, run_cli
from tollbook.inference.client import InferenceClient
from tollbook.inference.cost_tracker import CostTracker
from tollbook.inference.errors import AppError
from tollbook.inference.runtime import InferenceRuntime, now_ms, open_ledger, open_runtime
from tollbook.ledger.errors import CallsStopped
from tollbook.ledger.gate.stops import read_stop
from tollbook.ledger.keys import projector_lease
from tollbook.observability.health import Readiness
from tollbook.observability.metrics import MetricsPage
from tollbook.observability.process_state import ProcessState
from tollbook.schemas.identifiers import month_at
from tollbook.schemas.results import TaskStatus

LEASE: Final = projector_lease("tollbook")
CHARGE: Final = {"basis": "reported", "outcome": "recorded"}
REFUSAL: Final = {
    "task_type": "score_post", "plan": "trial", "worker": "w", "cap_nanousd": 5, "budget": "user:stranger:2026-11",
    "reason": "cap",
}  # fmt: skip
WENT_BACK: Final = "the ledger has only"


async def stop_of(apart: Apart) -> str | None:
    handle = apart.running.system.handle
    return await read_stop(handle.pipeline, handle.keys)


async def wait_for_resume(apart: Apart) -> None:
    async def is_resumed() -> bool:
        return await stop_of(apart) is None

    await wait_until(is_resumed, what="the lift of the mark")


async def wait_for_end(projector: BackgroundCommand) -> None:
    await wait_until(lambda: projector.process.returncode is not None, what="the end of the projector")
    assert projector.process.returncode == 1, projector.stderr


@asynccontextmanager
async def new_process(apart: Apart, data_dir: Path) -> AsyncIterator[InferenceRuntime]:
    """The view of a process that starts now, on a machine without the projector's data."""
    url = apart.running.system.redis_url
    async with (
        open_ledger(apart.settings, url, may_create=False) as handle,
        open_runtime(apart.settings, handle) as runtime,
    ):
        yield runtime


async def call(runtime: InferenceRuntime, task_id: str | None = None) -> TaskStatus:
    return (await InferenceClient("score_post", runtime).call("a post", user_id="u1", task_id=task_id)).status


async def go_back(apart: Apart, redis: Redis) -> Backup:
    """Restore an older backup; return the newer data."""
    await finish(apart, "before")
    older = await take_backup(redis)
    await finish(apart, "lost")
    newer = await take_backup(redis)
    await put_back(redis, older)
    return newer


def without_lease(backup: Backup) -> Backup:
    """Leave out the lease, which has ended by the time that a backup is restored."""
    return {key: value for key, value in backup.items() if key != LEASE.encode()}


async def test_a_process_that_has_seen_nothing_makes_no_call_on_a_ledger_that_went_back(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart:
        newer = await go_back(apart, redis_client)
        paid = apart.running.provider.arrived.total()
        await wait_for_end(apart.projector)
        events = await redis_client.xlen(apart.running.system.handle.keys[0].ledger)

        async with new_process(apart, tmp_path / "elsewhere") as runtime:
            with pytest.raises(CallsStopped, match=WENT_BACK):
                await call(runtime)
            assert await call(runtime, "before-0") is TaskStatus.DONE, "what is finished is answered"
        assert apart.running.provider.arrived.total() == paid
        assert await redis_client.xlen(apart.running.system.handle.keys[0].ledger) == events

        await put_back(redis_client, newer)
        await apart.restart_projector()
        async with new_process(apart, apart.settings.data_dir) as runtime:
            assert await call(runtime) is TaskStatus.DONE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"type": "nothing-known", "v": "9"}, "cannot be read"),
        ({}, "was not written by the gate"),
        ({"type": "budget-denied", "amount": "0"}, "was not written by the gate"),
    ],
    ids=["unreadable", "a charge", "a refusal"],
)
async def test_an_event_of_another_program_stops_calls_until_it_is_removed_and_all_is_folded(
    redis_client: Redis, server_url: str, tmp_path: Path, changes: dict[str, str], problem: str
) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart:
        await finish(apart, "before")
        paid = apart.running.provider.arrived.total()
        ledger = apart.running.system.handle.keys[0].ledger
        newest: Any = await redis_client.xrevrange(ledger, count=1)
        forged = {
            "type": "cost-recorded", "v": "2", "seq": str(int(newest[0][1][b"seq"]) + 1), "user_id": "stranger",
            "period": month_at(now_ms()).name, "call_id": "x", "attempt": "0", "amount": "5", "committed": "5",
            "payload": json.dumps(CHARGE if not changes else REFUSAL),
        }  # fmt: skip
        entry = await redis_client.xadd(ledger, forged | changes)  # pyright: ignore[reportArgumentType]
        await wait_for_end(apart.projector)

        assert "calls are stopped: the projector has stopped" in await refusal_of_a_call(apart)
        for _ in range(2):
            # As long as the cause is there, starting it again changes nothing.
            again = await start_until_end(apart)
            assert problem in again.stderr
            assert await stop_of(apart) is not None
        assert apart.running.provider.arrived.total() == paid

        await redis_client.xdel(ledger, entry)
        await apart.restart_projector()
        await wait_for_resume(apart)
        await finish(apart, "after")


@pytest.mark.slow
async def test_every_view_shows_why_calls_are_stopped(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart:
        await go_back(apart, redis_client)
        await wait_for_end(apart.projector)
        here = {"REDIS_URL": server_url, "TOLLBOOK_DATA_DIR": str(apart.settings.data_dir)}

        shown = json.loads((await run_cli("top", "--json", cwd=tmp_path, env=here)).stdout)
        assert WENT_BACK in shown["redis"]["stopped"]
        texts = [problem["text"] for problem in shown["problems"] if problem["level"] == "person"]
        assert any(text.startswith("calls are stopped: ") and WENT_BACK in text for text in texts)
        assert not any("no projector runs" in text for text in texts)

        async with new_process(apart, tmp_path / "elsewhere") as runtime:
            state = ProcessState("worker", apart.settings)
            with state.open(runtime.handle, runtime.ledger, runtime.prices):
                readiness = Readiness(state)
                health = await readiness.get()
                page, _ = await MetricsPage(state, readiness).render("")
            assert not health.ok
            (problem,) = [check.found for check in health.checks if not check.ok]
            assert "calls are stopped" in problem
            assert WENT_BACK in problem
            assert b"tollbook_calls_stopped 1.0" in page
            assert b"tollbook_ready 0.0" in page
            with pytest.raises(CallsStopped, match=WENT_BACK):
                await CostTracker(runtime).get_usage_summary("u1")
            with pytest.raises(CallsStopped, match=WENT_BACK):
                await CostTracker(runtime).check_budget("u1")


async def start_until_end(apart: Apart) -> BackgroundCommand:
    projector = await BackgroundCommand.start(
        "projector",
        cwd=apart.settings.data_dir.parent,
        env={
            "REDIS_URL": apart.running.system.redis_url,
            "TOLLBOOK_DATA_DIR": str(apart.settings.data_dir),
        },
    )
    try:
        await wait_for_end(projector)
    finally:
        await kill(projector)
    return projector


@pytest.mark.slow
async def test_a_standby_elsewhere_that_has_seen_less_does_not_let_calls_begin(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart, AsyncExitStack() as ends:
        standby = await start_projector(
            apart.settings,
            server_url,
            "--standby",
            data_dir=tmp_path / "standby",
            waits_for="projector.standing_by",
        )
        ends.push_async_callback(kill, standby)
        # It slept while those calls were made that the ledger has lost since.
        standby.process.send_signal(signal.SIGSTOP)
        newer = await go_back(apart, redis_client)
        standby.process.send_signal(signal.SIGCONT)
        await wait_for_end(apart.projector)
        await wait_until(lambda: "calls.not_resumed" in standby.stderr, what="the standby's refusal")

        assert WENT_BACK in (await stop_of(apart) or "")
        async with new_process(apart, tmp_path / "standby") as runtime:
            with pytest.raises(CallsStopped, match=WENT_BACK):
                await call(runtime)

        meta = apart.running.system.handle.keys[0].meta
        fields = ["stopped", "stopped_seen", "stopped_at", "projector", "projector_epoch"]
        mark = dict(zip(fields, await redis_client.hmget(meta, fields), strict=True))
        await put_back(redis_client, without_lease(newer))
        await redis_client.hset(meta, mapping={name: value or b"" for name, value in mark.items()})
        await wait_for_resume(apart)
        async with new_process(apart, tmp_path / "standby") as runtime:
            assert await call(runtime) is TaskStatus.DONE


@pytest.mark.slow
async def test_a_standby_elsewhere_that_has_seen_as_much_refuses_the_older_ledger(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart, AsyncExitStack() as ends:
        await finish(apart, "before")
        older = await take_backup(redis_client)
        await finish(apart, "lost")
        # It has folded what is lost next: one that had not would rightly follow the older ledger.
        standby = await start_projector(
            apart.settings, server_url, "--standby", data_dir=tmp_path / "standby", waits_for="standby.in_step"
        )
        ends.push_async_callback(kill, standby)
        await put_back(redis_client, older)
        await wait_for_end(apart.projector)
        await wait_for_end(standby)

        assert "the ledger has only" in standby.stderr
        assert WENT_BACK in (await stop_of(apart) or "")


@pytest.mark.slow
async def test_a_person_who_sets_the_file_aside_lets_calls_begin_on_the_older_ledger(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart:
        await go_back(apart, redis_client)
        await wait_for_end(apart.projector)
        apart.path.rename(apart.path.with_suffix(".aside"))
        await apart.restart_projector()
        await wait_for_resume(apart)

        async with new_process(apart, apart.settings.data_dir) as runtime:
            assert await call(runtime) is TaskStatus.DONE


@pytest.mark.slow
async def test_a_projector_that_lost_its_lease_while_paused_does_not_stop_calls(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """It has folded what the ledger lacks; the one that has taken over has not, and answers for the ledger."""
    async with running_apart(tmp_path / "data", server_url) as apart, AsyncExitStack() as ends:
        await finish(apart, "before")
        older = await take_backup(redis_client)
        await finish(apart, "lost")
        apart.projector.process.send_signal(signal.SIGSTOP)
        await put_back(redis_client, without_lease(older))
        other = await start_projector(apart.settings, server_url, data_dir=tmp_path / "elsewhere")
        ends.push_async_callback(kill, other)

        apart.projector.process.send_signal(signal.SIGCONT)
        await wait_for_end(apart.projector)

        assert "works on this ledger" in apart.projector.stderr or "has taken over" in apart.projector.stderr
        assert await stop_of(apart) is None
        assert other.process.returncode is None


@pytest.mark.slow
async def test_a_projector_is_accepted_after_the_clock_of_redis_was_set_back(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart:
        await finish(apart, "before")
        await apart.projector.end()
        meta, an_hour_ahead = apart.running.system.handle.keys[0].meta, (time.time_ns() // 1000) + 3_600_000_000
        await redis_client.hset(meta, mapping={"projector": "earlier", "projector_epoch": str(an_hour_ahead)})
        await redis_client.hset(meta, mapping={"stopped": "by then", "stopped_seen": "0-0", "stopped_at": ""})

        await apart.restart_projector()
        await wait_for_resume(apart)

        assert int(await redis_client.hget(meta, "projector_epoch") or 0) == an_hour_ahead + 1
        await finish(apart, "after")


@pytest.mark.slow
async def test_a_stop_mark_is_kept_until_all_events_of_the_check_are_folded(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """The event that cannot be read stands behind all that the new projector has to fold first."""
    async with running_apart(tmp_path / "data", server_url) as apart:
        await finish(apart, "before")
        keys = apart.running.system.handle.keys[0]
        await apart.projector.end()
        await redis_client.hset(keys.meta, mapping={"stopped": "by hand", "stopped_seen": "0-0", "stopped_at": ""})
        await redis_client.xadd(keys.ledger, {"type": "nothing-known", "v": "9"})

        again = await start_until_end(apart)

        assert "calls.resumed" not in again.stderr
        assert "cannot be read" in (await stop_of(apart) or "")


@pytest.mark.slow
async def test_the_command_says_why_it_has_ended(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart:
        await go_back(apart, redis_client)
        await wait_for_end(apart.projector)
        refused = await run_cli(
            "projector",
            cwd=tmp_path,
            env={"REDIS_URL": server_url, "TOLLBOOK_DATA_DIR": str(apart.settings.data_dir)},
        )
        assert refused.code == 1
        assert WENT_BACK in refused.stderr
        with pytest.raises(AppError, match="is no longer on the ledger"):
            await call(apart.running.system.runtime)
