"""`tollbook verify`: proof that the ledger is whole, and that nobody overspent."""

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tollbook.cli.options import ArchiveOption

if TYPE_CHECKING:
    from tollbook.audit.verification.certificates import Verdict
    from tollbook.audit.verification.live_projection import LiveProjection
    from tollbook.ledger.archive.history import LedgerSource

_SHOWN = 50


def verify(
    archive: ArchiveOption = None,
    since: Annotated[
        str | None,
        typer.Option(help="A certificate's file, or a head: what lies before it is trusted and not checked again."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A certificate's file, or a head, that the chain must pass; everything is checked."),
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="Write the certificate to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate and what was walked as JSON.")] = False,
) -> int:
    """Walk the whole ledger and prove that it is whole, that no cap was passed, that every hold is settled or open.

    Nothing is stopped or changed. The stream's events that are not sealed yet are in no segment, so that their order,
    balances and meaning are checked, and their head is in the certificate. Exit code 0 only where nothing was found.

    Example: tollbook verify --certificate books.json
    """
    verdict = asyncio.run(_verify(archive, since, against))
    document = verdict.certificate()
    if certificate is not None:
        certificate.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        walked = [asdict(partition) for partition in verdict.partitions]
        extra = {"projection_rows": verdict.projection_rows, "gate_balances": verdict.gate_balances, "walked": walked}
        typer.echo(json.dumps(document | extra, indent=2))
    else:
        _print(verdict)
    return 0 if verdict.is_sound else 1


async def _verify(archive: Path | None, since: str | None, against: str | None) -> "Verdict":
    from tollbook.audit.verification.verification import Options, verify

    async with _opened(archive) as (source, live):
        with (
            tempfile.TemporaryDirectory(prefix="tollbook-verify-") as folder,
            _progress(await _count(source)) as progress,
        ):
            options = Options(Path(folder), since=since, against=against)
            return await verify(source, options, live=live, progress=progress)


@asynccontextmanager
async def _opened(archive: Path | None) -> "AsyncGenerator[tuple[LedgerSource, LiveProjection | None]]":
    from tollbook.app.connect import open_tables
    from tollbook.audit.verification.live_projection import LiveProjection
    from tollbook.cli.open_history import open_source
    from tollbook.inference.settings import load_settings
    from tollbook.ledger.archive.history import LedgerSource
    from tollbook.ledger.archive.segments import Archive
    from tollbook.ledger.errors import LedgerUnavailable

    if archive is not None:
        yield LedgerSource.of_damaged_archive(Archive(archive)), None
        return
    settings = load_settings()
    async with open_source(settings) as source:
        if source.redis is None:
            # Half a ledger is not proven by the other half; who means the archive says so.
            raise LedgerUnavailable("without the stream only an archive can be verified: --archive DIR")
        has_projection = (settings.data_dir / "tollbook.duckdb").exists()
        yield source, await asyncio.to_thread(LiveProjection.look, open_tables(settings)) if has_projection else None


async def _count(source: "LedgerSource") -> int | None:
    from tollbook.ledger.archive.segments import ArchiveDamaged

    try:
        return await source.count()
    except ArchiveDamaged:
        return None  # Told by the walk.


@contextmanager
def _progress(total: int | None) -> Generator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from tollbook.views.tables import make_console

    columns = (TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TextColumn("events"), TimeElapsedColumn())
    with Progress(*columns, console=make_console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=total)
        yield lambda events: bar.advance(task, events)


def _print(verdict: "Verdict") -> None:
    parts = verdict.partitions
    walked = sum(part.events for part in parts)
    sealed, compared = sum(part.sealed_events for part in parts), sum(part.compared_with_stream for part in parts)
    typer.echo(f"ledger {verdict.ledger_id}: {walked:,} events in {len(parts)} partition{'s' * (len(parts) > 1)}")
    typer.echo(f"  archive     {sealed:,} events in {sum(part.segments for part in parts):,} segments, chained by hash")
    trusted = sum(part.trusted_events for part in parts)
    if trusted:
        typer.echo(f"              {trusted:,} of them taken as trusted")
    if verdict.gate_balances is not None:
        unsealed = sum(part.unsealed_events for part in parts)
        typer.echo(f"  stream      {compared:,} archived events compared with their copy on the stream")
        typer.echo(f"              {unsealed:,} not sealed yet: no segment binds them; order and meaning were checked")
        typer.echo(f"  gate        {verdict.gate_balances:,} of its own balances compared, and its list of open holds")
    typer.echo(
        f"  caps        {len(verdict.highest):,} budgets, at every hold; {len(verdict.open_holds):,} holds are open"
    )
    rows = verdict.projection_rows
    typer.echo(
        f"  projection  {'not compared' if rows is None else f'{rows:,} rows compared with the ledger folded anew'}"
    )
    for part in parts:
        typer.echo(f"  head        {part.head or 'unknown'} (partition {part.partition}, event {part.events:,})")
    for finding in verdict.findings[:_SHOWN]:
        typer.echo(f"{finding.kind}: {finding.place() or 'ledger'}: {finding.problem}")
    if len(verdict.findings) > _SHOWN:
        typer.echo(f"and {len(verdict.findings) - _SHOWN} more (--json shows all)")
    typer.echo("nothing was found: the ledger is sound" if verdict.is_sound else f"{len(verdict.findings)} findings")
