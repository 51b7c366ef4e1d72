"""Replay to any point, of one user or all, over archive and stream: equal to folding the events one by one (G5)."""

import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import typer
from redis.asyncio import Redis

from tests.archive.test_sealing import KEYS, LEDGER, Archiving, seal_all
from tests.ledger_maker import LedgerMaker
from tollbook.cli.moments import parse_moment
from tollbook.ledger.archive.history import LedgerSource, NoLedger
from tollbook.ledger.archive.replay import ReplayLimits, replay
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.projection.comparison import compare, compare_with_live
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch
from tollbook.schemas.identifiers import EntryId

EVENTS = LedgerMaker(1).run(400).entries


@pytest.fixture
async def archiving(redis_client: Redis, tmp_path: Path) -> AsyncIterator[Archiving]:
    made = Archiving(redis_client, tmp_path)
    await made.fill(400)
    sealer = made.sealer()
    await seal_all(sealer)
    await sealer.trim()
    await made.fold()
    yield made
    made.store.close()
    await made.pipeline.aclose()


def source_of(archiving: Archiving, *, has_redis: bool = True) -> LedgerSource:
    return LedgerSource(LEDGER, (KEYS,), archiving.archive, archiving.redis if has_redis else None)


@pytest.mark.slow
async def test_replay_to_random_points_has_the_committed_of_every_user_there(
    archiving: Archiving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each read of the archive begins and ends within a segment.
    monkeypatch.setattr("tollbook.ledger.archive.rebuilding._ROWS", 70)
    for number in random.Random(3).sample(range(1, len(EVENTS)), 50):
        until = EntryId.parse(EVENTS[number - 1][0].decode())
        store = await replay(source_of(archiving), tmp_path / f"{number}.duckdb", ReplayLimits(until))
        stamped: dict[str, int] = {}
        for _, fields in EVENTS[:number]:
            event = dict(zip(fields[0::2], fields[1::2], strict=True))
            if event[b"user_id"] and event[b"committed"]:
                stamped[f"user:{event[b'user_id'].decode()}:{event[b'period'].decode()}"] = int(event[b"committed"])
        found = store.query("SELECT budget, nanousd(settled_usd + held_usd) AS committed FROM budgets")
        committed = {row["budget"]: row["committed"] for row in found}
        assert {name: committed.get(name, 0) for name in stamped} == stamped
        assert store.position().seq == number
        store.close()


@pytest.mark.slow
async def test_replay_of_one_user_has_that_users_rows_and_no_others(archiving: Archiving, tmp_path: Path) -> None:
    one = await replay(source_of(archiving), tmp_path / "one.duckdb", ReplayLimits(user_id="user:2"))
    for table in ("spend", "calls", "events"):
        wanted = archiving.store.query(f"SELECT * FROM {table} WHERE user_id = 'user:2' ORDER BY ALL")  # noqa: S608
        assert wanted
        assert one.query(f"SELECT * FROM {table} ORDER BY ALL") == wanted  # noqa: S608
    assert one.query("FROM discrepancies") == []
    assert one.position().seq == archiving.store.position().seq
    one.close()


@pytest.mark.slow
async def test_an_archive_alone_replays_what_was_sealed(archiving: Archiving, tmp_path: Path) -> None:
    alone = await replay(LedgerSource.of_archive(archiving.archive), tmp_path / "alone.duckdb")
    sealed = archiving.archive.segments(0)[-1].manifest.last_seq
    reference = Store.open(tmp_path / "reference.duckdb", LEDGER)
    reference.fold(Batch(0, EVENTS[:sealed]))
    assert compare(alone, reference) == []
    alone.close()
    reference.close()


@pytest.mark.slow
async def test_progress_counts_every_event(archiving: Archiving, tmp_path: Path) -> None:
    counts: list[int] = []
    source = source_of(archiving)
    store = await replay(source, tmp_path / "r.duckdb", progress=counts.append)
    assert sum(counts) == await source.count() == store.position().seq
    store.close()


@pytest.mark.parametrize("pages_before", [1, 3])
async def test_events_that_are_sealed_and_trimmed_during_a_read_are_read_from_the_archive(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages_before: int
) -> None:
    monkeypatch.setattr("tollbook.ledger.archive.history._PAGE", 20)
    archiving = Archiving(redis_client, tmp_path)
    await archiving.fill(400)
    source, sealer, seqs = source_of(archiving), archiving.sealer(), list[int]()
    # Part of the archive, and of the stream, is read before the rest is sealed.
    await sealer.seal()
    await sealer.trim()
    pages = 0
    async with aclosing(source.events(0)) as tables:
        async for table in tables:
            seqs += table["seq"].to_pylist()
            pages += 1
            if pages == pages_before:
                assert await seal_all(sealer)
                await sealer.trim()
    assert seqs == list(range(1, await source.count() + 1))
    archiving.store.close()
    await archiving.pipeline.aclose()


def test_a_missing_archive_is_reported(tmp_path: Path) -> None:
    with pytest.raises(NoLedger):
        LedgerSource.of_archive(Archive(tmp_path))


def test_a_moment_is_a_time_or_an_entry() -> None:
    last = 2**63 - 1
    assert parse_moment("1764000000000-3", "--until") == EntryId(1_764_000_000_000, 3)
    assert parse_moment("2026-11-24T12:00:00Z", "--until") == EntryId(1_795_521_600_000, last)
    assert parse_moment("2026-11-24T13:00:00+01:00", "--until") == EntryId(1_795_521_600_000, last)
    assert parse_moment("2026-11-24", "--until") == EntryId(1_795_478_400_000, last)
    for wrong in ("", "yesterday", "1764", "2026-13-01"):
        with pytest.raises(typer.BadParameter):
            parse_moment(wrong, "--until")


@pytest.mark.slow
async def test_a_projection_that_folds_on_is_compared_as_far_as_it_can_be(redis_client: Redis, tmp_path: Path) -> None:
    archiving = Archiving(redis_client, tmp_path)
    await archiving.fill(400)
    position = archiving.store.position()
    replayed = await replay(source_of(archiving), tmp_path / "r.duckdb", ReplayLimits({0: position.entry}))
    await archiving.append(LedgerMaker(1).run(480).entries[len(EVENTS) :])
    assert archiving.store.position().seq > position.seq
    comparison = compare_with_live(replayed, archiving.store, {0: position})
    assert comparison.differences == []
    assert comparison.moved_on > 0
    assert comparison.rows > position.seq
    with archiving.store.reading() as cursor:
        cursor.execute(
            "UPDATE budgets SET settled_usd = settled_usd + 1 WHERE last_seq = (SELECT min(last_seq) FROM budgets)"
        )
    tampered = compare_with_live(replayed, archiving.store, {0: position})
    assert tampered.differences[0].table == "budgets"
    replayed.close()
    archiving.store.close()
    await archiving.pipeline.aclose()
