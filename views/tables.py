"""Prints tables, facts and sentences on the command line. All commands print rows with it.

Ids and amounts are never cut. A table that is wider than the terminal uses the first of these layouts that fits: the
first column on a line of its own; without optional columns, dropped from the right; a line for each value. Without a
terminal, a table is as wide as it needs to be. No line ends in spaces.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Final

from tollbook.schemas.money import format_usd, nanousd_from_decimal

if TYPE_CHECKING:
    from rich.console import Console

_UNLIMITED: Final = 1_000_000
_MIN_TEXT: Final = 20
_GAP: Final = "  "
_STYLES: Final = {"": "", "bold": "\x1b[1m", "dim": "\x1b[2m"}
_PLAIN: Final = "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Row:
    """A row: a cell for each column, and sentences below it."""

    cells: Sequence[str]
    details: Sequence[str] = ()
    style: str = ""
    has_rule: bool = False
    """Whether a line is drawn above it, as above a sum."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    is_right: bool = False
    is_text: bool = False
    """Whether it has sentences, which are wrapped between words."""
    is_optional: bool = False
    """Whether it may be left out if there is no room; a line below the table says so."""


def parse_column(spec: str) -> Column:
    """Parse a column: its name, then `>` to align it right, `*` for sentences, `?` if it may be left out."""
    name = spec.rstrip(">*?")
    marks = spec[len(name) :]
    return Column(name, ">" in marks, "*" in marks, "?" in marks)


