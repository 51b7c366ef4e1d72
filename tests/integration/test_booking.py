"""Charges that a process could not book and has left behind are booked once the ledger is in order, once (G3)."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import pytest
from redis.asyncio import Redis

from tests.system import RunningSystem, run_cli, running_system
from tollbook.consumers.sweeper import Sweeper
from tollbook.inference.calls.steps import Unobserved, settle_observed
from tollbook.inference.cost_tracker import CostTracker, UsageKept
from tollbook.inference.runtime import build_ledger, now_ms
from tollbook.ledger.errors import LedgerWentBack
from tollbook.ledger.gate.call_record import CallRecord
from tollbook.ledger.gate.ledger import Ledger, Patience
from tollbook.ledger.gate.requests import (
    Adjusted,
    AdjustRequest,
    AttemptEvent,
    BudgetCap,
    ChargeRequest,
    Reserved,
    ReserveRequest,
    SettleRequest,
)
from tollbook.ledger.gate.unbooked import FOLDER, UnbookedCharge, unbooked_charge
from tollbook.ledger.keys import worker_key
from tollbook.schemas.events import BoundPrice, BudgetReserved, CostRecorded, ModelCalled, SegmentSealed, payload_json
from tollbook.schemas.identifiers import EntryId, month_at

# By the policy: `verify` computes it too.
TRIAL_CAP: Final = 5_000_000_000
AMOUNT: Final = 1_000
LOST: Final = EntryId(2**45, 7)
COST: Final = 300
RESERVED: Final = payload_json(
    BudgetReserved(
        task_type="score_post",
        plan="trial",
        worker="ended.1",
        bound=BoundPrice(
            model="m", prompt_tokens=1, completion_tokens=1, prompt_nanousd_per_mtok=1, completion_nanousd_per_mtok=1
        ),
    )
)
SEALED: Final[dict[Any, Any]] = {
    "type": "segment-sealed",
    "v": "1",
    "seq": "1",
    "user_id": "",
    "period": "",
    "call_id": "",
    "attempt": "0",
    "amount": "0",
    "committed": "",
    "payload": payload_json(
        SegmentSealed(
            segment="s", first_id="1-0", last_id="1-0", events=1, chain_before="00" * 32, chain_after="00" * 32
        )
    ),
}
CALLED: Final = payload_json(
    ModelCalled(hold=1, model="m", outcome="ok", latency_ms=1, charge_nanousd=COST, charge_basis="reported")
)


@pytest.fixture
async def running(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    """A system without workers: only the test sweeps."""
    async with running_system(tmp_path / "data", server_url, workers=0) as system:
        yield system


def ended_process(running: RunningSystem) -> Ledger:
    """The ledger of a process that does not retry."""
    system = running.system
    return build_ledger(
        system.handle,
        system.runtime.settings,
        lambda _: system.projection.read,
        patience=Patience(reserve_s=0.0, settle_s=0.0),
        process="ended",
    )


async def hold(ledger: Ledger, *, lease_ms: int = 3_600_000) -> SettleRequest:
    """Hold money for a call; return the settlement of its answer."""
    month = month_at(now_ms())
    budget = f"user:u:{month.name}"
    request = ReserveRequest(
        call_id="a",
        user_id="u",
        window=month,
        content_hash="h",
        amount_nanousd=AMOUNT,
        worker="ended.1",
        lease_ms=lease_ms,
        payload=RESERVED,
        budgets=(BudgetCap(budget, TRIAL_CAP),),
        policy_version=(await ledger.gate_of("u").policy()).version,
    )
    assert isinstance(await ledger.reserve(lambda _: request, now_ms()), Reserved)
    payload = payload_json(CostRecorded(basis="reported", outcome="done"))
    return SettleRequest(
        call_id="a",
        user_id="u",
        hold=1,
        cost_nanousd=COST,
        assumed_nanousd=0,
        attempt=1,
        is_final=True,
        payload=payload,
        budgets=(budget,),
        result="{}",
        events=(AttemptEvent("model-called", 1, CALLED),),
    )


async def leave_behind(ledger: Ledger, request: SettleRequest, *, seen: EntryId | None = None) -> None:
    """Note what a process could not settle before it ended."""
    if seen is not None:
        ledger.gates[0].see(seen)
    await ledger.gates[0].note_unbooked(request)


async def sweep(running: RunningSystem) -> None:
    ledger = running.system.runtime.ledger

    async def is_alive(process: str) -> bool:
        return bool(await running.redis.exists(worker_key("tollbook", process)))

    await Sweeper(ledger, ledger.gates, is_alive=is_alive).sweep()


async def record_of(running: RunningSystem) -> CallRecord:
    record = await running.system.runtime.ledger.gates[0].call_record("a")
    assert record is not None
    return record


async def notes(running: RunningSystem) -> list[UnbookedCharge]:
    return await running.system.runtime.ledger.gates[0].unbooked()


async def events(running: RunningSystem) -> list[dict[str, Any]]:
    return await running.query("SELECT type, amount_usd, assumed_usd, reason FROM events ORDER BY seq")


async def test_a_noted_settlement_is_booked_once_with_its_attempts(running: RunningSystem, tmp_path: Path) -> None:
    ended = ended_process(running)
    await leave_behind(ended, await hold(ended))
    # Redis is restored from a backup without the note; the file is still there.
    await running.redis.delete(running.keys.unbooked)

    for _ in range(2):
        await sweep(running)

    settled = (await record_of(running)).settled[1]
    assert (settled.cost_nanousd, settled.assumed_nanousd) == (COST, 0)
    printed = [event["type"] for event in await events(running)]
    assert printed == ["policy-applied", "budget-reserved", "model-called", "cost-recorded"]
    assert await notes(running) == []
    assert not any((tmp_path / "data" / FOLDER).iterdir())


async def test_what_was_only_assumed_meanwhile_is_corrected(running: RunningSystem) -> None:
    ended = ended_process(running)
    request = await hold(ended)
    await running.system.runtime.ledger.settle(
        replace(request, cost_nanousd=AMOUNT, assumed_nanousd=AMOUNT, is_final=False, result="", events=())
    )
    await leave_behind(ended, request)

    for _ in range(2):
        await sweep(running)

    settled = (await record_of(running)).settled[1]
    assert (settled.cost_nanousd, settled.assumed_nanousd) == (COST, 0)
    adjusted = [event for event in await events(running) if event["type"] == "cost-adjusted"]
    assert [event["reason"] for event in adjusted] == ["booked late"]
    assert await notes(running) == []


async def test_an_assumed_cost_in_a_note_does_not_replace_a_reported_one(running: RunningSystem) -> None:
    """G1: all assume the first attempt; the settling process knew the second's cost. The freed money may be spent."""
    ended = ended_process(running)
    request = await hold(ended)
    await running.system.runtime.ledger.settle(
        replace(request, cost_nanousd=COST, assumed_nanousd=100, is_final=False, result="", events=())
    )
    called = ModelCalled.model_validate_json(CALLED).model_copy(
        update={"outcome": "timeout", "charge_nanousd": 900, "charge_basis": "assumed"}
    )
    late = replace(request, cost_nanousd=AMOUNT, assumed_nanousd=AMOUNT)
    await leave_behind(ended, replace(late, events=(AttemptEvent("model-called", 2, payload_json(called)),)))

    await sweep(running)

    settled = (await record_of(running)).settled[1]
    assert (settled.cost_nanousd, settled.assumed_nanousd) == (COST, 100)
    assert await notes(running) == []


