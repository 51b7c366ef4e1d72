"""Tasks that another worker has taken over: an unneeded call ends, one whose answer is needed goes on."""

import signal
from pathlib import Path

from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.integration.test_worker import (
    BOUND,
    COST,
    PROMPT,
    STREAM,
    USER,
    assert_nothing_is_left,
    costs_of,
    make_task,
    worker_process,
)
from tests.servers import wait_until
from tests.system import RunningSystem, running_system, serving
from tollbook.ledger.keys import GROUP
from tollbook.schemas.results import TaskStatus
from tollbook.standin import FaultPlan

# The stand-in bills one token of a stream that it kept back.
CUT_OFF_COST = (len(PROMPT) // 4 + 4) * 250 + 1_250


async def has_id_of_request(running: RunningSystem, task_id: str) -> bool:
    """Whether the id of the request in flight is kept with its hold."""
    record = await running.system.runtime.ledger.gate_of(USER).call_record(task_id)
    return record is not None and record.hold.generation_id is not None


async def test_a_call_replaced_by_another_run_is_cancelled_and_its_cost_asked_for(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G2, G3: its worker slept; the request would hang for as long as one may last."""
    async with running_system(tmp_path / "data", server_url, workers=0, claim_after_s=1.0) as running:
        assert await redis_client.ping()
        running.provider.faults = FaultPlan(script=("stalled", None))
        async with worker_process(running, tmp_path) as command:
            await running.publish(STREAM, [make_task("slept")])
            await wait_until(lambda: has_id_of_request(running, "slept"), what="the id of the request")
            command.process.send_signal(signal.SIGSTOP)
            async with serving(running, 1):
                result = (await running.answers(["slept"]))[0]
                assert (result.status, result.cost_usd * 10**9) == (TaskStatus.DONE, COST)
                assert running.provider.cut_off == set()
                command.process.send_signal(signal.SIGCONT)

                async def is_corrected() -> bool:
                    return len(await costs_of(running, "slept")) == 3

                assert await wait_until(is_corrected, what="the correction")
                assert len(running.provider.cut_off) == 1
                assert "call.cut_off" in command.stderr
                await assert_nothing_is_left(running)
        assert await costs_of(running, "slept") == [
            {"type": "cost-recorded", "nanousd": BOUND, "basis": "assumed", "assumed_nanousd": BOUND},
            {"type": "cost-recorded", "nanousd": COST, "basis": "reported", "assumed_nanousd": 0},
            {"type": "cost-adjusted", "nanousd": CUT_OFF_COST - BOUND, "basis": "reported", "assumed_nanousd": -BOUND},
        ]
        assert running.provider.book.totals()[USER] == COST + CUT_OFF_COST


async def test_a_call_that_holds_the_tasks_money_goes_on_although_its_claim_is_lost(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G4: the new worker waits for this answer; otherwise it would be paid twice."""
    with capture_logs() as logs:
        async with running_system(tmp_path / "data", server_url, claim_after_s=1.0) as running:
            await running.provider.shut()
            entry_id = (await running.publish(STREAM, [make_task("kept")]))[0]
            await running.provider.wait_for_arrivals(1, user=USER)
            await redis_client.xclaim(STREAM, GROUP, "worker-9", 0, [entry_id], justid=True)
            (worker,) = running.workers
            await wait_until(lambda: worker.claims.lost == 1, what="the lost claim")
            await running.provider.open()
            assert (await running.answers(["kept"]))[0].status is TaskStatus.DONE
            assert (running.provider.requests, running.provider.cut_off) == (1, set())
    assert [line for line in logs if line["event"] == "call.cut_off"] == []
