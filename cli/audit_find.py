"""The filters of `tollbook audit find` as people write them, and what is found, as they want it."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final, get_args

import pyarrow as pa
import typer

from tollbook.audit.reader import AuditReader, Selection
from tollbook.audit.search import Search, search
from tollbook.cli.audit_text import money, places_of, plain
from tollbook.cli.entries import Entry, print_entries
from tollbook.cli.moments import parse_moment
from tollbook.schemas.events import CostRecorded, EventPayload, Outcome
from tollbook.schemas.identifiers import check_id
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD
from tollbook.schemas.problems import unknown_name
from tollbook.views.rows import write_rows
from tollbook.views.tables import make_console

_TYPES: Final = tuple(each.model_fields["type"].default for each in get_args(get_args(EventPayload)[0]))
_OUTCOMES: Final = (*get_args(Outcome), *get_args(CostRecorded.model_fields["outcome"].annotation))
_TABLE_ROWS: Final = 100
_ALL: Final = 2**62


@dataclass(frozen=True, slots=True)
class Asked:
    """The filters as they were given."""

    user_id: str | None
    campaign_id: str | None
    call_id: str | None
    model: str | None
    types: tuple[str, ...]
    outcome: str | None
    reason: str | None
    since: str | None
    until: str | None
    least_usd: str | None
    most_usd: str | None


def read_search(asked: Asked) -> Search:
    """Read the filters. Errors: typer.BadParameter."""
    for value, hint in ((asked.user_id, "--user"), (asked.campaign_id, "--campaign")):
        if value is not None:
            _check_id(value, hint)
    for name in asked.types:
        _check_known(name, _TYPES, "--type")
    if asked.outcome is not None:
        _check_known(asked.outcome, _OUTCOMES, "--outcome")
    selection = Selection(
        user_id=asked.user_id,
        call_ids=None if asked.call_id is None else frozenset({asked.call_id}),
        types=asked.types,
        since_ms=None if asked.since is None else parse_moment(asked.since, "--since").ms,
        until=None if asked.until is None else parse_moment(asked.until, "--until"),
        least_nanousd=None if asked.least_usd is None else _amount(asked.least_usd, "--min"),
        most_nanousd=None if asked.most_usd is None else _amount(asked.most_usd, "--max"),
    )
    return Search(
        selection=selection,
        campaign_id=asked.campaign_id,
        model=asked.model,
        outcome=asked.outcome,
        reason=asked.reason,
    )


async def write_found(reader: AuditReader, wanted: Search, form: str, output: Path | None, limit: int | None) -> None:
    """Write what is found, page by page, as a table, JSON, CSV or Parquet. Errors: as `AuditReader.tables`; OSError."""
    if form == "table" and output is None:
        await _print_table(reader, wanted, limit or _TABLE_ROWS)
        return
    found = _limited(search(reader, wanted), limit or _ALL)
    first = await anext(found)
    loop = asyncio.get_running_loop()

    def batches() -> Generator[pa.RecordBatch]:
        # Called in the writer's thread, while this one reads on.
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
        typer.echo("nothing found")
        return
    places = places_of(_nanousd(row[name]) for row in rows[:limit] for name in ("amount_usd", "committed_usd"))
    has_partitions = len(reader.source.keys) > 1
    entries: list[Entry] = []
    for row in rows[:limit]:
        at: datetime = row["recorded_at"]
        amounts = [_nanousd(row[name]) for name in ("amount_usd", "committed_usd")]
        cells = [
            f"{row['seq']:,}",
            f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
            row["type"],
            *("" if amount is None else money(amount, places) for amount in amounts),
        ]
        entries.append(Entry([*([str(row["partition"])] if has_partitions else []), *cells], [_what(row)]))
    columns = ("event>", "time (UTC)", "type*", "amount>", "committed>")
    console = make_console()
    print_entries(console, (*(["partition>"] if has_partitions else []), *columns), entries)
    if len(rows) > limit:
        typer.echo(f"the first {limit:,}; --limit shows more, --format csv --output FILE writes all")


def _what(row: dict[str, Any]) -> str:
    whose = " ".join(plain(row[name]) for name in ("user_id", "call_id") if row[name])
    names = ("model", "outcome", "basis", "plan", "author", "reason", "error")
    parts = dict.fromkeys(plain(str(row[name])) for name in names if row[name])
    return f"{whose}: {', '.join(parts)}" if parts else whose


def _nanousd(usd: Decimal | None) -> int | None:
    return None if usd is None else int(usd.scaleb(9))


def _amount(dollars: str, hint: str) -> int:
    """Return an amount in nano-dollars, which may be negative: corrections are."""
    try:
        given = Decimal(dollars)
        # Compared before it is scaled, since a huge exponent would make a huge integer.
        is_amount = (
            abs(given) <= MAX_NANOUSD // NANOUSD_PER_USD and given.scaleb(9) == given.scaleb(9).to_integral_value()
        )
    except InvalidOperation:
        is_amount, given = False, Decimal(0)
    if not is_amount:
        raise typer.BadParameter(f"{dollars!r} is no amount in dollars of at most nine places", param_hint=hint)
    return int(given.scaleb(9))


def _check_known(name: str, known: tuple[str, ...], hint: str) -> None:
    if name not in known:
        raise typer.BadParameter(unknown_name(hint.removeprefix("--"), name, known), param_hint=hint)


def _check_id(value: str, hint: str) -> None:
    try:
        check_id(value)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=hint) from None