@pytest.mark.slow
async def test_a_cost_that_is_confirmed_is_not_changed_by_an_old_note(running: RunningSystem) -> None:
    """A file of a machine that was away must not undo what a person has corrected since."""
    ended = ended_process(running)
    request = await hold(ended)
    await running.system.runtime.ledger.settle(replace(request, cost_nanousd=COST - 1))
    await leave_behind(ended, request)

    await sweep(running)

    assert (await record_of(running)).settled[1].cost_nanousd == COST - 1
    assert await notes(running) == []


async def test_a_note_is_left_to_its_process_while_that_lives(running: RunningSystem) -> None:
    """It has the answer too, and stores it as the task's result."""
    ended = ended_process(running)
    request = await hold(ended)
    await leave_behind(ended, request)
    await running.redis.set(worker_key("tollbook", "ended"), "1")
    await sweep(running)
    assert (await record_of(running)).state == "open"

    await running.redis.delete(worker_key("tollbook", "ended"))
    await sweep(running)
    assert (await record_of(running)).state == "closed"


@pytest.mark.slow
async def test_an_answer_becomes_the_result_although_its_cost_was_booked_before(running: RunningSystem) -> None:
    """A process that only looked dead; programs show no sign of life at all."""
    ended = ended_process(running)
    request = await hold(ended)
    await leave_behind(ended, request)
    await sweep(running)

    assert not await settle_observed(ended, Unobserved(), request, cast("Any", object()))
    corrected = await ended.adjust(
        AdjustRequest(
            call_id="a",
            user_id="u",
            hold=1,
            cost_nanousd=COST,
            assumed_nanousd=0,
            attempt=1,
            payload="{}",
            budgets=request.budgets,
            result="{}",
        )
    )

    assert corrected == Adjusted(0, is_call_over=True)
    assert (await record_of(running)).state == "settled"


async def test_a_note_waits_for_the_newest_event_that_its_process_has_seen(running: RunningSystem) -> None:
    """A hold of that number may be another run's, made since on the older ledger."""
    ended = ended_process(running)
    await leave_behind(ended, await hold(ended), seen=LOST)

    await sweep(running)

    assert (await record_of(running)).state == "open"
    assert [note.call_id for note in await notes(running)] == ["a"]


