"""The archive: sealed segments of a ledger, each a Parquet file and a manifest.

    <archive>/partition-0/000000000001-000000100000.parquet
    <archive>/partition-0/000000000001-000000100000.json

A segment holds whole events as they were written (payloads not upcast), sorted by id, with
the columns of `Batch.to_table`, and `head`, the first bytes of the chain's head after each event.
Its manifest binds it into the hash chain. Each file appears whole, the manifest last: a segment
exists if its manifest does. Files are never changed afterwards. Only `storage.py` knows where
they are.
"""

import hashlib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from tollbook.ledger.archive import chain
from tollbook.ledger.archive.manifests import (
    ArchiveDamaged,
    Manifest,
    folder_of,
    manifest_name,
    manifests_in,
    parquet_name,
    read_manifest,
)
from tollbook.ledger.archive.storage import Directory, Storage

_DIGITS: Final = 12
_ROW_GROUP: Final = 100_000
_READ: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """A sealed segment. `stem` is its name, with the folder of its partition and without ending."""

    manifest: Manifest
    storage: Storage
    stem: str

    @property
    def place(self) -> str:
        """Path or address of the segment's file, for people."""
        return self.storage.located(parquet_name(self.stem))

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Return the segment's events. Errors: ArchiveDamaged."""
        with self.file() as path:
            return self._read(path, columns)

    def read_checked(self) -> pa.Table:
        """Return the events, after a check that the file is the sealed one. Errors: ArchiveDamaged."""
        with self.checked_file() as path:
            return self._read(path)

    def batches(self, rows: int, *, after_seq: int = 0) -> Generator[pa.Table]:
        """Yield the segment's events after `after_seq` in tables of at most `rows`. Errors: ArchiveDamaged."""
        with self.checked_file() as path:
            yield from read_batches(path, self.place, rows, after_seq=after_seq)

    @contextmanager
    def file(self) -> Generator[Path]:
        """Yield a local file with the segment, which is valid during the block only. Errors: ArchiveDamaged."""
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self.storage.file(parquet_name(self.stem)))
            except OSError as exc:
                raise ArchiveDamaged(self.place, f"cannot be read ({exc.strerror})") from exc
            yield path

    @contextmanager
    def checked_file(self) -> Generator[Path]:
        """As `file`, after a check that the file is the sealed one. Errors: ArchiveDamaged."""
        with self.file() as path:
            try:
                is_same = path.stat().st_size == self.manifest.file_bytes
                is_same = is_same and file_sha256(path) == self.manifest.file_sha256
            except OSError as exc:
                raise ArchiveDamaged(self.place, f"cannot be read ({exc.strerror})") from exc
            if not is_same:  # G7
                raise ArchiveDamaged(self.place, "is not the file that was sealed")
            yield path

    def _read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.read_table(path, columns=columns, partitioning=None)  # pyright: ignore[reportUnknownMemberType]
        except (OSError, pa.ArrowException) as exc:
            raise ArchiveDamaged(self.place, f"cannot be read ({exc})") from exc


