"""Counts by OpenAI's tokenizers: never below the true ones, and only where they are certain."""

import asyncio
import sys
import unicodedata
from decimal import Decimal
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tollbook.inference import learning_models as learning
from tollbook.inference import tokenizers
from tollbook.inference.bounds import TOKENS_PER_MESSAGE, TOKENS_PER_REQUEST, bound, bound_embeddings
from tollbook.inference.current_policy import CurrentPolicy, PolicyInForce
from tollbook.inference.models import ModelCatalogue, ModelFacts
from tollbook.inference.prices.model_price import price_from_usd
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.settings import Settings
from tollbook.inference.tokenizers import counter_of, load_tokenizers
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import default_policy
from tollbook.views.audit.texts import bound_text

PRICE = price_from_usd("openai/gpt-4o-mini", prompt=Decimal(1), completion=Decimal(1))
LOADED: dict[str, Any] = {}
ENCODINGS = {"gpt-4o-mini": "o200k_base", "text-embedding-3-small": "cl100k_base"}
# Letters of many scripts, marks, spaces, controls, emoji, and what Unicode has taken up since.
CHARACTERS = st.one_of(
    st.characters(max_codepoint=0x7F), st.characters(max_codepoint=0x2FFF),
    st.characters(exclude_categories=["Cs"]), st.sampled_from("😀\u0301é漢\n '"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load them for the tests of this file alone."""
    monkeypatch.setattr(tokenizers, "_loaded", LOADED)
    load_tokenizers()


@cache
def reference(encoding: str) -> Any:
    # Not at the top: it reads all its tables when it is imported, and every process of the suite imports every file.
    import bpe_openai

    return bpe_openai.get_encoding(encoding)


@pytest.mark.parametrize("model", list(ENCODINGS))
@given(text=st.text(CHARACTERS, max_size=300))
@example(text="<|endoftext|>")
@example(text="\r\n \t  x'LL 123456 \u00a0\u2003")
@example(text="\u1cfa")  # A mark for some tables, a letter for others.
def test_count_is_exact_or_absent(model: str, text: str) -> None:
    """G1: by another implementation."""
    count = counter_of(model)
    assert count is not None
    counted = count(text)
    assert counted is None or counted == len(reference(ENCODINGS[model]).encode_ordinary(text))
    assert counted is None or counted <= len(text.encode())


@given(texts=st.lists(st.text(CHARACTERS, max_size=100), min_size=1, max_size=4))
def test_bound_is_never_below_the_true_count(texts: list[str]) -> None:
    """G1: with the seven tokens that the template adds to a message, and three to a request (November 2026)."""
    messages = [Message(role="user", content=text) for text in texts]
    joined = Message.model_validate({"role": "user", "content": [{"type": "text", "text": text} for text in texts]})
    count, true = counter_of("gpt-4o-mini"), lambda text: len(reference("o200k_base").encode_ordinary(text))
    found = bound(messages, 1, PRICE, count=count)
    assert found.prompt_tokens >= sum(true(text) + 7 for text in texts) + 3
    # Parts may be joined before they are counted.
    assert bound([joined], 1, PRICE, count=count).prompt_tokens >= true("".join(texts)) + 10
    vectors = bound_embeddings(texts, PRICE, count=counter_of("text-embedding-3-small"))
    assert vectors.prompt_tokens >= sum(len(reference("cl100k_base").encode_ordinary(text)) for text in texts)


@pytest.mark.slow
def test_characters_whose_class_depends_on_the_table_are_not_counted() -> None:
    count = counter_of("gpt-4o")
    assert count is not None
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category in ("Cn", "Cs") or (category[0] in "LMN" and unicodedata.ucd_3_2_0.category(chr(code)) == "Cn"):
            assert count(chr(code)) is None
    assert count("héllo 漢字 😀") is not None


def test_a_count_makes_the_bound_tighter_and_says_so() -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 100
    messages = [Message(role="user", content=text)]
    fixed = TOKENS_PER_MESSAGE + TOKENS_PER_REQUEST
    plain, counted = bound(messages, 1, PRICE), bound(messages, 1, PRICE, count=counter_of("gpt-4o"))
    assert (plain.prompt_tokens, plain.prompt_basis) == (fixed + len(text), "text")
    assert (counted.prompt_tokens, counted.prompt_basis) == (fixed + 1_001, "tokenizer")
    assert bound_text(counted.as_price()).startswith(f"{fixed + 1_001:,} prompt tokens (counted by its tokenizer) x ")
    unknown = [Message(role="user", content="\u1cfa")]
    assert bound(unknown, 1, PRICE, count=counter_of("gpt-4o")) == bound(unknown, 1, PRICE)
    read = bound(messages, 1, PRICE, count=counter_of("gpt-4o"), facts=ModelFacts(context_length=500))
    assert (read.prompt_tokens, read.prompt_basis) == (500, "context_length")


@pytest.mark.parametrize(
    ("ids_of", "model", "is_counted"),
    [
        ("openrouter", "openai/gpt-4o-mini", True), ("openrouter", "openai/gpt-4o-2024-11-20", True),
        ("openrouter", "openai/gpt-5-mini:floor", True), ("openrouter", "gpt-4o-mini", False),
        ("openrouter", "openai/gpt-5.4", False), ("openrouter", "anthropic/claude-3-haiku", False),
        ("openai", "gpt-4.1-mini", True), ("openai", "o3", True), ("openai", "text-embedding-ada-002", True),
        ("openai", "gpt-6", False), ("openai", "ft:gpt-4o:acme", False), (None, "gpt-4o", False),
    ],
)  # fmt: skip
def test_only_models_whose_tokenizer_is_public_are_counted(ids_of: Any, model: str, is_counted: bool) -> None:
    """G8: on a server with ids of its own, any model may have any id."""
    assert (ModelCatalogue(ids_of=ids_of).counter(model) is not None) == is_counted


def test_without_the_extra_the_bytes_are_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quicktok", None)
    monkeypatch.setattr(tokenizers, "_loaded", {})
    load_tokenizers()
    assert counter_of("gpt-4o") is None


async def test_a_process_loads_them_unless_it_is_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(learning, "load_tokenizers", lambda: loop.call_soon_threadsafe(loading.set))
    for ids_of, is_loaded in ((None, False), ("openrouter", True)):
        loading.clear()
        models: Any = ModelCatalogue(ids_of=ids_of)  # pyright: ignore[reportArgumentType]
        policies = CurrentPolicy.fixed(PolicyInForce(0, default_policy(), models=models))
        async with (
            ProviderClients(ProviderClient(base_url="http://127.0.0.1:9/v1")) as providers,
            learning.learning_models(policies, providers, Settings(), now_ms=lambda: 0),
        ):
            if is_loaded:
                await loading.wait()
        assert loading.is_set() == is_loaded
