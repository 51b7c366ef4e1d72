"""`tollbook partitions`: show where each partition of the ledger is, and how busy it is."""

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tollbook.cli.options import data_settings, load_redis_alone

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings
    from tollbook.views.partitions import Folded, PartitionFigures


def partitions(
    watch: Annotated[
        float, typer.Option(min=0.1, max=60, help="Seconds over which events are counted for the rate.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array of objects.")] = False,
) -> int:
    """Show where each partition of the ledger is, how fast it grows, its lag and its size.

    On a cluster, partitions are on several nodes; on one server, all have the same address. The lag is how far the
    projection in this data directory is behind the ledger; without a projection, no lag is shown.

    Example: tollbook partitions --watch 5
    """
    settings = data_settings()
    load_redis_alone()
    folded, note = _folded(settings)
    found = asyncio.run(_read(settings, folded, watch))
    if as_json:
        typer.echo(json.dumps([asdict(figures) for figures in found]))
    else:
        _print(found)
    if note:
        typer.echo(f"tollbook: {note}", err=True)
    return 0


def _folded(settings: "Settings") -> tuple[dict[str, dict[int, "Folded"]], str]:
    """Return the projection's positions by ledger and partition, or a note why they are unknown."""
    from tollbook.app.connect import query_projection
    from tollbook.ledger.errors import LedgerUnavailable
    from tollbook.views.partitions import Folded

    try:
        rows = query_projection(settings, "SELECT ledger_id, partition, seq, id FROM position")
    except LedgerUnavailable as exc:
        return {}, f"the lag is unknown: {exc}"
    found: dict[str, dict[int, Folded]] = {}
    for row in rows:
        found.setdefault(str(row["ledger_id"]), {})[row["partition"]] = Folded(row["seq"], row["id"])
    return found, ""


async def _read(
    settings: "Settings", folded: dict[str, dict[int, "Folded"]], watch_s: float
) -> "list[PartitionFigures]":
    from tollbook.app.connect import connected
    from tollbook.ledger.errors import LedgerUnavailable
    from tollbook.ledger.keys import Keys
    from tollbook.views.partitions import read_partitions

    namespace = settings.namespace
    async with connected(settings, only_reads=True) as connection:
        ledger_id, number = await connection.pipeline.execute("HMGET", Keys(namespace).meta, "ledger_id", "partitions")
        if ledger_id is None:
            raise LedgerUnavailable(
                f"there is no ledger {namespace!r}: `tollbook up` or `tollbook projector` creates it"
            )
        keys = [Keys(namespace, partition) for partition in range(int(number))]
        known = folded.get(ledger_id.decode(), {})
        return await read_partitions(connection.redis, connection.pipeline, keys, known, watch_s=watch_s)


def _print(found: "list[PartitionFigures]") -> None:
    from tollbook.views.tables import Printer

    def cells(each: "PartitionFigures") -> list[str]:
        return [
            str(each.partition),
            each.node,
            f"{each.events:,}",
            f"{each.events_per_s:,.0f}",
            "-" if each.lag_events is None else f"{each.lag_events:,}",
            "-" if each.lag_s is None else f"{each.lag_s:,.1f}",
            f"{each.open_holds:,}",
            f"{each.on_stream:,}",
            "-" if each.stream_bytes is None else f"{each.stream_bytes / 2**20:,.1f}",
        ]

    columns = (
        "partition>", "node", "events>", "events/s>", "lag (events)>", "lag (s)>", "open holds>?", "on stream>",
        "stream (MiB)>",
    )  # fmt: skip
    Printer().table(columns, [cells(each) for each in found], "Partitions of the ledger")
