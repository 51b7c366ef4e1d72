"""How tables look on the command line: one style, and as wide as they need to be where no terminal limits them."""

from collections.abc import Iterable
from decimal import Decimal
from typing import IO, Final

from rich import box
from rich.console import Console
from rich.table import Table

# Where the output is a pipe or a file, no line is cut or wrapped.
_UNLIMITED: Final = 400


def make_console(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console for people on standard output, on standard error, or for a file."""
    console = Console(stderr=stderr, highlight=False, file=file)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, file=file, width=_UNLIMITED)


def make_table(columns: Iterable[str], title: str | None = None) -> Table:
    """Return a table; a column whose name ends in `>` is set to the right."""
    table = Table(
        title=None if title is None else f" {title}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        header_style="dim",
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table


def dollars(amount: Decimal, places: int = 6) -> str:
    """Write an amount for people, the sign before the currency."""
    return f"{'-' if amount < 0 else ''}${abs(amount):,.{places}f}"
