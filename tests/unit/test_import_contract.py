"""The import contract holds, and a violation is found: a check that cannot fail checks nothing."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "cli",
    "demo",
    "views",
    "app",
    "gateway",
    "observability",
    "consumers",
    "audit",
    "inference",
    "ledger",
    "standin",
    "schemas",
)


def lint_imports(project: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages in a folder, under the contract in its pyproject.toml."""
    # Isolated, so that the packages come from that folder and not from where the project is installed.
    program = (
        f"import sys; sys.path.insert(0, {str(project)!r}); from importlinter import cli; cli.lint_imports_command()"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", program, "--no-cache"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Copy what import-linter reads to a folder of its own."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tollbook", tmp_path / "tollbook", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_packages_keep_the_import_contract(project: Path) -> None:
    result = lint_imports(project)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 6 kept, 0 broken." in result.stdout


WRONG_IMPORTS = (
    *((lower, upper) for upper, lower in pairwise(ROOMS) if (upper, lower) != ("ledger", "standin")),
    ("audit", "consumers"),
    ("standin", "ledger"),
    ("ledger.server", "ledger.gate"),
    ("ledger.gate", "ledger.projection"),
    ("ledger.projection", "ledger.archive"),
    ("inference.prices", "inference.providers"),
    ("inference.providers", "inference.calls"),
    ("schemas", "redis.asyncio"),
    ("schemas", "httpx"),
    ("schemas", "duckdb"),
    ("schemas", "asyncio"),
    ("schemas", "aiohttp"),
    ("schemas", "faststream"),
    ("schemas", "random"),
    ("schemas", "time"),
    ("gateway.messages", "time"),
    ("gateway.responses", "asyncio"),
    ("ledger", "prometheus_client"),
    ("inference", "opentelemetry.trace"),
)


@pytest.mark.slow
def test_each_wrong_import_breaks_the_contract(project: Path) -> None:
    expected: list[str] = []
    for number, (importer, imported) in enumerate(WRONG_IMPORTS):
        violation = project / Path(*importer.split(".")) / f"violation_{number}.py"
        wrong = f"tollbook.{imported}" if imported.partition(".")[0] in ROOMS else imported
        violation.write_text(f'"""Breaks the contract."""\n\nimport {wrong}\n', encoding="utf-8")
        shown = wrong if wrong.startswith("tollbook.") else wrong.partition(".")[0]
        expected.append(f"tollbook.{importer}.violation_{number} -> {shown} ")

    result = lint_imports(project)

    assert result.returncode == 1, result.stdout + result.stderr
    report = " ".join(result.stdout.split())
    assert [line for line in expected if line not in report] == []
