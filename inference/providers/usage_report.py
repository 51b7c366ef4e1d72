"""Reading the tokens and the cost that a reply reports. Invalid counts and amounts are not accepted.

A reported cost takes precedence over a cost computed from tokens. If the reported numbers disagree, the costlier
reading is taken, and a doubt says why.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from typing import Any, Final, cast

from tollbook.inference.providers.json_values import single
from tollbook.inference.providers.media_counts import media_counts, with_media
from tollbook.inference.providers.token_counts import PART_TOO_LARGE, TokenReadings, read_tokens
from tollbook.schemas.money import MoneyError, check_nanousd, nanousd_from_usd
from tollbook.schemas.usage import MediaUsage, Usage

# xAI reports its charge in ticks: 10,000,000,000 ticks are a dollar (November 2026).
_TICKS_PER_NANOUSD: Final = 10
_NO_MONEY: Final = "the reported cost is no amount of money and was ignored"
_COSTS_DIFFER: Final = "the reply reports several costs, and the highest was taken"
_TWO_USAGES: Final = "the reply reports two usages, which differ"
# Other names of the cost: DeepInfra's is `estimated_cost`. A zero under these names may mean an unknown price.
_FURTHER_COSTS: Final = ("total_cost", "estimated_cost", "cost_usd", "total_cost_usd")
_TOTALS: Final = ("total_cost", "total", "total_usd")
"""The names of the total in a cost that is an object."""
_AMOUNT: Final = re.compile(r"\s*\$?\s*([0-9]*\.?[0-9]+([eE][+-]?[0-9]{1,3})?)\s*(USD)?\s*", re.ASCII)
"""An amount of dollars as text."""
_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The usage and the cost of a reply; empty if they are not reported, or are invalid.

    `readings` are the possible readings of the token counts. `fee_nanousd` was charged in addition to the tokens.
    `has_zero`: the report has zero prompt or completion tokens.
    """

    readings: tuple[Usage, ...] = ()
    cost_nanousd: int | None = None
    fee_nanousd: int = 0
    doubt: str | None = None
    has_zero: bool = False

    @property
    def usage(self) -> Usage | None:
        """The usual reading."""
        return self.readings[0] if self.readings else None

    @property
    def is_known(self) -> bool:
        """Whether the report says what was charged."""
        return bool(self.readings) or self.cost_nanousd is not None


@dataclass(frozen=True, slots=True)
class _Cost:
    nanousd: int | None = None
    fee_nanousd: int = 0
    doubt: str | None = None


def read_usage(reported: object) -> UsageReport:
    """Read a reply's usage object, parsed with `parse_float=Decimal`."""
    fields = single(reported)
    if not fields:
        return UsageReport()
    return _report(_with_media(read_tokens(fields), media_counts(fields)), _cost(fields))


def _with_media(tokens: TokenReadings, counts: Mapping[str, int]) -> TokenReadings:
    """Return readings with the tokens of media; readings whose totals are too small are dropped unless all are."""
    if not counts or not tokens.readings:
        return tokens
    found = [with_media(usage, counts) for usage in tokens.readings]
    fitting = tuple(usage for usage, fits in found if fits)
    if fitting:
        return replace(tokens, readings=fitting)
    return replace(tokens, readings=tuple(usage for usage, _ in found), doubt=tokens.doubt or PART_TOO_LARGE)


def joined_reports(reports: Iterable[UsageReport]) -> UsageReport:
    """Join the reports in several places of one reply: all readings of tokens, and the highest cost.

    A cost of zero counts only in the first place: elsewhere it may mean an unknown cost.
    """
    filled = [report for report in reports if report.is_known or report.doubt]
    known = [report for report in filled if report.is_known]
    if len(filled) < 2 or not known:
        return filled[0] if filled else UsageReport()
    counted = [report for report in known if report.readings and not report.has_zero] or known[:1]
    readings = _distinct(usage for report in counted for usage in report.readings)
    costs = [report.cost_nanousd for report in known if report.cost_nanousd]
    doubts = [report.doubt for report in (filled[0], *counted) if report.doubt]
    if any(_plain(report) != _plain(counted[0]) for report in counted):
        doubts.append(_TWO_USAGES)
    if costs and _differ(max(costs), min(costs)):
        doubts.append(_COSTS_DIFFER)
    return UsageReport(
        readings,
        max(costs) if costs else known[0].cost_nanousd,
        max(report.fee_nanousd for report in known),
        doubts[0] if doubts else None,
        has_zero=all(report.has_zero for report in counted),
    )


def _distinct(usages: Iterable[Usage]) -> tuple[Usage, ...]:
    """Return the distinct usages, without those that another usage repeats with media tokens."""
    found = tuple(dict.fromkeys(usages))
    detailed = [usage.without_media() for usage in found if isinstance(usage, MediaUsage)]
    return tuple(usage for usage in found if isinstance(usage, MediaUsage) or usage not in detailed)


def _plain(report: UsageReport) -> set[Usage]:
    return set(map(_without_media, report.readings))


def _without_media(usage: Usage) -> Usage:
    return usage.without_media() if isinstance(usage, MediaUsage) else usage


def _report(tokens: TokenReadings, cost: _Cost) -> UsageReport:
    doubts = [doubt for doubt in (cost.doubt, tokens.doubt) if doubt]
    doubt = "; ".join(doubts) or None
    return UsageReport(tokens.readings, cost.nanousd, cost.fee_nanousd, doubt, has_zero=tokens.has_zero)


def read_cost(usd: object) -> int | None:
    """Return a cost in nano-dollars, or None. Errors: MoneyError if it is no amount of money."""
    if usd is None:
        return None
    if isinstance(usd, str):
        amount = _AMOUNT.fullmatch(usd)
        if amount is None:
            raise MoneyError("the cost is not a number")
        return nanousd_from_usd(amount[1])
    if isinstance(usd, Decimal | int):
        return nanousd_from_usd(usd)
    raise MoneyError("the cost is not a number")


