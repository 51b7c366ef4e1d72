"""Reconciling: assumed charges become the provider's true costs; those that it cannot tell stay and are named (G3)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tests.quick import first_quick
from tests.servers import wait_until
from tollbook.inference.administration import Administration
from tollbook.inference.calls.earlier_runs import settle_dead_hold
from tollbook.inference.calls.holds import Hold
from tollbook.inference.cost_lookup import CostLookup
from tollbook.inference.errors import ProviderRefused
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.reconcile import Reconciliation, reconcile
from tollbook.ledger.gate.call_record import SettledHold
from tollbook.ledger.gate.requests import OpenCall
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import CostAdjusted

PRICE = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
PRICE_OF_FALLBACK = PROMPT_TOKENS * 150 + COMPLETION_TOKENS * 600
BOUND = PROMPT_BOUND * 3_750 + 2_000 * 15_000
BOUND_OF_FALLBACK = PROMPT_BOUND * 150 + 2_000 * 600


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        yield calling
        await calling.check_guarantees()


async def reconciled(calling: Calling, *, is_folded: bool = True) -> Reconciliation:
    if is_folded:
        await calling.folded()
    async with ProviderClients.from_settings(calling.runtime.settings) as providers:
        costs = CostLookup(providers, calling.runtime.rules)
        return await reconcile(calling.query, calling.runtime.ledger, costs, author="test")


async def run(calling: Calling, call_id: str, *faults: str | None) -> None:
    calling.script(*faults)
    async with calling.runner() as (runner, _):
        await runner.run(calling.call(call_id))


# Faults -> what the ledger books at first, what the provider took, how many charges are asked about, what stays open.
@pytest.mark.parametrize(
    ("faults", "booked", "true", "asked", "open_calls"),
    first_quick(4, [
        (["missing_usage"], BOUND, PRICE, 1, []),
        (["missing_cost"], PRICE, PRICE, 1, []),
        (["broken_json", None], BOUND + PRICE_OF_FALLBACK, PRICE + PRICE_OF_FALLBACK, 1, []),
        (["reset_mid_body", "html_body", None], BOUND + BOUND_OF_FALLBACK + PRICE_OF_FALLBACK,
         PRICE + 2 * PRICE_OF_FALLBACK, 2, []),
        # The id of the generation never came, so nobody can be asked.
        (["reset_after_charge", None], BOUND + PRICE_OF_FALLBACK, BOUND + PRICE_OF_FALLBACK, 0, ["t1"]),
        (["reset_mid_body", "reset_after_charge", None], BOUND + BOUND_OF_FALLBACK + PRICE_OF_FALLBACK,
         PRICE + BOUND_OF_FALLBACK + PRICE_OF_FALLBACK, 1, ["t1"]),
        # The provider does not know the generation, since it charged nothing.
        (["http_524", None], BOUND + PRICE_OF_FALLBACK, BOUND + PRICE_OF_FALLBACK, 1, ["t1"]),
        ([None], PRICE, PRICE, 0, []),
        (["zero_cost"], 0, 0, 0, []),
    ]),
)  # fmt: skip
async def test_uncertain_charges_become_what_the_provider_took(
    calling: Calling, faults: list[str | None], booked: int, true: int, asked: int, open_calls: list[str]
) -> None:
    await run(calling, "t1", *faults)
    assert await calling.spent() == booked
    found = await reconciled(calling)
    assert await calling.spent() == true
    assert found == Reconciliation(
        asked=asked, adjusted=int(booked != true), difference_nanousd=true - booked, unknown=open_calls
    )
    if not open_calls:
        assert await calling.spent() == calling.booked()
        assert await calling.assumed() == 0


async def spend_by_model(calling: Calling) -> dict[str, int]:
    await calling.folded()
    rows = await calling.query("SELECT model, spent_usd FROM spend_by_model ORDER BY model")
    return {row["model"]: int(row["spent_usd"].scaleb(9)) for row in rows}


@pytest.mark.slow
async def test_each_model_has_what_its_attempts_cost(calling: Calling) -> None:
    """A correction is booked on the model whose attempt it is about, not on the one that answered."""
    await run(calling, "t1", "broken_json", None)
    await run(calling, "t2", "reset_mid_body", "html_body", None)
    assert await spend_by_model(calling) == {
        "anthropic/claude-sonnet-4": 2 * BOUND,
        "openai/gpt-4o-mini": BOUND_OF_FALLBACK + 2 * PRICE_OF_FALLBACK,
    }
    await reconciled(calling)
    assert await spend_by_model(calling) == {
        "anthropic/claude-sonnet-4": 2 * PRICE,
        "openai/gpt-4o-mini": 3 * PRICE_OF_FALLBACK,
    }


@pytest.mark.slow
async def test_a_correction_of_a_whole_call_leaves_no_model_below_zero(calling: Calling) -> None:
    await run(calling, "t1", "broken_json", None)
    administration = Administration(calling.runtime.ledger, calling.runtime.policies, calling.runtime.user_ids)
    await administration.adjust_cost("t1", 7, Signature("ann", "refunded"))
    # The last attempt had less than was taken back: the rest is taken from the one before it.
    assert await spend_by_model(calling) == {"anthropic/claude-sonnet-4": 7, "openai/gpt-4o-mini": 0}
    await administration.adjust_cost("t1", 50, Signature("ann", "after all"))
    assert await spend_by_model(calling) == {"anthropic/claude-sonnet-4": 50, "openai/gpt-4o-mini": 0}
    await administration.adjust_cost("t1", BOUND + PRICE_OF_FALLBACK, Signature("ann", "as it was"))
    assert await spend_by_model(calling) == {
        "anthropic/claude-sonnet-4": BOUND,
        "openai/gpt-4o-mini": PRICE_OF_FALLBACK,
    }
    await administration.adjust_cost("t1", calling.booked("u1"), Signature("ann", "as the provider's invoice says"))


async def test_repeating_changes_nothing(calling: Calling) -> None:
    for number, fault in enumerate(["missing_usage", "missing_cost", "reset_mid_body", "reset_after_charge"]):
        await run(calling, f"t{number}", fault, None)
    first = await reconciled(calling)
    assert first.adjusted == 2
    events = await calling.events()
    # Before DuckDB has heard of the corrections, and after.
    for is_folded in (False, True, True):
        again = await reconciled(calling, is_folded=is_folded)
        assert (again.adjusted, again.difference_nanousd, again.unknown) == (0, 0, first.unknown)
    assert await calling.events() == events


@pytest.mark.slow
async def test_charge_that_the_provider_learns_of_later_is_corrected_later(calling: Calling) -> None:
    await run(calling, "t1", "reset_mid_body", "broken_json", None)
    true = calling.booked()
    # The provider's statistics come late: of the three generations it knows only the first so far.
    entries = calling.provider.book.entries
    late = dict(list(entries.items())[1:])
    for generation_id in late:
        del entries[generation_id]
    partly = await reconciled(calling)
    assert (partly.adjusted, partly.unknown) == (1, ["t1"])
    assert await calling.spent() == PRICE + BOUND_OF_FALLBACK + PRICE_OF_FALLBACK
    entries.update(late)
    wholly = await reconciled(calling)
    assert (wholly.adjusted, wholly.unknown) == (1, [])
    assert await calling.spent() == true == PRICE + 2 * PRICE_OF_FALLBACK
    assert (await reconciled(calling)).asked == 0


async def test_attempt_that_died_with_its_worker_stays_booked_when_another_is_corrected(calling: Calling) -> None:
    calling.script("reset_mid_body", None)
    gate = asyncio.Event()
    async with calling.runner(transport=HeldBack(gate)) as (runner, _):
        running = asyncio.create_task(runner.run(calling.call("t1")))
        await wait_until(lambda: calling.provider.requests == 2)
        found = await runner.run(calling.call("t1", run_id="run-2"))
        assert isinstance(found, OpenCall)
        await runner.take_over(calling.call("t1", run_id="run-2"), found, give_up="enough")
        assert await calling.spent() == BOUND + BOUND_OF_FALLBACK
        outcome = await reconciled(calling)
        assert await calling.spent() == PRICE + BOUND_OF_FALLBACK
        assert await calling.assumed() == BOUND_OF_FALLBACK
        assert (outcome.adjusted, outcome.unknown) == (1, ["t1"])
        assert (await reconciled(calling)).adjusted == 0
        # The worker was not dead, only slow: its answer comes, and it knows nothing of the correction.
        gate.set()
        await running
    assert await calling.spent() == BOUND + PRICE_OF_FALLBACK
    outcome = await reconciled(calling)
    assert (outcome.adjusted, outcome.unknown) == (1, [])
    assert await calling.spent() == calling.booked() == PRICE + PRICE_OF_FALLBACK


async def test_late_answer_that_is_not_folded_yet_is_not_overwritten(calling: Calling) -> None:
    """G3: it comes while the provider is asked, and says more than what was asked about."""
    calling.script("reset_mid_body", None)
    gate = asyncio.Event()
    async with calling.runner(transport=HeldBack(gate)) as (runner, _):
        running = asyncio.create_task(runner.run(calling.call("t1")))
        await wait_until(lambda: calling.provider.requests == 2)
        found = await runner.run(calling.call("t1", run_id="run-2"))
        assert isinstance(found, OpenCall)
        await runner.take_over(calling.call("t1", run_id="run-2"), found)
        await calling.folded()

        async def query(sql: str) -> list[dict[str, Any]]:
            rows = await calling.query(sql)
            gate.set()
            await asyncio.wait({running})
            return rows

        async with ProviderClients.from_settings(calling.runtime.settings) as providers:
            costs = CostLookup(providers, calling.runtime.rules)
            outcome = await reconcile(query, calling.runtime.ledger, costs, author="test")
        assert (outcome.adjusted, outcome.unknown) == (0, ["t1"])
        await running
    assert await calling.spent() == BOUND + PRICE_OF_FALLBACK
    outcome = await reconciled(calling)
    assert (outcome.adjusted, outcome.unknown) == (1, [])
    assert await calling.spent() == calling.booked() == PRICE + PRICE_OF_FALLBACK


@pytest.mark.slow
async def test_answer_that_came_late_and_told_no_cost_is_asked_about(calling: Calling) -> None:
    calling.script("missing_usage")
    gate = asyncio.Event()
    async with calling.runner(transport=HeldBack(gate, free=0)) as (runner, _):
        running = asyncio.create_task(runner.run(calling.call("t1")))
        await wait_until(lambda: calling.provider.requests == 1)
        await expire(calling, "t1")
        gate.set()
        # The cost is the assumed one, but the answer is still recorded: generation, result.
        result = await running
    assert await calling.runtime.handle.results.get("t1") == result
    outcome = await reconciled(calling)
    assert (outcome.asked, outcome.adjusted, outcome.unknown) == (1, 1, [])
    assert await calling.spent() == calling.booked() == PRICE


@pytest.mark.parametrize("is_told", ["before", "meanwhile"])
async def test_late_assumed_cost_does_not_replace_a_reported_one(calling: Calling, is_told: str) -> None:
    """G1: other calls have spent the freed money. The answer is still the task's."""
    await calling.set_cap(BOUND + PRICE)
    calling.script("missing_usage")
    gate = asyncio.Event()
    ledger = ToldMeanwhile(calling) if is_told == "meanwhile" else calling.runtime.ledger
    async with calling.runner(transport=HeldBack(gate, free=0), ledger=ledger) as (runner, _):  # pyright: ignore[reportArgumentType]
        running = asyncio.create_task(runner.run(calling.call("t1")))
        await wait_until(lambda: calling.provider.requests == 1)
        await expire(calling, "t1", reported_nanousd=PRICE if is_told == "before" else None)
        if is_told == "before":
            assert isinstance(await calling.runtime.reservations.reserve(calling.call("t2")), Hold)
        gate.set()
        result = await running
    assert await calling.runtime.handle.results.get("t1") == result
    assert (await calling.spent(), await calling.assumed()) == (PRICE, 0)
    if is_told == "before":
        await expire(calling, "t2", reported_nanousd=0)
    assert (await reconciled(calling)).asked == 0
    assert await calling.spent() == calling.booked() == PRICE


