"""Bounds: never below the true cost, whatever the text and the tokenizer."""

import json
import sys
import unicodedata
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tollbook.inference.bounds import (
    MAX_NORMALISED_CHARACTERS,
    TOKENS_PER_MESSAGE,
    TOKENS_PER_REQUEST,
    bound,
    json_tokens_at_most,
    prompt_tokens_at_most,
    text_tokens_at_most,
)
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.models import ModelFacts
from tollbook.inference.prices.model_price import ModelPrice, PriceTier, price_from_usd
from tollbook.schemas.events import BoundPrice
from tollbook.schemas.json_text import replace_surrogates
from tollbook.schemas.messages import Message
from tollbook.schemas.usage import Usage

PRICE = price_from_usd(
    "m", prompt=Decimal(3), completion=Decimal(15), cached=Decimal("0.3"), cache_write=Decimal("3.75")
)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def byte_tokens(text: str) -> int:
    """A tokenizer with one token for each byte: no byte-level BPE has more."""
    return len(text.encode("utf-8", "replace"))


def normalising_byte_tokens(text: str) -> int:
    """The same after NFKC, as SentencePiece does it."""
    return byte_tokens(unicodedata.normalize("NFKC", text.encode("utf-8", "replace").decode()))


ANY_TEXT = st.text(alphabet=st.characters(), max_size=200)  # Lone surrogates included.


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5), completion=st.integers(1, 5000))
@example(texts=["\ufdfa" * 50], completion=1)
@example(texts=["\ud800"], completion=1)
def test_bound_is_at_least_the_true_cost(texts: list[str], completion: int) -> None:
    messages = [user(text) for text in texts]
    most = bound(messages, 5000, PRICE)
    for tokenizer in (byte_tokens, normalising_byte_tokens):
        wrapped = sum(tokenizer(text) + 10 for text in texts) + 20
        for cached, written in ((0, 0), (wrapped, 0), (0, wrapped)):
            usage = Usage(
                prompt_tokens=wrapped, completion_tokens=completion, cached_tokens=cached, cache_write_tokens=written
            )
            assert PRICE.cost(usage) <= most.amount_nanousd


@given(text=st.text(alphabet=st.characters(), min_size=1, max_size=30))
def test_long_text_is_bounded_like_a_short_one_or_wider(text: str) -> None:
    long = text * (MAX_NORMALISED_CHARACTERS // len(text) + 1)
    assert len(long) > MAX_NORMALISED_CHARACTERS
    assert text_tokens_at_most(long) >= max(byte_tokens(long), normalising_byte_tokens(long))


def test_composing_never_adds_a_byte() -> None:
    # What the bound of long texts rests on: NFKC has at most the bytes of NFKD.
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        apart = unicodedata.normalize("NFD", character)
        if apart != character and unicodedata.normalize("NFC", apart) == character:
            assert len(character.encode()) <= len(apart.encode())


@pytest.mark.timeout(20)
def test_combining_marks_in_bad_order_do_not_take_long() -> None:
    text = "a" + "\u0301\u0323" * 250_000
    assert text_tokens_at_most(text) == len(text.encode())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("plain", 5),
        ("h\u00e9", 3),
        ("\u6f22\u5b57", 6),
        ("\U0001f600", 4),
        ("\ufdfa", 33),
        ("\ud800", 3),
        ("\ufb01" * 5000, 15_000),
    ],
)
def test_tokens_of_a_text_at_most(text: str, tokens: int) -> None:
    assert text_tokens_at_most(text) == tokens


def test_bound_is_arithmetic_on_the_highest_prices() -> None:
    most = bound([user("x" * 100), user("y" * 50)], 200, PRICE)
    prompt_tokens = TOKENS_PER_REQUEST + 2 * TOKENS_PER_MESSAGE + 150
    assert most.amount_nanousd == prompt_tokens * 3_750 + 200 * 15_000
    assert most.as_price() == BoundPrice(
        model="m",
        prompt_tokens=prompt_tokens,
        completion_tokens=200,
        prompt_nanousd_per_mtok=3_750_000_000,
        completion_nanousd_per_mtok=15_000_000_000,
        request_nanousd=0,
    )


