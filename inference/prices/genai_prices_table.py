"""Reading the table of genai-prices as exact integers: dated prices in tiers.

Every rule here prefers the higher price, since bounds are computed from these prices. Models whose price the table
cannot express are refused: routers and presets, which choose the model themselves; variants that bill for more than
tokens (`:online`), or may have another price (`:thinking`); models that bill for their own web searches; and models
without a price for text.
"""

from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import cache
from importlib.metadata import version
from typing import Final

from genai_prices import data_snapshot
from genai_prices.types import ModelInfo, StartDateConstraint, TieredPrices, TimeOfDateConstraint
from genai_prices.types import ModelPrice as ListedPrice

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice, PriceTier, tier_from_usd
from tollbook.schemas.money import nanousd_from_usd

_REFUSED_SUFFIXES: Final = {
    ":online": "it bills for each web search",
    ":batch": "batch prices are not valid for chat completions",
}
# With these suffixes OpenRouter chooses among the endpoints of the same model, by speed, price or quality of tool
# calls. It uses no endpoint above the bound, which each request has as `provider.max_price` (November 2026).
_CHOOSING_SUFFIXES: Final = (":nitro", ":floor", ":exacto")
# Variants with their own price, refused if the table does not list them.
_UNLISTED_SUFFIXES: Final = {
    ":thinking": "tokens of this variant may have another price than the model's own",
    ":free": "the price catalogue has no free variant of this model",
    ":extended": "this variant may have another price than the model's own",
}
_OPENROUTER: Final = "openrouter"
_REFUSED_PARTS: Final = {
    "perplexity/sonar": "it bills for each web search, at a price that the catalogue does not have",
    "-search-preview": "it bills for each web search",
    "-deep-research": "it bills for each web search",
    "-image": "it makes images, whose price the catalogue does not have",
    "-audio": "it makes audio, whose price the catalogue does not have",
}
# Prices that a text-only request without plugins does not need.
_IRRELEVANT: Final = ("audio", "image", "video", "document", "searches")
# The table's names for how a request is processed: OpenAI's and Google's tier, batches, Anthropic's fast mode.
_TIER_NAMES: Final[tuple[str, ...]] = ("service_tier", "processing", "speed")
_MEDIA: Final = ("image", "audio", "video")
_RELEVANT: Final = {
    "input_mtok",
    "output_mtok",
    "output_reasoning_mtok",
    "cache_read_mtok",
    "cache_write_mtok",
    "cache_write_1h_mtok",
    "requests_kcount",
}


def prices_of(model: str, provider_id: str, service_tier: str = "") -> tuple[DatedPrice, ...]:
    """Return a model's listed prices, oldest first; the first has no start date. Errors: PriceUnknown.

    For a service tier without its own prices, return the usual prices.
    """
    refuse_unpriceable(model)
    snapshot = data_snapshot.get_snapshot()
    provider = data_snapshot.find_provider_by_id(snapshot.providers, provider_id)
    if provider is None:
        raise PriceUnknown.of_model(
            model,
            f"the price catalogue has no provider {provider_id}; correct TOLLBOOK_PRICE_PROVIDER, or the provider's "
            "`catalogue` in the policy",
        )
    info = provider.find_model(model, all_providers=snapshot.providers)
    if info is None and provider_id == _OPENROUTER:
        base, colon, name = model.rpartition(":")
        suffix = (colon + name).lower()
        if suffix in _CHOOSING_SUFFIXES:
            return prices_of(base, provider_id)
        if suffix in _UNLISTED_SUFFIXES:
            raise PriceUnknown.of_model(model, f"{_UNLISTED_SUFFIXES[suffix]}; set it in TOLLBOOK_PRICES")
    if info is None:
        raise PriceUnknown.of_model(
            model, f"the price catalogue does not list it for {provider_id}; set it in TOLLBOOK_PRICES"
        )
    moments = [(FOREVER_MS, datetime.min.replace(tzinfo=UTC))]
    for start in _start_dates(info):
        midnight = datetime.combine(start, time.min, UTC)
        moments.append((round(midnight.timestamp()) * 1000, midnight))
    return tuple(
        DatedPrice(from_ms, replace(_price_at(model, info, moment, service_tier), source=_source()))
        for from_ms, moment in moments
    )


def context_tokens(model: str, provider_id: str) -> int | None:
    """Return a model's context length in tokens; None if the table does not have it."""
    snapshot = data_snapshot.get_snapshot()
    provider = data_snapshot.find_provider_by_id(snapshot.providers, provider_id)
    info = provider.find_model(model, all_providers=snapshot.providers) if provider else None
    return info.context_window if info else None


@cache
def _source() -> str:
    return f"catalogue {version('genai-prices')}"


def refuse_unpriceable(model: str) -> None:
    """Refuse a model whose calls can cost more than tokens, whatever the source of its price. Errors: PriceUnknown."""
    name = model.lower()
    for suffix, why in _REFUSED_SUFFIXES.items():
        if name.endswith(suffix):
            raise PriceUnknown.of_model(model, why)
    for part, why in _REFUSED_PARTS.items():
        if part in name:
            raise PriceUnknown.of_model(model, why)
    if "@" in name or name.startswith(("openrouter/", "~")):
        raise PriceUnknown.of_model(model, "it is a router, preset or alias, which can pick any model")


