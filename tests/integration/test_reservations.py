"""Money for a call before it is sent: waiting for it, taking it over from a dead run, giving up; without a provider."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.calling import Calling, SingleTry, open_calling
from tests.servers import wait_until
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.reservations import Reservations, WaitLimits
from tollbook.ledger.gate.requests import OpenCall
from tollbook.schemas.results import ErrorCode

LONG = WaitLimits(hold_wait_s=3_600.0)


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        yield calling
        assert calling.provider.requests == 0


@pytest.fixture
async def runner(calling: Calling) -> AsyncIterator[SingleTry]:
    async with calling.runner() as (runner, _):
        yield runner


@pytest.fixture
def reservations(calling: Calling) -> Reservations:
    """Those of the system, which hear when a budget is freed."""
    return calling.runtime.reservations


async def held(calling: Calling, runner: SingleTry, call_id: str = "first") -> Hold:
    """Let one call hold so much that no second one fits the cap."""
    hold = await runner.reserve(calling.call(call_id))
    assert isinstance(hold, Hold)
    await calling.set_cap(2 * hold.amount_nanousd - 1)
    return hold


async def test_a_slot_given_back_while_waiting_is_taken_again_before_the_call(
    calling: Calling, runner: SingleTry, reservations: Reservations
) -> None:
    hold = await held(calling, runner)
    happened: list[str] = []

    @asynccontextmanager
    async def given_back() -> AsyncIterator[None]:
        happened.append("given back")
        yield
        happened.append("taken again")

    waiting = asyncio.create_task(reservations.acquire(calling.call("second"), LONG, while_waiting=given_back))
    await wait_until(lambda: reservations.waiting == 1, what="the second call's wait")
    assert happened == ["given back"]
    request = hold.settle_request(outcome="failed", reason="test", result="", is_final=False)
    await calling.runtime.ledger.settle(request)
    acquired = await waiting
    assert acquired.hold is not None
    assert happened == ["given back", "taken again"]
    assert reservations.waiting == 0


async def test_a_call_does_not_wait_if_too_many_wait_already(
    calling: Calling, runner: SingleTry, reservations: Reservations
) -> None:
    await held(calling, runner)
    limits = WaitLimits(hold_wait_s=3_600.0, max_parked=1)
    waiting = asyncio.create_task(reservations.acquire(calling.call("second"), limits))
    await wait_until(lambda: reservations.waiting == 1, what="the second call's wait")
    left = await reservations.acquire(calling.call("third"), limits)
    assert (left.hold, left.result, left.give_up) == (None, None, None)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_the_wait_ends_with_a_refusal_that_says_so(
    calling: Calling, runner: SingleTry, reservations: Reservations
) -> None:
    """G9."""
    await held(calling, runner)
    acquired = await reservations.acquire(calling.call("second"), WaitLimits(hold_wait_s=0.0))
    assert acquired.result is not None
    assert acquired.result.error_code is ErrorCode.BUDGET_WAIT_TIMEOUT


async def test_a_living_run_is_waited_for_and_a_dead_one_is_taken_over(
    calling: Calling, runner: SingleTry, reservations: Reservations
) -> None:
    dead = await runner.reserve(calling.call("first"))
    assert isinstance(dead, Hold)
    looks: list[OpenCall] = []

    async def is_dead(found: OpenCall) -> bool:
        looks.append(found)
        return len(looks) == 3

    limits = WaitLimits(hold_wait_s=0.0, first_pause_s=0.0, max_pause_s=0.0)
    acquired = await reservations.acquire(calling.call("first", run_id="2"), limits, is_dead=is_dead)
    assert {found.worker for found in looks} == {dead.run}
    assert acquired.hold is not None
    assert (acquired.hold.number, acquired.give_up) == (2, None)
    # A request may have been in flight, so all of the dead run's hold is charged.
    assert await calling.spent() == dead.amount_nanousd


@pytest.mark.parametrize("max_attempts", [1, 2])
async def test_a_call_is_given_up_after_its_last_allowed_attempt(
    calling: Calling, runner: SingleTry, reservations: Reservations, max_attempts: int
) -> None:
    """G3, G4: the last dead run's hold is settled, and the result that says so stands."""

    async def is_dead(_found: OpenCall) -> bool:
        return True

    limits = WaitLimits(hold_wait_s=0.0, max_attempts=max_attempts)
    for number in range(1, max_attempts + 1):
        acquired = await reservations.acquire(calling.call("deadly", run_id=f"{number}"), limits, is_dead=is_dead)
        assert acquired.hold is not None
        assert (acquired.hold.number, acquired.give_up) == (number, None)
    acquired = await reservations.acquire(calling.call("deadly", run_id="last"), limits, is_dead=is_dead)
    assert acquired.result is not None
    assert acquired.result.error_code is ErrorCode.ATTEMPTS_EXHAUSTED
    assert acquired.give_up == acquired.result.error
    again = await reservations.acquire(calling.call("deadly", run_id="again"), limits)
    assert (again.result, again.give_up) == (acquired.result, None)
