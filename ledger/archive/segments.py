"""The archive: sealed segments of a ledger, each a Parquet file and a manifest.

    <archive>/partition-0/000000000001-000000100000.parquet
    <archive>/partition-0/000000000001-000000100000.json

A segment holds whole events as they were written (payloads not upcast), sorted by id, with
the columns of `Batch.to_table`, and `head`, the first bytes of the chain's head after each event.
Its manifest binds it into the hash chain. Both are written under a temporary name, synced and
renamed, the manifest last: a segment exists if its manifest does. Nothing here is changed
afterwards.
"""

import contextlib
import hashlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tollbook.ledger.archive import chain
from tollbook.ledger.errors import LedgerError
from tollbook.schemas.problems import as_text, problems_of

FORMAT: Final = 1
_DIGITS: Final = 12
_ROW_GROUP: Final = 100_000
_READ: Final = 1 << 20


class ArchiveDamaged(LedgerError):
    """A part of the archive is not what was sealed; the message names the file and the problem."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class Manifest(BaseModel):
    """What a segment holds, and its place in the chain. Hashes are hexadecimal SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    ledger_id: str
    partition: int = Field(ge=0)
    segment: str
    first_id: str
    last_id: str
    first_seq: int = Field(ge=1)
    last_seq: int = Field(ge=1)
    events: int = Field(ge=1)
    chain_before: str
    chain_after: str
    file_sha256: str
    file_bytes: int
    schema_versions: dict[str, list[int]]

    def text(self) -> str:
        """Return the exact content of the manifest's file."""
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class Segment:
    """A sealed segment on disk."""

    manifest: Manifest
    path: Path

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Return the segment's events. Errors: ArchiveDamaged."""
        try:
            return pq.read_table(  # pyright: ignore[reportUnknownMemberType]
                self.path, columns=columns, partitioning=None
            )
        except (OSError, pa.ArrowException) as exc:
            raise ArchiveDamaged(self.path, f"cannot be read ({exc})") from exc

    def batches(self, rows: int, *, after_seq: int = 0) -> Generator[pa.Table]:
        """Yield the segment's events after `after_seq` in tables of at most `rows`. Errors: ArchiveDamaged."""
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=rows):  # pyright: ignore[reportUnknownMemberType]
                    events = pa.Table.from_batches([batch])
                    past = max(0, after_seq + 1 - events["seq"][0].as_py())
                    if past < events.num_rows:
                        yield events.slice(past)
        except (OSError, pa.ArrowException) as exc:
            raise ArchiveDamaged(self.path, f"cannot be read ({exc})") from exc


