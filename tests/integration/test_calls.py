"""The life of a call over the real gate: outcomes of its attempts -> events, result, money.

After every test the ledger is compared with the stand-in's own book (G3), every hold is
settled once (G2), none has passed its cap (G1), and no prompt or answer is in an event
or a log line (G10).
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.calling import API_KEY, COMPLETION_TOKENS, PROMPT, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tests.proxy import faulty_proxy
from tests.quick import one_of_each
from tests.servers import wait_until
from tollbook.inference.calls.call import Call
from tollbook.inference.calls.earlier_runs import settle_dead_hold
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.runner import CallTakenOver
from tollbook.inference.runtime import build_gates, build_ledger, open_ledger
from tollbook.ledger.errors import IdempotencyConflict, LedgerWentBack
from tollbook.ledger.gate.ledger import Ledger, Patience
from tollbook.ledger.gate.requests import OpenCall, Waiting
from tollbook.schemas.events import (
    BudgetDenied,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    Event,
    FallbackUsed,
    ModelCalled,
)
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.money import nanousd_from_usd, usd_from_nanousd
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.standin.prices import PRICES, ListPrice

COMPLETION = "tokens of nothing"
SONNET, MINI = "anthropic/claude-sonnet-4", "openai/gpt-4o-mini"
# generate_draft: Claude Sonnet 4 at 3,000 and 15,000 nano-dollars a token (3,750 to write into a cache),
# then GPT-4o mini at 150 and 600; 2,000 completion tokens at most.
PRICE = {
    SONNET: PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000,
    MINI: PROMPT_TOKENS * 150 + COMPLETION_TOKENS * 600,
}
BOUND = {SONNET: PROMPT_BOUND * 3_750 + 2_000 * 15_000, MINI: PROMPT_BOUND * 150 + 2_000 * 600}

HELD = ("held", BOUND[SONNET])
DONE, FAILED = TaskStatus.DONE, TaskStatus.FAILED


def called(model: str, outcome: str, charge: int, basis: str) -> tuple[object, ...]:
    return ("called", model, outcome, charge, basis)


def ok(model: str) -> tuple[object, ...]:
    return called(model, "ok", PRICE[model], "reported")


def free(outcome: str, model: str = SONNET) -> tuple[object, ...]:
    return called(model, outcome, 0, "released")


def dear(outcome: str, model: str = SONNET) -> tuple[object, ...]:
    """A request that may have been charged: booked at its bound."""
    return called(model, outcome, BOUND[model], "assumed")


def settled(cost: int, basis: str, outcome: str, *, assumed: int = 0) -> tuple[object, ...]:
    return ("settled", cost, basis, outcome, assumed)


def event_summary(event: Event) -> tuple[object, ...]:
    """One event on one line."""
    match event.payload:
        case BudgetReserved(kind=kind):
            return ({"hold": "held", "extension": "extended"}[kind], event.amount)
        case BudgetDenied():
            return ("denied", event.amount)
        case ModelCalled(model=model, outcome=outcome, charge_nanousd=charge, charge_basis=basis):
            return ("called", model, outcome, charge, basis)
        case FallbackUsed(to_model=model, reason=reason):
            return ("fell back", model, reason)
        case CostRecorded(basis=basis, outcome=outcome, assumed_nanousd=assumed):
            return settled(event.amount, basis, outcome, assumed=assumed)
        case CostAdjusted(basis=basis, reason=reason, assumed_nanousd=assumed):
            return ("adjusted", event.amount, basis, reason, assumed)
        case _:
            return (event.type,)


@pytest.fixture
async def calling(
    redis_client: Redis,
    server_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> AsyncIterator[Calling]:
    caplog.set_level(logging.DEBUG)
    with capture_logs() as lines:
        async with open_calling(server_url, tmp_path) as calling:
            yield calling
            await calling.check_guarantees()
            events = repr(await calling.raw_events())
    # G10: no prompt, answer or key in any event or log line.
    shown = [events, repr(lines), caplog.text, *capfd.readouterr()]
    for secret in (PROMPT, "Tell me", COMPLETION, API_KEY):
        assert not [text for text in shown if secret in text]


async def run(calling: Calling, call: Call | None = None, **options: Any) -> InferenceResult:
    async with calling.runner() as (runner, _):
        result = await runner.run(call or calling.call(), **options)
    assert isinstance(result, InferenceResult)
    return result


async def story(calling: Calling, call_id: str = "t1") -> list[tuple[object, ...]]:
    return [event_summary(event) for event in await calling.events(call_id)]


# Outcomes of the requests -> the events of the call, the result's status, what the ledger books, the book.
LIVES: dict[str, tuple[list[str | None], list[tuple[object, ...]], TaskStatus, int, int]] = {
    "answered at once": (
        [None],
        [HELD, ok(SONNET), settled(PRICE[SONNET], "reported", "done")],
        DONE, PRICE[SONNET], PRICE[SONNET],
    ),
    "answered at the second try": (
        ["http_503", None],
        [HELD, free("http_error"), ok(SONNET), settled(PRICE[SONNET], "reported", "done")],
        DONE, PRICE[SONNET], PRICE[SONNET],
    ),
    "refused, answered by the fallback": (
        ["http_400", None],
        [HELD, free("http_error"), ("fell back", MINI, "http_error"), ok(MINI),
         settled(PRICE[MINI], "reported", "done")],
        DONE, PRICE[MINI], PRICE[MINI],
    ),
    "tries used up, answered by the fallback at its second try": (
        ["http_500", "http_429", "http_502", None],
        [HELD, free("http_error"), free("http_error"), ("fell back", MINI, "http_error"), free("http_error", MINI),
         ok(MINI), settled(PRICE[MINI], "reported", "done")],
        DONE, PRICE[MINI], PRICE[MINI],
    ),
    "everything fails": (
        ["http_503"] * 4,
        [HELD, free("http_error"), free("http_error"), ("fell back", MINI, "http_error"), free("http_error", MINI),
         free("http_error", MINI), settled(0, "released", "failed")],
        FAILED, 0, 0,
    ),
    "the key is wrong: no other model would do better": (
        ["http_401"],
        [HELD, free("http_error"), settled(0, "released", "failed")],
        FAILED, 0, 0,
    ),
    "busy for a moment": (
        ["in_flight", None],
        [HELD, free("http_error"), ok(SONNET), settled(PRICE[SONNET], "reported", "done")],
        DONE, PRICE[SONNET], PRICE[SONNET],
    ),
    "no answer in time, charged or not": (
        ["hang_charged", None],
        [HELD, dear("timeout"), ("extended", BOUND[MINI]), ("fell back", MINI, "timeout"), ok(MINI),
         settled(BOUND[SONNET] + PRICE[MINI], "assumed", "done", assumed=BOUND[SONNET])],
        DONE, BOUND[SONNET] + PRICE[MINI], PRICE[SONNET] + PRICE[MINI],
    ),
    "no answer in time, three times": (
        ["hang", "hang_charged", "hang"],
        [HELD, dear("timeout"), ("extended", BOUND[MINI]), ("fell back", MINI, "timeout"), dear("timeout", MINI),
         ("extended", BOUND[MINI]), dear("timeout", MINI),
         settled(BOUND[SONNET] + 2 * BOUND[MINI], "assumed", "failed", assumed=BOUND[SONNET] + 2 * BOUND[MINI])],
        FAILED, BOUND[SONNET] + 2 * BOUND[MINI], PRICE[MINI],
    ),
    "connection broken before anything was charged": (
        ["reset_before_charge", None],
        [HELD, dear("connection_error"), ("extended", BOUND[MINI]), ("fell back", MINI, "connection_error"), ok(MINI),
         settled(BOUND[SONNET] + PRICE[MINI], "assumed", "done", assumed=BOUND[SONNET])],
        DONE, BOUND[SONNET] + PRICE[MINI], PRICE[MINI],
    ),
    "connection broken amid the answer": (
        ["reset_mid_body", None],
        [HELD, dear("connection_error"), ("extended", BOUND[MINI]), ("fell back", MINI, "connection_error"), ok(MINI),
         settled(BOUND[SONNET] + PRICE[MINI], "assumed", "done", assumed=BOUND[SONNET])],
        DONE, BOUND[SONNET] + PRICE[MINI], PRICE[SONNET] + PRICE[MINI],
    ),
    "an answer that cannot be read": (
        ["broken_json", None],
        [HELD, dear("invalid_response"), ("extended", BOUND[MINI]), ("fell back", MINI, "invalid_response"), ok(MINI),
         settled(BOUND[SONNET] + PRICE[MINI], "assumed", "done", assumed=BOUND[SONNET])],
        DONE, BOUND[SONNET] + PRICE[MINI], PRICE[SONNET] + PRICE[MINI],
    ),
    "an error inside a 200": (
        ["error_in_200", None],
        [HELD, free("provider_error"), ok(SONNET), settled(PRICE[SONNET], "reported", "done")],
        DONE, PRICE[SONNET], PRICE[SONNET],
    ),
    "an answer that ends in an error, and is charged": (
        ["error_finish", None],
        [HELD, called(SONNET, "provider_error", PRICE[SONNET], "reported"), ("extended", PRICE[SONNET]), ok(SONNET),
         settled(2 * PRICE[SONNET], "reported", "done")],
        DONE, 2 * PRICE[SONNET], 2 * PRICE[SONNET],
    ),
    "a proxy's time-out: the provider may have answered": (
        ["http_524", None],
        [HELD, dear("http_error"), ("extended", BOUND[MINI]), ("fell back", MINI, "http_error"), ok(MINI),
         settled(BOUND[SONNET] + PRICE[MINI], "assumed", "done", assumed=BOUND[SONNET])],
        DONE, BOUND[SONNET] + PRICE[MINI], PRICE[MINI],
    ),
    "free of charge": (
        ["zero_cost"],
        [HELD, called(SONNET, "ok", 0, "reported"), settled(0, "reported", "done")],
        DONE, 0, 0,
    ),
    "no cost told: priced from the usage": (
        ["missing_cost"],
        [HELD, called(SONNET, "ok", PRICE[SONNET], "priced"), settled(PRICE[SONNET], "priced", "done")],
        DONE, PRICE[SONNET], PRICE[SONNET],
    ),
    "a cost of null is no cost": (
        ["null_cost"],
        [HELD, called(SONNET, "ok", PRICE[SONNET], "priced"), settled(PRICE[SONNET], "priced", "done")],
        DONE, PRICE[SONNET], PRICE[SONNET],
    ),
    "no usage told: assumed at the bound": (
        ["missing_usage"],
        [HELD, dear("ok"), settled(BOUND[SONNET], "assumed", "done", assumed=BOUND[SONNET])],
        DONE, BOUND[SONNET], PRICE[SONNET],
    ),
}  # fmt: skip


@pytest.mark.parametrize("life", one_of_each(lambda life: life[1][-1], LIVES))  # One of each settlement.
async def test_life_of_a_call(calling: Calling, life: str) -> None:
    faults, events, status, cost, book = LIVES[life]
    calling.script(*faults)
    result = await run(calling)
    assert await story(calling) == events
    assert (result.status, nanousd_from_usd(result.cost_usd)) == (status, cost)
    assert (await calling.spent(), calling.booked()) == (cost, book)
    assert calling.provider.requests == len(faults)
    if status is DONE:
        assert result.content == f"[stand-in] {COMPLETION_TOKENS} {COMPLETION}."
        assert result.model_used == events[-2][1]
        assert result.token_count == (0 if life.startswith("no usage") else PROMPT_TOKENS + COMPLETION_TOKENS)
    else:
        assert (result.content, result.error_code) == (None, ErrorCode.INFERENCE_FAILED)
        assert result.error
    # G4: what is stored is what was returned, and asking again neither asks the model nor books anything.
    assert await calling.runtime.handle.results.get("t1") == result
    assert await run(calling, calling.call(run_id="run-2")) == result
    assert calling.provider.requests == len(faults)
    assert await story(calling) == events


@pytest.mark.slow
async def test_pauses_between_tries_are_what_the_provider_asks_for(calling: Calling) -> None:
    calling.script("http_429:7", "http_400", "http_503:3", None)
    async with calling.runner() as (runner, pauses):
        await runner.run(calling.call())
    # The fallback is asked at once.
    assert pauses == [7.0, 3.0]


@pytest.mark.slow
async def test_pause_longer_than_allowed_is_not_made(calling: Calling) -> None:
    calling.script("http_429:999", None)
    async with calling.runner() as (runner, pauses):
        await runner.run(calling.call())
    assert pauses == []
    assert (await story(calling))[2] == ("fell back", MINI, "http_error")


async def test_provider_that_cannot_be_reached_costs_nothing_and_has_no_fallback(calling: Calling) -> None:
    async with calling.runner(base_url="http://127.0.0.1:9/api/v1") as (runner, _):
        result = await runner.run(calling.call())
    assert isinstance(result, InferenceResult)
    assert result.error_code is ErrorCode.INFERENCE_FAILED
    assert await story(calling) == [HELD, free("not_sent"), free("not_sent"), settled(0, "released", "failed")]


@pytest.mark.slow
async def test_call_without_a_fallback_is_retried_even_if_it_may_have_been_charged(calling: Calling) -> None:
    call = calling.call()
    route = call.route.model_copy(update={"fallback": ()})
    calling.script("hang_charged", None)
    result = await run(calling, Call(**{**_fields(call), "route": route}))
    assert result.status is DONE
    assert await story(calling) == [
        HELD,
        dear("timeout"),
        ("extended", BOUND[SONNET]),
        ok(SONNET),
        settled(BOUND[SONNET] + PRICE[SONNET], "assumed", "done", assumed=BOUND[SONNET]),
    ]


def _fields(call: Call) -> dict[str, Any]:
    return {name: getattr(call, name) for name in call.__dataclass_fields__}


def _with_model(call: Call, model: str) -> Call:
    return Call(**{**_fields(call), "route": call.route.model_copy(update={"model": model})})


async def test_model_without_a_price_is_not_called(calling: Calling) -> None:
    # G8
    result = await run(calling, _with_model(calling.call(), "no/such-model"))
    assert (result.status, result.error_code) == (FAILED, ErrorCode.PRICE_UNKNOWN)
    assert await calling.runtime.handle.results.get("t1") == result
    assert (calling.provider.requests, await calling.events()) == (0, [])


@pytest.mark.slow
async def test_fallback_without_a_price_is_not_called(calling: Calling) -> None:
    call = calling.call()
    route = call.route.model_copy(update={"fallback": "no/such-model"})
    calling.script("http_400")
    result = await run(calling, Call(**{**_fields(call), "route": route}))
    assert result.status is FAILED
    assert await story(calling) == [HELD, free("http_error"), settled(0, "released", "failed")]


# The cap, in nano-dollars -> whether the fallback still fits beside the time-out that may have been charged.
@pytest.mark.slow
@pytest.mark.parametrize(("room", "fits"), [(0, True), (-1, False)])
async def test_fallback_goes_only_as_far_as_the_hold_can_be_extended(
    calling: Calling, room: int, *, fits: bool
) -> None:
    # G1
    await calling.set_cap(BOUND[SONNET] + BOUND[MINI] + room)
    calling.script("hang_charged", None)
    result = await run(calling)
    failed = settled(BOUND[SONNET], "assumed", "failed", assumed=BOUND[SONNET])
    if fits:
        assert result.status is DONE
        assert calling.provider.requests == 2
    else:
        assert (result.status, result.error_code) == (FAILED, ErrorCode.INFERENCE_FAILED)
        assert "do not fit the cap" in (result.error or "")
        assert await story(calling) == [HELD, dear("timeout"), failed]
        assert calling.provider.requests == 1


@pytest.mark.slow
async def test_while_calls_are_stopped_no_hold_is_extended_and_what_was_spent_is_settled(calling: Calling) -> None:
    # G3 G8
    calling.script("hang_charged", None)
    keys = calling.runtime.handle.keys[0]
    async with calling.runner() as (runner, _):
        hold = await runner.reserve(calling.call())
        assert isinstance(hold, Hold)
        await calling.runtime.handle.redis.hset(keys.meta, "stopped", "the ledger has only 9 events")
        result = await runner.runner.run(calling.call(), hold)
    await calling.runtime.handle.redis.hdel(keys.meta, "stopped")

    assert (result.status, result.error_code) == (FAILED, ErrorCode.INFERENCE_FAILED)
    assert "calls are stopped: the ledger has only 9 events" in (result.error or "")
    failed = settled(BOUND[SONNET], "assumed", "failed", assumed=BOUND[SONNET])
    assert await story(calling) == [HELD, dear("timeout"), failed]
    assert calling.provider.requests == 1


@pytest.mark.slow
async def test_what_failed_attempts_cost_is_noted_where_the_ledger_went_back_before_the_next(calling: Calling) -> None:
    # G3
    calling.script("hang_charged", None)
    runtime = calling.runtime
    gates = build_gates(runtime.handle, runtime.settings, process="ended")
    ledger = Ledger(runtime.handle.redis, gates, runtime.ledger.baselines, patience=Patience(settle_s=0.0))
    async with calling.runner(ledger=ledger) as (runner, _):
        hold = await runner.reserve(calling.call())
        assert isinstance(hold, Hold)
        gates[0].see(EntryId(2**45, 7))
        with pytest.raises(LedgerWentBack):
            await runner.runner.run(calling.call(), hold)

    (note,) = await gates[0].unbooked()
    assert (note.call_id, note.hold, note.cost_nanousd) == ("t1", 1, BOUND[SONNET])
    assert [event.type for event in note.events] == ["model-called"]
    assert calling.provider.requests == 1
    # The newer data is back.
    await runtime.ledger.settle(note.settle_request)
    await gates[0].forget(note)


@pytest.mark.slow
async def test_extension_does_not_wait_for_other_holds(calling: Calling) -> None:
    # The other call holds what the extension needs; waiting for it could be waiting for each other.
    await calling.set_cap(2 * BOUND[SONNET] + BOUND[MINI] - 1)
    gate, hung = asyncio.Event(), httpx.ReadTimeout("x")
    async with calling.runner(transport=Held(gate)) as (other, _):
        holding = asyncio.create_task(other.run(calling.call("other", run_id="run-2")))
        await wait_until(lambda: calling.provider.requests == 1)
        async with calling.runner(transport=Broken(hung)) as (runner, _):
            result = await runner.run(calling.call())
        gate.set()
        await holding
    assert isinstance(result, InferenceResult)
    assert result.error_code is ErrorCode.INFERENCE_FAILED
    assert (await story(calling))[-1] == settled(BOUND[SONNET], "assumed", "failed", assumed=BOUND[SONNET])


async def test_provider_that_charges_more_than_the_hold(calling: Calling) -> None:
    bound = PROMPT_BOUND * 3_750 + COMPLETION_TOKENS * 15_000
    await calling.set_cap(bound)
    calling.script("overcharge")
    result = await run(calling, calling.call(max_tokens=COMPLETION_TOKENS))
    assert (result.status, nanousd_from_usd(result.cost_usd)) == (DONE, 10 * PRICE[SONNET])
    recorded = (await calling.events())[-1]
    assert isinstance(recorded.payload, CostRecorded)
    assert (recorded.amount, recorded.payload.overage_nanousd) == (10 * PRICE[SONNET], 10 * PRICE[SONNET] - bound)
    assert calling.booked() == await calling.spent() == 10 * PRICE[SONNET]
    # G1: the true cost is recorded, and the next call is refused.
    refused = await run(calling, calling.call("t2", max_tokens=1))
    assert (refused.status, refused.error_code) == (TaskStatus.DENIED, ErrorCode.PLAN_LIMIT_REACHED)
    assert calling.provider.requests == 1


async def test_call_over_the_cap_is_refused_with_the_numbers(calling: Calling) -> None:
    await calling.set_cap(BOUND[SONNET] - 1)
    result = await run(calling)
    assert (result.status, result.error_code) == (TaskStatus.DENIED, ErrorCode.PLAN_LIMIT_REACHED)
    assert "$0.030720" in (result.error or "")
    assert await story(calling) == [("denied", BOUND[SONNET])]
    assert calling.provider.requests == 0
    # G4: the same task again is refused with the same words.
    again = await run(calling, calling.call(run_id="run-2"))
    assert again.model_copy(update={"finished_at_ms": 0}) == result.model_copy(update={"finished_at_ms": 0})
    assert len(await story(calling)) == 1


@pytest.mark.slow
async def test_call_that_would_fit_without_open_holds_waits_unless_it_is_final(calling: Calling) -> None:
    # G9
    await calling.set_cap(2 * BOUND[SONNET] - 1)
    gate = asyncio.Event()
    async with calling.runner(transport=Held(gate)) as (runner, _):
        holding = asyncio.create_task(runner.run(calling.call("first")))
        await wait_until(lambda: calling.provider.requests == 1)
        waiting = await runner.run(calling.call(run_id="run-2"))
        assert isinstance(waiting, Waiting)
        assert (waiting.held_nanousd, waiting.settled_nanousd) == (BOUND[SONNET], 0)
        late = await runner.run(calling.call("t2", run_id="run-3"), is_final=True)
        assert isinstance(late, InferenceResult)
        assert late.error_code is ErrorCode.BUDGET_WAIT_TIMEOUT
        gate.set()
        await holding
        assert isinstance(await runner.run(calling.call(run_id="run-2")), InferenceResult)
    assert (await story(calling))[0] == HELD


CHEAPER: Final = {"generate_draft": {"cheaper": "openai/gpt-4o-mini", "fallback": None}}


async def test_cheaper_model_is_called_where_the_first_ones_hold_does_not_fit(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path, routes=CHEAPER) as calling:
        await calling.set_cap(BOUND[SONNET] - 1)
        result = await run(calling)
        assert (result.status, result.downgraded_from) == (TaskStatus.DONE, SONNET)
        assert result.model_used == "openai/gpt-4o-mini"
        await calling.check_guarantees()
        held = await calling.query("SELECT payload FROM events WHERE type = 'budget-reserved'")
        assert [json.loads(row["payload"])["downgraded_from"] for row in held] == [SONNET]
        assert [json.loads(row["payload"])["bound"]["model"] for row in held] == ["openai/gpt-4o-mini"]
        # The same task again has the same answer, and costs nothing.
        assert await run(calling, calling.call(run_id="run-2")) == result
        assert calling.provider.requests == 1
        await calling.check_guarantees()


@pytest.mark.slow
async def test_cheaper_model_is_called_rather_than_waiting_for_other_holds(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path, routes=CHEAPER) as calling:
        await calling.set_cap(2 * BOUND[SONNET] - 1)
        gate = asyncio.Event()
        async with calling.runner(transport=Held(gate)) as (runner, _):
            holding = asyncio.create_task(runner.run(calling.call("first")))
            await wait_until(lambda: calling.provider.requests == 1)
            cheap = asyncio.create_task(runner.run(calling.call("second", run_id="run-2")))
            await wait_until(lambda: calling.provider.requests == 2)
            gate.set()
            first, second = await holding, await cheap
        assert isinstance(first, InferenceResult)
        assert isinstance(second, InferenceResult)
        assert (first.downgraded_from, second.downgraded_from) == (None, SONNET)


@pytest.mark.slow
async def test_first_model_is_called_where_it_fits_and_a_task_with_its_own_model_gets_no_cheaper_one(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path, routes=CHEAPER) as calling:
        await calling.set_cap(BOUND[SONNET])
        named = await run(calling, calling.call("own", model=SONNET, max_tokens=200_000))
        assert (named.status, named.downgraded_from) == (TaskStatus.DENIED, None)
        result = await run(calling)
        assert (result.status, result.downgraded_from) == (TaskStatus.DONE, None)


@pytest.mark.slow
async def test_call_that_fits_with_neither_model_is_refused_once_with_the_cheaper_ones_numbers(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path, routes=CHEAPER) as calling:
        await calling.set_cap(1)
        result = await run(calling)
        assert (result.status, result.error_code) == (TaskStatus.DENIED, ErrorCode.PLAN_LIMIT_REACHED)
        assert await story(calling) == [("denied", BOUND[MINI])]
        await calling.check_guarantees()
        denied = await calling.query("SELECT payload FROM events WHERE type = 'budget-denied'")
        assert [json.loads(row["payload"])["bound"]["model"] for row in denied] == ["openai/gpt-4o-mini"]


@pytest.mark.slow
async def test_run_finds_the_hold_of_the_cheaper_model_that_its_own_lost_request_has_opened(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path, routes=CHEAPER) as calling:
        await calling.set_cap(BOUND[SONNET] - 1)
        async with calling.runner() as (runner, _):
            hold = await runner.reserve(calling.call())
            again = await runner.reserve(calling.call())
            assert isinstance(hold, Hold)
            assert isinstance(again, Hold)
            assert (again.bound, again.amount_nanousd) == (hold.bound, hold.amount_nanousd)
            assert again.downgraded_from == SONNET
            await runner.runner.run(calling.call(), again)
        await calling.check_guarantees()


async def test_fallbacks_are_tried_in_their_order(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    routes = {"generate_draft": {"fallback": ["no/price", "openai/gpt-4o-mini", "google/gemini-2.5-flash"]}}
    async with open_calling(server_url, tmp_path, routes=routes, retries=0) as calling:
        calling.script("http_503", "http_503")
        result = await run(calling)
        assert (result.status, result.model_used) == (TaskStatus.DONE, "google/gemini-2.5-flash")
        await calling.check_guarantees()
        moves = await calling.query("SELECT payload FROM events WHERE type = 'fallback-used' ORDER BY partition, seq")
        assert [(each["from_model"], each["to_model"]) for each in (json.loads(row["payload"]) for row in moves)] == [
            (SONNET, "openai/gpt-4o-mini"),
            ("openai/gpt-4o-mini", "google/gemini-2.5-flash"),
        ]


async def test_what_costs_nothing_runs_at_a_used_up_cap(
    redis_client: Redis, server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G9: a free model of the catalogue, and a server of one's own whose price is zero."""
    free_model = "deepseek/deepseek-r1:free"
    for model in ("own/model", free_model):
        monkeypatch.setitem(PRICES, model, ListPrice(0, 0, 0, 0))
    prices = {"own/model": {"prompt": 0, "completion": 0}}
    async with open_calling(server_url, tmp_path, prices=prices, day_cap_nanousd="0") as calling:
        await calling.set_cap(0)
        assert (await run(calling, calling.call("dear"))).status is TaskStatus.DENIED
        for model in ("own/model", free_model):
            result = await run(calling, calling.call(model, model=model))
            assert (result.status, result.cost_usd) == (TaskStatus.DONE, 0)
        await calling.check_guarantees()


