"""Entries of a journal for people: figures in columns, and below them what they are, over the whole width."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

_GAP = 2
_LEAST_TEXT = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: a cell for each column, of which the text is wrapped, and details below it."""

    cells: Sequence[str]
    details: Sequence[str] = ()
    is_bold: bool = False


def print_entries(console: Console, columns: Sequence[str], entries: Sequence[Entry]) -> None:
    """Print entries under the names of their columns.

    The column named `text*` takes the room that is left; one whose name ends in `>` is set to the right.
    """
    names = [column.removesuffix(">").removesuffix("*") for column in columns]
    at = next(number for number, column in enumerate(columns) if column.endswith("*"))
    widths = [max(len(name), *(len(entry.cells[i]) for entry in entries)) for i, name in enumerate(names)]
    others = sum(widths) - widths[at] + _GAP * (len(widths) - 1) + 1
    widths[at] = max(_LEAST_TEXT, len(names[at]), min(widths[at], console.width - others))
    indent = 1 + sum(widths[:at]) + _GAP * at
    head = _line(names, widths, columns)
    console.print(Text(head, "dim", no_wrap=True))
    console.print(Text(f" {'─' * (len(head) - 1)}", "dim", no_wrap=True))
    for entry in entries:
        first, *rest = textwrap.wrap(entry.cells[at], widths[at]) or [""]
        cells = [first if i == at else cell for i, cell in enumerate(entry.cells)]
        console.print(Text(_line(cells, widths, columns), "bold" if entry.is_bold else "", no_wrap=True))
        for line in rest:
            console.print(Text(" " * indent + line, "bold" if entry.is_bold else "", no_wrap=True))
        for detail in entry.details:
            for line in textwrap.wrap(detail, max(_LEAST_TEXT, console.width - indent), subsequent_indent="  "):
                console.print(Text(" " * indent + line, "dim", no_wrap=True))


def _line(cells: Sequence[str], widths: Sequence[int], columns: Sequence[str]) -> str:
    parts = [
        cell.rjust(width) if column.endswith(">") else cell.ljust(width)
        for cell, width, column in zip(cells, widths, columns, strict=True)
    ]
    return " " + (" " * _GAP).join(parts).rstrip()
