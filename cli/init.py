"""`tollbook init`: write a policy file with the defaults, commented."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The file to write; by default tollbook.toml.")
    ] = None,
) -> int:
    """Write a policy file with the defaults, commented. A file that exists is never overwritten.

    Example: tollbook init
    """
    from tollbook.inference.policy_file import POLICY_FILE, policy_template

    path = file or Path(POLICY_FILE)
    try:
        with path.open("x", encoding="utf-8") as made:
            made.write(policy_template())
    except FileExistsError:
        typer.echo(f"tollbook: {path} already exists, and was not changed", err=True)
        return 1
    except OSError as exc:
        typer.echo(f"tollbook: {path} cannot be written: {exc.strerror or exc}", err=True)
        return 1
    typer.echo(f"{path} is written. Edit it, then run `tollbook up`, or on an existing ledger `tollbook policy apply`")
    return 0
