"""Prices in a provider's list: what is read, what is not trusted, and how they combine with policy and catalogue."""

import json
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tollbook.inference.bounds import bound
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.models import ModelCatalogue, ModelFacts, facts_of
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.listed_price import read_pricing, relevant_pricing
from tollbook.inference.prices.model_price import (
    DatedPrice,
    ModelPrice,
    PriceTier,
    completed,
    price_from_usd,
)
from tollbook.inference.prices.price_lists import PriceLists
from tollbook.schemas.events import BoundPrice
from tollbook.schemas.messages import Message
from tollbook.schemas.upcasters import event_from_entry
from tollbook.schemas.usage import Usage
from tollbook.views.audit.texts import bound_text, event_text

NOVEMBER_2026_MS = 1_795_000_000_000
SOURCE = "provider 2026-11-18T11:06:40.000Z"
CATALOGUE = f"catalogue {version('genai-prices')}"
# Dollars per million tokens as genai-prices 0.2.3 has them, in nano-dollars per token.
MINI_IN, MINI_OUT = 150, 600
CHEAP = {"prompt": "0.000001", "completion": "0.000002"}
CHEAP_IN, CHEAP_OUT = 1_000, 2_000


def catalogue(pricing: dict[str, Any], **options: Any) -> PriceCatalogue:
    lists = PriceLists()
    lists.add(pricing, NOVEMBER_2026_MS)
    return PriceCatalogue(models=ModelCatalogue(price_lists=lists), **options)


def cost(price: ModelPrice, **usage: int) -> int:
    return price.cost(Usage.model_validate(usage))


@pytest.mark.parametrize(
    ("pricing", "usage", "nanousd"),
    [
        (CHEAP, {"prompt_tokens": 10, "completion_tokens": 5}, 10 * 1_000 + 5 * 2_000),
        ({"prompt": "1e-6", "completion": "2E-6"}, {"prompt_tokens": 10, "completion_tokens": 5}, 20_000),
        ({"prompt": "0", "completion": "0"}, {"prompt_tokens": 10, "completion_tokens": 5}, 0),
        (CHEAP | {"request": "0.01", "web_search": "0.005", "discount": 0}, {}, 10_000_000),
        (CHEAP | {"internal_reasoning": "0.000003"}, {"completion_tokens": 5}, 5 * 3_000),
        (CHEAP | {"input_cache_read": "0.0000001"}, {"prompt_tokens": 10, "cached_tokens": 4}, 6 * 1_000 + 4 * 100),
        (CHEAP | {"input_cache_write": "0.00000125"}, {"prompt_tokens": 8, "cache_write_tokens": 8}, 8 * 1_250),
        (CHEAP | {"audio": "0.0001", "image_output": "0.1", "request": None}, {"prompt_tokens": 1}, 1_000),
        # A 30-digit price is exact until it is rounded up, once: to whole nano-dollars per million tokens.
        ({"prompt": "0.000000000000000000000001", "completion": "0"}, {"prompt_tokens": 10**6}, 1),
    ],
)
def test_a_listed_price_is_read_exactly(pricing: dict[str, Any], usage: dict[str, int], nanousd: int) -> None:
    for written in (pricing, relevant_pricing(pricing)):
        price = read_pricing("m", written)
        assert price is not None
        assert cost(price, **usage) == nanousd


@pytest.mark.parametrize(
    "pricing",
    [
        None,
        [],
        {},
        {"prompt": "0.1"},
        {"prompt": "-1", "completion": "-1"},  # OpenRouter's auto router.
        CHEAP | {"completion": "-0.000001"},
        CHEAP | {"request": "-1"},
        CHEAP | {"input_cache_read": "free"},
        CHEAP | {"internal_reasoning": "NaN"},
        {"prompt": 0.15, "completion": 0.6},  # Other servers': dollars per million, as numbers.
        {"prompt": Decimal("0.000001"), "completion": Decimal("0.000002")},
        {"prompt": "0.15", "completion": "0.60"},  # The same as text: no token costs 15 cents.
        {"prompt": True, "completion": "0"},
        {"prompt": "1e-999999999", "completion": "0"},
        {"prompt": "0x1", "completion": "0"},
        {"prompt": "\u0660", "completion": "0"},  # Digits of another script.
        CHEAP | {"request": "99999999"},
        CHEAP | {"output_storage": "0.001"},  # Billed by an unknown kind.
        CHEAP | {"image_token": "0.00001"},
        CHEAP | {"overrides": "many"},
        CHEAP | {"overrides": [7]},
        CHEAP | {"overrides": [{"min_prompt_tokens": -1, "prompt": "0.1"}]},
        CHEAP | {"overrides": [{"min_prompt_tokens": 10, "prompt": "x"}]},
        CHEAP | {"overrides": [{"weekday": "7", "prompt": "0.000002"}]},
        {"input": 0.2, "output": 0.6, "hourly": 0},  # Together's.
    ],
)
def test_an_entry_that_cannot_be_trusted_states_no_price(pricing: Any) -> None:
    assert read_pricing("m", pricing) is None
    assert facts_of({"id": "m", "pricing": pricing, "context_length": 9}) == ModelFacts(context_length=9)