class Archive:
    """The segments of one ledger under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def partitions(self) -> list[int]:
        """Return the partitions that have segments."""
        found = self.directory.glob("partition-*/*.json")
        return sorted({int(path.parent.name.removeprefix("partition-")) for path in found})

    def ledger_id(self) -> str | None:
        """Return the ledger that the first segment is of; None where there is none. Errors: ArchiveDamaged."""
        for path in sorted(self.directory.glob("partition-*/*.json")):
            return read_manifest(path).ledger_id
        return None

    def segments(self, partition: int) -> list[Segment]:
        """Return a partition's segments in order.

        Errors: ArchiveDamaged for a manifest that cannot be read, or a gap between segments.
        """
        folder = self._folder(partition)
        found: list[Segment] = []
        for path in sorted(folder.glob("*.json")):
            manifest = read_manifest(path)
            if found and manifest.first_seq != found[-1].manifest.last_seq + 1:
                missing = f"{found[-1].manifest.last_seq + 1} to {manifest.first_seq - 1}"
                raise ArchiveDamaged(path, f"does not continue the segment before it: events {missing} are missing")
            found.append(Segment(manifest, path.with_suffix(".parquet")))
        return found

    def write(self, events: pa.Table, *, ledger_id: str, partition: int, head: bytes) -> Segment:
        """Seal a table of events as the next segment; `head` is the chain's head before it.

        What a crash has left half written is written again. Errors: OSError (disk full, no permission).
        """
        folder = self._folder(partition)
        folder.mkdir(parents=True, exist_ok=True)
        seqs, ids = events["seq"], events["id"]
        first_seq, last_seq = seqs[0].as_py(), seqs[-1].as_py()
        name = f"{first_seq:0{_DIGITS}}-{last_seq:0{_DIGITS}}"
        path = folder / f"{name}.parquet"
        heads = chain.heads(head, chain.digests(events))
        with _replacing(path) as draft:
            pq.write_table(  # pyright: ignore[reportUnknownMemberType]
                _with_marks(events, heads[1:]),
                draft,
                compression="zstd",
                row_group_size=_ROW_GROUP,
                sorting_columns=[pq.SortingColumn(events.schema.get_field_index("seq"))],
            )
        manifest = Manifest(
            ledger_id=ledger_id,
            partition=partition,
            segment=f"partition-{partition}/{name}",
            first_id=ids[0].as_py(),
            last_id=ids[-1].as_py(),
            first_seq=first_seq,
            last_seq=last_seq,
            events=events.num_rows,
            chain_before=head.hex(),
            chain_after=heads[-1].hex(),
            file_sha256=file_sha256(path),
            file_bytes=path.stat().st_size,
            schema_versions=versions_of(events),
        )
        with _replacing(path.with_suffix(".json")) as draft:
            draft.write_text(manifest.text(), encoding="utf-8")
        return Segment(manifest, path)

    def _folder(self, partition: int) -> Path:
        return self.directory / f"partition-{partition}"


def check_segment(segment: Segment) -> None:
    """Read a segment back and check that it is what its manifest says. Errors: ArchiveDamaged."""
    check_file(segment)
    manifest, events = segment.manifest, segment.read()
    head = chain.extend(bytes.fromhex(manifest.chain_before), chain.digests(events))
    if head.hex() != manifest.chain_after or events.num_rows != manifest.events:  # G7
        raise ArchiveDamaged(segment.path, "does not give the chain head that its manifest says")


def check_file(segment: Segment) -> None:
    """Check that a segment's file is the one that its manifest describes. Errors: ArchiveDamaged."""
    manifest, path = segment.manifest, segment.path
    try:
        is_same = path.stat().st_size == manifest.file_bytes and file_sha256(path) == manifest.file_sha256
    except OSError as exc:
        raise ArchiveDamaged(path, f"cannot be read ({exc.strerror})") from exc
    if not is_same:  # G7
        raise ArchiveDamaged(path, "is not the file that was sealed")


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check that it belongs where it is. Errors: ArchiveDamaged."""
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise ArchiveDamaged(path, f"cannot be read ({exc.strerror})") from exc
    except ValidationError as exc:
        raise ArchiveDamaged(path, f"is no manifest ({as_text(problems_of(exc, Manifest))})") from exc
    if manifest.format != FORMAT:
        raise ArchiveDamaged(path, f"is of format {manifest.format}; this program reads format {FORMAT}")
    if manifest.segment != f"{path.parent.name}/{path.stem}":
        raise ArchiveDamaged(path, f"belongs to segment {manifest.segment}")
    return manifest


def _with_marks(events: pa.Table, heads: list[bytes]) -> pa.Table:
    marks = pa.array([head[: chain.MARK_BYTES] for head in heads], pa.binary(chain.MARK_BYTES))
    return events.append_column("head", marks)


def versions_of(events: pa.Table) -> dict[str, list[int]]:
    """Return the schema versions of each type of event, as a manifest lists them."""
    pairs = set(zip(events["type"].to_pylist(), events["v"].to_pylist(), strict=True))
    versions: dict[str, list[int]] = {}
    for kind, version in sorted(cast("set[tuple[str, int]]", pairs)):
        versions.setdefault(kind, []).append(version)
    return versions


@contextlib.contextmanager
def _replacing(path: Path) -> Generator[Path]:
    """Yield a temporary path; what is written there is synced, and renamed to `path` in one step."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