def test_price_per_request_is_added() -> None:
    price = price_from_usd("m", prompt=Decimal(0), completion=Decimal(0), request=Decimal("0.005"))
    assert bound([user("x")], 1, price).amount_nanousd == 5_000_000


@pytest.mark.parametrize(("characters", "per_token"), [(800, 1_000), (900, 2_000)])
def test_long_context_price_counts_where_the_prompt_could_reach_it(characters: int, per_token: int) -> None:
    def tier(above: int, price: int) -> PriceTier:
        return PriceTier(
            above_prompt_tokens=above,
            prompt_nanousd_per_mtok=price,
            completion_nanousd_per_mtok=price,
            cached_nanousd_per_mtok=price,
            cache_write_nanousd_per_mtok=price,
            cache_write_1h_nanousd_per_mtok=price,
        )

    price = ModelPrice("m", (tier(-1, 10**9), tier(1000, 2 * 10**9)))
    most = bound([user("x" * characters)], 10, price)
    assert most.amount_nanousd == (characters + TOKENS_PER_REQUEST + TOKENS_PER_MESSAGE + 10) * per_token


@pytest.mark.parametrize("max_tokens", [0, -1, True, 1.5, 1_000_001, None])
def test_limit_that_limits_nothing_is_refused(max_tokens: object) -> None:
    with pytest.raises(PriceUnknown, match="max_tokens"):
        bound([user("x")], max_tokens, PRICE)  # pyright: ignore[reportArgumentType]


def test_no_message_is_refused() -> None:
    with pytest.raises(PriceUnknown, match="at least one message"):
        bound([], 10, PRICE)


def test_bound_above_the_ledgers_limit_is_refused() -> None:
    price = price_from_usd("m", prompt=Decimal(1_000_000), completion=Decimal(1_000_000))
    with pytest.raises(PriceUnknown, match="more than 1,000,000 USD"):
        bound([user("x" * 1000)], 1_000_000, price)


@settings(max_examples=25)
@given(st.integers(0, 2000), st.integers(1, 2000))
def test_bound_grows_with_text_and_limit(characters: int, max_tokens: int) -> None:
    smaller = bound([user("x" * characters)], max_tokens, PRICE).amount_nanousd
    assert smaller < bound([user("x" * (characters + 1))], max_tokens, PRICE).amount_nanousd
    assert smaller < bound([user("x" * characters)], max_tokens + 1, PRICE).amount_nanousd


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
HI = (user("hi"),)


def prompt_tokens(*messages: Message, **parameters: Any) -> int:
    return prompt_tokens_at_most(messages, parameters)


def test_numbers_and_cache_marks_add_no_tokens() -> None:
    free_parameters = {
        "temperature": 0.2,
        "top_p": 1.0,
        "seed": 7,
        "logprobs": True,
        "logit_bias": {"1": 5},
        "top_k": 40,
    }
    assert prompt_tokens(*HI, **free_parameters, prompt_cache_key="k") == prompt_tokens(*HI)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT.map(replace_surrogates),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT.map(replace_surrogates), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_json_counts_with_every_way_to_write_it(value: Any) -> None:
    """G1: templates write tools with and without indents, and with or without escapes."""
    most = json_tokens_at_most(value)
    for indent in (None, 1, 2, 4):
        for is_ascii in (True, False):
            for separators in (None, (",", ":")):
                text = json.dumps(value, indent=indent, ensure_ascii=is_ascii, separators=separators)
                assert max(byte_tokens(text), normalising_byte_tokens(text)) <= most


@pytest.mark.parametrize(
    "parameters",
    [{"tools": [TOOL]}, {"functions": [TOOL["function"]]}, {"response_format": {"type": "json_object"}}],
)
def test_tools_and_schemas_count_with_the_instructions_around_them(parameters: dict[str, Any]) -> None:
    """G1: Anthropic puts up to 735 tokens of its own before them."""
    least = prompt_tokens(*HI) + 735 + len(json.dumps(parameters))
    assert prompt_tokens(*HI, **parameters) >= least


