"""What a reply reports of tokens and cost. What is no count and no amount of money is not accepted.

A cost that the provider reports wins over one that is computed from tokens. Where its numbers disagree, the dearer
reading is taken, and a doubt says why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any, Final, cast

from tollbook.inference.providers.token_counts import TokenReadings, read_tokens
from tollbook.schemas.money import MoneyError, check_nanousd, nanousd_from_usd
from tollbook.schemas.usage import Usage

# xAI reports what it charged in ticks: 10,000,000,000 to the dollar (November 2026).
_TICKS_PER_NANOUSD: Final = 10
_NO_MONEY: Final = "the reported cost is no amount of money and was ignored"


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The usage and the cost of a reply; none where they are not reported, or cannot be right.

    `readings` are what the numbers of tokens can mean. `fee_nanousd` was charged beside what the tokens cost.
    `has_zero`: the prompt or the completion is reported to have no token at all.
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
    if not isinstance(reported, dict):
        return UsageReport()
    fields = cast(dict[str, Any], reported)
    tokens, cost = read_tokens(fields), _cost(fields)
    return _report(tokens, cost)


def _report(tokens: TokenReadings, cost: _Cost) -> UsageReport:
    doubts = [doubt for doubt in (cost.doubt, tokens.doubt) if doubt]
    doubt = "; ".join(doubts) or None
    return UsageReport(tokens.readings, cost.nanousd, cost.fee_nanousd, doubt, has_zero=tokens.has_zero)


def read_cost(usd: object) -> int | None:
    """Return a cost in nano-dollars; None where there is none. Errors: MoneyError where it is no amount of money."""
    if usd is None:
        return None
    if isinstance(usd, Decimal | int | str):
        return nanousd_from_usd(usd)
    raise MoneyError("the cost is not a number")


def read_generation_cost(generation: Mapping[str, Any]) -> int | None:
    """Return what a generation cost in all, as `/generation` tells it; None where it does not, or not all of it.

    With an own provider key `total_cost` is OpenRouter's fee, and the provider bills `upstream_inference_cost`.
    Errors: MoneyError where it is no amount of money.
    """
    cost = read_cost(generation.get("total_cost"))
    upstream = read_cost(generation.get("upstream_inference_cost"))
    is_byok = generation.get("is_byok")
    if cost is None or (is_byok is True and upstream is None):
        return None
    return _with_own_key(cost, upstream, is_byok, None).nanousd


def _cost(fields: Mapping[str, Any]) -> _Cost:
    try:
        cost = _total_cost(fields)
        upstream, doubt = _upstream(fields.get("cost_details"))
    except MoneyError:
        return _Cost(doubt=_NO_MONEY)
    try:
        return _with_own_key(cost, upstream, fields.get("is_byok"), doubt)
    except MoneyError:
        return _Cost(doubt=_NO_MONEY)


def _with_own_key(cost: int | None, upstream: int | None, is_byok: object, doubt: str | None) -> _Cost:
    """Add what the provider bills to an own key. Errors: MoneyError.

    With an own provider key `cost` is OpenRouter's fee, and the provider bills the rest. OpenRouter's own example has
    no flag; without an own key, what the provider charges is not above the cost (November 2026).
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
    return _Cost(check_nanousd(cost + upstream))


def _is_above(upstream: int, cost: int) -> bool:
    """Whether an amount is larger by more than the last digits of floats, which both may have been."""
    return upstream > cost + 2 + cost // 1_000_000


def _total_cost(fields: Mapping[str, Any]) -> int | None:
    """Return the cost under any of its names. Errors: MoneyError."""
    reported = fields.get("cost")
    if isinstance(reported, dict):
        table = cast(dict[str, Any], reported)
        reported = table.get("total_cost")  # Perplexity's form.
        if reported is None:
            raise MoneyError("the cost has no total")
    cost, ticks = read_cost(reported), fields.get("cost_in_usd_ticks")
    if ticks is None:
        return cost
    if isinstance(ticks, bool) or not isinstance(ticks, Decimal | int | str):
        raise MoneyError("the cost is not a number")
    whole = int(_decimal(ticks).to_integral_value(ROUND_CEILING))
    billed = check_nanousd(-(-whole // _TICKS_PER_NANOUSD))
    return billed if cost is None else max(cost, billed)


def _decimal(value: Decimal | int | str) -> Decimal:
    try:
        number = Decimal(value)
    except ArithmeticError as exc:
        raise MoneyError("the cost is not a number") from exc
    if not number.is_finite() or not 0 <= number <= 10**18:
        raise MoneyError("the cost is not an amount of money")
    return number


def _upstream(details: object) -> tuple[int | None, str | None]:
    """Return what the provider behind a router charged, and why that is doubtful."""
    if not isinstance(details, dict):
        return None, None
    table = cast(dict[str, Any], details)
    try:
        whole = read_cost(table.get("upstream_inference_cost"))
        parts = [read_cost(table.get(f"upstream_inference_{part}_cost")) for part in ("prompt", "completions")]
    except MoneyError:
        return None, "the provider's own charge is no amount of money and was ignored"
    known = [part for part in parts if part is not None]
    return (sum(known) if whole is None and any(known) else whole), None
