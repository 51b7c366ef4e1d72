"""`tollbook doctor`: what is missing for calls to be made, and what to do."""

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from tollbook.cli.options import JsonOption

if TYPE_CHECKING:
    from tollbook.app.doctor import Finding


def doctor(as_json: JsonOption = False) -> int:
    """Check settings, Redis, DuckDB, prices, routes and provider, and say what to do.

    Exit code 1 if a check failed.

    Example: tollbook doctor
    """
    from tollbook.app.doctor import examine

    findings = asyncio.run(examine())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return 1 if any(finding.state == "failed" for finding in findings) else 0


def _print(findings: "list[Finding]") -> None:
    from rich.table import Table
    from rich.text import Text

    from tollbook.views.tables import make_console

    marks = {"ok": ("ok", "green"), "warning": ("look", "yellow"), "failed": ("FAILED", "bold red")}
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark, style = marks[finding.state]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style="dim")
        table.add_row(Text(mark, style=style), Text(finding.check), text)
    make_console().print(table)
