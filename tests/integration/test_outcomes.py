"""What a reply means: outcome, cost and reasons of every scenario and of reported replies, over the real gate.

After every test the ledger is compared with the stand-in's book, and no prompt or answer is in an event or a log line.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.calling import API_KEY, PROMPT, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tests.quick import first_quick, one_of_each
from tests.servers import wait_until
from tollbook.inference.calls.call import Call
from tollbook.inference.calls.earlier_runs import settle_dead_hold
from tollbook.inference.calls.holds import Hold
from tollbook.inference.models import ModelCatalogue, ModelFacts
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, price_from_usd
from tollbook.schemas.events import BudgetReserved, CostRecorded, ModelCalled
from tollbook.schemas.money import nanousd_from_usd
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.routes import Target
from tollbook.schemas.usage import MediaUsage, Usage
from tollbook.standin import SCENARIOS
from tollbook.standin.scenarios import Scenario

REPLIES: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "provider_replies.json").read_text(encoding="utf-8"),
    parse_float=str,
)
OUTCOMES = {name: scenario for name, scenario in SCENARIOS.items() if scenario.group == "outcome"}
THOUGHTS = ("Seven must", "c2lnbmVk", "ZW5jcnlwdGVk")
SONNET, MINI = "anthropic/claude-sonnet-4", "openai/gpt-4o-mini"


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
            await calling.check_guarantees(is_exact=False)
            events = repr(await calling.raw_events())
    # G10
    shown = [events, repr(lines), caplog.text, *capfd.readouterr()]
    for secret in (
        PROMPT,
        "Tell me",
        "tokens of nothing",
        "half a sen",
        "no credit left",
        "I cannot help",
        *THOUGHTS,
        API_KEY,
    ):
        assert not [text for text in shown if secret in text]


async def run(calling: Calling, call: Call | None = None, **options: Any) -> InferenceResult:
    async with calling.runner(**options) as (runner, _):
        result = await runner.run(call or calling.call())
    assert isinstance(result, InferenceResult)
    return result


def with_route(call: Call, **changes: Any) -> Call:
    fields = {name: getattr(call, name) for name in Call.__dataclass_fields__}
    return Call(**{**fields, "route": call.route.model_copy(update=changes)})


def outcome_of(scenario: Scenario) -> tuple[str, str, bool]:
    return (scenario.result, scenario.booked, scenario.is_asked_again)


async def attempts(calling: Calling, call_id: str = "t1") -> list[ModelCalled]:
    return [event.payload for event in await calling.events(call_id) if isinstance(event.payload, ModelCalled)]


@pytest.mark.parametrize("name", one_of_each(outcome_of, SCENARIOS))
async def test_scenario_has_the_outcome_of_the_table(calling: Calling, name: str) -> None:
    scenario = SCENARIOS[name]
    call = with_route(calling.call(), fallback=())
    calling.script(*[name] * 9)
    result = await run(calling, call)
    book = calling.booked()
    called = await attempts(calling)
    assert ("done" if result.status is TaskStatus.DONE else result.error_code) == scenario.result
    cost = nanousd_from_usd(result.cost_usd)
    assert await calling.spent() == cost
    bases = {
        "reported": "reported",
        "priced": "priced",
        "doubted": "priced",
        "assumed": "assumed",
        "nothing": "released",
    }
    expected = "reported" if name == "nothing_for_nothing" else bases[scenario.booked]
    assert {event.charge_basis for event in called} == {expected}
    is_doubted = scenario.booked == "doubted" or name == "nothing_counted"
    assert all((event.usage_doubt is not None) == is_doubted for event in called)
    # G3: at least the true cost, and exactly that where the report is consistent.
    assert cost == book if scenario.booked in ("reported", "priced", "nothing") else cost >= book
    # G4: a paid call is not paid again.
    may_repeat = scenario.is_asked_again or name == "proxy_page"
    assert calling.provider.requests == (len(called) if may_repeat else 1)
    assert (len(called) > 1) == may_repeat
    if result.status is TaskStatus.FAILED:
        assert result.error
        assert all(event.reason for event in called)
    else:
        assert result.content or result.images or result.tool_calls or result.refusal
        assert all(event.reason is None for event in called)
    if scenario.booked not in ("nothing", "assumed"):
        assert result.usage is not None
        assert result.token_count == result.usage.total_tokens > 0
    # The stored result is the returned one.
    assert await calling.runtime.handle.results.get("t1") == result


@pytest.mark.parametrize("name", one_of_each(outcome_of, OUTCOMES))
async def test_outcome_that_is_paid_for_is_not_asked_of_the_fallback(calling: Calling, name: str) -> None:
    if SCENARIOS[name].is_asked_again:
        return
    calling.script(name, None)
    await run(calling)
    assert calling.provider.requests == 1


CAUSES: dict[str, dict[str, Any]] = {
    "signed_thinking": {
        "reasoning": "Seven must be looked up first.",
        "reasoning_details": (SCENARIOS["signed_thinking"].choice or {})["message"]["reasoning_details"],
    },
    "text_cut": {"content": "half a sen", "finish_reason": "length"},
    "text_filtered": {"content": "half a sen", "finish_reason": "content_filter"},
    "refusal": {"refusal": "I cannot help with that.", "content": None},
    "refusal_part": {"refusal": "I cannot help with that.", "content": None},
    "limit_before_text": {"finish_reason": "length"},
    "recitation": {"finish_reason": "content_filter"},
    "prompt_blocked": {"finish_reason": "content_filter"},
    "reasoning_used_up_limit": {"reasoning": "...", "finish_reason": "length"},
    "thinking_parts": {"reasoning": "ok", "content": "ok"},
    "text_parts": {"content": "two parts"},
    "function_call": {"finish_reason": "function_call"},
    "tool_use_part": {"finish_reason": "tool_calls"},
    "out_of_credit": {"provider_error": "the account has no credit left"},
}


@pytest.mark.parametrize("name", first_quick(5, CAUSES))
async def test_result_says_what_happened(calling: Calling, name: str) -> None:
    calling.script(*[name] * 4)
    result = (await run(calling)).model_dump()
    assert {field: result[field] for field in CAUSES[name]} == CAUSES[name]


async def test_details_of_reasoning_that_a_result_cannot_hold_are_left_out(calling: Calling) -> None:
    details = [{"type": "reasoning.encrypted", "data": "x" * 4_000_000}]
    message = {"content": "Yes.", "reasoning_details": details}
    reply: dict[str, Any] = {"finish_reason": "stop", "message": message, "usage": {}}
    result = await run(calling, transport=transport_of(reply, []))
    assert (result.content, result.reasoning_details) == ("Yes.", None)


async def test_tokens_of_media_are_in_the_result_and_not_on_the_ledger(calling: Calling) -> None:
    details = {"prompt_tokens_details": {"audio_tokens": 7}, "completion_tokens_details": {"reasoning_tokens": 1}}
    usage = {"prompt_tokens": 20, "completion_tokens": 3, "total_tokens": 23, **details}
    reply: dict[str, Any] = {"finish_reason": "stop", "message": {"content": "Yes."}, "usage": usage}
    result = await run(calling, transport=transport_of(reply, []))
    assert result.usage == MediaUsage(prompt_tokens=20, completion_tokens=3, reasoning_tokens=1, prompt_audio_tokens=7)
    assert await calling.runtime.handle.results.get("t1") == result
    (called,) = await attempts(calling)
    assert called.usage == Usage(prompt_tokens=20, completion_tokens=3, reasoning_tokens=1)


@pytest.mark.parametrize("name", ["tool_calls", "function_call", "tool_use_part"])
async def test_tool_calls_have_one_form(calling: Calling, name: str) -> None:
    calling.script(name)
    result = await run(calling)
    assert result.tool_calls is not None
    (call,) = result.tool_calls
    assert call["type"] == "function"
    assert call["function"]["name"] == "look_up"
    assert json.loads(call["function"]["arguments"]) == {"id": 7}


@pytest.mark.parametrize(
    "refusal",
    [
        # Groq's, Mistral's, and Anthropic's behind a router (November 2026).
        (400, "'messages.1' : for 'role:assistant' the following must be satisfied[('messages.1' : property "
              "'reasoning_content' is unsupported)]"),
        (422, "Extra inputs are not permitted"),
        (400, "messages.1.content.0: Invalid `signature` in `thinking` block"),
    ],
)  # fmt: skip
async def test_reasoning_that_a_server_refuses_is_left_out(calling: Calling, refusal: tuple[int, str]) -> None:
    """G1 G3: the refusal is free, and the second request, which says less, is held for and paid for once."""
    asked: list[dict[str, Any]] = []
    status, sentence = refusal

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        if any(name.startswith("reasoning") for message in asked[-1]["messages"] for name in message):
            return httpx.Response(status, json={"error": {"message": sentence}})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}
        return httpx.Response(200, json={"choices": [choice], "usage": {"cost": "0.0001"}})

    thought = {"role": "assistant", "content": "Hm.", "reasoning": "hm", "reasoning_content": "hm"}
    messages = [{"role": "user", "content": PROMPT}, thought, {"role": "user", "content": "And?"}]
    call = calling.call(prompt=None, messages=messages)
    result = await run(calling, call, transport=httpx.MockTransport(answer))
    assert (result.status, result.content) == (TaskStatus.DONE, "Yes.")
    assert [each["messages"][1].get("reasoning") for each in asked] == ["hm", None]
    assert asked[1]["messages"][1] == {"role": "assistant", "content": "Hm."}
    first, second = await attempts(calling)
    assert (first.model, first.charge_nanousd) == (second.model, 0)
    assert await calling.spent() == second.charge_nanousd == nanousd_from_usd("0.0001")


def transport_of(reply: dict[str, Any], asked: list[dict[str, Any]]) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        if "body" in reply:
            return httpx.Response(reply["http_status"], json=reply["body"])
        choice = {"index": 0, "finish_reason": reply["finish_reason"], "message": reply["message"]}
        document = {"id": "gen-1", "object": "chat.completion", "model": "as asked", "choices": [choice]}
        usage = json.dumps(reply["usage"])
        # Numbers as they were sent: a float would change them.
        for text in ("0.0125", "28.0", "38.0", "66.0", "0.95"):
            usage = usage.replace(f'"{text}"', text)
        return httpx.Response(200, content=json.dumps(document)[:-1] + f', "usage": {usage}}}')

    return httpx.MockTransport(answer)


@pytest.mark.parametrize("reply", first_quick(3, REPLIES), ids=[reply["name"] for reply in REPLIES])
async def test_reply_of_a_public_bug_report_has_the_right_outcome(calling: Calling, reply: dict[str, Any]) -> None:
    asked: list[dict[str, Any]] = []
    right = dict(reply["right"])
    requests = right.pop("requests", None)
    result = await run(calling, transport=transport_of(reply, asked))
    document = json.loads(result.model_dump_json())
    assert {name: document[name] for name in right} == right
    assert requests is None or len(asked) == requests
    assert await calling.spent() == nanousd_from_usd(Decimal(right["cost_usd"]))
    if details := reply.get("details"):
        called = (await attempts(calling))[-1]
        assert called.error_details is not None
        assert called.error_details.model_dump(exclude_none=True) == details
        assert result.error is not None
        assert right["provider_error"] in result.error
        (settled,) = [e.payload for e in await calling.events("t1") if isinstance(e.payload, CostRecorded)]
        assert right["provider_error"] not in (settled.reason or "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "fallback", "requests"),
    [
        (MINI, "google/gemini-2.5-flash", 2),  # 128,000 tokens of context, then 1,048,576.
        ("google/gemini-2.5-flash", MINI, 1),
        (SONNET, MINI, 1),  # The catalogue does not say how large the first one's context is.
    ],
)
async def test_prompt_that_is_too_long_goes_only_to_a_larger_context(
    calling: Calling, model: str, fallback: str, requests: int
) -> None:
    calling.script("context_too_long", None)
    result = await run(calling, with_route(calling.call(), model=model, fallback=(fallback,)))
    assert calling.provider.requests == requests
    assert result.status is (TaskStatus.DONE if requests == 2 else TaskStatus.FAILED)


async def test_no_model_of_an_account_without_credit_is_asked(calling: Calling) -> None:
    for number, name in enumerate(("out_of_credit", "quota_used_up")):
        calling.script(name, None)
        result = await run(calling, calling.call(f"t{number}"))
        assert result.error_code is ErrorCode.INFERENCE_FAILED
        assert [event.reason for event in await attempts(calling, f"t{number}")] == ["out_of_credit"]
    assert calling.provider.requests == 2


# A second try with a larger limit.
LIMIT, LARGER = 2_000, 3_000
FIRST_BOUND = PROMPT_BOUND * 3_750 + LIMIT * 15_000
LARGER_BOUND = PROMPT_BOUND * 3_750 + LARGER * 15_000
PAID = PROMPT_TOKENS * 3_000 + 40 * 15_000


async def test_cut_reply_is_asked_for_again_with_the_larger_limit_of_its_route(calling: Calling) -> None:
    call = with_route(calling.call(), retry_max_tokens=LARGER)
    calling.script("reasoning_used_up_limit", None)
    result = await run(calling, call)
    assert result.status is TaskStatus.DONE
    assert nanousd_from_usd(result.cost_usd) == calling.booked() == 2 * PAID
    held = [event for event in await calling.events("t1") if isinstance(event.payload, BudgetReserved)]
    # G1: what the first try cost stays covered, and the second is held in full.
    assert [event.amount for event in held] == [FIRST_BOUND, PAID + LARGER_BOUND - FIRST_BOUND]
    bounds = [event.payload.bound.completion_tokens for event in held if isinstance(event.payload, BudgetReserved)]
    assert bounds == [LIMIT, LARGER]


async def test_second_try_is_made_once(calling: Calling) -> None:
    call = with_route(calling.call(), retry_max_tokens=LARGER)
    calling.script("text_cut", "text_cut", None)
    result = await run(calling, call)
    assert (result.content, result.finish_reason) == ("half a sen", "length")
    assert calling.provider.requests == 2


@pytest.mark.slow
async def test_cut_reply_stands_where_the_larger_limit_does_not_fit_the_cap(calling: Calling) -> None:
    await calling.set_cap(FIRST_BOUND)
    call = with_route(calling.call(), retry_max_tokens=LARGER)
    calling.script("text_cut", None)
    result = await run(calling, call)
    assert (result.status, result.content) == (TaskStatus.DONE, "half a sen")
    assert calling.provider.requests == 1
    assert await calling.spent() == PAID


@pytest.mark.slow
async def test_cut_reply_stands_where_the_hold_was_not_extended(
    calling: Calling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1: the gate's answer says what is held, not that it is enough."""
    call = with_route(calling.call(), retry_max_tokens=LARGER)
    calling.script("text_cut", None)

    async def record(_: object) -> int:
        return FIRST_BOUND

    monkeypatch.setattr(calling.runtime.ledger, "record", record)
    result = await run(calling, call)
    assert (result.status, result.content) == (TaskStatus.DONE, "half a sen")
    assert calling.provider.requests == 1


