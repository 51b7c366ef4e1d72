"""Bodies of requests: what each kind of provider is sent of a message and of parameters."""

import json
from decimal import Decimal
from typing import Any, Final

import pytest
from pydantic import SecretStr

from tollbook.inference.attempts import ChatRequest
from tollbook.inference.bounds import bound
from tollbook.inference.prices.model_price import price_from_usd
from tollbook.inference.providers.adapter import Application
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.inference.settings import load_settings
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import Dialect

MARK: Final = {"type": "ephemeral"}
ECHO: Final[dict[str, Any]] = {
    "role": "assistant",
    "content": [{"type": "text", "text": "hi", "cache_control": MARK}],
    "reasoning": "because",
    "reasoning_content": "because",
    "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}],
    "annotations": [{"type": "url_citation"}],
    "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "extra_content": {"google": {}}}
    ],
}
PARAMETERS: Final[dict[str, Any]] = {
    "reasoning": {"effort": "low"},
    "cache_control": MARK,
    "tools": [{"type": "function", "function": {"name": "f"}, "cache_control": MARK}],
    "top_p": 0.5,
}


def body(dialect: Dialect = "compatible", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"parameters": PARAMETERS, **changes}
    request = ChatRequest(model="m", messages=(Message.model_validate(ECHO),), max_tokens=7, **values)
    return json.loads(ADAPTERS[dialect].completion_body(request))


def test_openrouter_gets_its_own_reasoning_back() -> None:
    sent = body("openrouter")
    assert sent["messages"] == [ECHO]
    assert {name: sent[name] for name in PARAMETERS} == PARAMETERS
    assert sent["provider"] == {"require_parameters": True}


def test_another_server_gets_no_annotations() -> None:
    """Groq and Mistral refuse a request with them."""
    sent = body()
    assert sent["messages"] == [{name: value for name, value in ECHO.items() if name != "annotations"}]
    assert "provider" not in sent


def test_openai_gets_only_its_own_fields() -> None:
    """It refuses what it does not know."""
    sent = body("openai", limit_name="max_completion_tokens")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert sent == {
        "model": "m",
        "messages": [{"role": "assistant", "content": [{"type": "text", "text": "hi"}], "tool_calls": [call]}],
        "max_completion_tokens": 7,
        "reasoning_effort": "low",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "top_p": 0.5,
        "service_tier": "default",
    }


TOOLS: Final = [{"type": "function", "function": {"name": "f"}}]
NAMED: Final = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("parameters", "choice"),
    [
        # A choice without tools, which SDKs send all the same.
        ({"tool_choice": "auto", "parallel_tool_calls": True}, None),
        ({"tool_choice": "none"}, None),
        ({"tool_choice": "required"}, "required"),
        ({"tool_choice": NAMED}, NAMED),
        ({"tools": TOOLS, "tool_choice": "auto"}, "auto"),
        # The forms of OpenAI's responses and of Anthropic's messages.
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, NAMED),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, NAMED),
        ({"tools": TOOLS, "tool_choice": {"type": "any"}}, "required"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, "auto"),
        ({"tools": TOOLS, "tool_choice": NAMED}, NAMED),
    ],
)
@pytest.mark.parametrize("dialect", ["compatible", "openai", "openrouter"])
def test_choice_of_a_tool_is_sent_in_the_form_of_a_chat_completion(
    dialect: Dialect, parameters: dict[str, Any], choice: object
) -> None:
    sent = body(dialect, parameters=parameters)
    assert sent.get("tool_choice") == choice
    assert "parallel_tool_calls" not in sent


def test_word_of_another_provider_for_a_choice_is_not_sent_to_openai() -> None:
    parameters = {"tools": TOOLS, "tool_choice": "any"}
    assert body("openai", parameters=parameters)["tool_choice"] == "required"
    assert body(parameters=parameters)["tool_choice"] == "any"


@pytest.mark.parametrize("dialect", ["compatible", "openai", "openrouter"])
@pytest.mark.parametrize("given", [None, "", " "])
def test_call_without_arguments_is_sent_with_an_empty_object(dialect: Dialect, given: str | None) -> None:
    said = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": given}},
                                                {"id": "d", "type": "custom", "custom": {"name": "g"}}]}  # fmt: skip
    request = ChatRequest(model="m", messages=(Message.model_validate(said),), max_tokens=7)
    first, second = json.loads(ADAPTERS[dialect].completion_body(request))["messages"][0]["tool_calls"]
    assert first["function"] == {"name": "f", "arguments": "{}"}
    assert second["custom"] == {"name": "g", "input": ""}


def test_only_parameters_that_were_set_are_sent() -> None:
    assert body(parameters={}).keys() == {"model", "messages", "max_tokens"}


