"""Usage in every provider's dialect: a drawn usage, reported their way, is priced at least at its true cost.

Where the report is consistent it is priced at exactly that. Prices are drawn too, so that no
reading is always the dearer one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tollbook.inference.attempts import Attempt
from tollbook.inference.bounds import Bound
from tollbook.inference.calls.holds import charge_of, with_costliest_usage
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice, tier_from_usd
from tollbook.inference.providers.usage_report import UsageReport, read_usage
from tollbook.schemas.usage import MAX_TOKEN_COUNT, Usage


@dataclass(frozen=True)
class Used:
    """What was used, each token counted once."""

    fresh: int
    cached: int
    written_5m: int
    written_1h: int
    text: int
    reasoning: int

    @property
    def written(self) -> int:
        return self.written_5m + self.written_1h

    @property
    def prompt(self) -> int:
        return self.fresh + self.cached + self.written

    @property
    def completion(self) -> int:
        return self.text + self.reasoning

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt,
            completion_tokens=self.completion,
            cached_tokens=self.cached,
            cache_write_tokens=self.written,
            cache_write_1h_tokens=self.written_1h,
            reasoning_tokens=self.reasoning,
        )


def lifetimes(used: Used) -> dict[str, int]:
    return {"ephemeral_5m_input_tokens": used.written_5m, "ephemeral_1h_input_tokens": used.written_1h}


def openai(used: Used) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.total,
        "prompt_tokens_details": {
            "cached_tokens": used.cached,
            "cache_write_tokens": used.written,
            "cache_creation_token_details": lifetimes(used),
        },
        "completion_tokens_details": {"reasoning_tokens": used.reasoning},
    }


def openai_without_total(used: Used) -> dict[str, Any]:
    return {name: value for name, value in openai(used).items() if name != "total_tokens"}


def responses(used: Used) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt,
        "output_tokens": used.completion,
        "total_tokens": used.total,
        "input_tokens_details": {
            "cached_tokens": used.cached,
            "cache_write_tokens": used.written,
            "cache_creation_token_details": lifetimes(used),
        },
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
    }


def xai(used: Used) -> dict[str, Any]:
    return openai(used) | {"completion_tokens": used.text}


def writes_beside(used: Used) -> dict[str, Any]:
    return openai(used) | {"prompt_tokens": used.fresh + used.cached}


def all_beside(used: Used) -> dict[str, Any]:
    return openai(used) | {"prompt_tokens": used.fresh, "completion_tokens": used.text}


def anthropic(used: Used) -> dict[str, Any]:
    return {
        "input_tokens": used.fresh,
        "output_tokens": used.completion,
        "cache_read_input_tokens": used.cached,
        "cache_creation_input_tokens": used.written,
        "cache_creation": lifetimes(used),
    }


def anthropic_with_total(used: Used) -> dict[str, Any]:
    return anthropic(used) | {"total_tokens": used.total}


def anthropic_with_small_total(used: Used) -> dict[str, Any]:
    return anthropic(used) | {"total_tokens": used.fresh + used.completion}


def anthropic_in_openai_names(used: Used) -> dict[str, Any]:
    renamed = {"prompt_tokens": used.fresh, "completion_tokens": used.completion}
    return {
        name: value for name, value in anthropic(used).items() if "put_tokens" not in name or "cache" in name
    } | renamed


def litellm(used: Used) -> dict[str, Any]:
    names = ("cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation")
    return openai(used) | {name: anthropic(used)[name] for name in names}


def gemini(used: Used) -> dict[str, Any]:
    report = {
        "promptTokenCount": used.prompt,
        "candidatesTokenCount": used.text,
        "thoughtsTokenCount": used.reasoning,
        "cachedContentTokenCount": used.cached,
        "totalTokenCount": used.total,
    }
    # What is zero is left out, and writes have no name.
    return {name: count for name, count in report.items() if count or name == "promptTokenCount"}


def gemini_compatible(used: Used) -> dict[str, Any]:
    return {"prompt_tokens": used.prompt, "completion_tokens": used.text, "total_tokens": used.total}


def deepseek(used: Used) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.total,
        "prompt_cache_hit_tokens": used.cached,
        "prompt_cache_miss_tokens": used.fresh,
        "completion_tokens_details": {"reasoning_tokens": used.reasoning},
    }


def mistral(used: Used) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.total,
        "num_cached_tokens": used.cached,
    }


def bare(used: Used) -> dict[str, Any]:
    return {"prompt_tokens": used.prompt, "completion_tokens": used.completion, "total_tokens": used.total}


def gemini_in_snake_case(used: Used) -> dict[str, Any]:
    return {
        "prompt_token_count": used.prompt,
        "candidates_token_count": used.text,
        "thoughts_token_count": used.reasoning,
        "cached_content_token_count": used.cached,
        "total_token_count": used.total,
    }


def gemini_with_tools(used: Used) -> dict[str, Any]:
    """Tokens of what its own tools have found stand beside the prompt."""
    found = used.fresh // 2
    return gemini(used) | {"promptTokenCount": used.prompt - found, "toolUsePromptTokenCount": found}


def bedrock(used: Used) -> dict[str, Any]:
    return {
        "inputTokens": used.fresh,
        "outputTokens": used.completion,
        "totalTokens": used.total,
        "cacheReadInputTokens": used.cached,
        "cacheWriteInputTokens": used.written,
    }


def bedrock_without_total(used: Used) -> dict[str, Any]:
    return {name: count for name, count in bedrock(used).items() if name != "totalTokens"}


def bedrock_metrics(used: Used) -> dict[str, Any]:
    return {
        "inputTokenCount": used.fresh,
        "outputTokenCount": used.completion,
        "cacheReadInputTokenCount": used.cached,
        "cacheWriteInputTokenCount": used.written,
    }


def anthropic_with_empty_details(used: Used) -> dict[str, Any]:
    return anthropic(used) | {"input_tokens_details": None, "prompt_tokens_details": {}}


def camel_case(used: Used) -> dict[str, Any]:
    return {"promptTokens": used.prompt, "completionTokens": used.completion, "totalTokens": used.total}


def cohere(used: Used) -> dict[str, Any]:
    counts = {"input_tokens": used.prompt, "output_tokens": used.completion}
    return {"billed_units": counts, "tokens": counts}


def ollama(used: Used) -> dict[str, Any]:
    return {"prompt_eval_count": used.prompt, "eval_count": used.completion}


def vercel(used: Used) -> dict[str, Any]:
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.completion,
        "total_tokens": used.total,
        "cache_write_input_tokens": used.written,
        "cached_tokens": used.cached,
        "reasoning_tokens": used.reasoning,
        "cache_creation": lifetimes(used),
    }


def total_alone(used: Used) -> dict[str, Any]:
    return {"total_tokens": used.total}


def no_completion(used: Used) -> dict[str, Any]:
    return {"prompt_tokens": used.prompt, "total_tokens": used.total}


WRITES = {openai, openai_without_total, responses, xai, writes_beside, all_beside, anthropic, anthropic_with_total,
          anthropic_with_small_total, anthropic_in_openai_names, litellm, bedrock, vercel,
          bedrock_without_total, bedrock_metrics, anthropic_with_empty_details}  # fmt: skip
NO_CACHE = {bare, ollama, cohere, camel_case, gemini_compatible, total_alone, no_completion}
DISAGREE = (anthropic_with_small_total, anthropic_in_openai_names, bedrock, bedrock_without_total, bedrock_metrics,
            gemini_compatible, total_alone)  # fmt: skip
"""Dialects whose reports cannot say what was used."""
DIALECTS: list[Callable[[Used], dict[str, Any]]] = [
    openai, openai_without_total, responses, xai, writes_beside, all_beside, anthropic, anthropic_with_total,
    anthropic_with_small_total, anthropic_in_openai_names, litellm, gemini, gemini_in_snake_case, gemini_with_tools,
    gemini_compatible, deepseek, mistral, bare, ollama, bedrock, vercel, total_alone, no_completion,
    bedrock_without_total, bedrock_metrics, anthropic_with_empty_details, cohere, camel_case,
]  # fmt: skip

counts = st.one_of(st.just(0), st.integers(1, 9), st.integers(1, 300_000))
useds = st.builds(Used, counts, counts, counts, counts, counts, counts)
NOTHING = [Decimal(0)] * 4
dollars = st.decimals(0, 50, places=3)


@st.composite
def model_prices(draw: st.DrawFn) -> ModelPrice:
    """Draw prices of each kind of tokens, in any order of size; a longer prompt makes none of them lower."""
    starts = (-1, *sorted(draw(st.sets(st.sampled_from((10, 1_000, 200_000)), max_size=2))))
    kinds = [sorted(draw(st.lists(dollars, min_size=len(starts), max_size=len(starts)))) for _ in range(5)]
    tiers = []
    for start, (prompt, completion, cached, written, written_1h) in zip(starts, zip(*kinds, strict=True), strict=True):
        # Writes below the prompt's price would be taken for storage on top of it.
        tiers.append(tier_from_usd(start, prompt, completion, cached, prompt + written, prompt + written_1h))
    return ModelPrice("m", tuple(tiers), request_nanousd=draw(st.integers(0, 10**7)))


def booked(report: UsageReport, price: ModelPrice) -> tuple[int, str | None]:
    """What an attempt with this report is charged at, and its doubt."""
    attempt = Attempt(
        outcome="ok",
        charge="known",
        latency_ms=1,
        usage=report.usage,
        other_readings=report.readings[1:],
        usage_doubt=report.doubt,
        reported_cost_nanousd=report.cost_nanousd,
        fee_nanousd=report.fee_nanousd,
    )
    prices = PriceCatalogue({"m": [DatedPrice(FOREVER_MS, price)]})
    bound = Bound("m", 1, 1, 1, 1, 0, 1, 1)
    chosen = with_costliest_usage(attempt, bound, prices, 0)
    return charge_of(chosen, bound, prices, 0).nanousd, chosen.usage_doubt


def expressible(used: Used, dialect: Callable[[Used], dict[str, Any]]) -> Used:
    """Leave out the kinds of tokens for which a dialect has no word."""
    written = (used.written_5m, used.written_1h) if dialect in WRITES else (0, 0)
    cached = 0 if dialect in NO_CACHE else used.cached
    return Used(used.fresh, cached, *written, used.text, used.reasoning)


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.__name__)
@given(used=useds, price=model_prices())
@example(Used(12, 0, 16_000, 0, 2, 0), ModelPrice("m", (tier_from_usd(-1, *map(Decimal, (3, 15, 3, 4, 6))),)))
@example(
    Used(11, 0, 0, 0, 0, 1),
    # Only a prompt that just reaches the second tier makes the completion dear.
    ModelPrice("m", (tier_from_usd(-1, *NOTHING), tier_from_usd(10, Decimal(0), Decimal(1), *NOTHING[:2]))),
)
@example(Used(32, 0, 0, 0, 237, 1_901), ModelPrice("m", (tier_from_usd(-1, *map(Decimal, (3, 15, 3, 4, 6))),)))
def test_booked_cost_is_at_least_the_true_one(
    dialect: Callable[[Used], dict[str, Any]], used: Used, price: ModelPrice
) -> None:
    used = expressible(used, dialect)
    report = read_usage(dialect(used))
    if not report.readings:
        assert used.total == 0
        return
    cost, doubt = booked(report, price)
    assert cost >= price.cost(used.usage)
    if doubt is None:
        # What is not doubted is exact, whatever the dialect.
        assert cost == price.cost(used.usage)


@pytest.mark.parametrize(
    "dialect", [each for each in DIALECTS if each not in DISAGREE], ids=lambda dialect: dialect.__name__
)
def test_consistent_report_is_read_without_doubt(dialect: Callable[[Used], dict[str, Any]]) -> None:
    # No two of these numbers, and no two sums of them, are the same.
    used = expressible(Used(1_000, 200, 30, 4, 50_000, 600_000), dialect)
    report = read_usage(dialect(used))
    assert report.doubt is None
    assert [usage.model_copy(update={"reasoning_tokens": 0}) for usage in report.readings] == [
        used.usage.model_copy(update={"reasoning_tokens": 0})
    ]


@pytest.mark.parametrize("dialect", DISAGREE, ids=lambda dialect: dialect.__name__)
def test_report_that_disagrees_is_doubted(dialect: Callable[[Used], dict[str, Any]]) -> None:
    used = expressible(Used(1_000, 200, 30, 4, 50_000, 600_000), dialect)
    assert read_usage(dialect(used)).doubt or len(read_usage(dialect(used)).readings) > 1


@given(used=useds, price=model_prices(), total=st.integers(0, 2_000_000))
def test_a_wrong_total_never_makes_a_call_cheaper(used: Used, price: ModelPrice, total: int) -> None:
    report = read_usage(openai(used) | {"total_tokens": total})
    assert booked(report, price)[0] >= price.cost(used.usage)
    # Where the total counts reasoning beside the completion, as some servers do, all numbers agree.
    assert total in (used.total, used.total + used.reasoning) or report.doubt


@given(used=useds, price=model_prices(), form=st.sampled_from(["float", "digits", "decimal"]))
def test_form_of_a_number_does_not_matter(used: Used, price: ModelPrice, form: str) -> None:
    def formed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: formed(each) for name, each in value.items()}
        return {"float": Decimal(f"{value}.0"), "digits": str(value), "decimal": Decimal(value)}[form]

    assert booked(read_usage(formed(xai(used))), price) == booked(read_usage(xai(used)), price)


def test_cache_writes_of_an_unknown_lifetime_cost_the_dearer_one() -> None:
    report = read_usage(
        {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cache_write_tokens": 50}}
    )
    price = ModelPrice("m", (tier_from_usd(-1, *map(Decimal, (3, 15, 3, 4, 6))),))
    cost, doubt = booked(report, price)
    assert cost == 50 * 3_000 + 50 * 6_000 + 1 * 15_000
    assert doubt
    same = ModelPrice("m", (tier_from_usd(-1, *map(Decimal, (3, 15, 3, 4))),))
    assert booked(report, same) == (50 * 3_000 + 50 * 4_000 + 1 * 15_000, None)


@pytest.mark.parametrize(("tier", "is_doubted"), [("", False), ("flex", False), ("priority", True), ("fast", True)])
def test_dear_processing_without_a_price_of_its_own_is_doubted(tier: str, is_doubted: bool) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    attempt = Attempt(outcome="ok", charge="known", latency_ms=1, usage=usage, service_tier=tier)
    price = ModelPrice("m", (tier_from_usd(-1, *map(Decimal, (3, 15, 3, 4))),))
    prices = PriceCatalogue({"m": [DatedPrice(FOREVER_MS, price)]})
    chosen = with_costliest_usage(attempt, Bound("m", 1, 1, 1, 1, 0, 1, 1), prices, 0)
    assert (chosen.usage_doubt is not None) == is_doubted


def test_split_that_leaves_writes_open_takes_them_for_the_dearer_kind() -> None:
    usage = {"input_tokens": 1, "output_tokens": 1, "cache_creation_input_tokens": 50}
    report = read_usage({**usage, "cache_creation": {"ephemeral_5m_input_tokens": 20}})
    assert max(usage.cache_write_1h_tokens for usage in report.readings) == 30
    assert report.doubt


def test_writes_that_cannot_be_read_are_all_that_was_not_cached() -> None:
    report = read_usage({"prompt_tokens": 100, "completion_tokens": 1, "cache_write_tokens": "many"})
    assert {usage.cache_write_tokens for usage in report.readings} == {0, 100}
    assert report.doubt == "a number of tokens cannot be read"


def test_sum_that_is_not_a_count_is_not_read() -> None:
    report = read_usage({"input_tokens": MAX_TOKEN_COUNT, "output_tokens": 1, "cache_read_input_tokens": 1})
    assert all(usage.prompt_tokens <= MAX_TOKEN_COUNT for usage in report.readings)
