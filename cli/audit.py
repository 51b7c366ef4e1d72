"""`tollbook audit`: the life of a call, a user's statement, why a call was refused, and a search for events."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from tollbook.cli.options import (
    ArchiveOption,
    JsonOption,
    UserArgument,
    data_settings,
    read_call,
    read_id,
    read_period,
)
from tollbook.cli.row_options import FormatOption, choose_format
from tollbook.cli.user_ids import on_ledger, on_ledger_or_none, plain_ids

if TYPE_CHECKING:
    from tollbook.audit.reader import AuditReader

app = typer.Typer(name="audit", help="Answer questions from the ledger: archive and stream.", no_args_is_help=True)

_Answer = TypeVar("_Answer")
# A smaller ledger is read before anybody could see a progress bar.
_MIN_EVENTS_FOR_PROGRESS: Final = 100_000
_DEFAULT_MOVEMENTS: Final = 50

CallArgument = Annotated[str, typer.Argument(metavar="CALL", help="Call id: the id of the task.", callback=read_call)]


@app.command()
def call(call_id: CallArgument, archive: ArchiveOption = None, as_json: JsonOption = False) -> int:
    """Show the life of a call: holds, attempts, fallbacks, settlement, corrections.

    Example: tollbook audit call 5f1c0e0e
    """
    from tollbook.audit.calls import CallLife, find_call
    from tollbook.views.audit.documents import calls_document
    from tollbook.views.audit.screens import print_calls

    def show(reader: "AuditReader", lives: list[CallLife]) -> int:
        if as_json:
            typer.echo(json.dumps(calls_document(reader, lives)))
        else:
            print_calls(reader, lives)
        return 0

    return _answer(archive, lambda reader: find_call(reader, call_id), show)


@app.command()
def user(
    user_id: UserArgument,
    period: Annotated[
        str | None, typer.Option(help="Billing period, YYYY-MM; the user's latest by default.", callback=read_period)
    ] = None,
    holds: Annotated[bool, typer.Option(help="Show holds too, or only charges, refusals and changes.")] = True,
    last: Annotated[
        int | None,
        typer.Option(min=1, help=f"How many of the newest movements. [default: {_DEFAULT_MOVEMENTS}; --json: all]"),
    ] = None,
    archive: ArchiveOption = None,
    as_json: JsonOption = False,
) -> int:
    """Show a user's statement of a billing period: the newest movements, with the balance after each.

    Exit code 1 if the gate's balances differ. Example: tollbook audit user u42 --period 2026-11
    """
    from tollbook.audit.reader import NotOnLedger
    from tollbook.audit.statements import Statement, make_statement
    from tollbook.views.audit.documents import statement_document
    from tollbook.views.audit.screens import print_statement, statement_problems

    kept = on_ledger(data_settings(), user_id)

    def show(reader: "AuditReader", statement: Statement) -> int:
        statement = replace(statement, user_id=plain_ids(data_settings(), [kept])(kept))
        lines = [
            each for each in statement.lines if holds or each.event.type != "budget-reserved" or not each.is_agreed
        ]
        shown = lines[-(last or (len(lines) if as_json else _DEFAULT_MOVEMENTS)) :]
        if as_json:
            typer.echo(json.dumps(statement_document(reader, statement, shown)))
        else:
            print_statement(reader, statement, shown, left_out=len(lines) - len(shown))
            _print_problems(statement_problems(statement))
        return 1 if statement.disagreements else 0

    async def read(reader: "AuditReader") -> Statement:
        try:
            return await make_statement(reader, kept, period)
        except NotOnLedger as exc:
            raise NotOnLedger(str(exc).replace(kept, user_id)) from None  # With the id that was typed.

    return _answer(archive, read, show)


@app.command()
def explain(call_id: CallArgument, archive: ArchiveOption = None, as_json: JsonOption = False) -> int:
    """Explain why a call was refused or allowed: every number that decided it, at that position.

    Exit code 1 if the gate's balances differ. Example: tollbook audit explain 5f1c0e0e
    """
    from tollbook.audit.calls import CallLife, find_call
    from tollbook.audit.explanations import Decision
    from tollbook.audit.explanations import explain as decisions_on
    from tollbook.views.audit.documents import explanations_document
    from tollbook.views.audit.screens import explanation_problems, print_explanations

    async def read(reader: "AuditReader") -> list[tuple[CallLife, list[Decision]]]:
        return [(life, await decisions_on(reader, life)) for life in await find_call(reader, call_id)]

    def show(reader: "AuditReader", found: list[tuple[CallLife, list[Decision]]]) -> int:
        if as_json:
            typer.echo(json.dumps(explanations_document(reader, found)))
        else:
            print_explanations(reader, found)
            _print_problems(explanation_problems(found))
        is_agreed = all(
            each.is_agreed for _, decisions in found for decision in decisions for each in decision.weighings
        )
        return 0 if is_agreed else 1

    return _answer(archive, read, show)


@app.command()
def find(
    user_id: Annotated[str | None, typer.Option("--user", help="Only events of this user.", callback=read_id)] = None,
    campaign: Annotated[str | None, typer.Option(help="Only calls of this campaign.", callback=read_id)] = None,
    call_id: Annotated[str | None, typer.Option("--call", help="Only events of this call.", callback=read_call)] = None,
    model: Annotated[
        str | None, typer.Option(help="Only calls for which this model was asked, answered, or failed over.")
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="Only this event type, e.g. cost-recorded; repeatable."),
    ] = None,
    outcome: Annotated[
        str | None, typer.Option(help="Only this outcome of an attempt (ok, timeout ...) or a settlement (done ...).")
    ] = None,
    reason: Annotated[
        str | None, typer.Option(help="Only reasons that contain this text; case does not matter.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="From this time (2026-11-24T12:00:00Z) or entry id.")] = None,
    until: Annotated[str | None, typer.Option(help="Up to and including this time or entry id.")] = None,
    least: Annotated[str | None, typer.Option("--min", help="Smallest amount in dollars; may be negative.")] = None,
    most: Annotated[str | None, typer.Option("--max", help="Largest amount in dollars.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many events at most; 100 by default in a table.")
    ] = None,
    form: FormatOption = None,
    output: Annotated[Path | None, typer.Option(help="Write to this new file instead of standard output.")] = None,
    archive: ArchiveOption = None,
    as_json: JsonOption = False,
) -> int:
    """Find the events that match all filters. The columns are those of the table `events`.

    Example: tollbook audit find --user u42 --type cost-recorded --min 0.10 --output costs.csv
    """
    from tollbook.cli.audit_find import read_search
    from tollbook.views.audit.found import write_found

    chosen = choose_format(form, output, as_json=as_json)
    if output is not None and output.exists():
        raise typer.BadParameter(f"{output} already exists", param_hint="--output")
    search = read_search(
        user_id=on_ledger_or_none(data_settings(), user_id),
        campaign_id=campaign,
        call_id=call_id,
        model=model,
        types=types or (),
        outcome=outcome,
        reason=reason,
        since=since,
        until=until,
        least_usd=least,
        most_usd=most,
    )

    async def write() -> None:
        async with open_reader(archive) as reader:
            await write_found(reader, search, chosen, output, limit)

    asyncio.run(write())
    return 0


def _print_problems(problems: list[str]) -> None:
    for problem in problems:
        typer.echo(f"tollbook: {problem}", err=True)


def _answer(
    archive: str | None,
    read: "Callable[[AuditReader], Awaitable[_Answer]]",
    show: "Callable[[AuditReader, _Answer], int]",
) -> int:
    """Read with a progress bar, then show the answer."""
    from tollbook.cli.progress import progress

    async def ask() -> "tuple[AuditReader, _Answer]":
        async with open_reader(archive) as reader:
            total = await reader.source.count()
            with progress(
                "reading", total, is_quiet=not sys.stderr.isatty() or total < _MIN_EVENTS_FOR_PROGRESS
            ) as advance:
                reader.progress = advance
                return reader, await read(reader)

    return show(*asyncio.run(ask()))


@asynccontextmanager
async def open_reader(archive: str | None = None) -> "AsyncGenerator[AuditReader]":
    """Open this system's ledger, or an archive alone, for reading. Errors: as `open_source`."""
    from tollbook.audit.reader import AuditReader
    from tollbook.cli.open_history import open_source

    async with open_source(data_settings(), archive) as source:
        reader = AuditReader(source)
        try:
            yield reader
        finally:
            reader.close()
