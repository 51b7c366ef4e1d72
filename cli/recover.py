"""`tollbook recover`: repair a ledger that lost events."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli.money import AuthorOption, sign
from tollbook.cli.options import JsonOption, data_settings

if TYPE_CHECKING:
    from tollbook.app.recovery import PartitionReport, Report
    from tollbook.inference.settings import Settings
    from tollbook.ledger.signature import Signature


def recover(
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Repair the ledger. Without it, nothing is written.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="The reason; recorded on the ledger. Required with --yes.")] = None,
    author: AuthorOption = None,
    projection: Annotated[
        Path | None,
        typer.Option(help="An older DuckDB file that has more events than the one in use.", exists=True),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show the events that Redis lost but DuckDB or the archive still has, and with --yes repair the ledger.

    Redis loses events when an older backup is restored, or when a failover promotes a replica that lagged. If the
    ledger has no newer events, the lost events are appended again as they were. Otherwise new events enter their
    charges again, and the rest is recorded as lost. Stop the projector (or `tollbook up`) and all workers first.
    Repeating it is harmless; an interrupted run is finished.

    Exit code 0 if nothing is lost, or all is recovered; 1 if events are lost and --yes was not given, or if there is
    nothing here to compare with.

    Example: tollbook recover
    Example: tollbook recover --yes --reason "backup of 4 November restored"
    """
    signature = sign(author, reason or "") if yes else None
    report = asyncio.run(_recover(data_settings(), projection, signature))
    if as_json:
        typer.echo(json.dumps(_document(report), indent=2))
    else:
        _print(report)
    return 0 if report.is_in_order else 1


async def _recover(settings: "Settings", projection: Path | None, signature: "Signature | None") -> "Report":
    from tollbook.app.recovery import open_recovery

    async with open_recovery(settings, projection) as recovery:
        return await recovery.look() if signature is None else await recovery.apply(signature)


def _document(report: "Report") -> dict[str, Any]:
    return {
        "ledger_id": report.ledger_id,
        "is_whole": report.is_whole,
        "is_applied": report.is_applied,
        "has_copies": report.has_copies,
        "has_projection": report.has_projection,
        "partitions": [_partition_document(partition) for partition in report.partitions],
        "moved_aside": report.moved_aside,
    }


def _partition_document(partition: "PartitionReport") -> dict[str, Any]:
    loss, summary = partition.loss, partition.summary
    return {
        "partition": loss.keys.partition,
        "way": way_of(partition),
        "lost_events": loss.events,
        "after": {"seq": loss.common.seq, "id": str(loss.common.entry)},
        "up_to": {"seq": loss.known.seq, "id": str(loss.known.entry)},
        "newer_events": loss.newer,
        "is_unfinished": loss.unfinished is not None,
        "kinds": summary.kinds,
        "calls": len(summary.calls),
        "users": len(summary.users),
        "settled_nanousd": summary.settled_nanousd,
        "open_holds": len(summary.holds),
        "held_nanousd": summary.held_nanousd,
        "unbooked_charges": partition.unbooked,
        "unknown_event": str(partition.unknown) if partition.unknown else None,
        "restored_events": partition.restored,
        "entered_events": partition.entered,
        "entered_nanousd": partition.entered_nanousd,
        "booked_charges": partition.booked,
        "left_events": partition.left,
    }


def way_of(partition: "PartitionReport") -> str:
    """Return how a partition is recovered: `none`, `restore`, or `enter_again`."""
    if partition.is_whole:
        return "none"
    return (
        "enter_again" if partition.loss.newer or not (partition.loss.events or partition.loss.unfinished) else "restore"
    )


def _print(report: "Report") -> None:
    from tollbook.schemas.money import format_usd
    from tollbook.views.tables import Printer

    printer = Printer()
    if not report.has_copies:
        printer.text(
            "There is neither a DuckDB file nor an archive of this ledger here, so nothing can be compared. Run this "
            "where the projector's files are, or name them with TOLLBOOK_DATA_DIR, TOLLBOOK_ARCHIVE_DIR, "
            "TOLLBOOK_ARCHIVE_URL or --projection."
        )
    elif not report.has_projection:
        printer.text(
            "There is no DuckDB file of this ledger here, so only what is sealed in the archive was compared. Newer "
            "events may be lost too: if another machine has a projector's file, run this there first, or copy the file "
            "here and name it with --projection."
        )
    for partition in report.partitions:
        if partition.unknown:
            printer.text(
                f"Partition {partition.loss.keys.partition}: event {partition.unknown} is lost. The projector that "
                "stopped calls had folded it, but DuckDB and the archive here do not have it. Run this where that "
                "projector's files are."
            )
    if report.is_whole and not report.is_in_order:
        return
    if report.is_whole:
        copies = "DuckDB and the archive have" if report.has_projection else "the archive has"
        printer.text(f"Nothing is lost: ledger {report.ledger_id} has every event that {copies}.")
        return
    for partition in report.partitions:
        if partition.is_whole:
            continue
        loss, summary = partition.loss, partition.summary
        rows = [(kind, f"{count:,}") for kind, count in sorted(summary.kinds.items())]
        printer.table(("lost events", "number>"), rows, f"Partition {loss.keys.partition}")
        facts = [
            ("lost", f"{loss.events:,} events of {len(summary.calls):,} calls and {len(summary.users):,} users"),
            ("after", f"event {loss.common.seq:,}, {loss.common.entry}"),
            ("up to", f"event {loss.known.seq:,}, {loss.known.entry}"),
            ("settled", format_usd(summary.settled_nanousd, places=9)),
            ("open holds", f"{len(summary.holds):,}, {format_usd(summary.held_nanousd, places=9)}"),
            ("newer", f"{loss.newer:,} events that only the ledger has"),
        ]
        if partition.unbooked:
            facts.append(("unbooked", f"{partition.unbooked:,} paid answers that no worker can book"))
        printer.facts(facts)
        printer.text(_outcome(partition) if report.is_applied else _plan(partition))
        if partition.left:
            printer.text(
                "Not entered again, because they were repeated, decided again, or have nothing left to change: "
                f"{', '.join(partition.left)}. The files that were moved aside still have these events."
            )
    for path in report.moved_aside:
        printer.text(f"Moved aside, because it holds the lost history: {path}")
    if report.is_applied:
        printer.text("Check it with `tollbook verify`, then start the projector and the workers.")
    else:
        printer.text("Nothing was written. `tollbook recover --yes --reason ...` does it.")


def _plan(partition: "PartitionReport") -> str:
    if way_of(partition) == "restore":
        if not partition.loss.events:
            return "A recovery was interrupted; it will be completed."
        return "The lost events will be appended again as they were."
    if not partition.loss.events:
        return "The paid answers will be charged by new events."
    return (
        "Their charges, plans and credits will be entered again by new events; open holds and refusals are lost for "
        "good. DuckDB and segments that hold the lost history will be moved aside."
    )


def _outcome(partition: "PartitionReport") -> str:
    from tollbook.schemas.money import format_usd

    done = list[str]()
    if partition.restored or way_of(partition) == "restore":
        done.append(f"{partition.restored:,} events are back as they were")
    if way_of(partition) == "enter_again" or partition.entered:
        amount = format_usd(partition.entered_nanousd, places=9)
        done.append(f"{partition.entered:,} new events enter {amount} again")
    return "; ".join(done) + "."
