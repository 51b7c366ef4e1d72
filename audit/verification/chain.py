"""Verification of a partition's archive: files, manifests, the order of events and the hash chain.

Reads everything, trusts nothing that it has not computed, and goes on after a finding: each
segment is held against its own manifest, so that one break is told once, at its place. What
it yields is the events of one segment after the other, for the checks of what they mean.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

import duckdb
import pyarrow as pa

from tollbook.audit.verification.findings import Findings, Kind
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.history import ROWS
from tollbook.ledger.archive.segments import (
    Archive,
    ArchiveDamaged,
    Manifest,
    Segment,
    file_sha256,
    read_manifest,
    versions_of,
)
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.stream import Batch
from tollbook.schemas.identifiers import EntryId

_ENVELOPE: Final = Batch(0, []).to_table().schema
_COLUMNS: Final = (*_ENVELOPE.names, "head")
_TYPES: Final = (*_ENVELOPE.types, pa.binary(chain.MARK_BYTES))
_NAME: Final = re.compile(r"(\d{12,})-(\d{12,})")


@dataclass(frozen=True, slots=True)
class Point:
    """A place in a partition's ledger and, in hexadecimal, the head of its chain there; `seq` 0 is its beginning."""

    seq: int
    head: str


@dataclass(frozen=True, slots=True)
class Events:
    """A table of events that follow each other without a gap; `segment` is None for those of the stream."""

    table: pa.Table
    segment: str | None

    @property
    def first_seq(self) -> int:
        """The number of the first event."""
        return cast("int", self.table["seq"][0].as_py())

    @property
    def last_seq(self) -> int:
        """The number of the last event."""
        return cast("int", self.table["seq"][-1].as_py())

    @property
    def last_id(self) -> str:
        """The id of the last event."""
        return cast("str", self.table["id"][-1].as_py())


@dataclass(slots=True)
class Trust:
    """What is known from elsewhere: points that the chain must pass, and up to where nothing is checked again.

    `heads` are to be met anywhere; those that were met are taken out.
    """

    points: dict[int, list[Point]] = field(default_factory=dict[int, list[Point]])
    skip_until: dict[int, int] = field(default_factory=dict[int, int])
    heads: set[str] = field(default_factory=set[str])


class Chain:
    """The chain of a partition as it is recomputed, event by event.

    `head` is None where it is not known: after a break, until the next manifest says where to begin again.
    """

    def __init__(self, ledger_id: str, partition: int, findings: Findings, trust: Trust) -> None:
        self.partition = partition
        self.findings = findings
        self.seq = 0
        self.last_id = "0-0"
        self.first_id: str | None = None
        self.head: bytes | None = chain.genesis(ledger_id, partition)
        self.told: bytes | None = None
        """The head that a manifest says, where that is not the computed one."""
        self.skip_until = trust.skip_until.get(partition, 0)
        self._points = {point.seq: point.head for point in trust.points.get(partition, [])}
        self._wanted = trust.heads
        self._meet(0, [self.head], None)

    def take(self, events: pa.Table, *, segment: str | None, marks: list[bytes] | None = None) -> None:
        """Go over further events, which follow each other, and hold them against the marks that were sealed."""
        before, head = self.seq, self.head
        self.skip(events)
        if head is None:
            return
        digests = chain.digests(events)
        heads = chain.heads(head, digests)[1:]
        at = None if marks is None else _first_difference(heads, marks)
        if at == 0 and self.told is not None and marks is not None:
            # The events before were rewritten, or this manifest was: the marks say which.
            heads = chain.heads(self.told, digests)[1:]
            at = _first_difference(heads, marks)
        self.told = None
        self._meet(before + 1, heads[:at], segment)
        if at is None:
            self.head = heads[-1]
            return
        self.findings.add(
            "chain",
            "the chain breaks here: this event is not what was sealed, or one was dropped or added before it",
            partition=self.partition,
            segment=segment,
            seq=before + 1 + at,
            event_id=cast("str", events["id"][at].as_py()),
        )

    def skip(self, events: pa.Table) -> None:
        """Go over further events without looking at them."""
        self.first_id = self.first_id or cast("str", events["id"][0].as_py())
        self.seq, self.last_id = self.seq + events.num_rows, cast("str", events["id"][-1].as_py())
        self.head = None

    def resume(self, head: bytes, *, segment: str | None = None) -> None:
        """Take a head as given."""
        self.head = head
        self._meet(self.seq, [head], segment)

    def end(self) -> None:
        """Note what should have been passed and was not."""
        for seq in sorted(seq for seq in self._points if seq > self.seq):
            problem = f"the ledger ends at event {self.seq}, before the trusted head"
            self.findings.add("trust", problem, partition=self.partition, seq=seq)

    def _meet(self, first_seq: int, heads: list[bytes], segment: str | None) -> None:
        if self._wanted:
            self._wanted.difference_update(head.hex() for head in heads)
        for seq, head in self._points.items():
            if first_seq <= seq < first_seq + len(heads) and heads[seq - first_seq].hex() != head:
                problem = "the head of the chain here is not the trusted one: what is before it was rewritten"
                self.findings.add("trust", problem, partition=self.partition, segment=segment, seq=seq)


