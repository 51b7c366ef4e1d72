"""Commands over a data directory at rest: what they print in narrow and wide terminals, and the files they write."""

import csv
import json
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest

from tests.quick import first_quick
from tests.report_data import load, make_data_dir, renamed
from tests.system import run_cli
from tollbook.cli import app as cli
from tollbook.ledger.projection.snapshot import open_snapshot
from tollbook.views import tables

UUID: Final = "1a00139e8-62f1-509b-a9c7-4345f78771c1"
FORMULA: Final = "=HYPERLINK(1)"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home")
    entries = renamed(load(300, users=3), {"user-0001": UUID, "user-0002": FORMULA})
    make_data_dir(path / "data", entries)
    return path


def rows(home: Path, sql: str) -> list[Any]:
    with open_snapshot(home / "data" / "tollbook.duckdb") as connection:
        return connection.execute(sql).fetchall()


@pytest.mark.parametrize("width", first_quick(2, [80, 140, 40, None]))
def test_spend_shows_whole_ids_and_amounts_at_every_width(
    home: Path, width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    if width is not None:
        monkeypatch.setattr(tables, "_UNLIMITED", width)
    for arguments in (["spend"], ["spend", UUID]):
        assert cli.run(arguments) == 0
        shown = capsys.readouterr().out
        where = "period = (SELECT max(period) FROM spend)" if len(arguments) == 1 else f"user_id = '{UUID}'"
        found = rows(home, f"SELECT user_id, spent_usd, cap_usd FROM spend WHERE {where}")  # noqa: S608
        assert found
        for user_id, spent, cap in found:
            for part in (user_id, tables.dollars(spent, 4), tables.dollars(cap, None)):
                assert part in shown
        assert "…" not in shown
        assert [line for line in shown.splitlines() if line != line.rstrip()] == []
        assert width is None or max(map(len, shown.splitlines())) <= width


def test_spend_as_json_is_one_array(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    assert cli.run(["spend", "--json"]) == 0
    assert {row["user_id"] for row in json.loads(capsys.readouterr().out)} >= {UUID, FORMULA}


@pytest.mark.slow
async def test_sql_writes_the_format_that_the_file_s_ending_names(home: Path, tmp_path: Path) -> None:
    query = "SELECT user_id, assumed_usd - assumed_usd AS zero_usd, 1 AS one FROM spend ORDER BY user_id LIMIT 3"
    file = tmp_path / "spend.csv"
    assert (await run_cli("sql", query, "--output", str(file), cwd=home)).code == 0
    first = next(row for row in csv.DictReader(file.read_text().splitlines()) if FORMULA in row["user_id"])
    assert first == {"user_id": f"'{FORMULA}", "zero_usd": "0.000000000", "one": "1"}
    file = tmp_path / "spend.json"
    assert (await run_cli("sql", query, "--output", str(file), cwd=home)).code == 0
    assert Decimal(json.loads(file.read_text())[0]["zero_usd"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    first_quick(
        3,
        [
            (("SELECT usr_id FROM spend",), 1, 'not found in FROM clause! Candidate bindings: "user_id"'),
            (("FROM spent",), 1, 'Did you mean "spend"?'),
            ((" ; ",), 2, "the query is empty"),
            (("/* nothing */",), 1, "it is empty"),
            (("SELECT 1; SELECT 2",), 1, "it is more than one statement"),
            (("FROM spend", "--output", "a.xlsx"), 2, "the extension .xlsx is not a known format"),
            (("FROM spend", "--output", "nowhere/a.csv"), 2, "there is no directory nowhere"),
            (("FROM spend", "--memory", "much"), 2, "--memory"),
        ],
    ),
)
async def test_what_is_wrong_with_a_query_is_one_clear_line(
    home: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    finished = await run_cli("sql", *arguments, cwd=home)
    assert (finished.code, finished.stdout) == (code, "")
    assert words in finished.stderr
    assert finished.stderr.count("\n") == 1