def test_openrouter_uses_no_endpoint_that_asks_more_for_an_image_than_the_bound_holds() -> None:
    """G1."""
    part = {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}
    message = Message.model_validate({"role": "user", "content": [part]})
    price = price_from_usd("openai/gpt-4o", prompt=Decimal("2.5"), completion=Decimal(10))
    request = ChatRequest(model="m", messages=(message,), max_tokens=7, price_limit=bound([message], 7, price))
    sent = json.loads(ADAPTERS["openrouter"].completion_body(request))
    assert sent["provider"]["max_price"] == {
        "prompt": "2.500000000",
        "completion": "10.000000000",
        "request": "0.000000000",
        "image": f"{(85 + 8 * 170) * Decimal('2.5') / 1_000_000 + Decimal('0.0000000005'):.9f}",
    }


def test_no_repr_of_a_request_shows_a_prompt() -> None:
    """G10."""
    request = ChatRequest(
        model="m", messages=(Message(role="user", content="secret"),), max_tokens=7, parameters={"stop": "secret"}
    )
    assert "secret" not in repr(request)


@pytest.mark.parametrize(
    ("url", "dialect"),
    [
        ("https://api.openai.com/v1", "openai"), ("https://eu.api.openai.com/v1", "openai"),
        ("https://mine.openai.azure.com/openai/v1", "openai"), ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://api.openai.com.evil.test/v1", "compatible"), ("http://127.0.0.1:8000/v1", "compatible"),
        ("https://api.anthropic.com/v1", "anthropic"),
    ],
)  # fmt: skip
def test_a_dialect_is_known_by_the_address(url: str, dialect: str) -> None:
    assert load_settings(env_file=None, openrouter_base_url=url).provider_dialect == dialect


CLAUDE: Final = "claude-haiku-4-5"


def claude(
    *messages: dict[str, Any], model: str = CLAUDE, max_tokens: int = 4_000, **parameters: Any
) -> dict[str, Any]:
    """Return what Anthropic is sent, without what is the same for every request."""
    said = tuple(Message.model_validate(each) for each in messages or ({"role": "user", "content": "Hello"},))
    request = ChatRequest(model=model, messages=said, max_tokens=max_tokens, user="u1", parameters=parameters)
    sent = json.loads(ADAPTERS["anthropic"].completion_body(request))
    assert (sent.pop("model"), sent.pop("max_tokens")) == (model, max_tokens)
    assert sent.pop("service_tier") == "standard_only", "other tiers have other prices (G1)"
    assert sent.pop("metadata") == {"user_id": "u1"}
    return sent


def test_anthropic_gets_its_own_form() -> None:
    sent = claude(
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Look.", "cache_control": MARK},
                                     {"type": "image_url", "image_url": {"url": "data:image/PNG;base64,aWk="}}]},
        {"role": "developer", "content": "Be kind."},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "a.b:1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "no JSON"}},
        ]},
        {"role": "tool", "tool_call_id": "a.b:1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": "And?", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    )  # fmt: skip
    assert sent == {
        "system": [{"type": "text", "text": "Be short."}, {"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "Look.", "cache_control": MARK},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aWk="}},
            ]},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "a_b_1", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "c2", "name": "g", "input": {"input": "no JSON"}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a_b_1", "content": [{"type": "text", "text": "one"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "two"}]},
                {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
            ]},
        ],
    }  # fmt: skip


def test_anthropic_gets_signed_thinking_back() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    details = [
        {"type": "reasoning.text", "text": "hm", "signature": "c2ln", "format": "anthropic-claude-v1"},
        {"type": "reasoning.encrypted", "data": "eA==", "format": "anthropic-claude-v1"},
        {"type": "reasoning.text", "text": "unsigned", "format": "anthropic-claude-v1"},
        {"type": "reasoning.encrypted", "data": "of another provider", "format": "openai-responses-v1"},
    ]
    asked = {"role": "user", "content": "Hello"}
    in_details = claude(asked, {"role": "assistant", "content": "Yes.", "reasoning_details": details})
    in_blocks = claude(asked, {"role": "assistant", "content": "Yes.", "thinking_blocks": [thought]})
    said = {"type": "text", "text": "Yes."}
    hidden = {"type": "redacted_thinking", "data": "eA=="}
    assert in_details["messages"][1]["content"] == [thought, hidden, said]
    assert in_blocks["messages"][1]["content"] == [thought, said]


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        ({"tool_choice": "any", "parallel_tool_calls": False}, {"type": "any", "disable_parallel_tool_use": True}),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        ({"parallel_tool_calls": True}, None),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"type": "tool", "name": "f"}),
        ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, {"type": "tool", "name": "f"}),
        ({"tool_choice": {"type": "tool", "name": "f"}}, {"type": "tool", "name": "f"}),
        ({"function_call": {"name": "f"}}, {"type": "tool", "name": "f"}),
    ],
)
def test_a_tool_choice_becomes_anthropics(choice: dict[str, Any], sent: dict[str, Any] | None) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d", "strict": True}, "cache_control": MARK}
    body = claude(tools=[tool], **choice)
    schema = {"type": "object", "properties": {}}
    assert body["tools"] == [
        {"name": "f", "description": "d", "strict": True, "input_schema": schema, "cache_control": MARK}
    ]
    assert body.get("tool_choice") == sent


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_anthropic_gets_no_tool_choice_without_tools(choice: str) -> None:
    assert "tool_choice" not in claude(tool_choice=choice)