class ArchiveWalk:
    """Goes over the segments of a partition in order."""

    def __init__(self, archive: Archive, ledger_id: str, chain_: Chain) -> None:
        self._archive = archive
        self._ledger_id = ledger_id
        self._chain = chain_
        self._findings = chain_.findings
        self._partition = chain_.partition
        self._previous: Manifest | None = None
        self.manifests: dict[str, Manifest] = {}
        self.segments = 0
        self.is_broken = False
        """Whether events are missing, or cannot be read: what comes after cannot be added up."""

    def events(self) -> Iterator[Events]:
        """Yield the events of segments that are beyond what was walked so far; may be called again for newer ones."""
        folder = self._archive.directory / f"partition-{self._partition}"
        stems = sorted(
            {path.stem for path in folder.glob("*") if path.suffix in (".json", ".parquet") and path.name[0] != "."}
        )
        for stem in stems:
            named = _NAME.fullmatch(stem)
            name = f"{folder.name}/{stem}"
            if named is None:
                if not self.segments:
                    self._note("archive", "is not the name of a segment", name)
                continue
            if int(named[2]) > self._chain.seq:
                yield from self._segment(folder / stem, name, int(named[1]), int(named[2]))
            elif name not in self.manifests:
                self._note("archive", "holds events that an earlier segment holds", name)

    def _segment(self, stem: Path, name: str, first_seq: int, last_seq: int) -> Iterator[Events]:
        path = stem.with_name(f"{stem.name}.parquet")
        manifest = self._manifest(stem.with_name(f"{stem.name}.json"), name)
        self.segments += 1
        if first_seq != self._chain.seq + 1:
            missing = f"events {self._chain.seq + 1} to {first_seq - 1} are missing before it"
            problem = (
                missing
                if first_seq > self._chain.seq
                else f"begins at {first_seq}, the one before ends at {self._chain.seq}"
            )
            self._note("archive", problem, name, seq=min(self._chain.seq + 1, first_seq))
            self.is_broken = True
            self._chain.seq, self._chain.head = first_seq - 1, None
        if manifest is not None:
            self._join(manifest, name)
        is_skipped = last_seq <= self._chain.skip_until and manifest is not None
        if not is_skipped:
            self._check_file(path, manifest, name)
        seen: list[pa.Table] = []
        for table in self._tables(path, name, is_skipped=is_skipped):
            # Kept without the long columns: what the manifest says is compared at the end.
            seen.append(_only(table, "seq", "id", "type", "v"))
            yield Events(table.drop_columns(["head"]), name)
        if self._chain.seq != last_seq:
            if not self.is_broken:
                self._note("archive", f"ends at event {self._chain.seq}", name, seq=self._chain.seq + 1)
            self.is_broken = True
            self._chain.seq, self._chain.head = last_seq, None
        elif manifest is not None and is_skipped:
            if (head := _hash(manifest.chain_after)) is not None:
                self._chain.resume(head, segment=name)
        elif manifest is not None and seen:
            self._check_manifest(manifest, pa.concat_tables(seen), name)
        if manifest is not None:
            self.manifests[name] = manifest
        self._previous = manifest

    def _manifest(self, path: Path, name: str) -> Manifest | None:
        try:
            manifest = read_manifest(path)
        except ArchiveDamaged as exc:
            self._note("manifest", exc.problem, name)
            return None
        if path.read_text(encoding="utf-8") != manifest.text():
            self._note("manifest", "is not written as it was sealed", name)
        expected = {"ledger_id": self._ledger_id, "partition": self._partition}
        for member, value in expected.items():
            if getattr(manifest, member) != value:
                self._note("manifest", f"{member} is {getattr(manifest, member)}, not {value}", name)
        return manifest

    def _join(self, manifest: Manifest, name: str) -> None:
        """Hold the manifest's head before the segment against the chain so far, and begin with it."""
        head = _hash(manifest.chain_before)
        if head is None or _hash(manifest.chain_after) is None:
            self._note("manifest", "has a chain head that is no SHA-256", name)
            return
        previous = self._previous
        if self._chain.head not in (None, head):
            self._note(
                "chain", "chain_before is not the head after the events before it", name, seq=self._chain.seq + 1
            )
        elif (
            previous is not None
            and previous.chain_after != manifest.chain_before
            and previous.last_seq == self._chain.seq
        ):
            self._note(
                "chain", f"chain_before is not the chain_after of {previous.segment}", name, seq=self._chain.seq + 1
            )
        if self._chain.head is None:
            self._chain.resume(head)
        elif self._chain.head != head:
            self._chain.told = head

    def _check_file(self, path: Path, manifest: Manifest | None, name: str) -> None:
        if manifest is None:
            return
        try:
            if path.stat().st_size != manifest.file_bytes:
                self._note("file", f"has {path.stat().st_size} bytes, {manifest.file_bytes} were sealed", name)
            elif file_sha256(path) != manifest.file_sha256:
                self._note("file", "is not the file that was sealed: its SHA-256 differs", name)
        except OSError as exc:
            self._note("file", f"cannot be read ({exc.strerror})", name)

    def _tables(self, path: Path, name: str, *, is_skipped: bool) -> Iterator[pa.Table]:
        """Yield the segment's events as far as they are events in their order."""
        try:
            for table in Segment(cast("Manifest", None), path).batches(ROWS):
                if not self._is_in_order(table, name):
                    self.is_broken = True
                    return
                if is_skipped:
                    self._chain.skip(table)
                else:
                    self._chain.take(table, segment=name, marks=cast("list[bytes]", table["head"].to_pylist()))
                yield table
        except (ArchiveDamaged, ValueError, KeyError, IndexError) as exc:
            problem = exc.problem if isinstance(exc, ArchiveDamaged) else f"cannot be read ({exc})"
            self._note("file", problem, name)
            self.is_broken = True

    def _is_in_order(self, table: pa.Table, name: str) -> bool:
        if (*table.schema.names,) != _COLUMNS or (*table.schema.types,) != _TYPES:
            self._note("file", "has other columns than a segment", name)
            return False
        for column in _COLUMNS:
            if column != "committed" and table[column].null_count:
                self._note("file", f"has events without {column}", name)
                return False
        return check_order(table, self._chain, segment=name)

    def _check_manifest(self, manifest: Manifest, seen: pa.Table, name: str) -> None:
        facts = {
            "first_id": seen["id"][0].as_py(),
            "last_id": seen["id"][-1].as_py(),
            "first_seq": seen["seq"][0].as_py(),
            "last_seq": seen["seq"][-1].as_py(),
            "events": seen.num_rows,
            "schema_versions": versions_of(seen),
        }
        for member, value in facts.items():
            if getattr(manifest, member) != value:
                self._note("manifest", f"{member} is {getattr(manifest, member)}, the events say {value}", name)
        head = self._chain.head
        if head is not None and head.hex() != manifest.chain_after:
            self._note("chain", "chain_after is not the head after its events", name, seq=manifest.last_seq)
            # The next segment is held against what this manifest says, so that the break is told once.
            self._chain.head = None

    def _note(self, kind: Kind, problem: str, name: str, *, seq: int | None = None) -> None:
        self._findings.add(kind, problem, partition=self._partition, segment=name, seq=seq)