def read_generation_cost(generation: Mapping[str, Any]) -> int | None:
    """Return the total cost of a generation in the answer of `/generation`; None if it is missing or incomplete.

    With the user's own provider key, `total_cost` is OpenRouter's fee, and the provider bills
    `upstream_inference_cost`. Errors: MoneyError if it is no amount of money.
    """
    cost = read_cost(generation.get("total_cost"))
    upstream = read_cost(generation.get("upstream_inference_cost"))
    is_byok = _flag(generation.get("is_byok"))
    if cost is None or (is_byok is True and upstream is None):
        return None
    return _with_own_key(cost, upstream, is_byok, None).nanousd


def _cost(fields: Mapping[str, Any]) -> _Cost:
    try:
        cost, differ = _total_cost(fields)
        upstream, doubt = _upstream(fields.get("cost_details"))
        found = _with_own_key(cost, upstream, _flag(fields.get("is_byok")), doubt)
    except MoneyError:
        return _Cost(doubt=_NO_MONEY)
    return replace(found, doubt=differ) if differ and not found.doubt else found


def _flag(value: object) -> bool | None:
    """Return whether a flag is set, in any form; None if it is missing or unreadable."""
    return _FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None


def _with_own_key(cost: int | None, upstream: int | None, is_byok: bool | None, doubt: str | None) -> _Cost:
    """Add the provider's own bill if the user's own provider key was used. Errors: MoneyError.

    With an own key, `cost` is OpenRouter's fee, and the provider bills the rest. OpenRouter's example has no flag for
    this; without an own key, the provider's charge is never above the cost (November 2026).
    """
    if is_byok is True and upstream is None:
        return _Cost(None, cost or 0, "the cost under the own provider key is not reported")
    if is_byok is True and cost is None:
        return _Cost(upstream, 0, "the fee beside the own provider key's bill is not reported")
    is_own = is_byok is True or (is_byok is not False and upstream is not None and _is_above(upstream, cost or 0))
    if not is_own or upstream is None:
        return _Cost(cost, 0, doubt if is_byok is not False else None)
    if cost is None:
        return _Cost(upstream, 0, "only the provider's own charge is reported")
    return _Cost(check_nanousd(cost + upstream), 0, doubt)


def _is_above(upstream: int, cost: int) -> bool:
    """Whether an amount is larger by more than rounding errors: both may have been floats."""
    return upstream > cost + 2 + cost // 1_000_000


def _differ(one: int, other: int) -> bool:
    return _is_above(one, other) or _is_above(other, one)


def _total_cost(fields: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Return the highest cost under any of its names, and a doubt if the costs differ.

    Errors: MoneyError for an invalid amount, or another currency than dollars.
    """
    named = (_stated_cost(fields.get("cost")), _ticks(fields.get("cost_in_usd_ticks")), *_further_costs(fields))
    costs = [cost for cost in named if cost is not None]
    if not costs:
        return None, None
    _check_dollars(fields)
    return max(costs), _COSTS_DIFFER if _differ(max(costs), min(costs)) else None


def _stated_cost(reported: object) -> int | None:
    """Return a cost that is a number, or an object with a total. Errors: MoneyError."""
    if not isinstance(reported, dict):
        return read_cost(reported)
    table = cast(dict[str, Any], reported)
    _check_dollars(table)
    for name in _TOTALS:
        if table.get(name) is not None:
            return read_cost(table[name])
    raise MoneyError("the cost has no total")


def _check_dollars(fields: Mapping[str, Any]) -> None:
    """Check that the amounts are in dollars. Errors: MoneyError."""
    currency = fields.get("currency")
    if isinstance(currency, str) and currency.strip().lower() not in ("", "usd"):
        raise MoneyError("the cost is not in dollars")


def _further_costs(fields: Mapping[str, Any]) -> list[int]:
    found: list[int] = []
    for name in _FURTHER_COSTS:
        try:
            found += [cost] if (cost := read_cost(fields.get(name))) else []
        except MoneyError:
            continue  # The name is not the cost's usual one, and may mean something else.
    return found


def _ticks(ticks: object) -> int | None:
    if ticks is None:
        return None
    if isinstance(ticks, bool) or not isinstance(ticks, Decimal | int | str):
        raise MoneyError("the cost is not a number")
    whole = int(_decimal(ticks).to_integral_value(ROUND_CEILING))
    return check_nanousd(-(-whole // _TICKS_PER_NANOUSD))


def _decimal(value: Decimal | int | str) -> Decimal:
    try:
        number = Decimal(value)
    except ArithmeticError as exc:
        raise MoneyError("the cost is not a number") from exc
    if not number.is_finite() or not 0 <= number <= 10**18:
        raise MoneyError("the cost is not an amount of money")
    return number


def _upstream(details: object) -> tuple[int | None, str | None]:
    """Return the charge of the provider behind a router, and a doubt if there is one."""
    if not isinstance(details, dict):
        return None, None
    table = cast(dict[str, Any], details)
    try:
        whole = read_cost(table.get("upstream_inference_cost"))
        parts = [read_cost(table.get(f"upstream_inference_{part}_cost")) for part in ("prompt", "completions")]
    except MoneyError:
        return None, "the provider's own charge is no amount of money and was ignored"
    known = [part for part in parts if part is not None]
    if whole is None:
        return (check_nanousd(sum(known)) if any(known) else None), None
    if _is_above(sum(known), whole):
        return check_nanousd(sum(known)), "the provider's own charge is less than its parts"
    return whole, None