@pytest.mark.parametrize(
    ("model", "parameters", "thinking", "effort"),
    [
        (CLAUDE, {}, None, None),
        (CLAUDE, {"reasoning": {"effort": "none"}}, {"type": "disabled"}, None),
        (CLAUDE, {"reasoning": {"enabled": False}}, {"type": "disabled"}, None),
        (CLAUDE, {"reasoning": {"exclude": True}}, None, None),
        (CLAUDE, {"reasoning": {"enabled": True}}, {"type": "enabled", "budget_tokens": 2_000}, None),
        (CLAUDE, {"reasoning_effort": "high"}, {"type": "enabled", "budget_tokens": 3_200}, None),
        (CLAUDE, {"reasoning": {"effort": "minimal"}}, {"type": "enabled", "budget_tokens": 1_024}, None),
        (CLAUDE, {"reasoning": {"max_tokens": 1_500}}, {"type": "enabled", "budget_tokens": 1_500}, None),
        (CLAUDE, {"reasoning": {"max_tokens": 9_000}}, {"type": "enabled", "budget_tokens": 3_999}, None),
        ("claude-3-7-sonnet-latest", {"reasoning_effort": "low"}, {"type": "enabled", "budget_tokens": 1_024}, None),
        ("claude-opus-4-1-20250805", {"reasoning_effort": "low"}, {"type": "enabled", "budget_tokens": 1_024}, None),
        ("claude-sonnet-4-20250514", {"reasoning_effort": "low"}, {"type": "enabled", "budget_tokens": 1_024}, None),
        ("claude-opus-4-6", {"reasoning_effort": "low"}, {"type": "adaptive"}, "low"),
        ("claude-opus-4-8-20260501", {"reasoning": {"effort": "minimal"}}, {"type": "adaptive"}, "low"),
        ("claude-sonnet-5", {"reasoning": {"max_tokens": 1_500}}, {"type": "adaptive"}, None),
        ("claude-haiku-5-5", {"reasoning_effort": "xhigh"}, {"type": "adaptive"}, "xhigh"),
        ("claude-fable-5-2", {"reasoning_effort": "max"}, {"type": "adaptive"}, "max"),
    ],
)
def test_reasoning_effort_becomes_anthropics_thinking(
    model: str, parameters: dict[str, Any], thinking: dict[str, Any] | None, effort: str | None
) -> None:
    sent = claude(model=model, temperature=0.5, top_k=7, **parameters)
    assert sent.get("thinking") == thinking
    assert sent.get("output_config", {}).get("effort") == effort
    # Neither is taken beside thinking.
    is_thinking = thinking is not None and thinking["type"] != "disabled"
    assert ("temperature" in sent, "top_k" in sent) == (not is_thinking, not is_thinking)


def test_there_is_no_room_for_thought_within_a_small_limit() -> None:
    assert "thinking" not in claude(max_tokens=1_024, reasoning={"effort": "high"})
    assert claude(max_tokens=1_025, reasoning={"effort": "low"})["thinking"]["budget_tokens"] == 1_024