@pytest.mark.slow
async def test_cut_reply_stands_where_the_second_try_fails(calling: Calling) -> None:
    call = with_route(calling.call(), retry_max_tokens=LARGER, fallback=())
    calling.script("text_cut", "http_503", None)
    result = await run(calling, call)
    assert (result.status, result.content, result.finish_reason) == (TaskStatus.DONE, "half a sen", "length")
    assert nanousd_from_usd(result.cost_usd) == PAID
    assert calling.provider.requests == 2


@pytest.mark.slow
async def test_cut_reply_stands_where_its_second_try_is_cancelled(calling: Calling) -> None:
    call = with_route(calling.call(), retry_max_tokens=LARGER)
    calling.script("text_cut", "hang")
    async with calling.runner() as (runner, _):
        running = asyncio.create_task(runner.run(call))
        await wait_until(lambda: calling.provider.requests == 2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    # G3 G4: the second request may be charged, and the first reply is the call's outcome.
    assert await calling.spent() == PAID + LARGER_BOUND
    result = await run(calling, calling.call(run_id="run-2"))
    assert (result.status, result.content) == (TaskStatus.DONE, "half a sen")
    assert calling.provider.requests == 2


@pytest.mark.slow
async def test_cut_reply_stands_where_another_run_has_settled_its_hold(calling: Calling) -> None:
    call = with_route(calling.call(), retry_max_tokens=LARGER)
    calling.script("text_cut", None)
    async with calling.runner() as (runner, _):
        hold = await runner.reserve(call)
        assert isinstance(hold, Hold)
        record = await calling.runtime.ledger.gate_of("u1").call_record("t1")
        assert record is not None
        settlement = settle_dead_hold(
            call_id="t1", user_id="u1", found=record.hold, outcome="expired", reason="the hold's deadline has passed"
        )
        await calling.runtime.ledger.settle_now(settlement)
        result = await runner.runner.run(call, hold)
    assert (result.status, result.content) == (TaskStatus.DONE, "half a sen")
    assert await calling.spent() == PAID
    assert calling.provider.requests == 1
    # G4: the reply is the call's outcome, and is not asked for again.
    assert await run(calling, calling.call(run_id="run-2")) == result
    assert calling.provider.requests == 1


@pytest.mark.slow
async def test_task_that_asks_for_more_than_the_larger_limit_has_no_second_try(calling: Calling) -> None:
    call = with_route(calling.call(max_tokens=LARGER), retry_max_tokens=LARGER)
    calling.script("text_cut", None)
    await run(calling, call)
    assert calling.provider.requests == 1


@pytest.mark.slow
async def test_fee_of_an_own_key_is_booked_beside_the_priced_tokens(calling: Calling) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "cost": "0.01", "is_byok": True}
    reply = {"message": {"content": "ok"}, "finish_reason": "stop", "usage": usage}
    result = await run(calling, transport=transport_of(reply, []))
    assert nanousd_from_usd(result.cost_usd) == 10 * 3_000 + 5 * 15_000 + 10_000_000


def test_configured_models_have_no_known_context() -> None:
    price = price_from_usd("own/a", prompt=Decimal(1), completion=Decimal(1))
    catalogue = PriceCatalogue({"own/a": [DatedPrice(FOREVER_MS, price)]})
    assert not catalogue.has_larger_context(Target("own/a"), Target(MINI))
    # What the provider lists counts before the table.
    listed = ModelCatalogue({"own/a": ModelFacts(context_length=10**7), MINI: ModelFacts(context_length=2 * 10**7)})
    assert not PriceCatalogue(models=listed).has_larger_context(Target("own/a"), Target(MINI))
    assert PriceCatalogue(models=listed).has_larger_context(Target(MINI), Target("own/a"))
    assert PriceCatalogue(models=listed).has_larger_context(Target("own/a"), Target("google/gemini-2.5-flash"))
    assert catalogue.has_larger_context(Target("google/gemini-2.5-flash"), Target(MINI))
