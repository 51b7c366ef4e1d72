"""`tollbook lake`: copy the archive into a DuckLake for analysts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tollbook.cli.options import ArchiveOption, JsonOption, data_settings


def lake(
    catalog: Annotated[Path, typer.Argument(help="The DuckLake's catalog file; created if it does not exist.")],
    files: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="Where a new lake keeps its files: a directory, or s3://bucket/prefix; by default beside the catalog.",
        ),
    ] = None,
    archive: ArchiveOption = None,
    as_json: JsonOption = False,
) -> int:
    """Copy sealed segments into a DuckLake. Repeat it to add newer segments. The archive is not changed.

    Example: tollbook lake books.ducklake
    """
    from tollbook.inference.archive_place import archive_at, archive_of
    from tollbook.ledger.archive.lake import copy_segments, open_lake
    from tollbook.ledger.archive.segments import Segment

    def report(segment: Segment) -> None:
        if not as_json:
            manifest = segment.manifest
            typer.echo(f"partition {manifest.partition}: events {manifest.first_seq:,} to {manifest.last_seq:,}")

    place = archive_of(data_settings()) if archive is None else archive_at(archive)
    with open_lake(catalog, files) as connection:
        taken = copy_segments(place, connection, report)
    if as_json:
        typer.echo(json.dumps({"segments": taken.segments, "events": taken.events}))
    else:
        typer.echo(f"copied into {catalog}: segments {taken.segments:,}, events {taken.events:,}")
    return 0
