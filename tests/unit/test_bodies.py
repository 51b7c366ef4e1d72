"""Bodies of requests: what each kind of provider is sent of a message and of parameters."""

import json
from decimal import Decimal
from typing import Any, Final

import pytest

from tollbook.inference.attempts import ChatRequest
from tollbook.inference.bounds import bound
from tollbook.inference.prices.model_price import price_from_usd
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


def test_openrouter_gets_back_what_it_gave() -> None:
    sent = body("openrouter")
    assert sent["messages"] == [ECHO]
    assert {name: sent[name] for name in PARAMETERS} == PARAMETERS
    assert sent["provider"] == {"require_parameters": True}


def test_another_server_gets_no_annotations() -> None:
    """Groq and Mistral refuse a request with them."""
    sent = body()
    assert sent["messages"] == [{name: value for name, value in ECHO.items() if name != "annotations"}]
    assert "provider" not in sent


def test_openai_gets_its_own_form_alone() -> None:
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
    }


def test_nothing_is_sent_that_nobody_set() -> None:
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
