"""`tollbook report` on the command line, and the Jupyter notebook. In a browser: tests/e2e/test_report.py."""

import json
import re
import socket
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from tests.report_data import load, make_data_dir
from tests.system import command_environment
from tollbook.cli import app as cli
from tollbook.cli.demo import commands_for_demo
from tollbook.inference.settings import DEMO_DATA_DIR
from tollbook.ledger.projection.snapshot import open_snapshot
from tollbook.views.report.app import notebook_path

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory, as `tollbook demo --keep` leaves it."""
    path = tmp_path_factory.mktemp("home")
    make_data_dir(path / DEMO_DATA_DIR, load(1_500))
    return path


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def execute(*arguments: str, cwd: Path = home) -> tuple[int, str]:
        monkeypatch.chdir(cwd)
        code = cli.run(["report", *arguments])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return execute


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("--period", "2026-13"), 2, "--period: a billing period is written YYYY-MM"),
        (("--user", "nobody"), 2, "there are no events of user nobody; there is "),
        (("--period", "2025-01"), 2, "there are no events of period 2025-01; there is 2026-10, 2026-11"),
        (("--archive", "nowhere"), 1, "there are no segments in nowhere"),
        (("--base-path", "spend"), 2, "--base-path: a base path is written like /spend"),
        (("--host", "nowhere.invalid"), 1, "the host nowhere.invalid is not known"),
        (("--html", "nowhere/x.html"), 2, "--html: there is no directory nowhere"),
    ],
)
def test_bad_input_gets_one_line(command: Any, arguments: tuple[str, ...], code: int, problem: str) -> None:
    left, errors = command(*arguments)
    assert left == code
    assert errors.count("\n") == 1
    assert problem in errors


@pytest.mark.slow
def test_without_data_it_says_where_data_would_come_from(command: Any, tmp_path: Path) -> None:
    code, errors = command(cwd=tmp_path)
    assert code == 1
    assert re.fullmatch(r"tollbook: there is no data in data/ to report: .*tollbook demo --keep.*\n", errors)
    make_data_dir(tmp_path / "data", [])
    assert "no calls were made" in command(cwd=tmp_path)[1]


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(command: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command("--port", str(port)) == (
            1,
            f"tollbook: port {port} of 127.0.0.1 cannot be used: Address already in use\n",
        )


def test_without_the_extra_it_says_what_to_install(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tollbook.cli.report.find_spec", lambda name: None if name == "marimo" else object())
    expected = "tollbook: the report needs packages that are not installed: pip install 'tollbook[report]'\n"
    assert command() == (1, expected)


def test_a_kept_demo_says_the_commands_that_work_from_where_it_ran(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert "tollbook report --html report.html" in dict(commands_for_demo(DEMO_DATA_DIR))
    # Where other data are in the way, the directory is named.
    monkeypatch.setenv("TOLLBOOK_DATA_DIR", str(tmp_path))
    assert "TOLLBOOK_DATA_DIR=tollbook-demo tollbook report" in dict(commands_for_demo(DEMO_DATA_DIR))
    monkeypatch.setenv("TOLLBOOK_NONSENSE", "1")  # Told when the settings are needed; the demo needs none.
    assert "TOLLBOOK_DATA_DIR=tollbook-demo tollbook report" in dict(commands_for_demo(DEMO_DATA_DIR))


@pytest.mark.slow
def test_the_jupyter_notebook_runs_from_top_to_bottom(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "notebooks" / "spend.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "outputs are to be stripped"
    for name, value in command_environment({"TOLLBOOK_DATA_DIR": str(home / DEMO_DATA_DIR)}).items():
        monkeypatch.setenv(name, value)
    client = nbclient.NotebookClient(
        notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    shown = json.dumps([cell.outputs for cell in code])
    with open_snapshot(home / DEMO_DATA_DIR / "tollbook.duckdb") as connection:
        sql = "SELECT sum(spent_usd) FROM spend WHERE period = (SELECT max(period) FROM spend)"
        (spent,) = connection.execute(sql).fetchone() or (Decimal(),)
    assert f"${spent:,.9f}" in shown
    assert shown.count("image/svg+xml") == 7
    assert "No call was denied in this selection." in shown


def test_the_wheel_has_the_notebook_that_the_command_opens() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    included = build["targets"]["wheel"]["force-include"]
    assert {"notebooks/spend_report.py": "tollbook/views/report/spend_report.py"}.items() <= included.items()
    assert notebook_path() == ROOT / "notebooks" / "spend_report.py"
