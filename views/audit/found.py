"""Writes the events that a search finds, page by page, while the search runs."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from tollbook.audit.reader import AuditReader
from tollbook.audit.search import Search, search
from tollbook.views.audit.screens import print_found
from tollbook.views.rows import Format, write_rows
from tollbook.views.tables import Printer

_TABLE_ROWS: Final = 100
_ALL: Final = 2**62


async def write_found(
    reader: AuditReader, wanted: Search, form: Format, output: Path | None, limit: int | None
) -> None:
    """Write the found events as a table, JSON, CSV or Parquet. Errors: as `AuditReader.tables`; OSError."""
    if form is Format.TABLE and output is None:
        await _print_table(reader, wanted, limit or _TABLE_ROWS)
        return
    found = _limited(search(reader, wanted), limit or _ALL)
    first = await anext(found)
    loop = asyncio.get_running_loop()

    def batches() -> Generator[pa.RecordBatch]:
        # Runs in the writer's thread, while this thread reads the next page.
        table: pa.Table | None = first
        while table is not None:
            yield from table.to_batches()
            table = asyncio.run_coroutine_threadsafe(_next(found), loop).result()

    rows = pa.RecordBatchReader.from_batches(first.schema, batches())
    await asyncio.to_thread(write_rows, rows, form, output)


async def _next(tables: AsyncGenerator[pa.Table]) -> pa.Table | None:
    return await anext(tables, None)


async def _limited(tables: AsyncGenerator[pa.Table], limit: int) -> AsyncGenerator[pa.Table]:
    left = limit
    async with aclosing(tables):
        async for table in tables:
            yield table.slice(0, left)
            left -= table.num_rows
            if left <= 0:
                return


async def _print_table(reader: AuditReader, wanted: Search, limit: int) -> None:
    rows: list[dict[str, Any]] = []
    async for table in _limited(search(reader, wanted), limit + 1):
        rows += table.to_pylist()
    if not rows:
        Printer().line("nothing found")
        return
    print_found(rows[:limit], has_partitions=len(reader.source.keys) > 1)
    if len(rows) > limit:
        Printer().text(f"the first {limit:,}; --limit shows more, --output FILE.csv writes all", indent=0)
