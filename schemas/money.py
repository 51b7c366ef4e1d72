"""Money is an integer number of nano-dollars (1e-9 USD); no float ever holds it.

Amounts are bounded by 1,000,000 USD: Lua, which runs the gate, holds numbers as
doubles, exact to 2**53, and the bound leaves a factor of nine in hand for sums.
"""

from collections.abc import Iterable
from decimal import ROUND_CEILING, Decimal, InvalidOperation, localcontext
from typing import Final

NANOUSD_PER_USD: Final = 1_000_000_000
MAX_NANOUSD: Final = 1_000_000 * NANOUSD_PER_USD


class MoneyError(ValueError):
    """The value is not an amount of money that Tollbook can hold exactly."""


def check_nanousd(value: int, *, name: str = "amount", minimum: int = 0) -> int:
    """Return `value` when it is an integer in [minimum, MAX_NANOUSD].

    Errors: MoneyError for bools, floats, anything below the minimum or past 1,000,000 USD.
    """
    if type(value) is not int:
        raise MoneyError(f"{name} must be an integer number of nano-dollars, got {value!r}")
    if not minimum <= value <= MAX_NANOUSD:
        raise MoneyError(f"{name} must be between {minimum} and {MAX_NANOUSD} nano-dollars, got {value}")
    return value


def nanousd_from_usd(usd: Decimal | str | int) -> int:
    """Convert dollars to nano-dollars, rounded up to the next nano-dollar.

    Floats are refused: parse provider JSON with `parse_float=Decimal`.
    Errors: MoneyError for floats, bools, NaN, infinities, negatives and amounts past the bound.
    """
    if isinstance(usd, bool) or not isinstance(usd, Decimal | str | int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise MoneyError(f"dollars must be a Decimal, a string or an integer, got {type(usd).__name__}")
    try:
        dollars = Decimal(usd)
    except InvalidOperation as exc:
        raise MoneyError(f"not a number of dollars: {usd!r}") from exc
    if not dollars.is_finite():
        raise MoneyError(f"not a finite number of dollars: {usd!r}")
    # Compared before it is scaled, since a huge exponent would make a huge integer.
    if not 0 <= dollars <= MAX_NANOUSD // NANOUSD_PER_USD:
        raise MoneyError(f"dollars must be between 0 and 1,000,000, got {usd!s:.40}")
    with localcontext() as context:
        context.prec = 100
        context.rounding = ROUND_CEILING  # For a text of more digits than that.
        return int((dollars * NANOUSD_PER_USD).to_integral_value(rounding=ROUND_CEILING))


def usd_from_nanousd(nanousd: int) -> Decimal:
    """Convert nano-dollars to dollars, exactly, with nine decimal places."""
    with localcontext() as context:
        context.prec = 100
        return Decimal(nanousd).scaleb(-9)


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

    Without `places`, the amount has as many as it needs to be exact, at least two.
    """
    places = exact_places([nanousd]) if places is None else places
    with localcontext() as context:
        context.prec = 100
        quantum = Decimal(1).scaleb(-places)
        dollars = usd_from_nanousd(abs(nanousd)).quantize(quantum, rounding=ROUND_CEILING)
    return f"{'-' if nanousd < 0 else ''}${dollars:,f}"
