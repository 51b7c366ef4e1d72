"""Prices: money as arithmetic from published prices, in dollars per million tokens."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.models import ModelCatalogue
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice, price_from_usd
from tollbook.inference.prices.price_lists import PriceLists
from tollbook.schemas.policy import default_policy
from tollbook.schemas.usage import Usage

AUGUST_2026_MS = 1_787_000_000_000
NOVEMBER_2026_MS = 1_795_000_000_000
DAY_MS = 86_400_000

# OpenRouter's list prices as in genai-prices 0.2.3: nano-dollars per token = dollars per million * 1000.
HAIKU_IN, HAIKU_OUT = 250, 1_250
SONNET_IN, SONNET_OUT, SONNET_CACHED, SONNET_WRITE = 3_000, 15_000, 300, 3_750
MINI_IN, MINI_OUT, MINI_CACHED = 150, 600, 75
GEMINI_PRO_IN, GEMINI_PRO_OUT, GEMINI_PRO_LONG_IN, GEMINI_PRO_LONG_OUT = 1_250, 10_000, 2_500, 15_000

CATALOGUE = PriceCatalogue()


@pytest.mark.parametrize(
    ("model", "usage", "expected"),
    [
        (
            "anthropic/claude-3-haiku",
            {"prompt_tokens": 1000, "completion_tokens": 200},
            1000 * HAIKU_IN + 200 * HAIKU_OUT,
        ),
        ("openai/gpt-4o-mini", {"prompt_tokens": 3, "completion_tokens": 5}, 3 * MINI_IN + 5 * MINI_OUT),
        ("openai/gpt-4o-mini-2024-07-18", {"prompt_tokens": 3, "completion_tokens": 5}, 3 * MINI_IN + 5 * MINI_OUT),
        (
            "anthropic/claude-sonnet-4",
            {"prompt_tokens": 1000, "completion_tokens": 10, "cached_tokens": 600, "cache_write_tokens": 100},
            300 * SONNET_IN + 600 * SONNET_CACHED + 100 * SONNET_WRITE + 10 * SONNET_OUT,
        ),
        (
            "openai/gpt-4o-mini",
            {"prompt_tokens": 100, "completion_tokens": 50, "cached_tokens": 100, "reasoning_tokens": 40},
            100 * MINI_CACHED + 50 * MINI_OUT,
        ),
        # Without a price of their own, cached tokens cost what others do.
        ("anthropic/claude-3-haiku", {"prompt_tokens": 10, "cached_tokens": 10}, 10 * HAIKU_IN),
        (
            "google/gemini-2.5-pro",
            {"prompt_tokens": 200_000, "completion_tokens": 1},
            200_000 * GEMINI_PRO_IN + GEMINI_PRO_OUT,
        ),
        (
            "google/gemini-2.5-pro",
            {"prompt_tokens": 200_001, "completion_tokens": 1},
            200_001 * GEMINI_PRO_LONG_IN + GEMINI_PRO_LONG_OUT,
        ),
        ("meta-llama/llama-3.3-70b-instruct:free", {"prompt_tokens": 10, "completion_tokens": 10}, 0),
    ],
)
def test_cost_is_usage_times_the_published_price(model: str, usage: dict[str, int], expected: int) -> None:
    assert CATALOGUE.cost(model, Usage(**usage), NOVEMBER_2026_MS) == expected


def test_more_cached_tokens_than_prompt_are_billed_once() -> None:
    usage = Usage(prompt_tokens=10, cached_tokens=999, cache_write_tokens=999)
    assert CATALOGUE.cost("anthropic/claude-sonnet-4", usage, NOVEMBER_2026_MS) == 10 * SONNET_CACHED


def test_cost_rounds_up_once_at_the_end() -> None:
    # A third of a nano-dollar a token: three tokens of each kind are two thirds more than one, not six.
    price = price_from_usd("m", prompt=Decimal("0.000333333"), completion=Decimal("0.000333333"))
    assert price.cost(Usage(prompt_tokens=2, completion_tokens=2)) == 2
    assert price.cost(Usage(prompt_tokens=1)) == 1
    assert price.cost(Usage()) == 0


def test_price_of_the_day_is_taken() -> None:
    # DeepSeek V3 on OpenRouter: 0.38 and 0.89 dollars until it changed on 2026-10-19 and -20.
    usage = Usage(prompt_tokens=1000, completion_tokens=1000)
    assert CATALOGUE.cost("deepseek/deepseek-chat", usage, AUGUST_2026_MS) == 1000 * (380 + 890)
    assert CATALOGUE.cost("deepseek/deepseek-chat", usage, NOVEMBER_2026_MS) == -(-1000 * (2574 + 10287) // 10)


def test_cache_write_below_the_prompt_price_is_a_surcharge_on_it() -> None:
    # Gemini 2.5 Flash: 0.30 dollars, and 0.0833333333333333 for storing, November 2026.
    price = CATALOGUE.price("google/gemini-2.5-flash", NOVEMBER_2026_MS)
    assert price.tiers[0].cache_write_nanousd_per_mtok == 300_000_000 + 83_333_334


@pytest.mark.parametrize(
    "model",
    [
        "acme/unheard-of",
        "gpt-4o-mini",
        "openai/gpt-4o-mini:online",
        "openai/gpt-4o-mini:thinking",
        "openai/gpt-4o-mini:extended",
        "openai/gpt-4o-mini:nitro:online",
        "acme/unheard-of:nitro",
        "openai/gpt-4o-mini:free",
        "openai/gpt-4o-mini@preset/cheap",
        "@preset/cheap",
        "openrouter/auto",
        "~anthropic/claude-haiku-latest",
        "perplexity/sonar",
        "openai/gpt-4o-search-preview",
        "anthropic/claude-haiku-4.5:batch",
        "stealth/crouton-alpha",
        "",
    ],
)
def test_model_without_a_dependable_price_is_refused(model: str) -> None:
    for _ in range(2):  # The second time from memory.
        with pytest.raises(PriceUnknown, match="no price is known"):
            CATALOGUE.price(model, NOVEMBER_2026_MS)
    assert not CATALOGUE.knows(model, NOVEMBER_2026_MS)


def test_every_listed_price_is_a_whole_number_of_at_least_zero() -> None:
    from genai_prices import data_snapshot  # Slow to import; only this test needs it by name.

    openrouter = next(each for each in data_snapshot.get_snapshot().providers if each.id == "openrouter")
    priced = [info.id for info in openrouter.models if CATALOGUE.knows(info.id, NOVEMBER_2026_MS)]
    assert len(priced) > 700
    for model in priced:
        for tier in CATALOGUE.price(model, NOVEMBER_2026_MS).tiers:
            assert type(tier.prompt_nanousd_per_mtok) is int
            assert min(tier.prompt_nanousd_per_mtok, tier.completion_nanousd_per_mtok) >= 0
            if not model.endswith(":free"):
                assert tier.prompt_nanousd_per_mtok > 0


def test_price_that_changes_with_the_hour_is_the_highest() -> None:
    # DeepSeek's own prices are lower off-peak; the bound must hold at any hour.
    own = PriceCatalogue(provider="deepseek")
    noon, night = (own.price("deepseek-chat", NOVEMBER_2026_MS // DAY_MS * DAY_MS + hour) for hour in (0, DAY_MS // 2))
    assert noon == night


def test_configured_price_comes_first_and_is_dated() -> None:
    now = NOVEMBER_2026_MS
    first = price_from_usd("own/model", prompt=Decimal(1), completion=Decimal(2))
    later = price_from_usd("own/model", prompt=Decimal(3), completion=Decimal(4), request=Decimal("0.01"))
    catalogue = PriceCatalogue({"own/model": [DatedPrice(now, later), DatedPrice(FOREVER_MS, first)]})
    usage = Usage(prompt_tokens=10, completion_tokens=10)
    assert catalogue.cost("own/model", usage, now - 1) == 10 * 1_000 + 10 * 2_000
    assert catalogue.cost("own/model", usage, now) == 10 * 3_000 + 10 * 4_000 + 10_000_000


def test_dated_configured_price_follows_the_catalogue() -> None:
    now = NOVEMBER_2026_MS
    dearer = price_from_usd("x", prompt=Decimal(1), completion=Decimal(1))
    catalogue = PriceCatalogue({"openai/gpt-4o-mini": [DatedPrice(now, dearer)]})
    assert catalogue.cost("openai/gpt-4o-mini", Usage(prompt_tokens=10), now - 1) == 10 * MINI_IN
    assert catalogue.cost("openai/gpt-4o-mini", Usage(prompt_tokens=10), now) == 10 * 1_000
    assert catalogue.price("openai/gpt-4o-mini", now).model == "openai/gpt-4o-mini"


def test_configured_price_not_in_force_yet_is_no_price() -> None:
    price = price_from_usd("own/model", prompt=Decimal(1), completion=Decimal(1))
    catalogue = PriceCatalogue({"own/model": [DatedPrice(NOVEMBER_2026_MS, price)]})
    with pytest.raises(PriceUnknown, match="not in force yet"):
        catalogue.price("own/model", NOVEMBER_2026_MS - 1)


def test_configured_price_serves_models_that_the_catalogue_refuses() -> None:
    price = price_from_usd("x", prompt=Decimal(1), completion=Decimal(1))
    catalogue = PriceCatalogue({"openai/gpt-4o-mini:online": [DatedPrice(FOREVER_MS, price)]})
    assert catalogue.knows("openai/gpt-4o-mini:online", NOVEMBER_2026_MS)


@pytest.mark.parametrize("suffix", [":nitro", ":floor", ":exacto", ":NITRO"])
def test_suffix_that_only_chooses_among_endpoints_has_the_models_price_and_its_own_name(suffix: str) -> None:
    base = CATALOGUE.price("openai/gpt-4o-mini", NOVEMBER_2026_MS)
    chosen = CATALOGUE.price(f"openai/gpt-4o-mini{suffix}", NOVEMBER_2026_MS)
    assert chosen.tiers == base.tiers
    assert chosen.model == f"openai/gpt-4o-mini{suffix}"


def test_free_variant_of_the_catalogue_costs_nothing() -> None:
    price = CATALOGUE.price("deepseek/deepseek-r1:free", NOVEMBER_2026_MS)
    assert price.max_prices(1_000_000) == (0, 0)
    assert price.request_nanousd == 0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("openai/gpt-4o-mini:online", "it bills for each web search"),
        ("openai/gpt-4o-mini:thinking", "may have another price"),
        ("openai/gpt-4o-mini:free", "no free variant"),
    ],
)
def test_refused_suffix_is_refused_with_its_reason(model: str, reason: str) -> None:
    with pytest.raises(PriceUnknown, match=reason):
        CATALOGUE.price(model, NOVEMBER_2026_MS)


def test_memory_of_names_from_outside_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tollbook.inference.prices.catalogue._MAX_CACHED_MODELS", 10)
    catalogue = PriceCatalogue()
    for number in range(50):
        assert not catalogue.knows(f"acme/{number}@preset", NOVEMBER_2026_MS)
    assert len(catalogue._found) <= 10


counts = st.integers(0, 300_000)


@given(prompt=counts, completion=counts, cached=counts, written=counts)
def test_no_usage_costs_more_than_the_highest_prices(prompt: int, completion: int, cached: int, written: int) -> None:
    price: ModelPrice = CATALOGUE.price("google/gemini-2.5-pro", NOVEMBER_2026_MS)
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached, cache_write_tokens=written)
    high_prompt, high_completion = price.max_prices(prompt)
    assert price.cost(usage) <= -(-(prompt * high_prompt + completion * high_completion) // 1_000_000)


@pytest.mark.parametrize(
    ("service_tier", "prompt", "completion"),
    [
        ("", 1_250, 10_000),
        ("flex", 625, 5_000),
        ("batch", 625, 5_000),
        ("priority", 2_500, 20_000),
        ("odd", 1_250, 10_000),
    ],
)
def test_processing_that_has_prices_of_its_own_is_priced_by_them(
    service_tier: str, prompt: int, completion: int
) -> None:
    # OpenAI's own prices of GPT-5, November 2026.
    own = PriceCatalogue(provider="openai")
    usage = Usage(prompt_tokens=10, completion_tokens=10)
    assert own.cost("gpt-5", usage, NOVEMBER_2026_MS, service_tier=service_tier) == 10 * prompt + 10 * completion


def test_cache_writes_cost_by_how_long_they_last() -> None:
    # Anthropic's own prices of Claude Sonnet 4: 3 dollars, writes for five minutes 3.75, for an hour 6.
    own = PriceCatalogue(provider="anthropic")
    usage = Usage(prompt_tokens=100, cache_write_tokens=60, cache_write_1h_tokens=20)
    expected = 40 * SONNET_IN + 40 * SONNET_WRITE + 20 * 6_000
    assert own.cost("claude-sonnet-4-0", usage, NOVEMBER_2026_MS) == expected


LIST: dict[str, dict[str, str]] = {"own/a": {"prompt": "0.000002", "completion": "0.000004"}}


def at_provider(**rule: Any) -> PriceCatalogue:
    """Return the prices of a provider of a policy, whose list has `own/a`; `[prices]` has `stated`."""
    policy = default_policy(
        {
            "prices": {"stated": {"prompt": 7, "completion": 8}},
            "providers": {"it": {"base_url": "https://it.test/v1", **rule}},
        }
    )
    lists = PriceLists()
    lists.add(LIST, 0)
    models = ModelCatalogue(lists_of=lambda _: lists)
    return PriceCatalogue.of_policy(policy, provider="openrouter", models=models).at("it")


@pytest.mark.parametrize(
    ("rule", "known"),
    [
        ({"dialect": "openrouter"}, ["own/a", "openai/gpt-4o-mini"]),
        ({"dialect": "openrouter", "prices_from": "catalogue"}, ["openai/gpt-4o-mini"]),
        ({"dialect": "openai"}, ["gpt-4o-mini"]),
        ({"dialect": "openai", "prices_from": "policy"}, []),
        ({"dialect": "anthropic"}, ["claude-haiku-4-5"]),
        ({"dialect": "compatible"}, []),
        ({"dialect": "compatible", "prices_from": "models"}, ["own/a"]),
        ({"dialect": "compatible", "catalogue": "groq"}, ["llama-3.3-70b-versatile"]),
        ({"dialect": "compatible", "catalogue": "groq", "prices_from": "models"}, ["own/a", "llama-3.3-70b-versatile"]),
        ({"dialect": "openai", "prices": {"Mine": {"prompt": 1, "completion": 2}}}, ["mine", "gpt-4o-mini"]),
    ],
)
def test_where_the_prices_of_a_provider_come_from(rule: dict[str, Any], known: list[str]) -> None:
    prices = at_provider(**rule)
    models = ("mine", "own/a", "openai/gpt-4o-mini", "gpt-4o-mini", "claude-haiku-4-5", "llama-3.3-70b-versatile")
    assert [model for model in models if prices.knows(model, NOVEMBER_2026_MS)] == known
    # What the policy states of a model counts at every provider.
    assert prices.price("stated", NOVEMBER_2026_MS).max_prices(0) == (7 * 10**9, 8 * 10**9)


def test_a_price_is_looked_for_at_every_provider() -> None:
    own = {"base_url": "https://it.test", "dialect": "compatible", "prices": {"mine": {"prompt": 1, "completion": 2}}}
    prices = PriceCatalogue.of_policy(default_policy({"providers": {"it": own}}), provider="openrouter")
    assert prices.price_anywhere("mine", NOVEMBER_2026_MS).max_prices(0) == (10**9, 2 * 10**9)
    assert prices.price_anywhere("openai/gpt-4o-mini", NOVEMBER_2026_MS).source.startswith("catalogue")
    with pytest.raises(PriceUnknown):
        prices.price_anywhere("nobody's", NOVEMBER_2026_MS)


def test_a_provider_that_is_gone_has_no_price() -> None:
    with pytest.raises(PriceUnknown, match="the policy has no price for it"):
        CATALOGUE.at("gone").price("openai/gpt-4o-mini", NOVEMBER_2026_MS)
    assert CATALOGUE.at("default") is CATALOGUE
