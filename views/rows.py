"""Rows of a query as a table, JSON, CSV or Parquet, batch by batch, so that a large answer needs little memory.

Money stays exact: a decimal is a string in JSON and all its places in CSV. A file appears when it is whole.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    import pyarrow as pa

_TABLE_ROWS: Final = 1_000
_ANY_WIDTH: Final = 1_000_000


def write_rows(reader: "pa.RecordBatchReader", form: str, output: Path | None) -> None:
    """Write all rows as `form` says, to a file or to standard output."""
    from tollbook.views.files import replacing

    with nullcontext(None) if output is None else replacing(output) as part:
        if form == "parquet":
            _write_parquet(reader, part)
            return
        write = _TEXT_FORMS[form]
        if part is None:
            write(reader, sys.stdout)
            return
        with part.open("w", encoding="utf-8", newline="") as file:
            write(reader, file)


def _write_parquet(reader: "pa.RecordBatchReader", part: Path | None) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(sys.stdout.buffer if part is None else part, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def _write_json(reader: "pa.RecordBatchReader", file: IO[str]) -> None:
    separator = "["
    for batch in reader:
        for row in batch.to_pylist():
            file.write(separator + json.dumps(row, default=_text))
            separator = ",\n"
    file.write("[]\n" if separator == "[" else "]\n")


def _write_csv(reader: "pa.RecordBatchReader", file: IO[str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(reader.schema.names)
    for batch in reader:
        writer.writerows([_cell(value) for value in row] for row in _tuples(batch))


def _write_table(reader: "pa.RecordBatchReader", file: IO[str]) -> None:
    import pyarrow as pa
    from rich.text import Text

    from tollbook.views.tables import make_console, make_table, printable

    fields = cast("Iterable[Any]", reader.schema)
    table = make_table(
        f"{field.name}>" if pa.types.is_integer(field.type) or pa.types.is_decimal(field.type) else str(field.name)
        for field in fields
    )
    cells: list[list[str]] = []
    rows = 0
    for batch in reader:
        cells += [[printable(_cell(value)) for value in row] for row in _tuples(batch)[: _TABLE_ROWS - rows]]
        rows += batch.num_rows
        if rows > _TABLE_ROWS:
            break
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console = make_console(file=file)
    if console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum <= console.width:
        console.print(table)
    else:
        _write_records(reader.schema.names, cells, file)
    if rows > _TABLE_ROWS:
        file.write(f"the first {_TABLE_ROWS:,} rows; --format csv writes them all\n")


def _write_records(names: list[str], rows: list[list[str]], file: IO[str]) -> None:
    """Write each column on a line of its own: a table wider than the terminal would show cut numbers and ids."""
    width = max(len(name) for name in names)
    for number, row in enumerate(rows, 1):
        file.write(f"row {number:,}\n")
        file.writelines(f"  {name:<{width}}  {cell}".rstrip() + "\n" for name, cell in zip(names, row, strict=True))


def _tuples(batch: "pa.RecordBatch") -> list[tuple[Any, ...]]:
    arrays = cast("list[Any]", batch.columns)
    columns: list[list[Any]] = [array.to_pylist() for array in arrays]
    return list(zip(*columns, strict=True))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, default=_text)
    return value if isinstance(value, str) else _text(value)


def _text(value: object) -> str:
    if isinstance(value, Decimal):
        return f"{value:f}"
    return value.isoformat() if isinstance(value, datetime | date) else str(value)


_TEXT_FORMS: Final[dict[str, Callable[["pa.RecordBatchReader", IO[str]], None]]] = {
    "table": _write_table,
    "json": _write_json,
    "csv": _write_csv,
}
