"""Numbers as people read them; dollars keep every place."""

from datetime import date, datetime
from decimal import Decimal
from typing import Any, Final

_STEPS: Final = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


def dollars(amount: Decimal, places: int | None = None) -> str:
    """Write an amount exactly, or rounded to some places, the sign before the currency."""
    text = f"{abs(amount):,.9f}" if places is None else f"{abs(amount):,.{places}f}"
    return f"{'-' if amount < 0 else ''}${text}"


def thousands(number: int) -> str:
    """Write a number with separators."""
    return f"{number:,}"


def percent(part: Decimal | int, whole: Decimal | int) -> str:
    """Write a share; of nothing, it is a dash."""
    return f"{100 * Decimal(part) / Decimal(whole):.1f} %" if whole else "-"


def span(seconds: int) -> str:
    """Write a step of time in its largest whole unit: day, 12 hours."""
    length, unit = next((length, unit) for length, unit in _STEPS if seconds % length == 0)
    count = seconds // length
    return unit if count == 1 else f"{count} {unit}s"


def cell(value: Any) -> str:
    """Write a value of a table; a decimal has all its places."""
    match value:
        case None:
            return ""
        case Decimal():
            return f"{value:f}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
        case date():
            return value.isoformat()
        case _:
            return str(value)
