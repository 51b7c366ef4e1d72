"""Money is an integer number of nano-dollars (1e-9 USD); no float ever holds it.

Every function refuses values that are not exact: bools, floats, NaN. Amounts are at most 1,000,000 USD: the gate runs
in Lua, whose numbers are doubles and exact up to 2**53, so that sums of nine such amounts are still exact.
"""

from collections.abc import Iterable
from decimal import ROUND_CEILING, Decimal, InvalidOperation, localcontext
from typing import Final

from tollbook.schemas.problems import shown

NANOUSD_PER_USD: Final = 1_000_000_000
MAX_NANOUSD: Final = 1_000_000 * NANOUSD_PER_USD


class MoneyError(ValueError):
    """The value is not an amount of money that Tollbook can hold exactly."""


def check_nanousd(value: int, *, name: str = "amount", minimum: int = 0) -> int:
    """Return `value` if it is an integer from `minimum` to MAX_NANOUSD.

    Errors: MoneyError, also for bools and floats.
    """
    if type(value) is not int or not minimum <= value <= MAX_NANOUSD:
        raise MoneyError(
            f"{name} must be a whole number of nano-dollars from {minimum} to {MAX_NANOUSD}, not {shown(value)}"
        )
    return value


def nanousd_from_usd(usd: Decimal | str | int) -> int:
    """Convert dollars to nano-dollars, rounded up to the next nano-dollar.

    A float is refused, since it is not exact: parse a provider's JSON with `parse_float=Decimal`.
    Errors: MoneyError for floats, bools, NaN, infinities, negatives and amounts over 1,000,000 USD.
    """
    if isinstance(usd, bool) or not isinstance(usd, Decimal | str | int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MoneyError(f"dollars must be a Decimal, text or an integer, not {type(usd).__name__}")
    try:
        dollars = Decimal(usd)
    except InvalidOperation as exc:
        raise MoneyError(f"dollars must be a decimal number, not {shown(usd)}") from exc
    # The check comes before the scaling, since a huge exponent would make a huge integer.
    if not dollars.is_finite() or not 0 <= dollars <= MAX_NANOUSD // NANOUSD_PER_USD:
        raise MoneyError(f"dollars must be from 0 to 1,000,000, not {shown(usd)}")
    with localcontext() as context:
        context.prec = 100
        context.rounding = ROUND_CEILING  # For text with more digits than `prec`.
        return int((dollars * NANOUSD_PER_USD).to_integral_value(rounding=ROUND_CEILING))


def usd_from_nanousd(nanousd: int) -> Decimal:
    """Convert nano-dollars to dollars, exactly, with nine decimal places. Errors: MoneyError, if not an integer."""
    if type(nanousd) is not int:
        raise MoneyError(f"nano-dollars must be a whole number, not {shown(nanousd)}")
    # Made from text, which is exact in any context and three times as fast.
    return Decimal(f"{nanousd}E-9")


def nanousd_from_decimal(usd: Decimal) -> int:
    """Convert a `DECIMAL(18,9)` of DuckDB, which may be a sum or negative, to nano-dollars, exactly."""
    with localcontext() as context:
        context.prec = 100
        return int(usd.scaleb(9))


def usd_text(nanousd: int) -> str:
    """Write dollars with all nine decimal places, as in JSON documents."""
    return f"{usd_from_nanousd(nanousd):f}"


def exact_places(amounts: Iterable[int | None]) -> int:
    """Return how many decimal places show all these amounts in nano-dollars exactly; at least two."""
    places = 2
    for amount in amounts:
        while places < 9 and amount is not None and amount % 10 ** (9 - places):
            places += 1
    return places


def format_usd(nanousd: int, *, places: int | None = 2) -> str:
    """Format for people, for example `$1,234.57`; rounds up, so that a spend is never shown too low.

    With `places=None`, the amount has as many decimal places as it needs to be exact, at least two.
    Errors: MoneyError, if not an integer.
    """
    places = exact_places([nanousd]) if places is None else places
    with localcontext() as context:
        context.prec = 100
        quantum = Decimal(1).scaleb(-places)
        dollars = abs(usd_from_nanousd(nanousd)).quantize(quantum, rounding=ROUND_CEILING)
    return f"{'-' if nanousd < 0 else ''}${dollars:,f}"
