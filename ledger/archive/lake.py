"""Copies sealed segments into a DuckLake: their events are rows of its table `events`; each segment is copied once.

The lake has files of its own, which it may compact and expire; the archive's files are only read. The table `segments`
lists the copied segments and is written in the same transaction, so a killed run can be repeated without harm. Each
segment must continue the one before it, by number and by the head of the chain.
"""

import importlib.resources
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import duckdb

from tollbook.ledger.archive.segments import Archive, Segment
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.projection.database import connect
from tollbook.ledger.projection.sql_text import quoted

_EXTRA: Final = "a lake needs DuckDB's extensions: pip install 'tollbook[lake]'"
_SEGMENTS: Final = """
CREATE TABLE IF NOT EXISTS lake.segments (
    ledger_id VARCHAR, partition INTEGER, segment VARCHAR, first_seq BIGINT, last_seq BIGINT, events BIGINT,
    chain_after VARCHAR
)
"""
# Only the archive needs the column `head`.
_EVENTS: Final = "SELECT * EXCLUDE (head) FROM read_parquet($path)"


class LakeRefused(LedgerError):
    """The lake cannot be opened, or it has events of another ledger or another history."""


@dataclass(slots=True)
class CopiedCounts:
    """How much a run has copied."""

    segments: int = 0
    events: int = 0


@contextmanager
def open_lake(catalog: Path, files: str | None) -> Generator[duckdb.DuckDBPyConnection]:
    """Open the DuckLake whose catalogue is a file, or make it; it is attached as `lake`.

    `files`: where a new lake has its Parquet files, a directory or `s3://bucket/prefix`; None: beside the catalogue.
    Errors: LakeRefused.
    """
    with connect() as connection:
        try:
            _load(connection, "ducklake")
            if (files or _files_of(catalog)).startswith("s3://"):
                _load(connection, "httpfs")
                connection.execute(_secret())
            place = "" if files is None else f" (DATA_PATH {quoted(files.rstrip('/') + '/')})"
            connection.execute(f"ATTACH {quoted(f'ducklake:{catalog}')} AS lake{place}")
            connection.execute(_SEGMENTS)
        except duckdb.Error as exc:
            raise LakeRefused(f"the lake {catalog} cannot be opened: {_first_line(exc)}") from exc
        yield connection


def copy_segments(archive: Archive, lake: duckdb.DuckDBPyConnection, report: Callable[[Segment], None]) -> CopiedCounts:
    """Copy every sealed segment that the lake does not have; `report` is called with each of them.

    Errors: LakeRefused; ArchiveDamaged; ArchiveUnavailable; ArchiveRefused. Segments copied before the error stay.
    """
    copied = CopiedCounts()
    _check_ledger(lake, archive)
    for partition in archive.partitions():
        last_seq, head = _end_of_copy(lake, partition)
        for segment in archive.segments(partition):
            manifest = segment.manifest
            if manifest.last_seq <= last_seq:
                continue
            if manifest.first_seq != last_seq + 1 or head not in (None, manifest.chain_before):
                raise LakeRefused(
                    f"{segment.place} does not continue the lake's events of partition {partition}, which end at event "
                    f"{last_seq}: the lake is of another history of the ledger; begin a new lake"
                )
            _copy(lake, segment)
            last_seq, head = manifest.last_seq, manifest.chain_after
            copied.segments += 1
            copied.events += manifest.events
            report(segment)
    return copied


def _files_of(catalog: Path) -> str:
    """Return where an existing lake has its files; empty for a new lake. Errors: duckdb.Error."""
    if not catalog.exists():
        return ""
    with connect(catalog, read_only=True) as connection:
        row = connection.execute("SELECT value FROM ducklake_metadata WHERE key = 'data_path'").fetchone()
    return str(row[0]) if row else ""


def _check_ledger(lake: duckdb.DuckDBPyConnection, archive: Archive) -> None:
    ledger_id = archive.ledger_id()
    other = lake.execute("SELECT ledger_id FROM lake.segments WHERE ledger_id <> ? LIMIT 1", [ledger_id]).fetchone()
    if other is not None:
        raise LakeRefused(f"the lake is of ledger {other[0]}, the archive of {ledger_id}: name another catalogue")


def _end_of_copy(lake: duckdb.DuckDBPyConnection, partition: int) -> tuple[int, str | None]:
    """Return the lake's last event of a partition, and the chain's head there; (0, None) if it has no events."""
    row = lake.execute(
        "SELECT max(last_seq), arg_max(chain_after, last_seq) FROM lake.segments WHERE partition = ?", [partition]
    ).fetchone()
    return (0, None) if row is None or row[0] is None else (row[0], row[1])


def _copy(lake: duckdb.DuckDBPyConnection, segment: Segment) -> None:
    manifest = segment.manifest
    with segment.checked_file() as path:
        given = {"path": str(path)}
        try:
            lake.begin()
            lake.execute(f"CREATE TABLE IF NOT EXISTS lake.events AS {_EVENTS} LIMIT 0", given)
            lake.execute(f"INSERT INTO lake.events BY NAME {_EVENTS}", given)
            lake.execute(
                "INSERT INTO lake.segments VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    manifest.ledger_id, manifest.partition, manifest.segment, manifest.first_seq, manifest.last_seq,
                    manifest.events, manifest.chain_after,
                ],
            )  # fmt: skip
            lake.commit()
        except duckdb.Error as exc:
            raise LakeRefused(f"{segment.place} cannot be copied into the lake: {_first_line(exc)}") from exc


def _load(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Load one of DuckDB's extensions from its wheel. Errors: LakeRefused if it is missing or of another DuckDB."""
    try:
        wheel = importlib.resources.files(f"duckdb_extension_{name}")
    except ModuleNotFoundError:
        raise LakeRefused(_EXTRA) from None
    file = wheel.joinpath("extensions", f"v{duckdb.__version__}", f"{name}.duckdb_extension")
    if not file.is_file():
        raise LakeRefused(f"the extension {name} is not for DuckDB {duckdb.__version__}: {_EXTRA}")
    connection.execute(f"LOAD {quoted(str(file))}")


def _secret() -> str:
    """Return the statement that lets DuckDB write to the object store, with the usual AWS credentials.

    Errors: LakeRefused.
    """
    try:
        import botocore.session
    except ModuleNotFoundError:
        raise LakeRefused("files in an object store need an extra: pip install 'tollbook[s3]'") from None
    session = botocore.session.get_session()
    found = session.get_credentials()
    if found is None:
        raise LakeRefused("no credentials for the object store: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    frozen = found.get_frozen_credentials()
    parts = {"KEY_ID": frozen.access_key, "SECRET": frozen.secret_key}
    parts |= {"SESSION_TOKEN": frozen.token} if frozen.token else {}
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
    parts |= {"REGION": str(region)} if region else {}
    options = [f"{name} {quoted(str(value))}" for name, value in parts.items()]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        url = urlsplit(endpoint)
        use_ssl = "true" if url.scheme == "https" else "false"
        options += [f"ENDPOINT {quoted(url.netloc)}", "URL_STYLE 'path'", f"USE_SSL {use_ssl}"]
    return f"CREATE SECRET (TYPE s3, {', '.join(options)})"


def _first_line(problem: Exception) -> str:
    return str(problem).splitlines()[0]
