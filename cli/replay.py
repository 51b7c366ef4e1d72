"""`tollbook replay`: fold the ledger again, up to any point, for one user or all, and compare with the live fold."""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tollbook.cli.moments import UntilOption, parse_moment
from tollbook.cli.options import ArchiveOption, JsonOption, data_settings, read_id
from tollbook.cli.user_ids import on_ledger_or_none

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings
    from tollbook.ledger.archive.history import LedgerSource
    from tollbook.ledger.gate.requests import Position
    from tollbook.ledger.projection.comparison import Comparison, Tables
    from tollbook.ledger.projection.store import Store
    from tollbook.schemas.identifiers import EntryId


_DEFAULT_FILE: Final = Path("replay.duckdb")


def replay(
    into: Annotated[
        Path | None,
        typer.Option(help=f"The DuckDB file to write; it must not exist. [default: {_DEFAULT_FILE}; --compare: none]"),
    ] = None,
    until: UntilOption = None,
    user: Annotated[str | None, typer.Option(help="Only events of this user.", callback=read_id)] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare with the projection in use, row for row; exit code 1 if they differ."),
    ] = False,
    archive: ArchiveOption = None,
    as_json: JsonOption = False,
) -> int:
    """Fold the ledger (archive and stream) into a new DuckDB file. Does not stop or change the running system.

    Example: tollbook replay --until 2026-11-01 --into october.duckdb
    Example: tollbook replay --compare
    """
    target = into or (None if compare else _DEFAULT_FILE)
    if target is not None and target.exists():
        raise typer.BadParameter(f"{target} already exists: name another file, or remove it", param_hint="--into")
    if compare and (user is not None or until is not None or archive is not None):
        raise typer.BadParameter("cannot be combined with --until, --user or --archive", param_hint="--compare")
    end = None if until is None else parse_moment(until, "--until")
    settings = data_settings()
    user = on_ledger_or_none(settings, user)
    with tempfile.TemporaryDirectory(prefix="tollbook-replay-") as folder:
        file = target or Path(folder) / _DEFAULT_FILE
        outcome = asyncio.run(_replay(settings, file, end, user, archive, is_compared=compare, is_quiet=as_json))
    outcome["file"] = None if target is None else str(target)
    if as_json:
        typer.echo(json.dumps(outcome))
    else:
        _print(outcome)
    return 1 if outcome.get("differences") else 0


async def _replay(
    settings: "Settings",
    into: Path,
    until: "EntryId | None",
    user: str | None,
    archive: str | None,
    *,
    is_compared: bool,
    is_quiet: bool,
) -> dict[str, Any]:
    from tollbook.cli.open_history import open_source
    from tollbook.cli.progress import progress
    from tollbook.ledger.archive.replay import ReplayLimits
    from tollbook.ledger.archive.replay import replay as fold

    async with open_source(settings, archive) as source:
        positions, live = await asyncio.to_thread(_live, settings) if is_compared else (None, None)
        ends = until if positions is None else {number: position.entry for number, position in positions.items()}
        started = time.perf_counter()
        with progress("folding", await source.count(), is_quiet=is_quiet) as advance:
            store = await fold(source, into, ReplayLimits(ends, user), progress=advance)
        seconds = time.perf_counter() - started
        try:
            outcome = await asyncio.to_thread(_summary, store, source, seconds)
            if positions is not None and live is not None:
                from tollbook.ledger.projection.comparison import compare_with_live

                outcome |= _compared(await asyncio.to_thread(compare_with_live, store, live, positions))
            return outcome
        finally:
            await asyncio.to_thread(store.close)


def _live(settings: "Settings") -> "tuple[dict[int, Position], Tables]":
    """Return the positions of the projection in use, and its tables."""
    from tollbook.app.connect import open_tables
    from tollbook.ledger.gate.requests import Position
    from tollbook.schemas.identifiers import EntryId

    live = open_tables(settings)
    rows = live.table("SELECT partition, id, seq FROM position").to_pylist()
    return {row["partition"]: Position(EntryId.parse(row["id"]), row["seq"]) for row in rows}, live


def _summary(store: "Store", source: "LedgerSource", seconds: float) -> dict[str, Any]:
    positions = store.query("SELECT partition, id, seq FROM position ORDER BY partition")
    events = sum(row["seq"] for row in positions)
    (counts,) = store.query(
        "SELECT (SELECT count(*) FROM spend) AS accounts, (SELECT count(*) FROM discrepancies) AS discrepancies"
    )
    return {
        "ledger_id": source.ledger_id,
        "events": events,
        "seconds": round(seconds, 3),
        "events_per_second": round(events / seconds) if seconds else 0,
        "positions": positions,
        "accounts": counts["accounts"],
        "discrepancies": counts["discrepancies"],
    }


def _compared(comparison: "Comparison") -> dict[str, Any]:
    return {
        "compared_rows": comparison.rows,
        "moved_on": comparison.moved_on,
        "differences": [
            {"table": d.table, "only_replayed": d.only_first, "only_live": d.only_second, "examples": list(d.examples)}
            for d in comparison.differences
        ],
    }


def _print(outcome: dict[str, Any]) -> None:
    rate = f"{outcome['seconds']:.1f} s, {outcome['events_per_second']:,}/s"
    into = f" into {outcome['file']}" if outcome["file"] else ""
    typer.echo(f"{outcome['events']:,} events folded ({rate}){into}")
    if outcome["discrepancies"]:
        typer.echo(f"{outcome['discrepancies']:,} events where ledger and fold differ: see the table `discrepancies`")
    if "differences" not in outcome:
        return
    moved = f"; {outcome['moved_on']:,} rows changed in the meantime" if outcome["moved_on"] else ""
    if not outcome["differences"]:
        typer.echo(f"equal to the projection in use: {outcome['compared_rows']:,} rows{moved}")
    for difference in outcome["differences"]:
        counts = f"{difference['only_replayed']:,} rows only replayed, {difference['only_live']:,} only in use"
        typer.echo(f"{difference['table']} differs: {counts}{moved}")
        for example in difference["examples"]:
            typer.echo(f"  {example}")