def test_a_conditional_price_holds_where_it_is_the_highest() -> None:
    overrides = [
        {"min_prompt_tokens": 1_000, "prompt": "0.000002", "completion": "0.000003"},
        {"utc_start": "16:30", "utc_end": "00:30", "prompt": "0.0000005", "completion": "0.000004"},
    ]
    pricing = CHEAP | {"overrides": overrides}
    kept = relevant_pricing(pricing)
    assert kept["overrides"] == [overrides[0], {"prompt": "0.0000005", "completion": "0.000004"}]
    for written in (pricing, kept):
        price = read_pricing("m", written)
        assert price is not None
        assert cost(price, prompt_tokens=999, completion_tokens=1) == 999 * 1_000 + 4_000
        assert cost(price, prompt_tokens=1_000, completion_tokens=1) == 1_000 * 2_000 + 4_000


def test_the_provider_s_list_comes_before_the_catalogue_and_after_the_policy() -> None:
    mini, own = "openai/gpt-4o-mini", price_from_usd("x", prompt=Decimal(7), completion=Decimal(7))
    later = NOVEMBER_2026_MS + 1_000
    prices = catalogue({mini: CHEAP}, overrides={mini: [DatedPrice(later, own)]})
    assert prices.price(mini, NOVEMBER_2026_MS - 1).source == CATALOGUE
    assert prices.cost(mini, Usage(prompt_tokens=2), NOVEMBER_2026_MS - 1) == 2 * MINI_IN
    listed = prices.price(mini, NOVEMBER_2026_MS)
    assert (listed.model, listed.source) == (mini, SOURCE)
    assert cost(listed, prompt_tokens=2, completion_tokens=1) == 2 * CHEAP_IN + CHEAP_OUT
    assert prices.price(mini, later).source == "policy"
    assert prices.cost(mini, Usage(prompt_tokens=2), later) == 2 * 7_000
    assert prices.price("anthropic/claude-3-haiku", later).source == CATALOGUE


def test_a_model_that_only_the_provider_prices_can_be_called() -> None:
    with pytest.raises(PriceUnknown, match="does not list it"):
        PriceCatalogue().price("acme/new", NOVEMBER_2026_MS)
    prices = catalogue({"acme/New": CHEAP, "acme/twice": CHEAP, "acme/TWICE": CHEAP})
    assert prices.cost("acme/new", Usage(prompt_tokens=3), NOVEMBER_2026_MS) == 3 * CHEAP_IN
    assert not prices.knows("acme/new", NOVEMBER_2026_MS - 1)
    assert not prices.knows("acme/Twice", NOVEMBER_2026_MS), "two entries: nobody knows which counts"
    local = PriceCatalogue(provider="nobody", models=prices.models)
    assert local.knows("acme/new", NOVEMBER_2026_MS)


@pytest.mark.parametrize(
    "model",
    ["acme/new:online", "acme/new:batch", "openrouter/auto", "acme/new@preset", "perplexity/sonar", "acme/new-image"],
)
def test_a_model_that_no_price_of_tokens_covers_is_refused_whoever_lists_it(model: str) -> None:
    assert not catalogue({model: CHEAP}).knows(model, NOVEMBER_2026_MS)


def test_free_models_are_free_where_the_provider_lists_them_so() -> None:
    free = {"prompt": "0", "completion": "0"}
    prices = catalogue({"acme/new:free": free, "google/gemini-2.5-pro": free})
    for model in ("acme/new:free", "google/gemini-2.5-pro"):
        usage = Usage(prompt_tokens=300_000, completion_tokens=9, cache_write_tokens=9)
        assert prices.cost(model, usage, NOVEMBER_2026_MS) == 0


def test_dearer_tiers_and_cache_writes_of_the_catalogue_stay_where_the_list_has_none() -> None:
    # Gemini 2.5 Pro: 1.25 and 10 dollars, above 200,000 tokens 2.50 and 15.
    for dollars, short, long in (("0.00000125", 1_250, 2_500), ("0.0000025", 2_500, 5_000), ("0.000001", 1_000, 2_500)):
        listed = {"prompt": dollars, "completion": "0.00001"}
        price = catalogue({"google/gemini-2.5-pro": listed}).price("google/gemini-2.5-pro", NOVEMBER_2026_MS)
        assert cost(price, prompt_tokens=200_000) == 200_000 * short
        assert cost(price, prompt_tokens=200_001, completion_tokens=1) == 200_001 * long + 15_000
    # Claude Sonnet 4 writes to its cache at 3.75 dollars.
    sonnet = {"prompt": "0.000003", "completion": "0.000015"}
    price = catalogue({"anthropic/claude-sonnet-4": sonnet}).price("anthropic/claude-sonnet-4", NOVEMBER_2026_MS)
    assert cost(price, prompt_tokens=4, cache_write_tokens=4) == 4 * 3_750


nanousd = st.integers(0, 10**10)


