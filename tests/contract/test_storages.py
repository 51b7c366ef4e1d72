"""What every storage of an archive promises, whether its files are on a disk or in an object store."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.ledger_maker import LedgerMaker
from tests.object_store import ObjectStore
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.manifests import ArchiveDamaged
from tollbook.ledger.archive.segments import Archive, Segment, check_segment
from tollbook.ledger.archive.storage import Directory, Storage
from tollbook.ledger.stream import Batch

LEDGER = "ledger-1"
NAME = "partition-0/one.json"
GENESIS = chain.genesis(LEDGER, 0)


@dataclass(frozen=True)
class Place:
    """A storage, and a way to change its content past Tollbook."""

    storage: Storage
    bucket: ObjectStore | None
    directory: Path

    def again(self) -> Storage:
        """Return a storage of the same place, as another process has it."""
        return self.bucket.storage() if self.bucket else Directory(self.directory)

    def put(self, name: str, content: bytes) -> None:
        if self.bucket:
            self.bucket.put(name, content)
        else:
            (self.directory / name).write_bytes(content)

    def delete(self, name: str) -> None:
        if self.bucket:
            self.bucket.delete(name)
        else:
            (self.directory / name).unlink()


@pytest.fixture(params=["directory", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "directory":
        yield Place(Directory(tmp_path / "archive"), None, tmp_path / "archive")
    else:
        bucket: ObjectStore = request.getfixturevalue("bucket")
        yield Place(bucket.storage(), bucket, tmp_path)


def create(storage: Storage, name: str, content: bytes) -> None:
    with storage.creating(name) as draft:
        draft.write_bytes(content)


def events(first: int, last: int, *, seed: int = 1) -> pa.Table:
    entries: list[Any] = LedgerMaker(seed).run(60).entries
    table = Batch(0, entries[:last]).to_table(is_upcast=False)
    return table.slice(first - 1)


def test_nothing_is_there_at_first(place: Place) -> None:
    assert place.storage.names() == []
    assert Archive(place.storage).ledger_id() is None
    assert Archive(place.storage).segments(0) == []


def test_what_is_created_is_read_back(place: Place) -> None:
    create(place.storage, NAME, b"content")
    create(place.storage, "partition-1/two.parquet", b"")
    for storage in (place.storage, place.again()):
        assert storage.names() == [NAME, "partition-1/two.parquet"]
        assert storage.names("partition-1") == ["partition-1/two.parquet"]
        storage.prefetch([NAME, "partition-0/missing.json"])
        assert (storage.read(NAME), storage.size(NAME)) == (b"content", 7)
        with storage.file(NAME) as path:
            assert path.read_bytes() == b"content"
        found = [path.read_bytes() for paths in storage.files(storage.names()) for path in paths]
        assert found == [b"content", b""]


def test_folders_do_not_list_each_others_files(place: Place) -> None:
    create(place.storage, "partition-1/one.json", b"1")
    create(place.storage, "partition-10/ten.json", b"10")
    assert place.storage.names("partition-1") == ["partition-1/one.json"]


def test_a_change_by_another_program_is_seen_at_the_next_read(place: Place) -> None:
    create(place.storage, NAME, b"content")
    place.storage.names()
    assert place.storage.read(NAME) == b"content"
    place.put(NAME, b"changed")
    place.storage.names()
    assert place.storage.read(NAME) == b"changed"


def test_what_is_missing_is_a_file_not_found(place: Place) -> None:
    create(place.storage, NAME, b"content")
    place.delete(NAME)
    storage = place.again()
    assert storage.names() == []
    with pytest.raises(FileNotFoundError):
        storage.read(NAME)
    with pytest.raises(FileNotFoundError):
        storage.size(NAME)
    with pytest.raises(FileNotFoundError), storage.file(NAME) as path:
        path.read_bytes()


def test_a_draft_that_fails_leaves_nothing(place: Place) -> None:
    with contextlib.suppress(OSError), place.storage.creating(NAME) as draft:
        draft.write_bytes(b"half")
        raise OSError("disk full")
    assert place.again().names() == []


def test_the_check_that_files_can_be_created_leaves_none(place: Place) -> None:
    create(place.storage, NAME, b"content")
    place.storage.check_writing(NAME)
    assert place.again().names() == [NAME]
    assert place.again().read(NAME) == b"content"


def test_files_are_set_aside_beside_the_place(place: Place) -> None:
    create(place.storage, NAME, b"content")
    aside = place.storage.set_aside([NAME], suffix=".lost")
    assert aside == f"{place.storage.place}.lost"
    assert place.storage.names() == []
    if place.bucket:
        assert "books.lost/partition-0/one.json" in place.bucket.names()
    else:
        assert Path(aside, NAME).read_bytes() == b"content"


def test_a_segment_is_written_once_and_can_be_proved(place: Place) -> None:
    archive = Archive(place.storage)
    first = archive.write(events(1, 20), ledger_id=LEDGER, partition=0, head=GENESIS)
    head = bytes.fromhex(first.manifest.chain_after)
    archive.write(events(21, 40), ledger_id=LEDGER, partition=0, head=head)
    segments = Archive(place.again()).segments(0)
    assert [segment.manifest.first_seq for segment in segments] == [1, 21]
    for segment in segments:
        check_segment(segment)
    assert segments[0].manifest == first.manifest
    assert segments[0].read(["seq"])["seq"].to_pylist() == list(range(1, 21))
    rest = [seq for table in segments[1].batches(7, after_seq=25) for seq in table["seq"].to_pylist()]
    assert rest == list(range(26, 41))
    assert Archive(place.again()).partitions() == [0]
    assert Archive(place.again()).ledger_id() == LEDGER


def test_a_second_writer_of_the_same_events_finds_them_written(place: Place) -> None:
    first = Archive(place.storage).write(events(1, 20), ledger_id=LEDGER, partition=0, head=GENESIS)
    second = Archive(place.again()).write(events(1, 20), ledger_id=LEDGER, partition=0, head=GENESIS)
    assert second.manifest == first.manifest


def test_a_second_writer_of_other_events_is_refused_and_changes_nothing(place: Place) -> None:
    first = Archive(place.storage).write(events(1, 20), ledger_id=LEDGER, partition=0, head=GENESIS)
    with pytest.raises(ArchiveDamaged, match=r"000000000001-000000000020\.json: was written before and is not what"):
        Archive(place.again()).write(events(1, 20, seed=2), ledger_id=LEDGER, partition=0, head=GENESIS)
    with pytest.raises(ArchiveDamaged, match="was written before"):
        Archive(place.again()).write(events(1, 20), ledger_id="other", partition=0, head=chain.genesis("other", 0))
    (segment,) = Archive(place.again()).segments(0)
    check_segment(segment)
    assert segment.manifest == first.manifest


def test_a_segment_without_its_manifest_is_completed(place: Place) -> None:
    first = Archive(place.storage).write(events(1, 20), ledger_id=LEDGER, partition=0, head=GENESIS)
    place.delete(f"{first.stem}.json")
    archive = Archive(place.again())
    assert archive.segments(0) == []
    assert archive.begun(0, 0) == 20
    assert archive.begun(0, 20) is None
    again = archive.write(events(1, 20), ledger_id=LEDGER, partition=0, head=GENESIS)
    check_segment(again)
    assert again.manifest.chain_after == first.manifest.chain_after


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_what_is_missing_or_changed_is_named(place: Place, ending: str) -> None:
    archive, head, segments = Archive(place.storage), GENESIS, list[Segment]()
    for first in (1, 11, 21):
        segments.append(archive.write(events(first, first + 9), ledger_id=LEDGER, partition=0, head=head))
        head = bytes.fromhex(segments[-1].manifest.chain_after)
    name = f"{segments[1].stem}.{ending}"
    place.put(name, place.storage.read(name)[:-40])
    assert place_of_damage(place) == place.storage.located(name)
    place.delete(name)
    # A gap is reported at the segment after it.
    named = name if ending == "parquet" else f"{segments[2].stem}.json"
    assert place_of_damage(place) == place.storage.located(named)


def place_of_damage(place: Place) -> str:
    try:
        for each in Archive(place.again()).segments(0):
            check_segment(each)
    except ArchiveDamaged as exc:
        return exc.place
    return ""