async def test_same_task_with_other_content_is_a_conflict(calling: Calling) -> None:
    # G4
    await run(calling)
    with pytest.raises(IdempotencyConflict):
        await run(calling, calling.call(prompt=PROMPT + " please", run_id="run-2"))
    assert calling.provider.requests == 1


async def test_call_that_is_under_way_elsewhere_is_not_made_twice(calling: Calling) -> None:
    gate = asyncio.Event()
    async with calling.runner(transport=Held(gate)) as (runner, _):
        first = asyncio.create_task(runner.run(calling.call()))
        await wait_until(lambda: calling.provider.requests == 1)
        found = await runner.run(calling.call(run_id="run-2"))
        assert isinstance(found, OpenCall)
        assert (found.worker, found.amount_nanousd, found.may_be_under_way) == ("test.run-1", BOUND[SONNET], True)
        gate.set()
        assert isinstance(await first, InferenceResult)
    assert calling.provider.requests == 1


async def test_run_finds_the_hold_that_its_own_lost_request_has_opened(calling: Calling) -> None:
    async with calling.runner() as (runner, _):
        call = calling.call()
        await runner.reserve(call)
        assert await story(calling) == [HELD]
        result = await runner.run(call)
    assert isinstance(result, InferenceResult)
    assert result.status is DONE
    assert await story(calling) == [HELD, ok(SONNET), settled(PRICE[SONNET], "reported", "done")]