@st.composite
def tiers(draw: st.DrawFn, above: int = -1) -> PriceTier:
    prompt, completion, cached, written, written_1h = (draw(nanousd) for _ in range(5))
    return PriceTier(
        above_prompt_tokens=above,
        prompt_nanousd_per_mtok=prompt,
        completion_nanousd_per_mtok=completion,
        cached_nanousd_per_mtok=cached,
        cache_write_nanousd_per_mtok=max(prompt, written),
        cache_write_1h_nanousd_per_mtok=max(prompt, written, written_1h),
    )


@given(listed=tiers(), usual=tiers(), dear=tiers(above=1_000), tokens=st.integers(0, 2_000))
def test_a_completed_price_is_never_below_the_list(
    listed: PriceTier, usual: PriceTier, dear: PriceTier, tokens: int
) -> None:
    price = completed(ModelPrice("m", (listed,)), ModelPrice("m", (usual, dear)))
    assume(listed.max_prompt_nanousd_per_mtok + listed.completion_nanousd_per_mtok > 0)
    found, after = price.tier_at(tokens), ModelPrice("m", (usual, dear)).tier_at(tokens)
    names = [name for name in PriceTier.__dataclass_fields__ if name != "above_prompt_tokens"]
    for name in names:
        assert getattr(found, name) >= getattr(listed, name)
        if tokens > 1_000:
            assert getattr(found, name) >= getattr(after, name), "a dearer tier stays"


def test_a_service_tier_that_only_the_catalogue_prices_keeps_its_price() -> None:
    prices = catalogue({"gpt-5": CHEAP}, provider="openai")
    usual = prices.price("gpt-5", NOVEMBER_2026_MS)
    assert cost(usual, prompt_tokens=1) == CHEAP_IN
    assert prices.price("gpt-5", NOVEMBER_2026_MS, service_tier="odd") == usual
    priority = prices.price("gpt-5", NOVEMBER_2026_MS, service_tier="priority")
    assert (cost(priority, prompt_tokens=1), priority.source) == (2_500, CATALOGUE)


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


def test_a_price_per_image_is_part_of_the_bound() -> None:
    model = "openai/gpt-4o-mini"
    message = Message.model_validate({"role": "user", "content": [{"type": "text", "text": "what?"}, IMAGE, IMAGE]})
    plain, dear = (
        bound((message,), 10, catalogue({model: CHEAP | extra}).price(model, NOVEMBER_2026_MS))
        for extra in ({}, {"image": "0.007"})
    )
    assert dear.amount_nanousd == plain.amount_nanousd + 2 * 7_000_000
    assert dear.image_nanousd == plain.image_nanousd + 7_000_000
    assert dear.fee_nanousd == 2 * 7_000_000
    stated = dear.as_price()
    assert dear.prompt_tokens * dear.prompt_nanousd_per_mtok + 10 * CHEAP_OUT * 10**6 == dear.amount_nanousd * 10**6
    assert stated.source == SOURCE
    free = catalogue({model: {"prompt": "0", "completion": "0", "image": "0.007"}}).price(model, NOVEMBER_2026_MS)
    with pytest.raises(PriceUnknown, match="it bills for images and not for tokens"):
        bound((message,), 10, free)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("policy", "the policy"),
        (SOURCE, "the provider's list of 2026-11-18T11:06:40.000Z"),
        ("catalogue 0.2.3", "the catalogue 0.2.3"),
        ("later \x1b[2J", "later \\x1b[2J"),
    ],
)
def test_the_source_of_a_price_is_readable(source: str, text: str) -> None:
    price = BoundPrice(
        model="m", prompt_tokens=1, completion_tokens=1, prompt_nanousd_per_mtok=1, completion_nanousd_per_mtok=1
    )
    plain = bound_text(price)
    assert "priced by" not in plain
    assert bound_text(price.model_copy(update={"source": source})) == f"{plain}, priced by {text}"


def test_a_catalogue_price_that_changes_is_seen_below_the_list() -> None:
    """The completed price is kept, and made again where what it is made of is another."""
    lists = PriceLists()
    prices = PriceCatalogue(models=ModelCatalogue(price_lists=lists))
    lists.add({"google/gemini-2.5-pro": CHEAP}, NOVEMBER_2026_MS)
    first = prices.price("google/gemini-2.5-pro", NOVEMBER_2026_MS)
    assert prices.price("google/gemini-2.5-pro", NOVEMBER_2026_MS) is first
    lists.add({"google/gemini-2.5-pro": {**CHEAP, "prompt": "0.000002"}}, NOVEMBER_2026_MS + 1)
    second = prices.price("google/gemini-2.5-pro", NOVEMBER_2026_MS + 1)
    assert (cost(first, prompt_tokens=1), cost(second, prompt_tokens=1)) == (1_000, 2_000)


def test_a_priced_charge_shows_where_its_price_comes_from() -> None:
    path = Path(__file__).parents[1] / "golden" / "events" / "v2" / "model-called.source.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    _, details = event_text(event_from_entry(stored["id"], stored["fields"]))
    assert "charged at $0.0093: priced from its usage by the provider's list of 2026-11-24T09:00:00.000Z" in details