def test_everything_in_a_message_counts() -> None:
    """G1."""
    text = "x" * 1_000
    call = {"id": "c", "function": {"name": "f", "arguments": json.dumps({"a": text})}}
    for more in (
        {"content": [{"type": "text", "text": text}]}, {"content": None, "tool_calls": [call]},
        {"content": None, "function_call": call["function"]}, {"content": None, "refusal": text},
        {"content": "", "reasoning": text}, {"content": "", "reasoning_content": text},
        {"content": "", "reasoning_details": [{"data": text}]}, {"content": "", "annotations": [{"url": text}]},
        {"content": "", "thinking_blocks": [{"thinking": text}]},
    ):  # fmt: skip
        assert prompt_tokens(Message(role="assistant", **more)) > 1_000  # pyright: ignore[reportArgumentType]
    assert prompt_tokens(Message(role="user", content="", name="n" * 256)) > 256
    assert prompt_tokens(Message(role="tool", content="", tool_call_id=text)) > 1_000


def test_an_image_counts_with_the_most_that_the_model_makes_of_one() -> None:
    """G1: neither its address nor its data says anything of it."""
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * 100_000}"}}
    pictured = Message(role="user", content=[part, part])  # pyright: ignore[reportArgumentType]
    plain = Message(role="user", content="")
    price = replace(PRICE, model="openai/gpt-4o")
    assert bound([pictured], 1, price).prompt_tokens == prompt_tokens(plain) + 2 * (85 + 8 * 170)
    with pytest.raises(PriceUnknown):
        bound([pictured], 1, replace(PRICE, model="my/model"))


def test_a_prediction_counts_as_completion_too() -> None:
    """G1: the part that the answer does not use is billed as completion."""
    parameters = {"prediction": {"type": "content", "content": "x" * 500}}
    found = bound(HI, 100, PRICE, parameters=parameters)
    assert found.completion_tokens > 600
    assert found.prompt_tokens > bound(HI, 100, PRICE).prompt_tokens + 500


@pytest.mark.parametrize(("thought", "completion"), [(99, 100), (100, 200), (5_000, 5_100)])
def test_a_budget_for_reasoning_above_the_limit_counts(thought: int, completion: int) -> None:
    """G1."""
    assert bound(HI, 100, PRICE, parameters={"reasoning": {"max_tokens": thought}}).completion_tokens == completion


FLAT = price_from_usd("m", prompt=Decimal(3), completion=Decimal(15))


@pytest.mark.parametrize(("mark", "percent"), [({"type": "ephemeral"}, 125), ({"type": "ephemeral", "ttl": "1h"}, 200)])
def test_parts_to_be_cached_cost_more(mark: dict[str, str], percent: int) -> None:
    """G1: tokens written into a cache cost up to twice as much, also where the price list does not say so."""
    part = {"type": "text", "text": "hi", "cache_control": mark}
    marked: list[tuple[Message, dict[str, Any]]] = [
        (Message(role="user", content=[part]), {}),  # pyright: ignore[reportArgumentType]
        (Message(role="user", content="hi", cache_control=mark), {}),  # pyright: ignore[reportArgumentType]
        (user("hi"), {"cache_control": mark}),
        (user("hi"), {"tools": [{**TOOL, "cache_control": mark}]}),
    ]
    for message, parameters in marked:
        found = bound([message], 100, FLAT, parameters=parameters)
        assert found.prompt_nanousd_per_mtok == 3 * 10**9 * percent // 100
        # An endpoint that lists this price would take as much more again for its cache.
        assert found.endpoint_nanousd_per_mtok == 3 * 10**9
    assert bound(HI, 100, FLAT).prompt_nanousd_per_mtok == 3 * 10**9


def test_a_prompt_is_not_bounded_above_what_the_model_can_read() -> None:
    long = (user("x" * 5_000),)
    found = bound(long, 100, PRICE, facts=ModelFacts(context_length=1_000))
    assert (found.prompt_tokens, found.prompt_basis) == (1_000, "context_length")
    for facts in (None, ModelFacts(), ModelFacts(context_length=100_000)):
        assert bound(long, 100, PRICE, facts=facts) == bound(long, 100, PRICE)
