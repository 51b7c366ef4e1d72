"""`tollbook doctor`: what is missing for calls to be made, and what to do."""

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from tollbook.cli.options import JsonOption

if TYPE_CHECKING:
    from tollbook.app.findings import Finding
    from tollbook.inference.settings import Settings


def doctor(as_json: JsonOption = False) -> int:
    """Check everything that calls need, and say what to do: Redis, ledger, projector, archive, disk, provider.

    Exit code 1 if something stops or endangers calls. Where nothing runs, the data directory is read at rest.

    Example: tollbook doctor
    """
    from tollbook.app.doctor import examine

    findings = asyncio.run(examine(_settings()))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    return 1 if any(finding.state == "failed" for finding in findings) else 0


def _settings() -> "Settings | None":
    """Return the settings with which the commands read; None where they are wrong, which is a finding."""
    from tollbook.cli.options import data_settings
    from tollbook.inference.errors import SettingsError

    try:
        return data_settings()
    except SettingsError:
        return None


def _print(findings: "list[Finding]") -> None:
    from rich.table import Table
    from rich.text import Text

    from tollbook.views.tables import make_console

    marks = {
        "ok": ("ok", "green"),
        "skipped": ("skip", "dim"),
        "warning": ("look", "yellow"),
        "failed": ("FAILED", "bold red"),
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        mark, style = marks[finding.state]
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style="dim")
        table.add_row(Text(mark, style=style), Text(finding.check), text)
    make_console().print(table)
