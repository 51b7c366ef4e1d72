"""`tollbook verify`: prove that the ledger is whole, and that nobody overspent."""

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli.options import ArchiveOption, JsonOption, data_settings

if TYPE_CHECKING:
    from tollbook.audit.verification.certificates import Verdict
    from tollbook.audit.verification.live_projection import LiveProjection
    from tollbook.ledger.archive.history import LedgerSource

_SHOWN = 50


def verify(
    archive: ArchiveOption = None,
    since: Annotated[
        str | None,
        typer.Option(help="A certificate file, or a head: trust all events before it, and check only newer ones."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="A certificate file, or a head, that the chain must contain; all events are checked."),
    ] = None,
    cap: Annotated[
        list[str] | None,
        typer.Option(
            help="An earlier cap in dollars, in addition to those of the settings: growth=30, user:u42=100, day=2 or "
            "campaign=50; repeatable.",
        ),
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="Write the certificate to this file.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Read the whole ledger and prove that it is whole, that no cap was passed, and that every hold is settled or open.

    Does not stop or change the running system. Events that are not in a sealed segment yet are checked for order,
    balances and meaning; the certificate has their head. Exit code 0 only if there are no findings. Unbooked charges,
    which wait beside the ledger, are listed too; they are not findings.

    Example: tollbook verify --certificate books.json
    """
    verdict, unbooked = asyncio.run(_verify(archive, since, against, [_cap(text) for text in cap or ()]))
    document = verdict.certificate()
    if certificate is not None:
        certificate.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if as_json:
        walked = [asdict(partition) for partition in verdict.partitions]
        extra = {
            "projection_rows": verdict.projection_rows,
            "gate_balances": verdict.gate_balances,
            "walked": walked,
            "unbooked": unbooked,
            "notes": verdict.notes,
        }
        typer.echo(json.dumps(document | extra, indent=2))
    else:
        _print(verdict, unbooked)
    return 0 if verdict.is_sound else 1


def _cap(text: str) -> tuple[str, int]:
    """Parse a `--cap` into subject and nano-dollars."""
    from tollbook.schemas.money import MoneyError, nanousd_from_usd

    name, _, dollars = text.rpartition("=")
    try:
        return name if name in ("day", "campaign") or ":" in name else f"plan:{name}", nanousd_from_usd(dollars)
    except MoneyError as exc:
        raise typer.BadParameter(f"{text!r} is not a name and dollars, such as growth=30 ({exc})") from None


async def _verify(
    archive: str | None, since: str | None, against: str | None, earlier: "list[tuple[str, int]]"
) -> "tuple[Verdict, list[dict[str, Any]]]":
    from tollbook.audit.verification.verification import Options, verify
    from tollbook.cli.progress import progress

    async with _opened(archive) as (source, live):
        with (
            tempfile.TemporaryDirectory(prefix="tollbook-verify-") as folder,
            progress("verifying", await _count(source), is_quiet=False) as advance,
        ):
            # An archive may come from another machine, whose settings are unknown here.
            caps = _known_caps(earlier) if archive is None or earlier else None
            options = Options(Path(folder), since=since, against=against, known_caps=caps)
            verdict = await verify(source, options, live=live, progress=advance)
        return verdict, await _unbooked(source)


async def _unbooked(source: "LedgerSource") -> list[dict[str, Any]]:
    """Return the unbooked charges; none if the archive alone is read."""
    from tollbook.cli.unbooked import unbooked_charges
    from tollbook.ledger.server.pipeline import CommandPipeline

    if source.redis is None:
        return []
    pipeline = CommandPipeline(source.redis)
    try:
        return await unbooked_charges(pipeline, source.keys, source.ledger_id, data_settings().data_dir)
    finally:
        await pipeline.aclose()


def _known_caps(earlier: "list[tuple[str, int]]") -> dict[str, set[int]]:
    """Return the caps of the settings and the `earlier` ones, by subject."""
    from tollbook.inference.stated_policy import policy_of

    settings, known = data_settings(), dict[str, set[int]]()
    policy = policy_of(settings)
    now = [(f"plan:{plan}", cap) for plan, cap in policy.plan_caps_nanousd.items()]
    now += [(f"user:{user_id}", cap) for user_id, cap in policy.user_caps_nanousd.items()]
    now += [(rule.name, rule.cap_nanousd("")) for rule in policy.budgets]
    for subject, cap in [*now, *earlier]:
        known.setdefault(subject, set()).add(cap)
    return known


@asynccontextmanager
async def _opened(archive: str | None) -> "AsyncGenerator[tuple[LedgerSource, LiveProjection | None]]":
    from tollbook.app.connect import open_tables
    from tollbook.audit.verification.live_projection import LiveProjection
    from tollbook.cli.open_history import open_source
    from tollbook.inference.archive_place import archive_at
    from tollbook.ledger.archive.history import LedgerSource
    from tollbook.ledger.errors import LedgerUnavailable

    if archive is not None:
        yield LedgerSource.of_damaged_archive(archive_at(archive)), None
        return
    settings = data_settings()
    async with open_source(settings) as source:
        if source.redis is None:
            # The archive is only a part of the ledger. Verify it alone only if the user asks for that.
            raise LedgerUnavailable(
                f"without Redis only the archive can be verified: tollbook verify --archive {settings.archive_place}"
            )
        has_projection = settings.projection_path.exists()
        yield source, await asyncio.to_thread(LiveProjection.look, open_tables(settings)) if has_projection else None


async def _count(source: "LedgerSource") -> int | None:
    from tollbook.ledger.archive.manifests import ArchiveDamaged

    try:
        return await source.count()
    except ArchiveDamaged:
        return None  # `verify` reports it.


def _print(verdict: "Verdict", unbooked: list[dict[str, Any]]) -> None:
    from tollbook.cli.unbooked import describe_unbooked

    parts = verdict.partitions
    walked = sum(part.events for part in parts)
    sealed, compared = sum(part.sealed_events for part in parts), sum(part.compared_with_stream for part in parts)
    typer.echo(f"ledger {verdict.ledger_id}: {walked:,} events in {len(parts)} partition{'s' * (len(parts) > 1)}")
    typer.echo(f"  archive     {sealed:,} events in {sum(part.segments for part in parts):,} segments, chained by hash")
    trusted = sum(part.trusted_events for part in parts)
    if trusted:
        typer.echo(f"              {trusted:,} of them trusted, not checked again")
    if verdict.gate_balances is not None:
        unsealed = sum(part.unsealed_events for part in parts)
        typer.echo(f"  stream      {compared:,} archived events compared with their copy on the stream")
        typer.echo(f"              {unsealed:,} not sealed yet: checked for order and meaning")
        typer.echo(f"  gate        {verdict.gate_balances:,} balances compared, and all else that it keeps")
    budgets = f"{len(verdict.highest):,} budget{'s' * (len(verdict.highest) != 1)}"
    typer.echo(f"  caps        {budgets} checked at every hold; {len(verdict.open_holds):,} holds open")
    rows = verdict.projection_rows
    typer.echo(
        f"  projection  {'not compared' if rows is None else f'{rows:,} rows compared with a new fold of the ledger'}"
    )
    for part in parts:
        typer.echo(f"  head        {part.head or 'unknown'} (partition {part.partition}, event {part.events:,})")
    for note in verdict.notes[:_SHOWN]:
        typer.echo(f"note: {note}")
    for finding in verdict.findings[:_SHOWN]:
        typer.echo(f"{finding.kind}: {finding.place() or 'ledger'}: {finding.problem}")
    if len(verdict.findings) > _SHOWN:
        typer.echo(f"and {len(verdict.findings) - _SHOWN} more (--json shows all)")
    for line in describe_unbooked(unbooked):
        typer.echo(line)
    typer.echo("nothing was found: the ledger is sound" if verdict.is_sound else f"{len(verdict.findings)} findings")