def _conditions(info: ModelInfo) -> list[StartDateConstraint | TimeOfDateConstraint]:
    usual = [] if isinstance(info.prices, ListedPrice) else info.prices
    conditions = [each.constraint for each in (*usual, *(info.price_variants or ()))]
    return [condition for condition in conditions if condition is not None]


def _start_dates(info: ModelInfo) -> list[date]:
    return sorted({each.start_date for each in _conditions(info) if isinstance(each, StartDateConstraint)})


def _price_at(model: str, info: ModelInfo, midnight: datetime, service_tier: str) -> ModelPrice:
    """Return the price of a day; if prices depend on the hour, the highest price of each class of tokens."""
    moments = [midnight]
    for each in _conditions(info):
        if isinstance(each, TimeOfDateConstraint):
            for clock in (each.start_time, each.end_time):
                hour = clock.replace(tzinfo=None)
                moments.append(midnight + timedelta(hours=hour.hour, minutes=hour.minute, seconds=hour.second))
    context: dict[str, str] | None = dict.fromkeys(_TIER_NAMES, service_tier) if service_tier else None
    prices = [_model_price(model, info.get_prices(moment, context)) for moment in moments]
    return prices[0] if len(prices) == 1 else _highest_of(model, prices)


def _highest_of(model: str, prices: list[ModelPrice]) -> ModelPrice:
    starts = sorted({tier.above_prompt_tokens for price in prices for tier in price.tiers})
    tiers: list[PriceTier] = []
    for start in starts:
        choices = [price.tier_at(start + 1) for price in prices]
        tiers.append(
            PriceTier(
                above_prompt_tokens=start,
                prompt_nanousd_per_mtok=max(tier.prompt_nanousd_per_mtok for tier in choices),
                completion_nanousd_per_mtok=max(tier.completion_nanousd_per_mtok for tier in choices),
                cached_nanousd_per_mtok=max(tier.cached_nanousd_per_mtok for tier in choices),
                cache_write_nanousd_per_mtok=max(tier.cache_write_nanousd_per_mtok for tier in choices),
                cache_write_1h_nanousd_per_mtok=max(tier.cache_write_1h_nanousd_per_mtok for tier in choices),
            )
        )
    return ModelPrice(
        model,
        tuple(tiers),
        request_nanousd=max(price.request_nanousd for price in prices),
        has_completion=all(price.has_completion for price in prices),
        media=tuple((kind, max(price.media_price(kind) or 0 for price in prices)) for kind, _ in prices[0].media),
    )


def _model_price(model: str, listed: ListedPrice) -> ModelPrice:
    prices = {name: value for name, value in vars(listed).items() if value is not None and not name.startswith("_")}
    unknown = [name for name in prices if name not in _RELEVANT and not any(part in name for part in _IRRELEVANT)]
    if unknown:
        raise PriceUnknown.of_model(model, f"it is billed by {', '.join(unknown)} too")
    if not prices.keys() & {"input_mtok", "output_mtok"} and model.lower().endswith(":free"):
        return ModelPrice(model, (tier_from_usd(-1, Decimal(0), Decimal(0), None, None),))
    outputs = [name for name in prices if name.startswith("output_") and any(part in name for part in _MEDIA)]
    if outputs:
        raise PriceUnknown.of_model(model, f"it is billed by {', '.join(outputs)} too")
    if "input_mtok" not in prices:
        raise PriceUnknown.of_model(model, "the price catalogue has no price for text")
    starts = {tier.start for value in prices.values() if isinstance(value, TieredPrices) for tier in value.tiers}

    def highest(start: int, *names: str) -> Decimal | None:
        values = [_value_above(prices[name], start) for name in names if name in prices]
        return max(values, default=None)

    tiers = tuple(
        tier_from_usd(
            start,
            highest(start, "input_mtok") or Decimal(0),
            highest(start, "output_mtok", "output_reasoning_mtok") or Decimal(0),
            highest(start, "cache_read_mtok"),
            highest(start, "cache_write_mtok"),
            highest(start, "cache_write_1h_mtok"),
        )
        for start in sorted({-1, *starts})
    )
    per_thousand_requests = highest(-1, "requests_kcount") or Decimal(0)
    return ModelPrice(
        model,
        tiers,
        request_nanousd=nanousd_from_usd(per_thousand_requests / 1000),
        has_completion="output_mtok" in prices,
        media=tuple(
            (kind, nanousd_from_usd(usd)) for kind in _MEDIA if (usd := highest(-1, f"input_{kind}_mtok")) is not None
        ),
    )


def _value_above(value: Decimal | TieredPrices, start: int) -> Decimal:
    """Return the price of a request whose prompt has just more than `start` tokens."""
    if isinstance(value, Decimal):
        return value
    return next((tier.price for tier in reversed(value.tiers) if start >= tier.start), value.base)
