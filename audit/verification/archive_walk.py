"""Verification of a partition's archive: its files, its manifests, and the order of its events.

Reads everything, trusts only what it computed itself, and continues after a finding: each
segment is compared with its own manifest, so that one break is reported once, at its place. It
yields the events of one segment after the other, for the checks of what they mean.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, cast

import pyarrow as pa

from tollbook.audit.verification.chain import Chain, Events, check_order, select_columns
from tollbook.audit.verification.findings import Kind
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.history import ROWS
from tollbook.ledger.archive.manifests import ArchiveDamaged, Manifest, manifest_name, parquet_name, read_manifest
from tollbook.ledger.archive.segments import Archive, file_sha256, read_batches, versions_of
from tollbook.ledger.stream import Batch

_ENVELOPE: Final = Batch(0, []).to_table().schema
_COLUMNS: Final = (*_ENVELOPE.names, "head")
_TYPES: Final = (*_ENVELOPE.types, pa.binary(chain.MARK_BYTES))
_NAME: Final = re.compile(r"(\d{12,})-(\d{12,})")


class ArchiveWalk:
    """Reads the segments of a partition in order."""

    def __init__(self, archive: Archive, ledger_id: str, chain_: Chain) -> None:
        self._archive = archive
        self._ledger_id = ledger_id
        self._chain = chain_
        self._findings = chain_.findings
        self._partition = chain_.partition
        self._previous: Manifest | None = None
        self._known: set[str] = set()
        self._last_seq: int | None = None
        self.manifests: dict[str, Manifest] = {}
        self.segments = 0
        self.is_broken = False
        """Whether events are missing or cannot be read, so that later ones cannot be added up."""

    def events(self) -> Iterator[Events]:
        """Yield the events of segments that were not read yet. May be called again for newer segments.

        Segments that were sealed while the stream was read are skipped: their events are read from the stream.
        """
        last_seq = self._last_seq
        folder = f"partition-{self._partition}"
        files = self._archive.storage.names(folder)
        self._archive.storage.prefetch([file for file in files if file.endswith(".json")])
        for name in sorted({file.rpartition(".")[0] for file in files if file.endswith((".json", ".parquet"))}):
            named = _NAME.fullmatch(name.removeprefix(f"{folder}/"))
            if named is None:
                if not self.segments:
                    self._note("archive", "is not the name of a segment", name)
                continue
            first, last = int(named[1]), int(named[2])
            is_late = last_seq is not None and first > last_seq
            if last > self._chain.seq:
                if is_late and first <= self._chain.seq:
                    break  # Its first events were read from the stream, and so are the others.
                yield from self._segment(name, first, last)
                last_seq = last
            elif name not in self._known:
                if is_late:
                    self._take_late(name)
                else:
                    self._note("archive", "holds events that an earlier segment holds", name)
            self._known.add(name)
        self._last_seq = last_seq or 0

    def _take_late(self, name: str) -> None:
        manifest = self._manifest(name)
        if manifest is not None:
            self.manifests[name] = manifest

    def _segment(self, name: str, first_seq: int, last_seq: int) -> Iterator[Events]:
        manifest = self._manifest(name)
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
        seen: list[pa.Table] = []
        for table in self._tables(name, None if is_skipped else manifest, is_skipped=is_skipped):
            # Kept without the long columns, for the comparison with the manifest at the end.
            seen.append(select_columns(table, "seq", "id", "type", "v"))
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

    def _manifest(self, name: str) -> Manifest | None:
        storage, file = self._archive.storage, manifest_name(name)
        try:
            manifest = read_manifest(storage, file)
        except ArchiveDamaged as exc:
            self._note("manifest", exc.problem, name)
            return None
        if storage.read(file) != manifest.text().encode():
            self._note("manifest", "is not written as it was sealed", name)
        expected = {"ledger_id": self._ledger_id, "partition": self._partition}
        for member, value in expected.items():
            if getattr(manifest, member) != value:
                self._note("manifest", f"{member} is {getattr(manifest, member)}, not {value}", name)
        return manifest

    def _join(self, manifest: Manifest, name: str) -> None:
        """Compare the manifest's head before the segment with the chain so far, and go on from it."""
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
            self._chain.stated_head = head

    def _check_file(self, path: Path, manifest: Manifest | None, name: str) -> None:
        if manifest is None:
            return
        try:
            if path.stat().st_size != manifest.file_bytes:  # audits G7
                self._note("file", f"has {path.stat().st_size} bytes, {manifest.file_bytes} were sealed", name)
            elif file_sha256(path) != manifest.file_sha256:  # audits G7
                self._note("file", "is not the file that was sealed: its SHA-256 differs", name)
        except OSError as exc:
            self._note("file", f"cannot be read ({exc.strerror})", name)

    def _tables(self, name: str, manifest: Manifest | None, *, is_skipped: bool) -> Iterator[pa.Table]:
        """Yield the segment's events up to the first that is malformed or out of order.

        The file is compared with the manifest first, where one is given.
        """
        storage, file = self._archive.storage, parquet_name(name)
        with ExitStack() as stack:
            try:
                path = stack.enter_context(storage.file(file))
            except OSError as exc:
                self._note("file", f"cannot be read ({exc.strerror})", name)
                self.is_broken = True
                return
            self._check_file(path, manifest, name)
            yield from self._tables_of(path, storage.located(file), name, is_skipped=is_skipped)

    def _tables_of(self, path: Path, place: str, name: str, *, is_skipped: bool) -> Iterator[pa.Table]:
        try:
            for table in read_batches(path, place, ROWS):
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
            if getattr(manifest, member) != value:  # audits G7
                self._note("manifest", f"{member} is {getattr(manifest, member)}, the events say {value}", name)
        head = self._chain.head
        if head is not None and head.hex() != manifest.chain_after:
            self._note("chain", "chain_after is not the head after its events", name, seq=manifest.last_seq)
            # The next segment is compared with what this manifest says, so that the break is reported once.
            self._chain.head = None

    def _note(self, kind: Kind, problem: str, name: str, *, seq: int | None = None) -> None:
        self._findings.add(kind, problem, partition=self._partition, segment=name, seq=seq)


def _hash(text: str) -> bytes | None:
    return bytes.fromhex(text) if re.fullmatch(r"[0-9a-f]{64}", text) else None
