"""Options that several commands have. Nothing heavy is imported here: every command's start pays for it."""

from pathlib import Path
from typing import Annotated

import typer

ArchiveOption = Annotated[
    Path | None,
    typer.Option(
        "--archive", help="An archive alone, copied from anywhere; by default this system's archive and stream."
    ),
]
