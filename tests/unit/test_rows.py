"""Rows as people read them: never cut, and unable to steer a terminal."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tollbook.views import tables
from tollbook.views.rows import Format, format_of, table_as_bytes, write_rows


def written(rows: list[dict[str, Any]], folder: Path, form: Format) -> str:
    table = pa.Table.from_pylist(rows)
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches())
    write_rows(reader, form, folder / "rows.txt")
    return (folder / "rows.txt").read_bytes().decode()


def table_of(rows: list[dict[str, Any]], folder: Path) -> str:
    return written(rows, folder, Format.TABLE)


def test_rows_that_fit_are_a_table(tmp_path: Path) -> None:
    lines = table_of([{"user_id": "ann", "spent_usd": Decimal("1.500000000")}], tmp_path).splitlines()
    assert [line.split() for line in lines if "us" in line or "ann" in line] == [
        ["user_id", "spent_usd"],
        ["ann", "1.500000000"],
    ]


def test_rows_that_are_too_wide_are_written_column_by_column_and_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"user_id": "ann", "note": "x" * 500}, {"user_id": None, "note": "y"}]
    # Where nothing limits the width, the table is as wide as it needs to be.
    assert f" ann      {'x' * 500}" in table_of(rows, tmp_path).splitlines()
    monkeypatch.setattr(tables, "_UNLIMITED", 111)
    assert table_of(rows, tmp_path).splitlines() == [
        "",
        "row 1",
        "  user_id  ann",
        *("  note     " + "x" * 100, *["           " + "x" * 100] * 4),
        "row 2",
        "  user_id",
        "  note     y",
    ]


def test_no_value_can_control_the_terminal(tmp_path: Path) -> None:
    shown = table_of([{"a": "\x1b[2J\nred"}], tmp_path)
    assert "\x1b" not in shown
    assert "\\x1b[2J\\x0ared" in shown


def test_csv_holds_no_formula_and_every_place_of_a_number(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"=cmd": f"{mark}1", "amount": Decimal("0.000000000") - number, "count": -1}
        for number, mark in enumerate("=+-@\t\r'x\uff1d")
    ]
    assert written(rows, tmp_path, Format.CSV).split("\n") == [
        "'=cmd,amount,count",
        "'=1,0.000000000,-1",
        "'+1,-1.000000000,-1",
        "'-1,-2.000000000,-1",
        "'@1,-3.000000000,-1",
        "'\t1,-4.000000000,-1",
        "'\r1,-5.000000000,-1",
        "'1,-6.000000000,-1",
        "x1,-7.000000000,-1",
        "'\uff1d1,-8.000000000,-1",
        "",
    ]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.csv", "csv"),
        ("a.JSON", "json"),
        ("a.parquet", "parquet"),
        ("a.table", "table"),
        ("a.txt", "table"),
        ("a", "table"),
    ],
)
def test_the_ending_of_a_file_names_the_format(name: str, form: str) -> None:
    assert format_of(Path(name)).value == form
    assert format_of(None) is Format.TABLE


def test_an_ending_that_names_no_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the extension \.xlsx is not a known format; give --format table, json"):
        format_of(Path("a.xlsx"))


def test_a_table_as_bytes_is_what_a_file_would_hold() -> None:
    table = pa.Table.from_pylist([{"user_id": "@ann", "held_usd": Decimal("0.000000000")}])
    assert table_as_bytes(table, Format.CSV) == b"user_id,held_usd\n'@ann,0.000000000\n"
    assert table_as_bytes(table, Format.JSON) == b'[{"user_id": "@ann", "held_usd": "0.000000000"}]\n'
    assert pq.read_table(pa.BufferReader(table_as_bytes(table, Format.PARQUET))) == table
