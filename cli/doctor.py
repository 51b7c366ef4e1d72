"""`tollbook doctor`: check what calls need, and say what to do."""

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import typer

from tollbook.cli.options import JsonOption

if TYPE_CHECKING:
    from tollbook.app.findings import Finding
    from tollbook.inference.settings import Settings

_MARKS: Final = {"ok": "ok", "skipped": "skip", "warning": "look", "failed": "FAILED"}
_STYLES: Final = {"skipped": "dim", "failed": "bold"}


def doctor(as_json: JsonOption = False) -> int:
    """Check everything that calls need, and say what to do: Redis, ledger, projector, archive, disk, provider.

    Exit code 1 if something stops or endangers calls. If Tollbook does not run, the data directory is checked.

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
    """Return the settings of a command that reads; None if they are invalid, which `examine` reports."""
    from tollbook.cli.options import data_settings
    from tollbook.inference.errors import SettingsError

    try:
        return data_settings()
    except SettingsError:
        return None


def _print(findings: "list[Finding]") -> None:
    from tollbook.views.tables import Printer, Row, printable

    rows = [
        Row(
            (_MARKS[finding.state], finding.check, printable(finding.found)),
            (f"→ {printable(finding.advice)}",) if finding.advice else (),
            style=_STYLES.get(finding.state, ""),
        )
        for finding in findings
    ]
    Printer().table(["state", "check", "found*"], rows)
