"""Rows as people read them: never cut, and unable to steer a terminal."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from tollbook.views.rows import write_rows


def table_of(rows: list[dict[str, Any]], folder: Path) -> str:
    table = pa.Table.from_pylist(rows)
    write_rows(pa.RecordBatchReader.from_batches(table.schema, table.to_batches()), "table", folder / "rows.txt")
    return (folder / "rows.txt").read_text()


def test_rows_that_fit_are_a_table(tmp_path: Path) -> None:
    lines = table_of([{"user_id": "ann", "spent_usd": Decimal("1.500000000")}], tmp_path).splitlines()
    assert [line.split() for line in lines if "us" in line or "ann" in line] == [
        ["user_id", "spent_usd"],
        ["ann", "1.500000000"],
    ]


def test_rows_that_are_too_wide_are_written_column_by_column_and_not_cut(tmp_path: Path) -> None:
    rows = [{"user_id": "ann", "note": "x" * 500}, {"user_id": None, "note": "y"}]
    assert table_of(rows, tmp_path).splitlines() == [
        "row 1",
        "  user_id  ann",
        "  note     " + "x" * 500,
        "row 2",
        "  user_id",
        "  note     y",
    ]


def test_no_value_steers_the_terminal(tmp_path: Path) -> None:
    shown = table_of([{"a": "\x1b[2J\nred"}], tmp_path)
    assert "\x1b" not in shown
    assert "\\x1b[2J\\x0ared" in shown
