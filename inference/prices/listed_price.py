"""Prices as a provider lists them in `/models`, in OpenRouter's form: text, in dollars per token, request or image.

Nothing here is trusted. A price that is missing, negative (a router, whose price nobody knows) or not in this form
makes the model's whole entry unknown: a part of it would be a bound that does not hold (G1). Numbers are refused too,
since other servers list dollars per million tokens under the same names, as numbers.
"""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final, TypeAlias, cast

from tollbook.inference.prices.model_price import ModelPrice, PriceTier, tier_from_usd
from tollbook.schemas.money import MoneyError, nanousd_from_usd

_TOKENS_PER_MTOK: Final = 1_000_000
_DECIMAL: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,24})?([eE]-?[0-9]{1,2})?")
# The dearest model costs 0.0006 dollars a token (November 2026). What is a hundred times that has another unit.
_MAX_USD_PER_TOKEN: Final = Decimal("0.06")
_TOKEN_PRICES: Final = (
    "prompt",
    "completion",
    "internal_reasoning",
    "input_cache_read",
    "input_cache_write",
    "input_cache_write_1h",
    "image_token",
    "audio",
)
_PRICES: Final = (*_TOKEN_PRICES, "request", "image")
# What the calls of Tollbook do not use: pictures and sounds that a model makes, and searches that nobody asked for.
_IRRELEVANT: Final = ("audio", "image", "video", "document", "search", "discount")
# Conditions of an override. All but the first count as met, so that the highest price is taken.
_MIN_PROMPT: Final = "min_prompt_tokens"
_CONDITIONS: Final = ("utc_start", "utc_end")

Pricing: TypeAlias = Mapping[str, Any]
"""The `pricing` of a model, as the provider lists it."""


def read_pricing(model: str, pricing: object) -> ModelPrice | None:
    """Return the price that an entry states, rounded up to whole nano-dollars; None where it states none.

    Of prices that hold at some hours only, the highest of each class of tokens counts.
    """
    try:
        return _model_price(model, _table(pricing))
    except (_Unreadable, MoneyError):
        return None


def relevant_pricing(pricing: Pricing) -> dict[str, Any]:
    """Return what of a readable entry makes its price: what is kept of it."""
    kept = {name: pricing[name] for name in _PRICES if pricing.get(name) is not None}
    overrides = pricing.get("overrides")
    if overrides:
        names = (*_PRICES, _MIN_PROMPT)
        kept["overrides"] = [{name: each[name] for name in names if each.get(name) is not None} for each in overrides]
    return kept


class _Unreadable(Exception):
    """The entry states no price that can be trusted."""


def _table(value: object) -> Pricing:
    if not isinstance(value, Mapping):
        raise _Unreadable
    return cast("Pricing", value)


def _model_price(model: str, pricing: Pricing) -> ModelPrice:
    base = _prices(pricing, ignored=("overrides",))
    if "prompt" not in base or "completion" not in base:
        raise _Unreadable
    overrides = list(_overrides(pricing.get("overrides")))
    starts = sorted({-1, *(above for above, _ in overrides)})
    tiers = tuple(
        _tier(above, [base, *({**base, **prices} for start, prices in overrides if start <= above)]) for above in starts
    )
    everything = [base, *(prices for _, prices in overrides)]
    request, image = (_highest(everything, name) or Decimal(0) for name in ("request", "image"))
    audio = _highest(everything, "audio")
    return ModelPrice(
        model,
        tiers,
        request_nanousd=nanousd_from_usd(request),
        image_nanousd=nanousd_from_usd(image),
        media=() if audio is None else (("audio", nanousd_from_usd(audio)),),
    )


def _overrides(value: object) -> Iterable[tuple[int, dict[str, Decimal]]]:
    """Yield each override as what a prompt must have more tokens than, and its prices."""
    if value is None:
        return
    if not isinstance(value, list):
        raise _Unreadable
    for each in cast("list[object]", value):
        table = _table(each)
        least = table.get(_MIN_PROMPT, 0)
        if type(least) is not int or not 0 <= least <= 2**53:
            raise _Unreadable
        yield least - 1, _prices(table, ignored=(_MIN_PROMPT, *_CONDITIONS))


def _prices(table: Pricing, *, ignored: tuple[str, ...]) -> dict[str, Decimal]:
    """Read the prices of a table. A price of a name that is not known must be nothing."""
    found: dict[str, Decimal] = {}
    for name, value in table.items():
        if name in ignored or value is None:
            continue
        if name in _PRICES:
            found[name] = _dollars(value)
            if name in _TOKEN_PRICES and found[name] > _MAX_USD_PER_TOKEN:
                raise _Unreadable
        elif not any(part in name for part in _IRRELEVANT) and _dollars(value):
            raise _Unreadable
    return found


def _dollars(value: object) -> Decimal:
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise _Unreadable
    return Decimal(value)


def _tier(above_prompt_tokens: int, choices: list[dict[str, Decimal]]) -> PriceTier:
    prompt, written, written_1h = (
        _highest(choices, name) for name in ("prompt", "input_cache_write", "input_cache_write_1h")
    )
    image_token = _highest(choices, "image_token")
    # Where tokens of images cost more than others, nobody knows how many of the prompt's tokens they are.
    if prompt is None or (image_token is not None and image_token > prompt):
        raise _Unreadable
    return tier_from_usd(
        above_prompt_tokens,
        prompt,
        _highest(choices, "completion", "internal_reasoning") or Decimal(0),
        _highest(choices, "input_cache_read"),
        written,
        written_1h,
    )


def _highest(choices: list[dict[str, Decimal]], *names: str) -> Decimal | None:
    """Return the highest of these prices, those of tokens per million; None where none is stated."""
    values = [choice[name] for choice in choices for name in names if name in choice]
    if not values:
        return None
    return max(values) * (_TOKENS_PER_MTOK if names[0] in _TOKEN_PRICES else 1)