def check_order(events: pa.Table, chain_: Chain, *, segment: str | None) -> bool:
    """See that the events continue the partition's, in the order of number and id; note the first that does not."""
    last = EntryId.parse(chain_.last_id)
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.register("incoming", _only(events, "seq", "id", "ms", "n", "partition"))
        given = {"seq": chain_.seq, "ms": last.ms, "n": last.seq, "partition": chain_.partition}
        row = connection.execute(_sql("verify_order"), given).fetchone()
    if row is None:
        return True
    expected, entry_id, problem = row
    chain_.findings.add(
        "stream" if segment is None else "archive",
        problem,
        partition=chain_.partition,
        segment=segment,
        seq=expected,
        event_id=entry_id,
    )
    return False


def _only(events: pa.Table, *names: str) -> pa.Table:
    return pa.table({name: events[name] for name in names})  # pyright: ignore[reportUnknownMemberType]


def _first_difference(heads: list[bytes], marks: list[bytes]) -> int | None:
    if [head[: chain.MARK_BYTES] for head in heads] == marks:
        return None
    pairs = zip(heads, marks, strict=True)
    return next(at for at, (head, mark) in enumerate(pairs) if head[: chain.MARK_BYTES] != mark)


def _hash(text: str) -> bytes | None:
    return bytes.fromhex(text) if re.fullmatch(r"[0-9a-f]{64}", text) else None


def _sql(name: str) -> str:
    return packaged_text("tollbook.audit", f"sql/{name}.sql")
