"""The parts of pages: facts, tables, notices and forms, as values without markup. The templates draw them.

Amounts and times have the commands' formats. Nothing here is escaped; the templates escape everything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal
from urllib.parse import urlencode

from tollbook.schemas.money import format_usd, nanousd_from_decimal
from tollbook.views.tables import dollars, percent_used

Tone = Literal["", "good", "warn", "bad", "dim", "strong"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell or the value of a fact. Kind `id` is a name chosen by others: set apart from the text, and never cut.

    `href` is a path of this view. `percent` is drawn as a bar beside the text. `details` are lines below it.
    """

    text: str
    kind: Literal["text", "number", "id", "secret", "time", "state"] = "text"
    href: str = ""
    tone: Tone = ""
    percent: int | None = None
    details: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of cells, one for each column; `is_sum`: the sum of the rows above."""

    cells: Sequence[Cell]
    is_sum: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table. A column whose name ends with `>` is right-aligned; `empty` is shown if there are no rows."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    empty: str = "There is nothing yet."
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and its value."""

    name: str
    cell: Cell


@dataclass(frozen=True, slots=True)
class Notice:
    """A sentence that stands out on a page; screen readers read `bad` ones at once."""

    text: str
    tone: Tone = ""
    details: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a form. `choices` make a list of it: values with their texts."""

    name: str
    label: str
    value: str = ""
    hint: str = ""
    kind: Literal["text", "select", "check", "checks", "date"] = "text"
    choices: Sequence[tuple[str, str]] = ()
    is_needed: bool = False
    autocomplete: str = "off"
    inputmode: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """A form. With `method` get it is a filter; with post it changes something, and has the session's token."""

    title: str
    action: str
    fields: Sequence[Field]
    button: str
    method: Literal["get", "post"] = "post"
    hidden: dict[str, str] = field(default_factory=dict[str, str])
    text: str = ""
    tone: Tone = ""
    reset: str = ""
    """The address without the filter, if a filter is set."""


Part = Table | Form | Notice | Sequence[Fact] | str
"""A string is a heading of a section."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page's content. `here` is the path of the current navigation entry."""

    title: str
    parts: Sequence[Part]
    here: str = ""
    lead: str = ""
    notices: Sequence[Notice] = ()
    freshness: str = ""
    status: int = 200
    template: str = "page.html"


def link(path: str, **values: str | None) -> str:
    """Return the path of a page of this view, with its query; values that are None or empty are left out."""
    query = urlencode({name: value for name, value in values.items() if value})
    return f"/ui{path}?{query}" if query else f"/ui{path}"


def sentence(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]


def call_cell(call_id: str) -> Cell:
    """Return a call's id, which links to its page."""
    return Cell(call_id, "id", link("/call", id=call_id))


def money(usd: Decimal | None, places: int | None = 4, *, percent: int | None = None) -> Cell:
    """Return dollars in the commands' format; without `places`, exactly."""
    return Cell("-", "number") if usd is None else Cell(dollars(usd, places), "number", percent=percent)


def count(number: int) -> Cell:
    """Return a number."""
    return Cell(f"{number:,}", "number")


def used(spent: Decimal | int, cap: Decimal | int | None) -> Cell:
    """Return the spent part of a cap, with a bar."""
    if cap is None:
        return Cell("-", "number")
    percent = min(100, int(100 * spent / cap)) if cap else 0
    tone: Tone = "bad" if percent >= 100 else "warn" if percent >= 80 else ""
    return Cell(percent_used(spent, cap), "number", tone=tone, percent=percent)


def moment(at: datetime | int | None) -> Cell:
    """Return a time in UTC; a number is milliseconds since the epoch."""
    if at is None:
        return Cell("-")
    at = datetime.fromtimestamp(at / 1000, UTC) if isinstance(at, int) else at.astimezone(UTC)
    return Cell(f"{at:%Y-%m-%d %H:%M:%S}", "time")


def exactly(nanousd: int, places: int | None = None) -> Cell:
    """Return an amount of nano-dollars in dollars; without `places`, with as many places as it needs."""
    return Cell(format_usd(nanousd, places=places), "number")


def nanousd_of(usd: Decimal | None) -> int | None:
    """Return an amount of DuckDB in nano-dollars."""
    return None if usd is None else nanousd_from_decimal(usd)


def rows_of(rows: Iterable[Sequence[Cell]]) -> list[Row]:
    """Return rows of cells."""
    return [Row(cells) for cells in rows]
