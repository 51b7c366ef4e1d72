"""Bounds: never below the true cost, whatever the text and the tokenizer."""

import sys
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tollbook.inference.bounds import (
    MAX_NORMALISED_CHARACTERS,
    TOKENS_PER_MESSAGE,
    TOKENS_PER_REQUEST,
    bound,
    text_tokens_at_most,
)
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.model_price import ModelPrice, PriceTier, price_from_usd
from tollbook.schemas.events import BoundPrice
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
def test_combining_marks_in_bad_order_do_not_stop_the_world() -> None:
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


def test_bound_past_what_the_ledger_can_hold_is_refused() -> None:
    price = price_from_usd("m", prompt=Decimal(1_000_000), completion=Decimal(1_000_000))
    with pytest.raises(PriceUnknown, match="more than 1,000,000 USD"):
        bound([user("x" * 1000)], 1_000_000, price)


@settings(max_examples=25)
@given(st.integers(0, 2000), st.integers(1, 2000))
def test_bound_grows_with_text_and_limit(characters: int, max_tokens: int) -> None:
    smaller = bound([user("x" * characters)], max_tokens, PRICE).amount_nanousd
    assert smaller < bound([user("x" * (characters + 1))], max_tokens, PRICE).amount_nanousd
    assert smaller < bound([user("x" * characters)], max_tokens + 1, PRICE).amount_nanousd