async def test_call_is_not_begun_more_often_than_it_may(calling: Calling) -> None:
    """G3: also if a sweeper settled the holds of dead workers, so that no worker took them over."""
    calling.script("hang_charged")
    async with calling.runner() as (runner, _):
        running = asyncio.create_task(runner.run(calling.call(), max_attempts=1))
        await wait_until(lambda: calling.provider.requests == 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        given_up = await runner.run(calling.call(run_id="run-2"), max_attempts=1)
        assert isinstance(given_up, InferenceResult)
        assert (given_up.status, given_up.error_code) == (FAILED, ErrorCode.ATTEMPTS_EXHAUSTED)
        assert await runner.run(calling.call(run_id="run-3"), max_attempts=1) == given_up
    assert calling.provider.requests == 1
    assert (await story(calling))[-1] == settled(0, "released", "failed")


async def test_answer_that_comes_after_its_hold_has_expired(calling: Calling) -> None:
    # G3: the charge is recorded, never refused; the result is taken, since nobody else has one.
    gate = asyncio.Event()
    async with calling.runner(transport=Held(gate)) as (runner, _):
        running = asyncio.create_task(runner.run(calling.call()))
        await wait_until(lambda: calling.provider.requests == 1)
        await _expire(calling)
        gate.set()
        result = await running
    assert isinstance(result, InferenceResult)
    assert result.status is DONE
    assert await calling.runtime.handle.results.get("t1") == result
    assert await story(calling) == [
        HELD,
        settled(BOUND[SONNET], "assumed", "expired", assumed=BOUND[SONNET]),
        ok(SONNET),
        ("adjusted", PRICE[SONNET] - BOUND[SONNET], "reported", "late_answer", -BOUND[SONNET]),
    ]
    assert await calling.spent() == calling.booked() == PRICE[SONNET]
    assert await calling.assumed() == 0


@pytest.mark.slow
async def test_answer_that_comes_after_another_worker_has_given_the_call_up(calling: Calling) -> None:
    gate = asyncio.Event()
    async with calling.runner(transport=Held(gate)) as (runner, _):
        running = asyncio.create_task(runner.run(calling.call()))
        await wait_until(lambda: calling.provider.requests == 1)
        found = await runner.run(calling.call(run_id="run-2"))
        assert isinstance(found, OpenCall)
        await runner.take_over(calling.call(run_id="run-2"), found, give_up="three workers have died")
        given_up = await calling.runtime.handle.results.get("t1")
        # The possible cost of the dead run is on the ledger, and the publisher has its result.
        assert given_up is not None
        assert nanousd_from_usd(given_up.cost_usd) == BOUND[SONNET]
        assert (given_up.status, given_up.error_code) == (FAILED, ErrorCode.ATTEMPTS_EXHAUSTED)
        gate.set()
        await running
    # The published result stands; the money is corrected.
    stored = await calling.runtime.handle.results.get("t1")
    assert stored is not None
    assert (stored.status, stored.error_code) == (FAILED, ErrorCode.ATTEMPTS_EXHAUSTED)
    assert await calling.spent() == calling.booked() == PRICE[SONNET]


async def test_answer_that_comes_while_another_worker_makes_the_call_anew(calling: Calling) -> None:
    gates = asyncio.Event(), asyncio.Event()
    async with (
        calling.runner(transport=Held(gates[0])) as (dead, _),
        calling.runner(transport=Held(gates[1])) as (alive, _),
    ):
        first = asyncio.create_task(dead.run(calling.call()))
        await wait_until(lambda: calling.provider.requests == 1)
        found = await alive.run(calling.call(run_id="run-2"))
        assert isinstance(found, OpenCall)
        await alive.take_over(calling.call(run_id="run-2"), found)
        second = asyncio.create_task(alive.run(calling.call(run_id="run-2")))
        await wait_until(lambda: calling.provider.requests == 2)
        gates[0].set()
        with pytest.raises(CallTakenOver):
            await first
        gates[1].set()
        result = await second
    assert isinstance(result, InferenceResult)
    assert await calling.runtime.handle.results.get("t1") == result
    assert nanousd_from_usd(result.cost_usd) == PRICE[SONNET]
    # Both requests were charged, and both are on the ledger at what they cost.
    assert await calling.spent() == calling.booked() == 2 * PRICE[SONNET]
    assert await calling.assumed() == 0
    holds = {event.payload.hold for event in await calling.events() if isinstance(event.payload, CostRecorded)}
    assert holds == {1, 2}


async def test_hold_of_a_run_that_died_between_two_attempts_is_settled_at_what_is_known(calling: Calling) -> None:
    calling.script("error_finish", "hang_charged")
    async with calling.runner() as (runner, _):
        running = asyncio.create_task(runner.run(calling.call()))
        await wait_until(lambda: calling.provider.requests == 2)
        found = await runner.run(calling.call(run_id="run-2"))
        assert isinstance(found, OpenCall)
        # The first attempt is on the ledger, the second may be under way: the whole hold is charged.
        assert (found.attempts_recorded, found.attempts_begun) == (1, 2)
        await runner.take_over(calling.call(run_id="run-2"), found, give_up="enough")
        recorded = (await story(calling))[-1]
        hold = PRICE[SONNET] + BOUND[SONNET]
        assert recorded == settled(hold, "assumed", "taken_over", assumed=BOUND[SONNET])
        # The dead run was only slow. Without a hold it sends no more requests, and its time-out changes nothing.
        with pytest.raises(CallTakenOver):
            await running
    assert (calling.provider.requests, await calling.spent()) == (2, hold)


async def test_cancelled_call_leaves_no_hold_behind(calling: Calling) -> None:
    calling.script("hang_charged")
    async with calling.runner() as (runner, _):
        running = asyncio.create_task(runner.run(calling.call()))
        await wait_until(lambda: calling.provider.requests == 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await story(calling) == [
            HELD,
            dear("abandoned"),
            settled(BOUND[SONNET], "assumed", "failed", assumed=BOUND[SONNET]),
        ]
        # The task is not over: it can be run again.
        calling.script(None)
        result = await runner.run(calling.call(run_id="run-2"))
    assert isinstance(result, InferenceResult)
    assert result.status is DONE
    assert await calling.spent() == BOUND[SONNET] + PRICE[SONNET]


async def test_call_cancelled_while_redis_is_away_ends(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """A cancelled call ends, although it cannot check whether it left a hold."""
    async with open_calling(server_url, tmp_path) as calling, calling.runner() as (runner, _):
        running = asyncio.create_task(runner.run(calling.call()))
        with capture_logs() as logs:
            await calling.runtime.handle.pipeline.aclose()
            await wait_until(lambda: any(entry["event"] == "redis.answer_missed" for entry in logs))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
    assert calling.provider.requests == 0


async def test_answer_is_stored_though_its_call_is_cancelled_while_redis_is_away(
    calling: Calling, server_url: str
) -> None:
    """G4: it is paid for; if it were dropped, it would be paid for again."""
    gate, settings = asyncio.Event(), calling.runtime.settings
    async with (
        faulty_proxy(server_url) as proxy,
        open_ledger(settings, proxy.url, may_create=False) as handle,
    ):
        ledger = build_ledger(handle, settings, lambda _: partial(asyncio.to_thread, calling.store.baselines))
        async with calling.runner(transport=Held(gate), ledger=ledger) as (runner, _):
            running = asyncio.create_task(runner.run(calling.call()))
            await wait_until(lambda: calling.provider.requests == 1)
            await proxy.stop()
            with capture_logs() as logs:
                gate.set()
                await wait_until(lambda: any(entry["event"] == "redis.answer_missed" for entry in logs))
                running.cancel()
            await proxy.start()
            with pytest.raises(asyncio.CancelledError):
                await running
    stored = await calling.runtime.handle.results.get("t1")
    assert stored is not None
    assert stored.status is DONE
    assert await story(calling) == [HELD, ok(SONNET), settled(PRICE[SONNET], "reported", "done")]


@pytest.mark.slow
async def test_call_cancelled_during_a_pause_costs_what_its_attempts_cost(calling: Calling) -> None:
    calling.script("error_finish")
    paused = asyncio.Event()

    async def pause(_: float) -> None:
        paused.set()
        await asyncio.get_running_loop().create_future()

    async with calling.runner() as (runner, _):
        runner.runner._sleep = pause
        running = asyncio.create_task(runner.run(calling.call()))
        await paused.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert (await story(calling))[-1] == settled(PRICE[SONNET], "reported", "failed")


async def test_call_cancelled_at_any_moment_leaves_no_hold_and_loses_no_money(calling: Calling) -> None:
    # G2, G3: check_guarantees looks for open holds and for money that the ledger does not have.
    states: list[str | None] = []
    steps, is_done = 0, False
    async with calling.runner() as (runner, _):
        # Later and later, until a call has come to its end before it could be cancelled.
        while not is_done:
            calling.script("error_finish", "http_400", None)
            running = asyncio.create_task(runner.run(calling.call(f"t{steps}")))
            for _ in range(steps):
                await asyncio.sleep(0)
            is_done = not running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            record = await calling.runtime.ledger.gates[0].call_record(f"t{steps}")
            states.append(record.state if record else None)
            # G4: an answer that was heard is the task's; it is not paid for a second time.
            is_answered = any(
                entry[:1] == ("called",) and entry[2] == "ok" for entry in await story(calling, f"t{steps}")
            )
            assert not is_answered or states[-1] == "settled"
            steps += max(1, steps // 20)
    assert "open" not in states
    assert states[0] is None
    assert "closed" in states
    assert states[-1] == "settled"


async def test_further_budgets_are_held_against_too(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    caps: dict[str, Any] = {
        "day_cap_nanousd": "1",
        "campaign_cap_nanousd": f"{usd_from_nanousd(2 * BOUND[SONNET] - 1)}",
    }
    async with open_calling(server_url, tmp_path, **caps) as calling:
        gate = asyncio.Event()
        async with calling.runner(transport=Held(gate)) as (runner, _):
            first = asyncio.create_task(runner.run(calling.call("t1", campaign_id="c1")))
            await wait_until(lambda: calling.provider.requests == 1)
            # Another user of the same campaign stands before the campaign's cap.
            waiting = await runner.run(calling.call("t2", user_id="u2", campaign_id="c1"))
            assert isinstance(waiting, Waiting)
            assert waiting.budget.startswith("campaign:c1:")
            gate.set()
            await first
            assert isinstance(await runner.run(calling.call("t2", user_id="u2", campaign_id="c1")), InferenceResult)
        await calling.check_guarantees()
        rows = await calling.query("SELECT name, settled_usd FROM budgets ORDER BY name, value")
        totals = {"campaign": 2 * PRICE[SONNET], "day": PRICE[SONNET], "user": PRICE[SONNET]}
        assert {(row["name"], int(row["settled_usd"].scaleb(9))) for row in rows} == set(totals.items())


async def test_burst_of_calls_with_faults_stays_within_the_cap_and_equals_the_book(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    cap = 6 * BOUND[SONNET]
    async with open_calling(server_url, tmp_path, retries=2) as calling:
        rates = {"http_503": 0.15, "error_finish": 0.1, "reset_after_charge": 0.1, "broken_json": 0.1, "zero_cost": 0.1}
        calling.provider.faults = type(calling.provider.faults)(rates=rates, seed=3)
        await calling.set_cap(cap)
        async with calling.runner() as (runner, _):
            results = await asyncio.gather(
                *(runner.run(calling.call(f"t{n}", run_id=f"r{n}"), is_final=True) for n in range(60))
            )
        codes = {result.error_code for result in results if isinstance(result, InferenceResult)}
        # Both happened: calls that were made, and calls that the cap kept off.
        assert None in codes
        assert codes & {ErrorCode.BUDGET_WAIT_TIMEOUT, ErrorCode.PLAN_LIMIT_REACHED}
        await calling.check_guarantees()
        assert await calling.spent() <= cap


class Held(httpx.AsyncBaseTransport):
    """Sends requests to the stand-in, and keeps the answers back until the event is set."""

    def __init__(self, gate: asyncio.Event) -> None:
        self._gate = gate
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        await self._gate.wait()
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class Broken(httpx.AsyncBaseTransport):
    """Every request fails in the same way."""

    def __init__(self, problem: Exception) -> None:
        self._problem = problem

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        raise self._problem


async def _expire(calling: Calling, call_id: str = "t1") -> None:
    """Settle a hold as the sweeper does when its deadline has passed."""
    record = await calling.runtime.ledger.gates[0].call_record(call_id)
    assert record is not None
    await calling.runtime.ledger.settle(
        settle_dead_hold(
            call_id=call_id, user_id=record.user_id, found=record.hold, outcome="expired", reason="the deadline passed"
        )
    )
