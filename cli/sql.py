"""`tollbook sql`: run one SELECT on a copy of the projection."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tollbook.cli.row_options import FormatOption, choose_format


def sql(
    query: Annotated[str | None, typer.Argument(help="One SELECT; `-` reads it from standard input.")] = None,
    form: FormatOption = None,
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds until the query is cancelled.")] = 30.0,
    memory: Annotated[str, typer.Option(help="Memory limit of the query, for example 512MB or 2GB.")] = "512MB",
    snapshot: Annotated[Path | None, typer.Option(help="Copy the whole projection to this DuckDB file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json: one array of objects.")] = False,
) -> int:
    """Query the projection, whether Tollbook runs or not. Does not slow the running system.

    Example: tollbook sql "SELECT user_id, spent_usd FROM spend ORDER BY spent_usd DESC LIMIT 10"
    """
    from tollbook.cli.options import data_settings
    from tollbook.ledger.projection.snapshot import memory_bytes
    from tollbook.views.limited_query import give_way, write_query

    give_way()
    path = data_settings().projection_path
    if (query is None) == (snapshot is None):
        raise typer.BadParameter("give one SELECT, or --snapshot FILE", param_hint="query")
    if snapshot is not None:
        return _copy(path, snapshot)
    form = choose_format(form, output, as_json=as_json)
    text = sys.stdin.read() if query == "-" else query or ""
    if not text.strip(" \t\r\n;"):
        raise typer.BadParameter("the query is empty; give one SELECT", param_hint="query")
    try:
        memory_bytes(memory)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--memory") from None
    write_query(path, text, form, output, timeout_s=timeout, memory=memory)
    return 0


def _copy(path: Path, target: Path) -> int:
    from tollbook.ledger.projection.snapshot import take_snapshot
    from tollbook.views.files import replacing

    if not target.parent.is_dir():
        raise typer.BadParameter(f"there is no directory {target.parent}", param_hint="--snapshot")
    with replacing(target) as part:
        take_snapshot(path, part)
    typer.echo(f"{target}: the projection as it is now; open it with any DuckDB 1.5, for example duckdb {target}")
    return 0
