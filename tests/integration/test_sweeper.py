"""The sweeper: holds past their deadline are settled, once, at the most that they can have cost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.servers import wait_until
from tests.system import RunningSystem, running_system
from tollbook.consumers.sweeper import Sweeper
from tollbook.inference.runtime import now_ms
from tollbook.ledger.gate.requests import (
    AlreadySettled,
    OpenCall,
    RecordRequest,
    Reserved,
    ReserveRequest,
    SettleRequest,
)
from tollbook.schemas.events import BoundPrice, BudgetReserved, CostRecorded, payload_json
from tollbook.schemas.identifiers import EntryId

USER: Final = "u1"
AMOUNT: Final = 1_000_000
HOUR_MS: Final = 3_600_000
RESERVED: Final = payload_json(
    BudgetReserved(
        task_type="score_post",
        plan="trial",
        worker="dead.1",
        bound=BoundPrice(
            model="m", prompt_tokens=1, completion_tokens=1, prompt_nanousd_per_mtok=1, completion_nanousd_per_mtok=1
        ),
    )
)


@pytest.fixture
async def running(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    """A system without workers: only the test sweeps."""
    async with running_system(tmp_path / "data", server_url, workers=0) as system:
        yield system


def make_sweeper(running: RunningSystem) -> Sweeper:
    ledger = running.system.runtime.ledger
    return Sweeper(ledger, ledger.gates)


async def reserve(running: RunningSystem, call_id: str, *, lease_ms: int, user: str = USER) -> Reserved:
    """Hold money for a call, as a worker does before it sends its request."""

    def make_request(at_ms: int) -> ReserveRequest:
        policy = running.system.runtime.policies.of(user)
        window, budgets = policy.budgets_at(at_ms, {"user": user, "plan": "trial"})
        return ReserveRequest(
            call_id=call_id,
            user_id=user,
            window=window,
            content_hash="h",
            amount_nanousd=AMOUNT,
            worker="dead.1",
            lease_ms=lease_ms,
            payload=RESERVED,
            budgets=budgets,
            policy_version=policy.version,
        )

    reply = await running.system.runtime.ledger.reserve(make_request, now_ms())
    assert isinstance(reply, Reserved)
    return reply


async def found(running: RunningSystem, call_id: str) -> OpenCall:
    record = await running.system.runtime.ledger.gates[0].call_record(call_id)
    assert record is not None
    return record.hold


def settle_request(call_id: str, hold: OpenCall, *, cost: int) -> SettleRequest:
    return SettleRequest(
        call_id=call_id,
        user_id=USER,
        hold=hold.hold,
        cost_nanousd=cost,
        assumed_nanousd=0,
        attempt=1,
        is_final=True,
        payload=payload_json(CostRecorded(basis="reported", outcome="done")),
        budgets=hold.budgets,
    )


async def overdue(running: RunningSystem, number: int) -> None:
    """Return once so many holds are past their deadline."""
    gate = running.system.runtime.ledger.gates[0]

    async def are_overdue() -> bool:
        return len(await gate.overdue(await gate.now_ms())) == number

    assert await wait_until(are_overdue, what=f"{number} overdue holds")


async def settlements(running: RunningSystem) -> list[tuple[str, int, int, str, str]]:
    rows = await running.query("FROM events WHERE type = 'cost-recorded' ORDER BY call_id, hold")
    return [
        (
            row["call_id"],
            int(row["amount_usd"] * 10**9),
            int(row["assumed_usd"] * 10**9),
            row["basis"],
            row["outcome"],
        )
        for row in rows
    ]


async def test_an_overdue_hold_is_charged_in_full_and_marked(running: RunningSystem) -> None:
    """G2, G3: a request may have been sent, so the whole hold counts as spent until the cost is known."""
    await reserve(running, "dead", lease_ms=1)
    await overdue(running, 1)
    assert await make_sweeper(running).sweep() == 1
    assert await settlements(running) == [("dead", AMOUNT, AMOUNT, "assumed", "expired")]
    spend = (await running.query("FROM spend"))[0]
    assert (spend["reserved_usd"], spend["spent_usd"] * 10**9, spend["assumed_usd"] * 10**9) == (0, AMOUNT, AMOUNT)
    assert await make_sweeper(running).sweep() == 0


async def test_a_hold_that_is_not_due_is_left_alone(running: RunningSystem) -> None:
    await reserve(running, "dead", lease_ms=1)
    await reserve(running, "alive", lease_ms=HOUR_MS)
    await overdue(running, 1)
    assert await make_sweeper(running).sweep() == 1
    assert [call_id for call_id, *_ in await settlements(running)] == ["dead"]
    assert await running.redis.zrange(running.keys.holds, 0, -1) == [b"alive"]


async def test_any_number_of_sweepers_settle_a_hold_once(running: RunningSystem) -> None:
    """G2, with many holds and more than one user."""
    calls = [f"dead-{number:02}" for number in range(30)]
    await asyncio.gather(*(reserve(running, call, lease_ms=1, user=f"u{call[-1]}") for call in calls))
    await overdue(running, len(calls))
    swept = await asyncio.gather(*(make_sweeper(running).sweep() for _ in range(4)))
    assert sum(swept) == len(calls)
    assert [call_id for call_id, *_ in await settlements(running)] == calls
    assert await running.query("FROM discrepancies") == []


async def test_a_hold_with_a_failed_attempt_behind_it_is_charged_in_full_with_its_unconfirmed_part(
    running: RunningSystem,
) -> None:
    """What the first attempt cost is known; that the second was sent is not."""
    known = AMOUNT // 4
    reserved = await reserve(running, "dead", lease_ms=1)
    hold = await found(running, "dead")
    policy = running.system.runtime.policies.of(USER)
    _, budgets = policy.budgets_at(now_ms(), {"user": USER, "plan": "trial"})
    await running.system.runtime.ledger.record(
        RecordRequest(
            call_id="dead",
            user_id=USER,
            hold=reserved.hold,
            attempts_begun=hold.attempts_begun + 1,
            spent_nanousd=known,
            assumed_nanousd=0,
            events=(),
            budgets=budgets,
        )
    )
    await overdue(running, 1)
    assert await make_sweeper(running).sweep() == 1
    assert await settlements(running) == [("dead", AMOUNT, AMOUNT - known, "assumed", "expired")]


@pytest.mark.slow
async def test_a_hold_that_cannot_be_settled_does_not_delay_others(running: RunningSystem) -> None:
    """More of them than are looked at in one go, all older: without a record, and with one that nobody can read."""
    keys, ghosts = running.keys, [f"ghost-{number}" for number in range(150)]
    await running.redis.set(keys.call(ghosts[0]), "what is this")
    await running.redis.zadd(keys.holds, dict.fromkeys(ghosts, 1))
    await reserve(running, "dead", lease_ms=1)

    async def is_swept() -> bool:
        return await make_sweeper(running).sweep() == 1

    assert await wait_until(is_swept, what="the sweep")
    assert [call_id for call_id, *_ in await settlements(running)] == ["dead"]


@pytest.mark.slow
async def test_a_ledger_that_went_back_is_logged_once_and_not_per_hold(running: RunningSystem) -> None:
    """G8: nothing is settled on it, and the log is not filled with the same sentence."""
    for number in range(3):
        await reserve(running, f"dead-{number}", lease_ms=1)
    await overdue(running, 3)
    running.system.runtime.ledger.gates[0].see(EntryId(now_ms() + HOUR_MS, 0))
    with capture_logs() as lines:
        assert await make_sweeper(running).sweep() == 0
    assert [line["event"] for line in lines if line["log_level"] in ("warning", "error")] == ["sweep.missed"]
    assert await settlements(running) == []


@pytest.mark.slow
async def test_a_settled_call_is_no_longer_swept(running: RunningSystem) -> None:
    await reserve(running, "quick", lease_ms=1)
    await overdue(running, 1)
    request = settle_request("quick", await found(running, "quick"), cost=AMOUNT // 2)
    await running.system.runtime.ledger.settle(request)
    assert await make_sweeper(running).sweep() == 0
    assert await settlements(running) == [("quick", AMOUNT // 2, 0, "reported", "done")]


async def test_a_settlement_after_the_sweep_adds_nothing(running: RunningSystem) -> None:
    """G2: the late worker learns at what cost the hold was settled, and corrects it with an event of its own."""
    await reserve(running, "late", lease_ms=1)
    request = settle_request("late", await found(running, "late"), cost=AMOUNT // 2)
    await overdue(running, 1)
    await make_sweeper(running).sweep()
    reply = await running.system.runtime.ledger.settle(request)
    assert reply == AlreadySettled(cost_nanousd=AMOUNT, assumed_nanousd=AMOUNT)
    assert await settlements(running) == [("late", AMOUNT, AMOUNT, "assumed", "expired")]


@pytest.mark.slow
async def test_money_that_a_dead_call_held_serves_others_within_the_sweepers_interval(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """A worker sweeps by itself, so the hold of a dead call does not stay."""
    async with running_system(tmp_path / "data", server_url) as running:
        await reserve(running, "dead", lease_ms=1)

        async def is_swept() -> bool:
            return await running.redis.zcard(running.keys.holds) == 0

        assert await wait_until(is_swept, what="the sweep")
        assert [outcome for *_, outcome in await settlements(running)] == ["expired"]
