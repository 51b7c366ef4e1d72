"""`tollbook audit`: what happened to a call, where a user's money went, why a call was refused; searching."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from tollbook.cli.options import ArchiveOption, data_settings
from tollbook.schemas.identifiers import check_id

if TYPE_CHECKING:
    from tollbook.audit.reader import AuditReader

app = typer.Typer(name="audit", help="Answers from the ledger itself, archive and stream.", no_args_is_help=True)

_Answer = TypeVar("_Answer")
# Ledgers of fewer events are read before a bar could be seen.
_LONG: Final = 100_000

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CallArgument = Annotated[str, typer.Argument(metavar="CALL", help="Call id, which is the task's id.")]


@app.command()
def call(call_id: CallArgument, archive: ArchiveOption = None, as_json: Json = False) -> int:
    """Show the life of a call: holds, attempts, fallbacks, settlement, corrections.

    Example: tollbook audit call 5f1c0e0e
    """
    from tollbook.audit.calls import CallLife, find_call
    from tollbook.cli import audit_views

    def show(reader: "AuditReader", lives: list[CallLife]) -> int:
        if as_json:
            typer.echo(json.dumps(audit_views.calls_document(reader, lives)))
        else:
            audit_views.print_calls(reader, lives)
        return 0

    return _answer(archive, lambda reader: find_call(reader, call_id), show)


@app.command()
def user(
    user_id: Annotated[str, typer.Argument(metavar="USER", help="User id.")],
    period: Annotated[str | None, typer.Option(help="Billing period, YYYY-MM; the user's latest by default.")] = None,
    holds: Annotated[bool, typer.Option(help="Show holds, or only what was charged, refused and changed.")] = True,
    archive: ArchiveOption = None,
    as_json: Json = False,
) -> int:
    """Show a user's statement of a billing period: every movement with the balance after it.

    Exit code 1 where the gate's own sums are others. Example: tollbook audit user u42 --period 2026-11
    """
    from tollbook.audit.statements import Statement, make_statement
    from tollbook.cli import audit_views
    from tollbook.cli.spend import check_period

    _check_user(user_id)
    if period is not None:
        check_period(period)

    def show(reader: "AuditReader", statement: Statement) -> int:
        if as_json:
            typer.echo(json.dumps(audit_views.statement_document(reader, statement, has_holds=holds)))
        else:
            audit_views.print_statement(reader, statement, has_holds=holds)
        return 1 if statement.disagreements else 0

    return _answer(archive, lambda reader: make_statement(reader, user_id, period), show)


@app.command()
def explain(call_id: CallArgument, archive: ArchiveOption = None, as_json: Json = False) -> int:
    """Explain why a call was refused, or what it was weighed against: every number at that position.

    Exit code 1 where the gate's own sums are others. Example: tollbook audit explain 5f1c0e0e
    """
    from tollbook.audit.calls import CallLife, find_call
    from tollbook.audit.explanations import Decision
    from tollbook.audit.explanations import explain as decisions_on
    from tollbook.cli import audit_views

    async def read(reader: "AuditReader") -> list[tuple[CallLife, list[Decision]]]:
        return [(life, await decisions_on(reader, life)) for life in await find_call(reader, call_id)]

    def show(reader: "AuditReader", found: list[tuple[CallLife, list[Decision]]]) -> int:
        if as_json:
            typer.echo(json.dumps(audit_views.explanations_document(reader, found)))
        else:
            audit_views.print_explanations(reader, found)
        is_agreed = all(
            each.is_agreed for _, decisions in found for decision in decisions for each in decision.weighings
        )
        return 0 if is_agreed else 1

    return _answer(archive, read, show)


class Format(StrEnum):
    """How what is found is written."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


@app.command()
def find(
    user_id: Annotated[str | None, typer.Option("--user", help="Of this user.")] = None,
    campaign: Annotated[str | None, typer.Option(help="Of this campaign's calls.")] = None,
    call_id: Annotated[str | None, typer.Option("--call", help="Of this call.")] = None,
    model: Annotated[str | None, typer.Option(help="Asked for, fallen back from, or answered by this model.")] = None,
    types: Annotated[
        list[str] | None, typer.Option("--type", help="Of this type, e.g. cost-recorded; repeatable.")
    ] = None,
    outcome: Annotated[
        str | None, typer.Option(help="Of attempts (ok, timeout ...) and settlements (done ...).")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="With this in its reason, in whatever case.")] = None,
    since: Annotated[str | None, typer.Option(help="From a moment (2026-11-24T12:00:00Z) or entry id on.")] = None,
    until: Annotated[str | None, typer.Option(help="Up to a moment or entry id, included.")] = None,
    least: Annotated[str | None, typer.Option("--min", help="Amount at least, in dollars; may be negative.")] = None,
    most: Annotated[str | None, typer.Option("--max", help="Amount at most, in dollars.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many; of a table 100 by default.")] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="By default the output's suffix, else a table.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A file to make; it must not exist.")] = None,
    archive: ArchiveOption = None,
    as_json: Json = False,
) -> int:
    """Find events by any of these filters together, with the columns of the table `events`.

    Example: tollbook audit find --user u42 --type cost-recorded --min 0.10 --output costs.csv
    """
    from tollbook.cli.audit_find import Asked, read_search, write_found

    chosen = Format.JSON if as_json else form or _format_of(output)
    if output is not None and output.exists():
        raise typer.BadParameter(f"{output} is there already", param_hint="--output")
    if chosen is Format.PARQUET and output is None and sys.stdout.isatty():
        raise typer.BadParameter("Parquet needs --output FILE", param_hint="--format")
    asked = Asked(user_id, campaign, call_id, model, tuple(types or ()), outcome, reason, since, until, least, most)
    search = read_search(asked)

    async def write() -> None:
        async with _reading(archive) as reader:
            await write_found(reader, search, chosen.value, output, limit)

    asyncio.run(write())
    return 0


def _format_of(output: Path | None) -> Format:
    suffix = "" if output is None else output.suffix.lower().removeprefix(".")
    return Format(suffix) if suffix in set(Format) else Format.TABLE


def _answer(
    archive: Path | None,
    read: "Callable[[AuditReader], Awaitable[_Answer]]",
    show: "Callable[[AuditReader, _Answer], int]",
) -> int:
    """Read under a bar, then show the answer."""
    from tollbook.cli.progress import progress

    async def ask() -> "tuple[AuditReader, _Answer]":
        async with _reading(archive) as reader:
            total = await reader.source.count()
            with progress("reading", total, is_quiet=not sys.stderr.isatty() or total < _LONG) as advance:
                reader.progress = advance
                return reader, await read(reader)

    return show(*asyncio.run(ask()))


@asynccontextmanager
async def _reading(archive: Path | None) -> "AsyncGenerator[AuditReader]":
    from tollbook.audit.reader import AuditReader
    from tollbook.cli.open_history import open_source

    async with open_source(data_settings(), archive) as source:
        reader = AuditReader(source)
        try:
            yield reader
        finally:
            reader.close()


def _check_user(value: str) -> None:
    try:
        check_id(value)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="USER") from None
