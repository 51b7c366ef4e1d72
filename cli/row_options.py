"""Options of the commands that write rows: format and output file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tollbook.views.rows import Format, format_of

FormatOption = Annotated[
    Format | None, typer.Option("--format", help="Output format; by default from the file's extension.")
]


def choose_format(form: Format | None, output: Path | None, *, as_json: bool) -> Format:
    """Return the output format. Errors: typer.BadParameter."""
    if output is not None and not output.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {output.parent}", param_hint="--output")
    try:
        chosen = Format.JSON if as_json else form or format_of(output)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--output") from None
    if chosen is Format.PARQUET and output is None and sys.stdout.isatty():
        raise typer.BadParameter("Parquet needs --output FILE", param_hint="--format")
    return chosen
