"""Folding a whole ledger side by side gives what the projector gives (G5); one that was cut off is not used."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import ledger.source
from ledger.comparison import compare
from ledger.fold import LedgerGap
from ledger.rebuilding import Rebuild
from ledger.source import Regrouping
from ledger.store import Store
from ledger.stream import Batch
from schemas.upcasters import UnreadableEvent
from tests.ledger_maker import LedgerMaker

LEDGER = "ledger-1"
ENTRIES = LedgerMaker(5, users=9).run(600).entries


def cut(entries: Sequence[Any], size: int) -> list[Batch]:
    return [Batch(0, list(entries[start : start + size])) for start in range(0, len(entries), size)]


@pytest.mark.parametrize("size", [1_000_000, 250, 7])
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
    monkeypatch.setattr(ledger.source, "ROWS", 50)
    regrouping = Regrouping()
    sizes = (1, 48, 3, 0, 120, 28)
    bounds = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
    assert bounds[-1] == 200
    pieces = [Batch(0, ENTRIES[start:end]).to_table() for start, end in pairwise(bounds)]
    tables = [table for piece in pieces for table in regrouping.add(piece)] + regrouping.rest()
    assert [table.num_rows for table in tables] == [50, 50, 50, 50]
    assert [seq for table in tables for seq in table["seq"].to_pylist()] == list(range(1, 201))
    assert regrouping.rest() == []
