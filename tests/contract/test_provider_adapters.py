"""What every adapter of a provider must do, tested over HTTP with a stand-in that speaks the provider's dialect.

A new dialect is added to `PROVIDERS`. What is special to one is tested in `tests/unit/test_bodies.py`.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.replies import chat_request, reply_of
from tollbook.inference.attempts import Attempt, ChatRequest
from tollbook.inference.bounds import bound
from tollbook.inference.calls.holds import charge_of, with_costliest_usage
from tollbook.inference.deltas import Delta
from tollbook.inference.errors import ProviderRefused, ProviderUnavailable
from tollbook.inference.models import ModelCatalogue
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import Dialect, default_policy
from tollbook.schemas.tasks import Task
from tollbook.standin import SCENARIOS, FaultPlan, StandIn, StandInConfig
from tollbook.standin.faults import STREAM_FAULTS

KEY: Final = "sk-a-very-secret-key"
NOW_MS: Final = 1_795_000_000_000
PROMPT: Final = "Tell me [[completion_tokens=40]]"
MAX_TOKENS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Provider:
    """A dialect, a model that the stand-in sells in it, and whether the provider states what a request cost."""

    dialect: Dialect
    model: str
    states_costs: bool = False


PROVIDERS: Final = (
    Provider("openrouter", "anthropic/claude-sonnet-4", states_costs=True),
    Provider("openai", "gpt-5-mini"),
    Provider("anthropic", "claude-haiku-4-5"),
    Provider("compatible", "own/small"),
)
# Anthropic's form has no images in replies.
MADE_IMAGE: Final = "image_made"
OUTCOMES: Final = [
    name
    for name, each in SCENARIOS.items()
    if each.group == "outcome" and each.booked == "reported" and name != MADE_IMAGE
]
# Status and name of a fault, and what follows: the reason, whether the same model is asked again, the pause.
REFUSALS: Final = [
    ("http_400", "bad_request", False, None),
    ("http_402", "out_of_credit", False, None),
    ("http_403", "forbidden", False, None),
    ("http_404", "not_found", False, None),
    ("http_429:7", "rate_limited", True, 7.0),
    ("http_500", "provider_failed", True, None),
    ("http_529", "overloaded", True, None),
]
CALL: Final = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"id": 7}'}}
OTHER_CALL: Final = {**CALL, "id": "functions.look_up:1", "function": {"name": "look_up", "arguments": ""}}
TOOL: Final = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}, "strict": True}}
MARK: Final = {"type": "ephemeral"}
PIXEL: Final = "data:image/png;base64,iVBORw0KGgo="
CONVERSATIONS: Final[dict[str, list[dict[str, Any]]]] = {
    "system and developer": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind.", "cache_control": MARK}]},
    ],
    "system alone": [{"role": "system", "content": "Say something."}],
    "tools and their results": [
        {"role": "user", "content": "Look up 7 and 8."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [CALL, OTHER_CALL],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "seven"},
        {"role": "tool", "tool_call_id": "functions.look_up:1", "content": [{"type": "text", "text": "eight"}]},
        {"role": "user", "content": "And?"},
    ],
    "the older form of tools": [
        {"role": "user", "content": "Look up 7."},
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "look_up", "content": "seven"},
    ],
    "a custom tool": [
        {"role": "user", "content": "Run it."},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "custom", "custom": {"name": "sh", "input": "ls"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "nothing"},
    ],
    "parts and an image": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "https://pictures.test/a.png"}},
            ],
        }
    ],
    "a refusal and what was thought": [
        {"role": "user", "content": "Do it."},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "No."}],
            "reasoning": "hm",
            "reasoning_details": [
                {"type": "reasoning.text", "text": "hm", "signature": "c2ln", "format": "anthropic-claude-v1"}
            ],
        },
        {"role": "user", "content": "Please."},
    ],
    "an assistant without words": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": " "},
        {"role": "user", "content": "Are you there?", "cache_control": MARK},
    ],
}
PARAMETERS: Final[list[dict[str, Any]]] = [
    {"temperature": 0.2, "top_p": 0.9},
    {"stop": "END"},
    {"stop": ["END", "STOP"]},
    {"tools": [TOOL], "tool_choice": "required"},
    {"tools": [{**TOOL, "cache_control": MARK}], "parallel_tool_calls": False},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look_up"}}},
    {"tools": [{"type": "custom", "custom": {"name": "sh", "description": "a shell"}}], "tool_choice": "none"},
    {"functions": [TOOL["function"]], "function_call": {"name": "look_up"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
    {"response_format": {"type": "json_object"}},
    {"reasoning": {"effort": "low"}, "temperature": 0.5},
    {"reasoning": {"max_tokens": 1_500}},
    {"reasoning": {"max_tokens": 5_000}},
    {"reasoning": {"enabled": False}},
    {"reasoning_effort": "minimal"},
    {"top_k": 40},
    {"top_k": -1},
    {"seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"min_p": 0.1, "repetition_penalty": 1.1},
    {"logit_bias": {"5": -100}, "logprobs": True, "top_logprobs": 2},
    {"verbosity": "low", "prediction": {"type": "content", "content": "x"}},
    {"cache_control": MARK, "prompt_cache_key": "k"},
]

pytestmark = pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.dialect)


@asynccontextmanager
async def opened(
    provider: Provider, *script: str | None, **changes: Any
) -> AsyncIterator[tuple[StandIn, ProviderClient]]:
    """Open a stand-in and a client that speaks to it; `script` has the faults of the requests."""
    async with StandIn(StandInConfig(api_key=KEY, faults=FaultPlan(script=script))) as server:
        values: dict[str, Any] = {"api_key": SecretStr(KEY), "dialect": provider.dialect, "attempt_timeout_s": 5.0}
        async with ProviderClient(
            **{**values, "base_url": f"{server.root_url}/{provider.dialect}/v1", **changes}
        ) as client:
            yield server, client


def request(provider: Provider, **changes: Any) -> ChatRequest:
    models = ModelCatalogue(dialect=provider.dialect)
    values: dict[str, Any] = {
        "messages": (Message(role="user", content=PROMPT),), "max_tokens": MAX_TOKENS, "user": "u1",
        "limit_name": models.limit_name(provider.model), **changes,
    }  # fmt: skip
    return ChatRequest(model=provider.model, **values)


def prices_of(provider: Provider) -> PriceCatalogue:
    rule: dict[str, Any] = {"base_url": "https://provider.test/v1", "dialect": provider.dialect}
    if provider.dialect == "compatible":
        rule["prices"] = {provider.model: {"prompt": "0.02", "completion": "0.04"}}
    policy = default_policy({"providers": {"it": rule}})
    return PriceCatalogue.of_policy(policy, provider="openrouter").at("it")


def cost_of(provider: Provider, attempt: Attempt) -> int:
    """Return what an attempt is charged at, nano-dollars."""
    prices = prices_of(provider)
    limit = bound((Message(role="user", content=PROMPT),), MAX_TOKENS, prices.price(provider.model, NOW_MS))
    return charge_of(with_costliest_usage(attempt, limit, prices, NOW_MS), limit, prices, NOW_MS).nanousd


async def test_an_answer_and_its_exact_cost(provider: Provider) -> None:
    async with opened(provider) as (server, client):
        attempt = await client.complete(request(provider))
    assert (attempt.outcome, attempt.finish_reason, attempt.model_used) == ("ok", "stop", provider.model)
    assert attempt.content is not None
    assert "stand-in" in attempt.content
    assert attempt.usage is not None
    assert (attempt.usage.prompt_tokens, attempt.usage.completion_tokens, attempt.usage_doubt) == (12, 40, None)
    assert (attempt.reported_cost_nanousd is not None) == provider.states_costs
    assert {"u1": cost_of(provider, attempt)} == server.book.totals()


@pytest.mark.parametrize("outcome", [None, *OUTCOMES])
async def test_a_streamed_reply_is_the_plain_one(provider: Provider, outcome: str | None) -> None:
    """Whether it is asked for as a stream, and whether the provider then sends one."""
    attempts: list[dict[str, Any]] = []
    for streams in (False, True):
        async with opened(provider, outcome, streams_replies=streams) as (_, client):
            attempt = await client.complete(request(provider))
            facts = {name: getattr(attempt, name) for name in attempt.__slots__}
            attempts.append({**facts, "generation_id": None, "latency_ms": 0})
    assert attempts[0] == attempts[1]


@pytest.mark.parametrize("outcome", [None, *OUTCOMES])
@pytest.mark.parametrize("streams", [False, True])
async def test_a_reader_of_the_stream_gets_the_answer(provider: Provider, outcome: str | None, streams: bool) -> None:
    """Whether the provider is always asked for streams, or only if somebody reads along."""
    deltas: list[dict[str, Any]] = []

    async def take(delta: Delta) -> None:
        deltas.append(delta["choices"][0])

    async with opened(provider, outcome, streams_replies=streams) as (_, client):
        attempt = await client.complete(request(provider), on_delta=take)
    assert attempt.is_ok
    for name in ("content", "reasoning", "refusal"):
        assert "".join(each["delta"].get(name, "") for each in deltas) == (getattr(attempt, name) or "")
    arguments: list[tuple[int, str]] = [
        (part["index"], part["function"]["arguments"])
        for each in deltas
        for part in each["delta"].get("tool_calls", ())
    ]
    for index, call in enumerate(attempt.tool_calls):
        assert "".join(text for place, text in arguments if place == index) == call["function"]["arguments"]
    assert {index for index, _ in arguments} == set(range(len(attempt.tool_calls)))
    finishes = [each["finish_reason"] for each in deltas if each["finish_reason"]]
    assert finishes == ([attempt.finish_reason] if deltas else [])


@pytest.mark.parametrize("fault", STREAM_FAULTS)
async def test_a_stream_that_breaks_off_keeps_its_first_parts(provider: Provider, fault: str) -> None:
    """G3: a request that may have been charged is never called free."""
    said: list[str] = []

    async def take(delta: Delta) -> None:
        said.append(delta["choices"][0]["delta"].get("content", ""))

    async with opened(provider, fault, attempt_timeout_s=0.5) as (server, client):
        attempt = await client.complete(request(provider), on_delta=take)
    assert (attempt.is_ok, attempt.content) == (False, "".join(said))
    outcomes = {"stream_hang": "timeout", "stream_error": "provider_error"}
    assert attempt.outcome == outcomes.get(fault, "connection_error")
    assert attempt.charge == "unknown" or not server.book.totals()
    assert (attempt.charge == "none") == (fault == "stream_error" and provider.dialect == "openrouter")


async def test_a_request_has_an_id_although_its_reply_breaks(provider: Provider) -> None:
    async with opened(provider, "reset_mid_body", None) as (server, client):
        broken, answered = [await client.complete(request(provider)) for _ in range(2)]
    assert (broken.charge, answered.charge) == ("unknown", "known")
    assert list(server.book.entries) == [broken.generation_id, answered.generation_id]


async def test_the_limit_is_sent_and_a_cut_answer_is_marked(provider: Provider) -> None:
    async with opened(provider) as (_, client):
        attempt = await client.complete(request(provider, max_tokens=16))
    assert (attempt.is_cut, attempt.finish_reason) == (True, "length")
    assert attempt.usage is not None
    assert attempt.usage.completion_tokens == 16


@pytest.mark.parametrize("name", OUTCOMES)
async def test_a_reply_that_was_paid_for_is_the_outcome(provider: Provider, name: str) -> None:
    """G4."""
    scenario = SCENARIOS[name]
    async with opened(provider, name) as (server, client):
        attempt = await client.complete(request(provider))
    assert (attempt.outcome, attempt.is_retryable) == ("ok", False)
    said = bool(attempt.content and attempt.content.strip()) or attempt.tool_calls or attempt.refusal
    assert bool(said) == (scenario.result == "done")
    assert (attempt.error_code or "done") == scenario.result
    assert cost_of(provider, attempt) == sum(server.book.totals().values())


async def test_images_that_were_made_and_paid_for_are_the_outcome(provider: Provider) -> None:
    """G4."""
    async with opened(provider, MADE_IMAGE) as (server, client):
        attempt = await client.complete(request(provider))
    assert len(attempt.images) == (0 if provider.dialect == "anthropic" else 1)
    assert (attempt.outcome, attempt.is_retryable) == ("ok", False)
    assert cost_of(provider, attempt) == sum(server.book.totals().values())


async def test_calls_of_tools_come_in_the_form_of_a_chat_completion(provider: Provider) -> None:
    async with opened(provider, "tool_calls") as (_, client):
        attempt = await client.complete(request(provider))
    (call,) = attempt.tool_calls
    assert (call["type"], call["function"]["name"], attempt.finish_reason) == ("function", "look_up", "tool_calls")
    assert json.loads(call["function"]["arguments"]) == {"id": 7}


@pytest.mark.parametrize(("fault", "reason", "is_retryable", "pause_s"), REFUSALS)
async def test_a_refusal_costs_nothing_and_has_a_reason(
    provider: Provider, fault: str, reason: str, is_retryable: bool, pause_s: float | None
) -> None:
    async with opened(provider, fault) as (server, client):
        attempt = await client.complete(request(provider))
    assert (attempt.outcome, attempt.charge, attempt.reason) == ("http_error", "none", reason)
    assert (attempt.is_retryable, attempt.retry_after_s) == (is_retryable, pause_s)
    assert attempt.provider_error == "a fault of the stand-in"
    assert server.book.totals() == {}


@pytest.mark.parametrize(
    ("fault", "charge"),
    [("error_in_200", None), ("html_body", "unknown"), ("broken_json", "unknown"), ("missing_usage", "unknown"),
     ("http_408", "unknown"), ("http_524", "unknown"), ("reset_after_charge", "unknown")],
)  # fmt: skip
async def test_a_request_that_may_have_been_charged_is_not_called_free(
    provider: Provider, fault: str, charge: str | None
) -> None:
    """G3. An error in a 200 is charged nothing where the provider says so by a code."""
    async with opened(provider, fault) as (_, client):
        attempt = await client.complete(request(provider))
    free = "unknown" if provider.dialect == "anthropic" else "none"
    assert attempt.charge == (charge or free)


async def test_a_wrong_key_is_reported_without_being_shown(provider: Provider) -> None:
    """G10."""
    async with opened(provider, api_key=SecretStr("sk-wrong-and-secret")) as (server, client):
        attempt = await client.complete(request(provider))
        with pytest.raises(ProviderRefused) as refused:
            await client.check_key()
    assert (attempt.charge, attempt.reason, attempt.is_retryable, attempt.may_fall_back) == (
        "none", "bad_key", False, False,
    )  # fmt: skip
    assert refused.value.http_status == 401
    assert server.book.totals() == {}
    assert "sk-wrong" not in f"{client!r} {attempt!r} {attempt} {refused.value} {ADAPTERS[provider.dialect]!r}"


async def test_a_right_key_is_accepted_and_the_models_are_listed(provider: Provider) -> None:
    async with opened(provider) as (_, client):
        assert provider.model in await client.models()
        assert await client.check_key()


async def test_a_provider_without_a_key_is_sent_none(provider: Provider) -> None:
    async with opened(provider, api_key=None) as (_, client):
        assert (await client.complete(request(provider))).reason == "bad_key"


async def test_the_cost_of_a_request_is_reported_later_or_never(provider: Provider) -> None:
    async with opened(provider, "missing_usage") as (server, client):
        attempt = await client.complete(request(provider))
        assert attempt.generation_id is not None
        found = await client.generation(attempt.generation_id)
        assert await client.generation("no such & generation?") is None
    assert found == (sum(server.book.totals().values()) if provider.states_costs else None)


@pytest.mark.parametrize("response", [httpx.Response(503), httpx.Response(200, content=b"<html>")])
async def test_an_unanswered_question_is_an_error(provider: Provider, response: httpx.Response) -> None:
    transport = httpx.MockTransport(lambda _: response)
    async with ProviderClient(
        base_url="https://provider.test/v1", dialect=provider.dialect, transport=transport
    ) as client:
        for question in (client.models, client.check_key):
            with pytest.raises(ProviderUnavailable):
                await question()


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
async def test_conversations_are_accepted(provider: Provider, conversation: list[dict[str, Any]]) -> None:
    messages = tuple(Message.model_validate(each) for each in conversation)
    async with opened(provider) as (_, client):
        attempt = await client.complete(request(provider, messages=messages))
    assert attempt.outcome == "ok", attempt.provider_error


@pytest.mark.parametrize("given", PARAMETERS, ids=lambda given: ",".join(given))
async def test_a_parameter_is_taken_or_refused_before_money_is_held(provider: Provider, given: dict[str, Any]) -> None:
    task = Task.model_validate({"task": "generate_draft", "user_id": "u1", "prompt": PROMPT, **given})
    temperature = {} if task.temperature is None else {"temperature": task.temperature}
    parameters = {**temperature, **task.parameters()}
    models = ModelCatalogue(dialect=provider.dialect)
    if models.unsupported(provider.model, parameters):
        parameters = models.without_unsupported(provider.model, parameters)
    async with opened(provider) as (_, client):
        attempt = await client.complete(request(provider, parameters=parameters))
    assert attempt.outcome == "ok", attempt.provider_error


NAMES: Final = ("id", "type", "error", "content", "choices", "message", "usage", "stop_reason", "data", "text")
BODIES: Final = st.binary(max_size=40) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(NAMES),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())


@given(status=st.integers(100, 599), body=BODIES)
def test_any_reply_is_read_and_never_called_free_without_reason(provider: Provider, status: int, body: bytes) -> None:
    """G3."""
    attempt = ADAPTERS[provider.dialect].read_reply(reply_of(body, status), chat_request())
    assert attempt.http_status == status
    if attempt.charge == "none":
        # In a 200, an error has its own member, or a message instead of choices.
        assert not 200 <= status < 300 or b"error" in body or re.search(rb'"message":\s*"[^"]', body)
    if attempt.charge == "known":
        assert attempt.usage is not None or attempt.reported_cost_nanousd is not None