def test_response_format_and_stop_become_anthropics() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert claude(response_format=wanted)["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    assert "output_config" not in claude(response_format={"type": "text"})
    assert claude(stop="END")["stop_sequences"] == ["END"]
    assert claude(stop=["A", "B"], top_p=0.5, top_k=-1).keys() == {"messages", "stop_sequences", "top_p"}


def test_a_key_goes_into_the_header_that_the_provider_reads() -> None:
    key = SecretStr("sk-secret")
    headers = {name: ADAPTERS[name].headers(key, Application("App", "https://app.test/")) for name in ADAPTERS}
    bearer = {"Authorization": "Bearer sk-secret"}
    assert headers == {
        "openrouter": {**bearer, "X-OpenRouter-Title": "App", "HTTP-Referer": "https://app.test/"},
        "openai": bearer,
        "anthropic": {"x-api-key": "sk-secret", "anthropic-version": "2023-06-01"},
        "compatible": bearer,
    }
    assert {
        name: ADAPTERS[name].headers(None, Application()).get("Authorization") for name in ADAPTERS
    } == dict.fromkeys(ADAPTERS)


def details(*formats: str) -> list[dict[str, Any]]:
    return [{"type": "reasoning.encrypted", "data": form, "format": form} for form in formats]


OURS, GEMINIS, GROKS = "anthropic-claude-v1", "google-gemini-v1", "xai-responses-v1"


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ("anthropic/claude-opus-5", [OURS, "unknown"]),
        ("vertex_ai/claude-opus-5", [OURS, "unknown"]),
        ("google/gemini-3-pro", [GEMINIS, "unknown"]),
        ("x-ai/grok-5", [GROKS, "unknown"]),
        ("openai/gpt-5-mini", ["azure-openai-responses-v1", "unknown"]),
        ("mistral-large-latest", ["unknown"]),
        # Its id says nothing of the model: the provider alone knows.
        ("my-alias", [OURS, GEMINIS, GROKS, "azure-openai-responses-v1", "unknown"]),
    ],
)
@pytest.mark.parametrize("dialect", ["compatible", "openrouter"])
def test_reasoning_signed_by_another_maker_is_not_sent(dialect: Dialect, model: str, kept: list[str]) -> None:
    said = {**ECHO, "reasoning_details": details(OURS, GEMINIS, GROKS, "azure-openai-responses-v1", "unknown")}
    request = ChatRequest(model=model, messages=(Message.model_validate(said),), max_tokens=7)
    (sent,) = json.loads(ADAPTERS[dialect].completion_body(request))["messages"]
    assert [each["format"] for each in sent["reasoning_details"]] == kept
    assert (sent["content"], sent["reasoning"]) == (ECHO["content"], "because")
    # The signature of a thought of Gemini's stands in the call.
    assert ("extra_content" in sent["tool_calls"][0]) == (model in ("google/gemini-3-pro", "my-alias"))


@pytest.mark.parametrize(
    ("dialect", "model"), [("openai", "gpt-5-mini"), ("openrouter", "openai/gpt-5"), ("compatible", "mistral-small")]
)
def test_a_message_of_thought_alone_is_left_out_where_nobody_understands_it(dialect: Dialect, model: str) -> None:
    thought = {"role": "assistant", "reasoning_details": details(OURS)}
    said = [{"role": "user", "content": "Hello"}, thought, {"role": "user", "content": "Go on."}]
    messages = tuple(Message.model_validate(each) for each in said)
    request = ChatRequest(model=model, messages=messages, max_tokens=7)
    assert json.loads(ADAPTERS[dialect].completion_body(request))["messages"] == [said[0], said[2]]


CALLED: Final = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
LOOP: Final[list[dict[str, Any]]] = [
    {"role": "user", "content": "Hello"}, CALLED, {"role": "tool", "tool_call_id": "c", "content": "7"}
]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "model", "thinks"),
    [
        (LOOP, CLAUDE, False),
        ([LOOP[0], {**CALLED, "reasoning_details": details(GEMINIS)}, LOOP[2]], CLAUDE, False),
        ([LOOP[0], {**CALLED, "reasoning_details": details(OURS)}, LOOP[2]], CLAUDE, True),
        ([*LOOP, {"role": "assistant", "content": "Seven."}, {"role": "user", "content": "Sure?"}], CLAUDE, True),
        # A model that chooses by itself goes on without its thoughts.
        (LOOP, "claude-opus-4-6", True),
    ],
)
def test_a_loop_that_another_provider_began_goes_on_at_anthropic_without_a_budget_for_thought(
    said: list[dict[str, Any]], model: str, thinks: bool
) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert ("thinking" in claude(*said, model=model, reasoning_effort="low", tools=tools)) == thinks


@pytest.mark.parametrize(
    ("blocks", "sent"),
    [
        ([{"type": "thinking", "thinking": "hm"}], []),
        ([{"type": "redacted_thinking"}], []),
        (
            [{"type": "thinking", "thinking": "hm", "signature": "c2ln", "cache_control": MARK}],
            [{"type": "thinking", "thinking": "hm", "signature": "c2ln"}],
        ),
    ],
)
def test_blocks_that_anthropic_would_refuse_are_not_sent(blocks: list[dict[str, Any]], sent: list[Any]) -> None:
    said = {"role": "assistant", "content": "Yes.", "thinking_blocks": blocks}
    turn = claude({"role": "user", "content": "Hello"}, said)["messages"][1]["content"]
    assert turn == [*sent, {"type": "text", "text": "Yes."}]


def test_no_turn_of_anthropics_ends_with_a_thought() -> None:
    said = {"role": "assistant", "reasoning_details": details(OURS)}
    sent = claude({"role": "user", "content": "Hello"}, said, {"role": "user", "content": "Go on."})
    assert [turn["role"] for turn in sent["messages"]] == ["user", "user"]