@pytest.mark.slow
async def test_correction_says_who_made_it_and_why(calling: Calling) -> None:
    await run(calling, "t1", "missing_usage")
    await reconciled(calling)
    payload = (await calling.events("t1"))[-1].payload
    assert isinstance(payload, CostAdjusted)
    assert (payload.author, payload.basis, payload.assumed_nanousd) == ("test", "reported", -BOUND)
    assert payload.reason.startswith("reconciled")
    assert payload.generation_id in calling.provider.book.entries


@pytest.mark.slow
async def test_corrections_of_many_users_add_up(calling: Calling) -> None:
    faults = ["missing_usage", "broken_json", "reset_mid_body", None]
    async with calling.runner() as (runner, _):
        for number in range(12):
            calling.script(faults[number % 4], None)
            await runner.run(calling.call(f"t{number}", user_id=f"u{number % 3}"))
    found = await reconciled(calling)
    assert (found.asked, found.adjusted) == (9, 9)
    for user in ("u0", "u1", "u2"):
        assert await calling.spent(user) == calling.booked(user)


@pytest.mark.slow
async def test_open_call_is_left_to_another_time(calling: Calling) -> None:
    calling.script("reset_mid_body", "hang")
    async with calling.runner() as (runner, _):
        running = asyncio.create_task(runner.run(calling.call("t1")))
        await wait_until(lambda: calling.provider.requests == 2)
        assert await reconciled(calling) == Reconciliation()
        await running