class Printer:
    """Writes to standard output or a file, within the width of the terminal if there is one."""

    def __init__(self, file: IO[str] | None = None, *, width: int | None = None) -> None:
        """Use the terminal's width unless `width` is given. A file or a pipe has no limit."""
        self._file = sys.stdout if file is None else file
        is_terminal = self._file.isatty()
        self.width = width or (shutil.get_terminal_size().columns if is_terminal else _UNLIMITED)
        self._has_styles = is_terminal and os.environ.get("TERM") != "dumb"

    def line(self, text: str = "", style: str = "") -> None:
        """Write one line as it is."""
        text = text.rstrip()
        if style and text and self._has_styles:
            text = f"{_STYLES[style]}{text}{_PLAIN}"
        self._file.write(text + "\n")

    def text(self, text: str, style: str = "", *, indent: int = 1, hang: int = 0) -> None:
        """Write sentences, wrapped between words; lines after the first are indented by `hang` more cells."""
        for number, line in enumerate(wrap(text, self.width - indent - hang)):
            self.line(" " * (indent + (hang if number else 0)) + line, style)

    def facts(self, facts: Iterable[tuple[str, str]], *, indent: int = 1) -> None:
        """Write names with their values, one fact per line or more."""
        pairs = list(facts)
        widest = max((cell_len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            head = " " * indent + _pad(name, widest) + _GAP
            first, *rest = wrap(value, self.width - cell_len(head)) or [""]
            self.line(head + first)
            for line in rest:
                self.line(" " * cell_len(head) + line)

    def table(
        self, columns: Sequence[str | Column], rows: Sequence[Row | Sequence[str]], title: str | None = None
    ) -> None:
        """Write a blank line, the title and the table. `parse_column` parses columns that are given as text."""
        found = [spec if isinstance(spec, Column) else parse_column(spec) for spec in columns]
        given = [row if isinstance(row, Row) else Row(row) for row in rows]
        self.line()
        if title is not None:
            self.text(title, "bold")
        form = _find_form(found, given, self.width)
        if form is None:
            self._records(found, given)
        else:
            self._lines(form, given)
        left_out = [] if form is None else [column.name for column in found if column not in form.columns]
        if left_out:
            self.text(f"No room for: {', '.join(left_out)}. A wider terminal or --json shows them.", "dim")

    def _lines(self, form: "_Form", rows: Sequence[Row]) -> None:
        names = [column.name for column in form.columns]
        rule = " " + "─" * min(self.width - 1, form.total - 1)
        for line in form.arrange(names):
            self.line(line, "dim")
        self.line(rule, "dim")
        for row in rows:
            if row.has_rule:
                self.line(rule, "dim")
            for line in form.arrange([row.cells[at] for at in form.at]):
                self.line(line, row.style)
            for detail in row.details:
                self.text(detail, "dim", indent=form.detail_indent, hang=2)

    def _records(self, columns: Sequence[Column], rows: Sequence[Row]) -> None:
        for number, row in enumerate(rows, 1):
            self.line(f"row {number:,}", "dim")
            self.facts(
                zip((column.name for column in columns), row.cells, strict=True),
                indent=2,
            )
            for detail in row.details:
                self.text(detail, "dim", indent=2, hang=2)


@dataclass(frozen=True, slots=True)
class _Form:
    """A layout of rows: which columns, how wide, and whether the first column has a line of its own."""

    columns: list[Column]
    at: list[int]
    widths: list[int]
    is_stacked: bool

    @property
    def total(self) -> int:
        below = sum(self.widths[self.is_stacked :]) + len(_GAP) * (len(self.widths) - 1 - self.is_stacked)
        return max(1 + self.widths[0], 3 + below) if self.is_stacked else 1 + below

    @property
    def detail_indent(self) -> int:
        """Sentences are indented to the column of sentences, or by a few cells."""
        text = next((at for at, column in enumerate(self.columns) if column.is_text), None)
        if text is None or self.is_stacked:
            return 3
        return 1 + sum(self.widths[:text]) + len(_GAP) * text

    def arrange(self, cells: Sequence[str]) -> list[str]:
        """Return the lines of a row."""
        wrapped = [
            wrap(cell, width) if column.is_text else [cell]
            for cell, width, column in zip(cells, self.widths, self.columns, strict=True)
        ]
        first: list[str] = []
        indent = " "
        if self.is_stacked:
            first, indent = [" " + cells[0]] if cells[0] else [], "   "
            wrapped = wrapped[1:]
        shown = self.columns[self.is_stacked :], self.widths[self.is_stacked :]
        height = max((len(lines) for lines in wrapped), default=0) or 1
        return first + [
            indent
            + _GAP.join(
                _pad(lines[number] if number < len(lines) else "", width, is_right=column.is_right)
                for lines, column, width in zip(wrapped, *shown, strict=True)
            )
            for number in range(height)
        ]


def _find_form(columns: list[Column], rows: Sequence[Row], width: int) -> _Form | None:
    """Return the first layout that fits the width; None if only a line for each value fits."""
    optional = [at for at, column in enumerate(columns) if column.is_optional]
    for kept in range(len(optional), -1, -1):
        at = [number for number in range(len(columns)) if number not in optional[kept:]]
        chosen = [columns[number] for number in at]
        widths = [
            max(cell_len(column.name), *(_widest_line(row.cells[number]) for row in rows), 0)
            for number, column in zip(at, chosen, strict=True)
        ]
        for is_stacked in (False, True) if len(at) > 1 else (False,):
            form = _Form(chosen, at, _squeezed(chosen, widths, width, is_stacked=is_stacked), is_stacked)
            if form.total <= width:
                return form
    return None


def _squeezed(columns: list[Column], widths: list[int], width: int, *, is_stacked: bool) -> list[int]:
    """Shrink columns of sentences to the room that the others leave."""
    squeezed = list(widths)
    over = _Form(columns, [], widths, is_stacked).total - width
    for at, column in enumerate(columns):
        if column.is_text and over > 0 and not (is_stacked and at == 0):
            squeezed[at] = max(min(widths[at], max(_MIN_TEXT, cell_len(column.name))), widths[at] - over)
            over -= widths[at] - squeezed[at]
    return squeezed


def _widest_line(text: str) -> int:
    return max(map(cell_len, text.split("\n"))) if "\n" in text else cell_len(text)


def _pad(text: str, width: int, *, is_right: bool = False) -> str:
    room = " " * max(0, width - cell_len(text))
    return room + text if is_right else text + room


def cell_len(text: str) -> int:
    """Return how many terminal cells a text takes."""
    if text.isascii():
        return len(text)
    # Imported here: few texts need it, and importing Rich takes longer than a light command.
    from rich.cells import cell_len as measured

    return measured(text)


def wrap(text: str, width: int) -> list[str]:
    """Wrap a text between words into lines of at most `width` cells; only a word wider than a line is broken."""
    width = max(1, width)
    lines: list[str] = []
    if "\n" in text:
        return [line for part in text.split("\n") for line in wrap(part, width)]
    if cell_len(text) <= width:
        return [text] if text else []
    line = ""
    for word in text.split(" "):
        if line and cell_len(line) + 1 + cell_len(word) <= width:
            line += f" {word}"
            continue
        if line:
            lines.append(line)
        *whole, line = _chopped(word, width)
        lines += whole
    return [*lines, line] if line else lines


def _chopped(word: str, width: int) -> list[str]:
    if cell_len(word) <= width:
        return [word]
    from rich.cells import chop_cells

    return chop_cells(word, width) or [""]


def printable(text: str) -> str:
    r"""Return a text without characters that could control a terminal: an escape character becomes `\x1b`."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def utc(at_ms: int) -> datetime:
    """Return milliseconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(at_ms / 1000, UTC)


def dollars(amount: Decimal, places: int | None = 6) -> str:
    """Format an amount of dollars, rounded up; without `places`, exactly."""
    return format_usd(nanousd_from_decimal(amount), places=places)


def percent_used(spent: Decimal | int, cap: Decimal | int, *, places: int = 0) -> str:
    """Format the spent part of a cap. It is 100 % only if the whole cap is spent, and more only above the cap."""
    if not cap:
        return "-"
    units, rest = divmod(Decimal(spent) * 100 * 10**places, Decimal(cap))
    if units >= 100 * 10**places and rest:
        units += 1
    return f"{units.scaleb(-places):,.{places}f}%"


def make_console(*, stderr: bool = False) -> "Console":
    """Return a Rich console for progress bars and screens.

    Errors of its `print`: BrokenPipeError if the reader has gone; Rich itself would end the process with code 1.
    """
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = Output(stderr=stderr, highlight=False)
    return console if console.is_terminal else Output(stderr=stderr, highlight=False, width=_UNLIMITED)
