"""The report of results: a table for people, JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Result

_WIDTH: Final = 150


def print_report(machine: dict[str, Any], results: Sequence[Result]) -> None:
    console = Console()
    # The table does not wrap: a report in a file or a log has no terminal width.
    console.width = max(console.width, _WIDTH)
    packages = machine["packages"]
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, {machine['server']}, "
        f"DuckDB {packages['duckdb']}, redis-py {packages['redis']}; load before {machine['load_before']}",
        highlight=False,
    )
    table = Table()
    for name in ("benchmark", "what", "subject", "reference", "ratio", "rounds", "target", ""):
        table.add_column(name, justify="right" if name in ("subject", "reference", "ratio") else "left")
    for result in results:
        table.add_row(*_cells(result))
    console.print(table)


def _cells(result: Result) -> list[str]:
    has_target = result.target is not None or result.floor is not None
    targets = [str(result.target) if result.target else "", f"{result.floor} {result.unit}" if result.floor else ""]
    verdict = ("met" if result.is_met else "[red]missed[/red]") if has_target else ""
    return [
        result.benchmark,
        result.what,
        _figure(result.subject, result.unit),
        "" if result.reference is None else _figure(result.reference, result.unit),
        "" if result.ratio is None else f"{result.ratio:.2f}",
        f"{min(result.rounds):.2f} to {max(result.rounds):.2f}" if result.rounds else "",
        ", ".join(text for text in targets if text),
        verdict,
    ]


def _figure(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.2f} {unit}"


def write_json(path: Path, machine: dict[str, Any], results: Sequence[Result], *, is_quick: bool) -> None:
    document = {"machine": machine, "is_quick": is_quick, "results": [result.as_json() for result in results]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
