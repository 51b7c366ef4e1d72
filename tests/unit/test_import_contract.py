"""The import contract holds, and would be seen to be broken: a check that cannot fail checks nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("schemas", "ledger", "inference", "consumers")


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
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_packages_keep_the_import_contract(project: Path) -> None:
    result = lint_imports(project)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 3 kept, 0 broken." in result.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("schemas", "ledger"),
        ("schemas", "consumers"),
        ("ledger", "inference"),
        ("ledger", "consumers"),
        ("inference", "consumers"),
        ("schemas", "redis.asyncio"),
        ("schemas", "httpx"),
        ("schemas", "duckdb"),
        ("schemas", "asyncio"),
        ("schemas", "aiohttp"),
        ("schemas", "faststream"),
        ("schemas", "random"),
        ("schemas", "time"),
        ("ledger", "prometheus_client"),
        ("inference", "opentelemetry.trace"),
    ],
)
def test_a_wrong_import_breaks_the_contract(project: Path, importer: str, imported: str) -> None:
    violation = project / importer / "violation.py"
    violation.write_text(f'"""Breaks the contract."""\n\nimport {imported}\n', encoding="utf-8")

    result = lint_imports(project)

    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{importer}.violation -> {imported.partition('.')[0]}" in result.stdout