class Archive:
    """The segments of one ledger in one storage, by default a directory."""

    def __init__(self, storage: Storage | Path) -> None:
        self.storage: Storage = Directory(storage) if isinstance(storage, Path) else storage

    @property
    def place(self) -> str:
        """Path or address of the archive, for people."""
        return self.storage.place

    def partitions(self) -> list[int]:
        """Return the partitions that have segments."""
        return sorted({int(name.split("/")[0].removeprefix("partition-")) for name in self.manifests()})

    def manifests(self, partition: int | None = None) -> list[str]:
        """Return the names of all manifests, or of a partition's, in order."""
        return manifests_in(self.storage, partition)

    def check_access(self) -> None:
        """Check that the archive can be read and written. Errors: OSError; ArchiveUnavailable; ArchiveRefused."""
        names = self.manifests()
        if names:
            self.storage.check_writing(names[-1])

    def ledger_id(self) -> str | None:
        """Return the ledger id of the first segment; None if there are no segments. Errors: ArchiveDamaged."""
        for name in self.manifests():
            return read_manifest(self.storage, name).ledger_id
        return None

    def segments(self, partition: int) -> list[Segment]:
        """Return a partition's segments in order.

        Errors: ArchiveDamaged for a manifest that cannot be read, or a gap between segments.
        """
        names = self.manifests(partition)
        self.storage.prefetch(names)
        found: list[Segment] = []
        for name in names:
            manifest = read_manifest(self.storage, name)
            if found and manifest.first_seq != found[-1].manifest.last_seq + 1:
                missing = f"{found[-1].manifest.last_seq + 1} to {manifest.first_seq - 1}"
                raise ArchiveDamaged(
                    self.storage.located(name), f"does not continue the segment before it: events {missing} are missing"
                )
            found.append(Segment(manifest, self.storage, name.removesuffix(".json")))
        return found

    def begun(self, partition: int, after_seq: int) -> int | None:
        """Return the last event of a segment after `after_seq` that a crash left without a manifest; else None."""
        first = f"{folder_of(partition)}/{after_seq + 1:0{_DIGITS}}-"
        for name in self.storage.names(folder_of(partition)):
            if name.startswith(first) and name.endswith(".parquet"):
                return int(name.removesuffix(".parquet").rpartition("-")[2])
        return None

    def write(self, events: pa.Table, *, ledger_id: str, partition: int, head: bytes) -> Segment:
        """Seal a table of events as the next segment; `head` is the chain's head before it.

        A segment that a crash has left half written is completed, and one that is written already stays, if it has the
        same events. Errors: ArchiveDamaged if it has other events (then nothing is written); OSError (disk full, no
        permission); ArchiveUnavailable; ArchiveRefused.
        """
        seqs, ids = events["seq"], events["id"]
        first_seq, last_seq = seqs[0].as_py(), seqs[-1].as_py()
        stem = f"{folder_of(partition)}/{first_seq:0{_DIGITS}}-{last_seq:0{_DIGITS}}"
        heads = chain.heads(head, chain.digests(events))
        written = self._written(stem)
        if written is not None:
            ends = (written.manifest.ledger_id, written.manifest.chain_before, written.manifest.chain_after)
            if ends != (ledger_id, head.hex(), heads[-1].hex()):  # G7
                raise self._differs(manifest_name(stem))
            return written
        sha256, size = self._write_events(stem, _with_marks(events, heads[1:]))
        manifest = Manifest(
            ledger_id=ledger_id,
            partition=partition,
            segment=stem,
            first_id=ids[0].as_py(),
            last_id=ids[-1].as_py(),
            first_seq=first_seq,
            last_seq=last_seq,
            events=events.num_rows,
            chain_before=head.hex(),
            chain_after=heads[-1].hex(),
            file_sha256=sha256,
            file_bytes=size,
            schema_versions=versions_of(events),
        )
        try:
            with self.storage.creating(manifest_name(stem)) as draft:
                draft.write_text(manifest.text(), encoding="utf-8")
        except FileExistsError:
            raise self._differs(manifest_name(stem)) from None  # G7
        return Segment(manifest, self.storage, stem)

    def _written(self, stem: str) -> Segment | None:
        try:
            self.storage.read(manifest_name(stem))
        except FileNotFoundError:
            return None
        return Segment(read_manifest(self.storage, manifest_name(stem)), self.storage, stem)

    def _write_events(self, stem: str, events: pa.Table) -> tuple[str, int]:
        """Write a segment's file, unless it exists, and return the hash and the size of the file."""
        try:
            with self.storage.creating(parquet_name(stem)) as draft:
                pq.write_table(  # pyright: ignore[reportUnknownMemberType]
                    events,
                    draft,
                    compression="zstd",
                    row_group_size=_ROW_GROUP,
                    sorting_columns=[pq.SortingColumn(events.schema.get_field_index("seq"))],
                )
                return file_sha256(draft), draft.stat().st_size
        except FileExistsError:
            return self._adopt(stem, events)

    def _adopt(self, stem: str, events: pa.Table) -> tuple[str, int]:
        """Return hash and size of a file that another process has written, if it has the same events.

        Another release of Arrow writes the same events as other bytes. A replaced file would not match the manifest
        that its writer is about to write.
        """
        name = parquet_name(stem)
        with self.storage.file(name) as path:
            try:
                found = pa.concat_tables(read_batches(path, self.storage.located(name), _ROW_GROUP))
            except (ArchiveDamaged, pa.ArrowException, KeyError) as exc:  # No table, an empty one, or other columns.
                raise self._differs(name) from exc
            if not found.equals(events):  # G7
                raise self._differs(name)
            return file_sha256(path), path.stat().st_size

    def _differs(self, name: str) -> ArchiveDamaged:
        return ArchiveDamaged(
            self.storage.located(name),
            "was written before and is not what the ledger has now, so it is not replaced, and nothing is trimmed: "
            "find the other ledger or projector that writes there",
        )


def read_batches(path: Path, place: str, rows: int, *, after_seq: int = 0) -> Generator[pa.Table]:
    """Yield the events of a segment's local file after `after_seq` in tables of at most `rows`.

    Errors: ArchiveDamaged, which names the place.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=rows):  # pyright: ignore[reportUnknownMemberType]
                events = pa.Table.from_batches([batch])
                past = max(0, after_seq + 1 - events["seq"][0].as_py())
                if past < events.num_rows:
                    yield events.slice(past)
    except (OSError, pa.ArrowException) as exc:
        raise ArchiveDamaged(place, f"cannot be read ({exc})") from exc


def check_segment(segment: Segment) -> None:
    """Read a segment back and check that it is what its manifest says. Errors: ArchiveDamaged."""
    manifest, events = segment.manifest, segment.read_checked()
    head = chain.extend(bytes.fromhex(manifest.chain_before), chain.digests(events))
    if head.hex() != manifest.chain_after or events.num_rows != manifest.events:  # G7
        raise ArchiveDamaged(segment.place, "does not give the chain head in its manifest")


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()


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
