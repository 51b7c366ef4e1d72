"""Formats numbers and values of a report."""

from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from tollbook.views.rows import cell_text

_STEPS: Final = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


def thousands(number: int) -> str:
    """Write a number with separators."""
    return f"{number:,}"


def percent(part: Decimal | int, whole: Decimal | int) -> str:
    """Format a share as a percentage; `-` if the whole is zero."""
    return f"{100 * Decimal(part) / Decimal(whole):.1f} %" if whole else "-"


def span(seconds: int) -> str:
    """Write a step of time in its largest whole unit: day, 12 hours."""
    length, unit = next((length, unit) for length, unit in _STEPS if seconds % length == 0)
    count = seconds // length
    return unit if count == 1 else f"{count} {unit}s"


def cell(value: Any) -> str:
    """Write a value of a table; a decimal has all its places, a time no fractions of a second."""
    return f"{value:%Y-%m-%d %H:%M:%S}" if isinstance(value, datetime) else cell_text(value)