async def test_a_note_whose_hold_is_gone_is_left_to_a_person(running: RunningSystem) -> None:
    ended = ended_process(running)
    await leave_behind(ended, replace(await hold(ended), hold=2))

    await sweep(running)

    assert [note.hold for note in await notes(running)] == [2]


async def test_one_note_that_cannot_be_booked_does_not_delay_the_next(running: RunningSystem) -> None:
    ended = ended_process(running)
    request = await hold(ended)
    await leave_behind(ended, replace(request, call_id="0 is before a"))
    # A note of another program: no gate accepts it, and it has no hold.
    spent = ChargeRequest(
        call_id="1 is before a", user_id="u", period=month_at(now_ms()).name, content_hash="h", cost_nanousd=COST,
        assumed_nanousd=0, payload=request.payload, budgets=(*request.budgets, "no budget"),
    )  # fmt: skip
    await ended.gates[0].note_unbooked(spent)
    await leave_behind(ended, request)

    await sweep(running)

    assert [note.call_id for note in await notes(running)] == ["0 is before a", "1 is before a"]


@pytest.mark.slow
async def test_verify_and_reconcile_name_what_is_not_booked(running: RunningSystem, tmp_path: Path) -> None:
    """It is no fault of the ledger, and somebody must look at it."""
    ended = ended_process(running)
    request = await hold(ended)
    await ended.settle(request)
    await leave_behind(ended, replace(request, hold=2), seen=LOST)
    here = {
        "REDIS_URL": running.system.redis_url,
        "TOLLBOOK_DATA_DIR": str(tmp_path / "data"),
        "OPENROUTER_BASE_URL": running.provider.base_url,
        "TOLLBOOK_DIALECT": "openrouter",
    }

    for command in ("verify", "reconcile"):
        printed = await run_cli(command, cwd=tmp_path, env=here)
        assert printed.code == 0, printed.stderr
        assert "unbooked: 1 charge, $0.000000300 in all" in printed.stdout
        assert f"unbooked: call a, user u: $0.000000300, needs event {LOST}" in printed.stdout
        (note,) = json.loads((await run_cli(command, "--json", cwd=tmp_path, env=here)).stdout)["unbooked"]
        assert (note["call_id"], note["hold"], note["cost_nanousd"]) == ("a", 2, COST)


async def test_recorded_spend_is_refused_noted_and_booked_under_its_key(running: RunningSystem) -> None:
    """The caller is told, and may record it again under the same key: it counts once."""
    ended = ended_process(running)
    ended.gates[0].see(LOST)
    with pytest.raises(UsageKept, match=r"not booked yet: if you record it again, .* key k1") as kept:
        await CostTracker(replace(running.system.runtime, ledger=ended)).record_usage("u", "0.25", idempotency_key="k1")
    assert kept.value.data == {"idempotency_key": "k1"}
    (note,) = await notes(running)
    assert (note.call_id, note.hold, note.cost_nanousd, note.seen) == ("usage k1", 0, 250_000_000, LOST)
    await sweep(running)
    assert await notes(running) == [note], "the event is still missing"

    # The newer data is back.
    await running.redis.xadd(running.keys.ledger, SEALED, id=str(LOST))
    for _ in range(2):
        await sweep(running)
    tracker = CostTracker(running.system.runtime)
    assert not await tracker.record_usage("u", "0.25", idempotency_key="k1")

    assert str((await tracker.get_usage_summary("u")).spent_usd) == "0.250000000"
    assert await notes(running) == []


@pytest.mark.slow
async def test_a_correction_is_refused_on_a_ledger_that_went_back_and_not_noted(running: RunningSystem) -> None:
    ended = ended_process(running)
    request = await hold(ended)
    await ended.settle(request)
    ended.gates[0].see(LOST)
    correction = AdjustRequest(
        call_id="a",
        user_id="u",
        hold=1,
        cost_nanousd=1,
        assumed_nanousd=0,
        attempt=1,
        payload="{}",
        budgets=request.budgets,
    )

    with pytest.raises(LedgerWentBack):
        await ended.adjust(correction)

    assert (await record_of(running)).settled[1].cost_nanousd == COST
    assert await notes(running) == []


def test_a_note_books_the_same_as_its_settlement() -> None:
    request = SettleRequest(
        call_id="a",
        user_id="u:v",
        hold=1,
        cost_nanousd=1,
        assumed_nanousd=0,
        attempt=1,
        is_final=True,
        payload="{}",
        budgets=("user:u:v:2026-11",),
        result="text",
    )
    note = unbooked_charge(request, ledger_id="l", partition=0, seen=LOST, process="p")
    assert note.period == "2026-11"
    assert note.settle_request == replace(request, is_final=False, result="")
