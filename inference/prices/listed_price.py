"""Prices that a provider lists in `/models`, in OpenRouter's form: strings, in dollars per token, request or image.

No entry is trusted. If a price is missing, negative (a router, whose price is unknown) or in another form, the model's
whole entry counts as unknown, since a bound from a part of it could be too low (G1). JSON numbers are refused too:
other servers list dollars per million tokens under the same names, as numbers.
"""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, Final, TypeAlias, cast

from tollbook.inference.prices.model_price import ModelPrice, PriceTier, tier_from_usd
from tollbook.schemas.money import MoneyError, nanousd_from_usd

_TOKENS_PER_MTOK: Final = 1_000_000
_DECIMAL: Final = re.compile(r"[0-9]{1,12}(\.[0-9]{1,24})?([eE]-?[0-9]{1,2})?")
# The most expensive model costs 0.0006 dollars per token (November 2026). A price a hundred times as high must be in
# another unit.
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
# Prices that Tollbook's calls do not need: images and sounds that a model makes, and searches that were not requested.
_IRRELEVANT: Final = ("audio", "image", "video", "document", "search", "discount")
# Conditions of an override. The other conditions than the first count as met, so that the highest price is taken.
_MIN_PROMPT: Final = "min_prompt_tokens"
_CONDITIONS: Final = ("utc_start", "utc_end")

Pricing: TypeAlias = Mapping[str, Any]
"""The `pricing` of a model as listed by the provider."""


def read_pricing(model: str, pricing: object) -> ModelPrice | None:
    """Return the price of an entry, rounded up to whole nano-dollars; None if the entry is unknown.

    If prices depend on the hour, the highest price of each class of tokens is taken.
    """
    try:
        return _model_price(model, _table(pricing))
    except (_Unreadable, MoneyError):
        return None


def relevant_pricing(pricing: Pricing) -> dict[str, Any]:
    """Return the part of a readable entry that its price depends on; only this part is stored."""
    kept = {name: pricing[name] for name in _PRICES if pricing.get(name) is not None}
    overrides = pricing.get("overrides")
    if overrides:
        names = (*_PRICES, _MIN_PROMPT)
        kept["overrides"] = [{name: each[name] for name in names if each.get(name) is not None} for each in overrides]
    return kept


class _Unreadable(Exception):
    """The entry has no price that can be trusted."""


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
    """Yield the prices of each override, with the number of prompt tokens above which it applies."""
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
    """Read the prices of a table. A price under an unknown name must be zero."""
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
    # If image tokens cost more, the price is unusable: it is unknown how many of the prompt's tokens are image tokens.
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
    """Return the highest of these prices, token prices per million tokens; None if there is none."""
    values = [choice[name] for choice in choices for name in names if name in choice]
    if not values:
        return None
    return max(values) * (_TOKENS_PER_MTOK if names[0] in _TOKEN_PRICES else 1)
