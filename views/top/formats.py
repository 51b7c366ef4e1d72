"""Formats numbers, amounts, ages and ids of the live view, short enough for its columns."""

from rich.cells import cell_len, set_cell_size

from tollbook.schemas.money import NANOUSD_PER_USD, format_usd
from tollbook.views.tables import printable


def count(number: int) -> str:
    """Format a count of events in at most seven characters."""
    return f"{number:,}" if abs(number) < 1_000_000 else f"{number / 1e6:,.2f}M"


def several(number: int, what: str, width: int = 0) -> str:
    """Format a number with its noun; the number is right-aligned in `width`."""
    return f"{count(number):>{width}} {what}{'' if number == 1 else 's'}"


def money(nanousd: int) -> str:
    """Write dollars without their sign, with as many places as eight or nine characters allow; rounded up."""
    dollars = abs(nanousd) // NANOUSD_PER_USD
    return format_usd(nanousd, places=4 if dollars < 1_000 else 2 if dollars < 100_000 else 0).replace("$", "")


def cap_text(nanousd: int) -> str:
    """Write a cap in dollars without their sign, exact where nine characters allow."""
    exact = format_usd(nanousd, places=None).removeprefix("$")
    return exact if len(exact) <= 9 else money(nanousd)


def ago(seconds: float) -> str:
    """Write an age for people."""
    if seconds < 1:
        return "now"
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:,.0f} min ago" if seconds < 7200 else f"{seconds / 3600:,.0f} h ago"


def shorten(text: str, width: int) -> str:
    """Cut out the middle of a text that is wider than `width` cells, because both ends of an id matter."""
    text = printable(text)
    if cell_len(text) <= width:
        return text
    if width < 3:
        return set_cell_size(text, max(0, width))
    right = (width - 1) // 2
    start = set_cell_size(text, width - 1 - right).rstrip()
    end = text[-right:]
    while cell_len(end) > right:
        end = end[1:]
    return f"{start}…{end}"
