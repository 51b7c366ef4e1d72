"""Writes rows of a query as a table, JSON, CSV or Parquet, batch by batch, so that a large result needs little memory.

Money stays exact: a decimal is a string in JSON, and has all its places in CSV. A file appears only once complete.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE_ROWS: Final = 1_000
# A spreadsheet takes a cell that begins with one of these as a formula; in some languages also the full-width forms
# (OWASP, CSV injection; November 2026).
_FORMULA_MARKS: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


class Format(StrEnum):
    """How rows are written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


def format_of(output: Path | None) -> Format:
    """Return the format of a file's extension; a table without an extension or for `.txt`. Errors: ValueError."""
    ending = "" if output is None else output.suffix.lower().removeprefix(".")
    if ending in ("", "txt"):
        return Format.TABLE
    try:
        return Format(ending)
    except ValueError:
        raise ValueError(f"the extension .{ending} is not a known format; give --format {', '.join(Format)}") from None


def write_rows(reader: "pa.RecordBatchReader", form: Format, output: Path | None) -> None:
    """Write all rows to a file or to standard output."""
    from tollbook.views.files import replacing

    with nullcontext(None) if output is None else replacing(output) as part:
        if form is Format.PARQUET:
            _write_parquet(reader, part or sys.stdout.buffer)
            return
        write = _TEXT_FORMS[form]
        if part is None:
            write(reader, sys.stdout)
            return
        with part.open("w", encoding="utf-8", newline="") as file:
            write(reader, file)


def table_as_bytes(table: "pa.Table", form: Format) -> bytes:
    """Return all rows of a table as the content of a file."""
    if form is Format.PARQUET:
        buffer = io.BytesIO()
        _write_parquet(table.to_reader(), buffer)
        return buffer.getvalue()
    file = io.StringIO()
    _TEXT_FORMS[form](table.to_reader(), file)
    return file.getvalue().encode()


def _write_parquet(reader: "pa.RecordBatchReader", file: IO[bytes] | Path) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(file, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def _write_json(reader: "pa.RecordBatchReader", file: IO[str]) -> None:
    separator = "["
    for batch in reader:
        for row in batch.to_pylist():
            file.write(separator + json.dumps(row, default=plain_text))
            separator = ",\n"
    file.write("[]\n" if separator == "[" else "]\n")


def _write_csv(reader: "pa.RecordBatchReader", file: IO[str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([neutralise(name) for name in reader.schema.names])
    for batch in reader:
        writer.writerows([neutralise(value) for value in row] for row in _tuples(batch))


def neutralise(value: object) -> str:
    """Format a value as a CSV cell that no spreadsheet takes as a formula; numbers stay as they are."""
    cell = cell_text(value)
    return f"'{cell}" if isinstance(value, str) and cell.startswith(_FORMULA_MARKS) else cell


def _write_table(reader: "pa.RecordBatchReader", file: IO[str]) -> None:
    import pyarrow as pa

    from tollbook.views.tables import Column, Printer, printable

    columns = [
        Column(printable(field.name), is_right=pa.types.is_integer(field.type) or pa.types.is_decimal(field.type))
        for field in cast("Iterable[Any]", reader.schema)
    ]
    cells: list[list[str]] = []
    count = 0
    for batch in reader:
        cells += [[printable(cell_text(value)) for value in row] for row in _tuples(batch)[: _TABLE_ROWS - count]]
        count += batch.num_rows
        if count > _TABLE_ROWS:
            break
    printer = Printer(file)
    printer.table(columns, cells)
    if count > _TABLE_ROWS:
        printer.text(f"the first {_TABLE_ROWS:,} rows; --format csv writes all of them", indent=0)


def _tuples(batch: "pa.RecordBatch") -> list[tuple[Any, ...]]:
    arrays = cast("list[Any]", batch.columns)
    columns: list[list[Any]] = [array.to_pylist() for array in arrays]
    return list(zip(*columns, strict=True))


def cell_text(value: object) -> str:
    """Format a value as text: '' for NULL, JSON for nested values, all places of a decimal."""
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, default=plain_text)
    return value if isinstance(value, str) else plain_text(value)


def plain_text(value: object) -> str:
    """Format a value that JSON has no type for: all places of a decimal, a time in ISO 8601."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    return value.isoformat() if isinstance(value, datetime | date) else str(value)


_TEXT_FORMS: Final[dict[Format, Callable[["pa.RecordBatchReader", IO[str]], None]]] = {
    Format.TABLE: _write_table,
    Format.JSON: _write_json,
    Format.CSV: _write_csv,
}
