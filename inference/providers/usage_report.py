"""What a reply reports of tokens and cost. What is no count and no amount of money is not accepted."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, cast

from tollbook.schemas.money import MoneyError, check_nanousd, nanousd_from_usd
from tollbook.schemas.usage import MAX_TOKEN_COUNT, Usage


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The usage and the cost of a reply; None where it is not reported, or cannot be right."""

    usage: Usage | None
    cost_nanousd: int | None
    warning: str | None = None


_NOTHING: Final = UsageReport(None, None)


def read_usage(reported: object) -> UsageReport:
    """Read a reply's `usage` object, parsed with `parse_float=Decimal`."""
    if not isinstance(reported, dict):
        return _NOTHING
    fields = cast(dict[str, Any], reported)
    cost, warning = _cost(fields)
    prompt, completion = _count(fields.get("prompt_tokens")), _count(fields.get("completion_tokens"))
    if prompt is None or completion is None:
        return UsageReport(None, cost, warning)
    prompt_details, completion_details = fields.get("prompt_tokens_details"), fields.get("completion_tokens_details")
    cached = min(_detail(prompt_details, "cached_tokens"), prompt)
    usage = Usage.model_construct(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=cached,
        cache_write_tokens=min(_detail(prompt_details, "cache_write_tokens"), prompt - cached),
        reasoning_tokens=min(_detail(completion_details, "reasoning_tokens"), completion),
    )
    return UsageReport(usage, cost, warning)


def read_cost(usd: object) -> int | None:
    """Return a cost in nano-dollars; None where there is none. Errors: MoneyError where it is no amount of money."""
    if usd is None:
        return None
    if isinstance(usd, Decimal | int | str):
        return nanousd_from_usd(usd)
    raise MoneyError("the cost is not a number")


def _cost(fields: dict[str, Any]) -> tuple[int | None, str | None]:
    try:
        cost = read_cost(fields.get("cost"))
        # With the user's own provider key, `cost` is OpenRouter's fee, and the provider bills the rest (November 2026).
        if cost is not None and fields.get("is_byok") is True:
            details = cast(dict[str, Any], fields.get("cost_details") or {})
            upstream = read_cost(details.get("upstream_inference_cost"))
            if upstream is None:
                return None, "the cost under the user's own provider key is not reported"
            cost = check_nanousd(cost + upstream)
    except (MoneyError, AttributeError):
        return None, "the reported cost is no amount of money and was ignored"
    return cost, None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_TOKEN_COUNT else None


def _detail(details: object, name: str) -> int:
    """Return how many tokens are of one kind. Not reported counts as none, which gives the higher cost."""
    if not isinstance(details, dict):
        return 0
    return _count(cast(dict[str, Any], details).get(name)) or 0
