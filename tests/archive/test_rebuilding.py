"""Folding a whole ledger in parallel gives the projector's result (G5); an interrupted rebuild is not used."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from tests.archive_files import file_of
from tests.ledger_maker import LedgerMaker
from tests.quick import first_quick
from tollbook.ledger.archive import chain, history
from tollbook.ledger.archive.history import LedgerSource, Regrouping
from tollbook.ledger.archive.manifests import ArchiveDamaged
from tollbook.ledger.archive.rebuilding import Rebuild
from tollbook.ledger.archive.replay import replay
from tollbook.ledger.archive.segments import Archive, Segment, file_sha256
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.fold import LedgerGap
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch
from tollbook.schemas.upcasters import UPCASTERS, UnreadableEvent

LEDGER = "ledger-1"
ENTRIES = LedgerMaker(5, users=9).run(600).entries


def cut(entries: Sequence[Any], size: int) -> list[Batch]:
    return [Batch(0, list(entries[start : start + size])) for start in range(0, len(entries), size)]


@pytest.mark.parametrize("size", first_quick(1, [60, 250, 1_000_000]))
def test_a_rebuild_equals_the_live_fold_wherever_batches_end(tmp_path: Path, size: int) -> None:
    live, rebuilt = (Store.open(tmp_path / name, LEDGER) for name in ("live.duckdb", "rebuilt.duckdb"))
    for batch in cut(ENTRIES, 100):
        live.fold(batch)
    with Rebuild.of(rebuilt) as rebuild:
        for batch in cut(ENTRIES, size):
            rebuild.fold(batch.to_table(), partition=0)
    assert compare(rebuilt, live) == []
    assert rebuilt.query("FROM position") == live.query("FROM position")
    live.close()
    rebuilt.close()
    again = Store.open(tmp_path / "rebuilt.duckdb", LEDGER)
    assert again.position().seq == len(ENTRIES)
    again.close()


@pytest.mark.slow
def test_a_rebuild_of_several_partitions_equals_the_live_fold(tmp_path: Path) -> None:
    live, rebuilt = (Store.open(tmp_path / name, LEDGER, 2) for name in ("live.duckdb", "rebuilt.duckdb"))
    ledgers = [LedgerMaker(seed, users=9).run(200).entries for seed in range(2)]
    with Rebuild.of(rebuilt) as rebuild:
        for partition, entries in enumerate(ledgers):
            table = Batch(partition, entries).to_table()
            live.fold_table(table, partition=partition)
            rebuild.fold(table, partition=partition)
    assert compare(rebuilt, live) == []
    live.close()
    rebuilt.close()


def test_a_rebuild_that_was_cut_off_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "t.duckdb"
    store = Store.open(path, LEDGER)
    with pytest.raises(KeyboardInterrupt), Rebuild.of(store) as rebuild:  # noqa: PT012 - the block is what is cut off.
        rebuild.fold(Batch(0, ENTRIES[:100]).to_table(), partition=0)
        raise KeyboardInterrupt
    store.close()
    opened = Store.open(path, LEDGER)
    assert (opened.position().seq, opened.query("FROM events")) == (0, [])
    assert [found.name for found in tmp_path.glob("*.bad")]
    opened.close()


@pytest.mark.parametrize(
    ("payload", "error"), [(b'{"hold":', UnreadableEvent), (b"[]", UnreadableEvent), (None, LedgerGap)]
)
def test_an_event_that_cannot_be_folded_ends_a_rebuild_as_it_ends_the_fold(
    tmp_path: Path, payload: bytes | None, error: type[Exception]
) -> None:
    entries = [[entry_id, list(fields)] for entry_id, fields in ENTRIES[:100]]
    if payload is None:
        del entries[50]
    else:
        entries[50][1][-1] = payload
    table = Batch(0, entries).to_table()
    store = Store.open(tmp_path / "t.duckdb", LEDGER)
    with pytest.raises(error) as live:
        store.fold_table(table, partition=0)
    with pytest.raises(error) as rebuilding, Rebuild.of(store) as rebuild:
        rebuild.fold(table, partition=0)
    assert str(rebuilding.value) == str(live.value)
    store.close()


def test_tables_are_joined_and_cut_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ROWS", 50)
    regrouping = Regrouping()
    sizes = (1, 48, 3, 0, 120, 28)
    bounds = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    assert bounds[-1] == 200
    pieces = [Batch(0, ENTRIES[start:end]).to_table() for start, end in pairwise(bounds)]
    tables = [table for piece in pieces for table in regrouping.add(piece)] + regrouping.rest()
    assert [table.num_rows for table in tables] == [50, 50, 50, 50]
    assert [seq for table in tables for seq in table["seq"].to_pylist()] == list(range(1, 201))
    assert regrouping.rest() == []


def sealed(directory: Path) -> tuple[Archive, LedgerSource]:
    """Return an archive of four segments, and its ledger."""
    archive, head = Archive(directory / "archive"), chain.genesis(LEDGER, 0)
    for batch in cut(ENTRIES, len(ENTRIES) // 4 + 1):
        written = archive.write(batch.to_table(is_upcast=False), ledger_id=LEDGER, partition=0, head=head)
        head = bytes.fromhex(written.manifest.chain_after)
    return archive, LedgerSource.of_archive(archive)


@pytest.mark.slow
async def test_segments_of_an_older_version_are_upcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB reads current segments by itself; from the first older one on, payloads go through the upcasters."""
    entries, older = list(ENTRIES), len(ENTRIES) * 5 // 8
    monkeypatch.setitem(globals(), "ENTRIES", entries)
    entries[older] = [entries[older][0], [b"1" if at == 3 else part for at, part in enumerate(entries[older][1])]]
    kind = entries[older][1][1].decode()
    monkeypatch.setitem(UPCASTERS, (kind, 1), lambda payload: {**payload, "worker": "lifted"})
    _, source = sealed(tmp_path)
    replayed = await replay(source, tmp_path / "r.duckdb")
    live = Store.open(tmp_path / "live.duckdb", LEDGER)
    live.fold(Batch(0, entries))
    assert compare(replayed, live) == []
    assert replayed.query("SELECT seq, worker FROM events WHERE v = 1") == [{"seq": older + 1, "worker": "lifted"}]
    replayed.close()
    live.close()


