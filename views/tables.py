"""How tables look on the command line: one style, and as wide as they need to be where no terminal limits them."""

from collections.abc import Iterable
from decimal import Decimal
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Where the output is a pipe or a file, no line is cut or wrapped.
_UNLIMITED: Final = 400


def make_console(*, stderr: bool = False, file: IO[str] | None = None) -> "Console":
    """Return a console for people on standard output, on standard error, or for a file.

    Errors of its `print`: BrokenPipeError where the reader has gone; Rich itself would end the process with code 1.
    """
    # Here, since light commands use what else is in this module.
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = Output(stderr=stderr, highlight=False, file=file)
    return console if console.is_terminal else Output(stderr=stderr, highlight=False, file=file, width=_UNLIMITED)


def make_table(columns: Iterable[str], title: str | None = None) -> "Table":
    """Return a table; a column whose name ends in `>` is set to the right."""
    from rich import box
    from rich.table import Table

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


def printable(text: str) -> str:
    """Return a text without what would steer a terminal: control characters are written out."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def dollars(amount: Decimal, places: int = 6) -> str:
    """Write an amount for people, the sign before the currency."""
    return f"{'-' if amount < 0 else ''}${abs(amount):,.{places}f}"