async def test_provider_that_refuses_the_key_is_an_error_and_nothing_is_changed(calling: Calling) -> None:
    await run(calling, "t1", "missing_usage")
    await calling.folded()
    async with ProviderClient(base_url=calling.provider.base_url, dialect="compatible") as stranger:
        costs = CostLookup(ProviderClients(stranger), calling.runtime.rules)
        with pytest.raises(ProviderRefused):
            await reconcile(calling.query, calling.runtime.ledger, costs, author="test")
    assert await calling.spent() == BOUND


async def expire(calling: Calling, call_id: str, *, reported_nanousd: int | None = None) -> None:
    """Settle an open hold as the sweeper does, at what its provider has told, else in full."""
    record = await calling.runtime.ledger.gates[0].call_record(call_id)
    assert record is not None
    request = settle_dead_hold(
        call_id=call_id,
        user_id="u1",
        found=record.hold,
        outcome="expired",
        reason="late",
        reported_nanousd=reported_nanousd,
    )
    await calling.runtime.ledger.settle(request)


class ToldMeanwhile:
    """A ledger of which a hold is corrected to what its provider has told, right after it was looked at."""

    def __init__(self, calling: Calling) -> None:
        self._calling = calling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calling.runtime.ledger, name)

    async def settled_hold(self, user_id: str, call_id: str, hold: int) -> SettledHold | None:
        runtime = self._calling.runtime
        found = await runtime.ledger.settled_hold(user_id, call_id, hold)
        administration = Administration(runtime.ledger, runtime.policies, runtime.user_ids)
        await administration.adjust_cost("t1", PRICE, Signature("ann", "as the provider says"))
        return found


class HeldBack(httpx.AsyncHTTPTransport):
    """Lets the first answers through, and keeps the others back until the event is set."""

    def __init__(self, gate: asyncio.Event, *, free: int = 1) -> None:
        super().__init__()
        self._gate, self._free = gate, free

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if self._free == 0:
            await self._gate.wait()
        self._free = max(0, self._free - 1)
        return response
