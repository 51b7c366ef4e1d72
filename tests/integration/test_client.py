"""The Python interface: one capped, recorded call; what it returns, what it raises, and what it leaves behind."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling, period
from tests.proxy import faulty_proxy
from tests.servers import PATIENCE_S, wait_until
from tollbook import (
    COST_CAPS,
    MODEL_ROUTING,
    AppError,
    BudgetWaitTimeout,
    ContentFiltered,
    IdempotencyConflict,
    InferenceClient,
    InferenceFailed,
    InvalidTask,
    LedgerRefused,
    LedgerUnavailable,
    OutputInvalid,
    OutputLimitReached,
    PlanLimitReached,
    PriceUnknown,
    SettingsError,
    connect_runtime,
)
from tollbook.inference.calls.call import Call
from tollbook.inference.calls.reservations import Acquired, WaitLimits
from tollbook.inference.calls.runner import CallTakenOver
from tollbook.inference.current_runtime import current_runtime
from tollbook.inference.direct_calls import _LOOK_AGAIN_S
from tollbook.inference.runtime import open_ledger, open_runtime
from tollbook.inference.settings import Settings
from tollbook.ledger.gate.ledger import Patience
from tollbook.schemas.events import BudgetReserved
from tollbook.schemas.money import nanousd_from_usd, usd_from_nanousd
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus

PRICE = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
BOUND = PROMPT_BOUND * 3_750 + 2_000 * 15_000


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    async with open_calling(server_url, tmp_path, hold_wait_s=5) as calling:
        yield calling
        await calling.check_guarantees()


def draft(calling: Calling) -> InferenceClient:
    return InferenceClient("generate_draft", calling.runtime)


async def refusal(kind: type[AppError], awaitable: Any) -> AppError:
    with pytest.raises(kind) as refused:
        await awaitable
    assert refused.type is kind
    return refused.value


def test_routes_and_caps_are_the_documented_ones() -> None:
    assert {"trial": Decimal(5), "starter": Decimal(15), "growth": Decimal(40)} == COST_CAPS
    assert {
        task: (route.model, *route.fallback, route.max_tokens, route.temperature)
        for task, route in MODEL_ROUTING.items()
    } == {
        "classify_archetype": ("anthropic/claude-3-haiku", "google/gemini-2.5-flash", 200, 0.1),
        "generate_draft": ("anthropic/claude-sonnet-4", "openai/gpt-4o-mini", 2000, 0.7),
        "score_post": ("anthropic/claude-3-haiku", "google/gemini-2.5-flash", 500, 0.0),
        "extract_patterns": ("anthropic/claude-3-haiku", "google/gemini-2.5-flash", 1000, 0.2),
    }


@pytest.mark.slow
async def test_repeat_resumes_the_hold_of_a_lost_reply(calling: Calling, server_url: str, tmp_path: Path) -> None:
    """G3: nothing is charged for the first try, which sent no request; and the repeat need not wait for its hold."""
    settings = calling.runtime.settings
    async with (
        faulty_proxy(server_url) as proxy,
        open_ledger(settings, proxy.url, may_create=False) as handle,
        open_runtime(
            settings,
            handle,
            lambda names: asyncio.to_thread(calling.store.baselines, names),
            patience=Patience(reserve_s=0.0),
        ) as runtime,
    ):
        client = InferenceClient("generate_draft", runtime)
        proxy.loses_replies = True
        lost = await refusal(LedgerUnavailable, client.call(PROMPT, "u1", task_id="t1"))
        assert lost.code is ErrorCode.LEDGER_UNAVAILABLE
        assert [event.type for event in await calling.events()] == ["budget-reserved"]
        proxy.loses_replies = False
        result = await client.call(PROMPT, "u1", task_id="t1")
        assert nanousd_from_usd(result.cost_usd) == await calling.spent() == PRICE
    assert [event.type for event in await calling.events()] == ["budget-reserved", "model-called", "cost-recorded"]


async def test_call_returns_content_model_tokens_and_cost(calling: Calling) -> None:
    result = await draft(calling).call(PROMPT, "u1", "trial", "c1")
    assert result.content == "[stand-in] 40 tokens of nothing."
    assert result.model_used == "anthropic/claude-sonnet-4"
    assert result.token_count == PROMPT_TOKENS + COMPLETION_TOKENS
    assert result.cost_usd == usd_from_nanousd(PRICE)
    assert (result.status, result.error_code, result.error) == (TaskStatus.DONE, None, None)
    assert await calling.spent() == calling.booked() == PRICE
    held = (await calling.events())[0].payload
    assert isinstance(held, BudgetReserved)
    assert (held.plan, held.campaign_id) == ("trial", "c1")


@pytest.mark.slow
async def test_every_task_type_has_a_client(calling: Calling) -> None:
    for task in MODEL_ROUTING:
        result = await InferenceClient(task, calling.runtime).call(PROMPT, user_id="u1")
        assert (result.task_type, result.model_used) == (task, MODEL_ROUTING[task].model)


async def test_ping_costs_nothing(calling: Calling) -> None:
    result = await InferenceClient("ping", calling.runtime).call()
    assert (result.content, result.cost_usd) == ("pong", 0)
    assert await calling.events() == []


async def test_messages_limits_and_model_of_the_caller_win_over_the_route(calling: Calling) -> None:
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": PROMPT}]
    result = await draft(calling).call(
        user_id="u1", messages=messages, max_tokens=7, model="gpt-4o-mini", metadata={"row": 3}
    )
    # "Be brief" has 8 bytes.
    tokens = (2 + 4) + PROMPT_TOKENS
    assert (result.model_used, result.token_count) == ("openai/gpt-4o-mini", tokens + 7)
    assert result.cost_usd == usd_from_nanousd(tokens * 150 + 7 * 600)
    assert result.metadata == {"row": 3}


async def test_plan_limit_is_an_error_with_the_numbers(calling: Calling) -> None:
    await calling.set_cap(BOUND - 1)
    error = await refusal(PlanLimitReached, draft(calling).call(PROMPT, "u1"))
    assert error.code is ErrorCode.PLAN_LIMIT_REACHED
    assert (
        str(error)
        == error.message
        == (
            f"user u1, period {period()}: a call of up to $0.030720 does not fit the cap of "
            f"${(BOUND - 1) / 10**9:.9f}, of which $0.000000 are spent and $0.000000 held by open calls"
        )
    )
    assert (error.data["status"], error.data["user_id"]) == (TaskStatus.DENIED, "u1")
    assert calling.provider.requests == 0


async def test_failed_inference_is_an_error_with_its_cost(calling: Calling) -> None:
    calling.script("error_finish", "http_503", "http_500", "http_500")
    error = await refusal(InferenceFailed, draft(calling).call(PROMPT, "u1", task_id="t1"))
    assert error.code is ErrorCode.INFERENCE_FAILED
    assert error.code not in error.message
    assert (error.data["task_id"], error.data["cost_usd"]) == ("t1", usd_from_nanousd(PRICE))
    assert await calling.spent() == calling.booked() == PRICE


@pytest.mark.parametrize(
    ("scenario", "error_class", "code"),
    [
        ("reasoning_used_up_limit", OutputLimitReached, ErrorCode.OUTPUT_LIMIT_REACHED),
        ("answer_filtered", ContentFiltered, ErrorCode.CONTENT_FILTERED),
        ("nothing_said", InferenceFailed, ErrorCode.INFERENCE_FAILED),
    ],
)
async def test_reply_without_an_answer_is_an_error_with_its_cost(
    calling: Calling, scenario: str, error_class: type[InferenceFailed], code: ErrorCode
) -> None:
    calling.script(scenario)
    error = await refusal(error_class, draft(calling).call(PROMPT, "u1", task_id="t1"))
    assert (type(error), error.code) == (error_class, code)
    assert error.data["cost_usd"] == usd_from_nanousd(PRICE)
    assert error.data["usage"]


@pytest.mark.slow
async def test_result_has_tool_calls_and_usage(calling: Calling) -> None:
    calling.script("tool_calls")
    result = await draft(calling).call(PROMPT, "u1", task_id="t1")
    assert result.tool_calls is not None
    assert result.finish_reason == "tool_calls"
    assert result.usage is not None
    assert result.usage.prompt_tokens == PROMPT_TOKENS


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "user_id": 'two "words"'},
        {"prompt": "", "user_id": "u1"},
        {"user_id": "u1"},
        {"prompt": PROMPT, "user_id": "u1", "plan": "plati num"},
        {"prompt": PROMPT, "user_id": "u1", "max_tokens": 0},
        {"prompt": PROMPT, "user_id": "u1", "temperature": float("nan")},
        {"prompt": PROMPT, "user_id": "u1", "messages": [{"role": "user", "content": "x"}]},
        {"user_id": "u1", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"prompt": PROMPT, "user_id": "u1", "task_id": "x" * 201},
    ],
)
async def test_wrong_arguments_are_refused_without_quoting_the_prompt(arguments: dict[str, Any]) -> None:
    # Before the runtime is asked for: there is none here.
    error = await refusal(InvalidTask, InferenceClient("generate_draft").call(**arguments))
    assert error.code is ErrorCode.INVALID_TASK
    assert PROMPT not in str(error)


async def test_model_without_a_price_is_refused(calling: Calling) -> None:
    error = await refusal(PriceUnknown, draft(calling).call(PROMPT, "u1", model="no/such-model"))
    assert error.code is ErrorCode.PRICE_UNKNOWN
    assert calling.provider.requests == 0


async def test_unknown_task_type_is_refused_with_the_known_ones(calling: Calling) -> None:
    with pytest.raises(InvalidTask, match="generate_draft") as refused:
        InferenceClient("write_novel", calling.runtime)
    assert refused.value.code is ErrorCode.INVALID_TASK


async def test_unknown_plan_is_refused_with_the_known_ones_and_without_the_prompt(calling: Calling) -> None:
    error = await refusal(InvalidTask, draft(calling).call(PROMPT, "u1", plan="platinum"))
    assert "'plan' must be one of 'trial', 'starter', 'growth', not 'platinum'" in str(error)
    assert PROMPT not in str(error)


async def test_same_task_id_calls_the_model_once(calling: Calling) -> None:
    # G4
    first = await draft(calling).call(PROMPT, "u1", task_id="t1")
    assert await draft(calling).call(PROMPT, "u1", task_id="t1") == first
    error = await refusal(IdempotencyConflict, draft(calling).call(PROMPT + "!", "u1", task_id="t1"))
    assert error.code is ErrorCode.IDEMPOTENCY_CONFLICT
    assert calling.provider.requests == 1


@pytest.mark.slow
async def test_same_task_id_at_the_same_time_calls_the_model_once(calling: Calling) -> None:
    calling.script("slow")
    results = await asyncio.gather(*(draft(calling).call(PROMPT, "u1", task_id="t1") for _ in range(3)))
    assert calling.provider.requests == 1
    assert all(result == results[0] for result in results)


@pytest.mark.slow
async def test_calls_without_a_task_id_are_calls_of_their_own(calling: Calling) -> None:
    await asyncio.gather(*(draft(calling).call(PROMPT, "u1") for _ in range(3)))
    assert calling.provider.requests == 3
    assert await calling.spent() == 3 * PRICE


async def test_call_waits_for_the_money_that_other_calls_give_back(calling: Calling) -> None:
    # G9: one bound fits at a time, and what the calls cost leaves room for all of them.
    await calling.set_cap(BOUND + 4 * PRICE)
    results = await asyncio.gather(*(draft(calling).call(PROMPT, "u1") for _ in range(5)))
    assert [result.status for result in results] == [TaskStatus.DONE] * 5
    assert await calling.spent() == 5 * PRICE


@pytest.mark.slow
async def test_wait_for_money_has_an_end(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path, hold_wait_s=0.1, attempt_timeout_s=PATIENCE_S) as calling:
        await calling.set_cap(2 * BOUND - 1)
        calling.script("hang")
        holding = asyncio.create_task(draft(calling).call(PROMPT, "u1"))
        await wait_until(lambda: calling.provider.requests == 1)
        error = await refusal(BudgetWaitTimeout, draft(calling).call(PROMPT, "u1"))
        assert error.code is ErrorCode.BUDGET_WAIT_TIMEOUT
        assert f"$0.000000 are spent and ${usd_from_nanousd(BOUND):.6f} held by open calls" in error.message
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await calling.check_guarantees()


@pytest.mark.slow
async def test_a_call_that_was_taken_over_does_not_begin_its_wait_anew(calling: Calling) -> None:
    """The limit counts from the first try."""
    waits: list[float] = []

    class Contested:
        """Money is held twice; another run takes the call over once."""

        async def acquire(self, call: Call, limits: WaitLimits, **_: object) -> Acquired:
            waits.append(limits.hold_wait_s)
            if len(waits) == 1:
                return Acquired(call=call, hold=cast("Any", "a hold"))
            return Acquired(call=call, result=InferenceResult(task_id="t", status=TaskStatus.DONE, content="theirs"))

        async def run(self, call: Call, _hold: object, **_: object) -> InferenceResult:
            raise CallTakenOver(call.call_id)

    contested = cast("Any", Contested())
    runtime = replace(calling.runtime, reservations=contested, runner=contested)
    result = await InferenceClient("generate_draft", runtime).call(PROMPT, user_id="u1", task_id="t")

    assert result.content == "theirs"
    assert waits[0] <= 5
    assert waits[1] <= waits[0] - _LOOK_AGAIN_S


async def test_cancelled_call_is_settled(calling: Calling) -> None:
    # G2, G3: at its full bound, since the provider may have charged it.
    calling.script("hang_charged")
    running = asyncio.create_task(draft(calling).call(PROMPT, "u1", task_id="t1"))
    await wait_until(lambda: calling.provider.requests == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await calling.spent() == await calling.assumed() == BOUND
    # The next one is a call of the same task, and not the same charge.
    assert (await draft(calling).call(PROMPT, "u1", task_id="t1")).status is TaskStatus.DONE
    assert await calling.spent() == BOUND + PRICE


async def test_call_that_times_out_around_us_is_settled(calling: Calling) -> None:
    async def call_until_the_provider_hangs() -> None:
        async with asyncio.timeout(None) as limit:
            running = asyncio.create_task(draft(calling).call(PROMPT, "u1"))
            await wait_until(lambda: calling.provider.requests == 1)
            limit.reschedule(0)
            await running

    calling.script("hang")
    with pytest.raises(TimeoutError):
        await call_until_the_provider_hangs()
    assert await calling.spent() == BOUND


async def test_call_is_refused_where_redis_holds_another_ledger(calling: Calling) -> None:
    # G8
    handle = calling.runtime.handle
    await handle.pipeline.execute("HSET", handle.keys[0].meta, "ledger_id", "another")
    with pytest.raises(LedgerRefused) as refused:
        await draft(calling).call(PROMPT, "u1")
    error = refused.value
    assert error.code is ErrorCode.LEDGER_UNAVAILABLE
    assert "another" in error.message
    assert calling.provider.requests == 0
    await handle.pipeline.execute("HSET", handle.keys[0].meta, "ledger_id", handle.ledger_id)


async def test_client_without_a_runtime_says_what_to_do() -> None:
    error = await refusal(LedgerUnavailable, InferenceClient("ping").call())
    assert error.code is ErrorCode.LEDGER_UNAVAILABLE
    assert "connect_runtime" in error.message


async def test_another_program_finds_the_running_system(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path, is_served=True) as calling:
        # By what `tollbook up` left in the data directory: no Redis is configured here.
        settings = calling.runtime.settings.model_copy(update={"redis_url": None})
        async with connect_runtime(settings) as connection:
            runtime = await current_runtime()
            assert runtime is await connection.get()
            assert runtime is not calling.runtime
            result = await InferenceClient("generate_draft").call(PROMPT, "u1")
            assert result.cost_usd == usd_from_nanousd(PRICE)
            assert isinstance(await calling.runtime.handle.results.get(result.task_id), InferenceResult)
        await calling.check_guarantees()
    with pytest.raises(LedgerUnavailable):
        await current_runtime()


async def test_without_a_key_the_client_says_so_and_asks_nobody(calling: Calling) -> None:
    default_url = Settings.model_fields["openrouter_base_url"].default
    settings = calling.runtime.settings.model_copy(
        update={"openrouter_base_url": default_url, "openrouter_api_key": None}
    )
    client = InferenceClient("generate_draft", replace(calling.runtime, settings=settings))
    error = await refusal(SettingsError, client.call(PROMPT, "u1"))
    assert "OPENROUTER_API_KEY" in error.message
    assert await calling.events() == []
    assert (await InferenceClient("ping", replace(calling.runtime, settings=settings)).call()).content == "pong"


class Answer(BaseModel):
    """Not what the stand-in answers."""

    text: str


async def test_an_answer_that_does_not_fit_the_model_is_charged(calling: Calling) -> None:
    both: tuple[dict[str, Any], ...] = ({"response_model": Answer}, {"response_format": Answer})
    for asked in both:
        calling.script("text_parts")
        spent = await calling.spent()
        error = await refusal(OutputInvalid, draft(calling).call(PROMPT, "u1", **asked))
        assert isinstance(error, OutputInvalid)
        assert error.data["content"] == error.result.content
        assert nanousd_from_usd(error.result.cost_usd) == await calling.spent() - spent > 0
    assert await calling.spent() == calling.booked()


async def test_messages_may_be_objects_of_an_sdk(calling: Calling) -> None:
    class Reply(BaseModel):
        role: str = "assistant"
        content: str | None = "hi"
        refusal: str | None = None
        tool_calls: list[Any] | None = None

    messages = [{"role": "user", "content": PROMPT}, Reply(), {"role": "user", "content": "and?"}]
    result = await draft(calling).call(user_id=42, messages=messages, stop=["END"], seed=7)
    assert (result.status, result.user_id) == (TaskStatus.DONE, "42")