def damage(segment: Segment) -> None:
    content = bytearray(file_of(segment).read_bytes())
    content[len(content) // 3] ^= 255
    file_of(segment).write_bytes(content)


def cut_off(segment: Segment) -> None:
    file_of(segment).write_bytes(file_of(segment).read_bytes()[:-40])


def lose(segment: Segment) -> None:
    file_of(segment).unlink()


def put_another(segment: Segment) -> None:
    events = segment.read()
    write_table(events.slice(0, events.num_rows - 3), file_of(segment))


@pytest.mark.slow
@pytest.mark.parametrize("harm", [damage, cut_off, lose, put_another])
async def test_a_replay_names_the_segment_that_is_damaged(tmp_path: Path, harm: Callable[[Segment], None]) -> None:
    archive, source = sealed(tmp_path)
    segment = archive.segments(0)[2]
    harm(segment)
    with pytest.raises(ArchiveDamaged) as refused:
        await replay(source, tmp_path / "r.duckdb")
    assert refused.value.place == segment.place


async def test_events_of_a_version_that_the_manifest_does_not_name_are_refused(tmp_path: Path) -> None:
    archive, source = sealed(tmp_path)
    segment = archive.segments(0)[1]
    events = segment.read()
    versions = pa.array([0] * events.num_rows, pa.int32())
    write_table(events.set_column(events.schema.get_field_index("v"), "v", versions), file_of(segment))
    path = file_of(segment).with_suffix(".json")
    refused = {"file_sha256": file_sha256(file_of(segment)), "file_bytes": file_of(segment).stat().st_size}
    path.write_text(json.dumps(json.loads(path.read_text()) | refused))
    with pytest.raises(ArchiveDamaged, match="other versions than its manifest says"):
        await replay(source, tmp_path / "r.duckdb")


@pytest.mark.slow
@pytest.mark.parametrize("size", [40, 130, 1_000])
async def test_a_replay_of_segments_equals_the_live_fold_wherever_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("tollbook.ledger.archive.rebuilding._ROWS", size)
    _, source = sealed(tmp_path / "o'brien=1")
    replayed = await replay(source, tmp_path / "r.duckdb")
    live = Store.open(tmp_path / "live.duckdb", LEDGER)
    live.fold(Batch(0, ENTRIES))
    assert compare(replayed, live) == []
    seqs = [row["seq"] for row in replayed.query("SELECT seq FROM events")]
    assert seqs == sorted(seqs), "what is appended side by side is in order"
    replayed.close()
    live.close()
