"""Which calls with a lost claim are cancelled, depending on their state on the ledger."""

import asyncio
from collections.abc import Callable
from typing import Final

import pytest

from tests.loop_clock import LoopClock
from tests.servers import wait_until
from tollbook.consumers.messages import Delivery
from tollbook.consumers.overtaken_calls import OvertakenCalls
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.call_record import CallRecord, CallState
from tollbook.ledger.gate.requests import OpenCall

DELIVERY: Final = Delivery("analysis", "1-0", {})
OWN: Final = 2


def record(state: CallState, hold: int) -> CallRecord:
    latest = OpenCall(hold, 100, "w1.1", 0, 1, 1, 0, 0, (), "2026-11")
    return CallRecord(state, "hash", "u1", latest, {}, frozenset())


OPEN: Final = record("open", OWN)


class Ledger:
    """What the ledger says of the call, and how often it was asked."""

    def __init__(self, said: CallRecord | None) -> None:
        self.said = said
        self.looks = 0
        self.is_away = False

    async def record_of(self, user_id: str, call_id: str) -> CallRecord | None:
        assert (user_id, call_id) == ("u1", "t1")
        self.looks += 1
        if self.is_away:
            raise LedgerUnavailable("gone")
        return self.said


async def made(calls: OvertakenCalls, *, can_be_cut_off: Callable[[], bool] = lambda: True) -> asyncio.Task[None]:
    """Begin a call that does not end by itself."""
    begun = asyncio.Event()

    async def make() -> None:
        with calls.running(DELIVERY, "t1", user_id="u1", hold=OWN, can_be_cut_off=can_be_cut_off):
            begun.set()
            await asyncio.get_running_loop().create_future()

    task = asyncio.create_task(make())
    await begun.wait()
    return task


@pytest.mark.parametrize("found", [record("open", OWN + 1), record("settled", OWN), record("settled", OWN + 1)])
async def test_a_call_whose_hold_or_result_another_run_has_is_cancelled(found: CallRecord) -> None:
    calls = OvertakenCalls(Ledger(found).record_of)
    task = await made(calls)
    calls.watch(DELIVERY)
    await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.parametrize("found", [OPEN, record("closed", OWN), None])
async def test_a_call_whose_answer_may_be_the_tasks_goes_on_until_that_changes(
    found: CallRecord | None, loop_clock: LoopClock
) -> None:
    """G4."""
    ledger = Ledger(found)
    calls = OvertakenCalls(ledger.record_of)
    task = await made(calls)
    calls.watch(DELIVERY)
    await wait_until(lambda: ledger.looks == 1)
    assert not task.cancelling()
    ledger.said = record("open", OWN + 1)
    loop_clock.advance(1.1)
    await asyncio.wait({task})
    assert (task.cancelled(), ledger.looks) == (True, 2)


async def test_nothing_is_known_while_the_ledger_is_away(loop_clock: LoopClock) -> None:
    ledger = Ledger(record("settled", OWN))
    ledger.is_away = True
    calls = OvertakenCalls(ledger.record_of)
    task = await made(calls)
    calls.watch(DELIVERY)
    await wait_until(lambda: ledger.looks == 1)
    assert not task.cancelling()
    ledger.is_away = False
    loop_clock.advance(1.1)
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_call_whose_cost_only_its_answer_has_goes_on(loop_clock: LoopClock) -> None:
    """G3."""
    ledger, asked, can_be_cut_off = Ledger(record("settled", OWN)), 0, False

    def is_askable() -> bool:
        nonlocal asked
        asked += 1
        return can_be_cut_off

    calls = OvertakenCalls(ledger.record_of)
    task = await made(calls, can_be_cut_off=is_askable)
    calls.watch(DELIVERY)
    await wait_until(lambda: asked == 1)
    assert (ledger.looks, task.cancelling()) == (0, 0)
    can_be_cut_off = True
    loop_clock.advance(1.1)
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_call_that_ended_while_the_ledger_was_asked_is_left_alone() -> None:
    answer: asyncio.Future[CallRecord] = asyncio.get_running_loop().create_future()
    is_asked, may_leave, has_left, may_end = (asyncio.Event() for _ in range(4))

    async def record_of(_user_id: str, _call_id: str) -> CallRecord:
        is_asked.set()
        return await answer

    calls = OvertakenCalls(record_of)

    async def make() -> None:
        with calls.running(DELIVERY, "t1", user_id="u1", hold=OWN, can_be_cut_off=lambda: True):
            calls.watch(DELIVERY)
            await may_leave.wait()
        has_left.set()
        await may_end.wait()

    task = asyncio.create_task(make())
    await is_asked.wait()
    may_leave.set()
    await has_left.wait()
    answer.set_result(record("settled", OWN))
    may_end.set()
    await task  # Cancelled, it would raise.


async def test_a_lost_claim_without_a_call_is_ignored() -> None:
    ledger = Ledger(OPEN)
    OvertakenCalls(ledger.record_of).watch(DELIVERY)
    assert ledger.looks == 0
