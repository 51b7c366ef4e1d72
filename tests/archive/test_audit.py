"""Statements and searches on made ledgers, across the seam of archive and stream; and missing events."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import typer
from redis.asyncio import Redis

from tests.archive.test_sealing import KEYS, LEDGER, Archiving, seal_all
from tests.archive_files import file_of
from tests.ledger_maker import LedgerMaker
from tollbook.audit.calls import find_call
from tollbook.audit.explanations import explain
from tollbook.audit.reader import AuditReader, EventsMissing, NotOnLedger, Selection
from tollbook.audit.search import Search, search
from tollbook.audit.statements import make_statement
from tollbook.cli.audit_find import read_search
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch
from tollbook.schemas.events import (
    BudgetReserved,
    FallbackUsed,
    ModelCalled,
)
from tollbook.schemas.identifiers import partition_of

STEPS = 400


# --- Made ledgers


@pytest.fixture
async def archiving(redis_client: Redis, tmp_path: Path) -> AsyncIterator[Archiving]:
    """A made ledger, the larger part of it sealed and trimmed off the stream."""
    made = Archiving(redis_client, tmp_path)
    await made.fill(STEPS)
    sealer = made.sealer()
    await seal_all(sealer)
    assert await sealer.trim() > 0
    await made.fold()
    yield made
    made.store.close()
    await made.pipeline.aclose()


def reader_of(archiving: Archiving, *, has_redis: bool = True) -> AuditReader:
    return AuditReader(LedgerSource(LEDGER, (KEYS,), archiving.archive, archiving.redis if has_redis else None))


async def check_statements(reader: AuditReader, store: Store) -> None:
    spend = store.query("SELECT * FROM spend")
    assert spend
    for row in spend:
        statement = await make_statement(reader, row["user_id"], row["period"])
        assert statement.disagreements == ()
        assert statement.settled_nanousd == row["spent_usd"].scaleb(9)
        assert statement.held_nanousd == row["reserved_usd"].scaleb(9)
        if row["cap_usd"] is not None:
            assert statement.cap_nanousd == row["cap_usd"].scaleb(9)
        assert sum(line.settled_change_nanousd for line in statement.lines) == statement.settled_nanousd
        assert sum(line.held_change_nanousd for line in statement.lines) == statement.held_nanousd


@pytest.mark.slow
async def test_a_statement_closes_as_spend_says_for_every_user(archiving: Archiving) -> None:
    await check_statements(reader_of(archiving), archiving.store)


@pytest.mark.slow
async def test_an_archive_alone_closes_as_the_ledger_stood_when_it_was_sealed(
    archiving: Archiving, tmp_path: Path
) -> None:
    sealed = archiving.archive.segments(0)[-1].manifest.last_seq
    store = Store.open(tmp_path / "sealed.duckdb", LEDGER)
    store.fold(Batch(0, LedgerMaker(1).run(STEPS).entries[:sealed]))
    reader = AuditReader(LedgerSource.of_archive(archiving.archive))
    await check_statements(reader, store)
    assert reader.positions[0].seq == sealed
    store.close()


@pytest.mark.slow
async def test_the_latest_period_is_the_default_and_others_are_named(archiving: Archiving) -> None:
    reader = reader_of(archiving)
    statement = await make_statement(reader, "user:1")
    assert (statement.period, statement.other_periods) == ("2026-11", ("2026-10",))
    with pytest.raises(NotOnLedger, match="nothing in 2025-01; there is 2026-10, 2026-11"):
        await make_statement(reader, "user:1", "2025-01")
    with pytest.raises(NotOnLedger, match="user user:9 is not on the ledger"):
        await make_statement(reader, "user:9")
    with pytest.raises(NotOnLedger, match="call nothing is not on the ledger"):
        await find_call(reader, "nothing")


@pytest.mark.slow
async def test_the_life_of_a_call_agrees_with_the_view_calls(archiving: Archiving) -> None:
    reader = reader_of(archiving)
    rows = archiving.store.query(
        "SELECT call_id, arg_max(status, last_seq) AS status, sum(cost_usd) AS cost, sum(held_usd) AS held, "
        "sum(assumed_usd) AS assumed, sum(holds) AS holds, sum(attempts) AS attempts, sum(fallbacks) AS fallbacks, "
        "count(*) AS periods, max(last_seq) - min(first_seq) AS span FROM calls GROUP BY call_id "
        "ORDER BY span DESC LIMIT 25"
    )
    sealed = archiving.archive.segments(0)[-1].manifest.last_seq
    across = 0
    for row in rows:
        (life,) = await find_call(reader, row["call_id"])
        assert life.status == row["status"]
        assert [life.cost_nanousd, life.held_nanousd, life.assumed_nanousd] == [
            row[name].scaleb(9) for name in ("cost", "held", "assumed")
        ]
        assert [life.count(kind) for kind in (BudgetReserved, ModelCalled, FallbackUsed)] == [
            row[name] for name in ("holds", "attempts", "fallbacks")
        ]
        across += life.events[0].seq <= sealed < life.events[-1].seq
    assert across > 0, "some lives begin in the archive and end on the stream"


async def test_a_sum_that_the_gate_did_not_write_is_a_disagreement(redis_client: Redis, tmp_path: Path) -> None:
    archiving = Archiving(redis_client, tmp_path)
    entries = LedgerMaker(1).run(120).entries
    index, fields = next((i, f) for i, (_, f) in enumerate(entries) if f[1] == b"cost-recorded")
    at = fields.index(b"committed") + 1
    fields[at] = str(int(fields[at]) + 1).encode()
    user = fields[fields.index(b"user_id") + 1].decode()
    of_period = fields[fields.index(b"period") + 1].decode()
    await archiving.append(entries)
    reader = reader_of(archiving)
    assert [line.event.seq for line in (await make_statement(reader, user, of_period)).disagreements] == [index + 1]
    archiving.store.close()
    await archiving.pipeline.aclose()


@pytest.mark.slow
async def test_a_refusal_with_other_sums_is_a_disagreement(archiving: Archiving) -> None:
    """All refusals of the made ledger have one nano-dollar settled and nothing held."""
    reader = reader_of(archiving)
    denied = await reader.events(Selection(types=("budget-denied",)))
    found = {True: 0, False: 0}
    for event in denied[-5:]:
        (life,) = await find_call(reader, event.call_id)
        ((decision,),) = [await explain(reader, life)]
        (weighing,) = decision.weighings
        assert weighing.stamped_nanousd == 1
        assert weighing.is_agreed == (weighing.settled_nanousd + weighing.held_nanousd == 1)
        found[weighing.is_agreed] += 1
    assert found[False] > 0


@pytest.mark.slow
async def test_only_the_partition_of_the_user_is_read(archiving: Archiving) -> None:
    keys = (KEYS, Keys("test", 1))
    both = AuditReader(LedgerSource(LEDGER, keys, archiving.archive, archiving.redis))
    alone = AuditReader(LedgerSource(LEDGER, keys, archiving.archive))
    users = [f"user:{number}" for number in range(20)]
    assert {tuple(both.partitions(user)) for user in users} == {(0,), (1,)}
    for user in users:
        assert list(both.partitions(user)) == [partition_of(user, 2)]
        # An archive may lack the segments of a partition, and does not say how many partitions there are.
        assert list(alone.partitions(user)) == [0, 1]


# --- Missing events are not skipped


@pytest.mark.slow
async def test_a_missing_first_segment_is_reported(archiving: Archiving) -> None:
    first, second, *_ = archiving.archive.segments(0)
    file_of(first).with_suffix(".json").unlink()
    for reader in (reader_of(archiving), AuditReader(LedgerSource.of_archive(archiving.archive))):
        with pytest.raises(EventsMissing, match=f"events 1 to {second.manifest.first_seq - 1} are neither"):
            await reader.events(Selection())


@pytest.mark.slow
async def test_missing_events_between_archive_and_stream_are_reported(archiving: Archiving) -> None:
    last = archiving.archive.segments(0)[-1]
    file_of(last).with_suffix(".json").unlink()
    first, last_seq = last.manifest.first_seq, last.manifest.last_seq
    with pytest.raises(EventsMissing, match=f"events {first} to {last_seq} are neither"):
        await reader_of(archiving).events(Selection())


async def test_an_event_deleted_from_the_stream_is_reported(archiving: Archiving) -> None:
    entries: Any = await archiving.redis.xrange(KEYS.ledger)
    await archiving.redis.xdel(KEYS.ledger, entries[len(entries) // 2][0])
    with pytest.raises(EventsMissing):
        await reader_of(archiving).events(Selection(user_id="user:1"))


@pytest.mark.slow
async def test_events_sealed_and_trimmed_during_the_reading_are_read_once(redis_client: Redis, tmp_path: Path) -> None:
    archiving = Archiving(redis_client, tmp_path)
    await archiving.fill(200)
    sealer = archiving.sealer()
    await sealer.seal()
    reader = reader_of(archiving)
    seen = {0: archiving.archive.segments(0)}
    await seal_all(sealer)
    await archiving.fold()
    await sealer.trim()
    # As if the reader had read the archive before the rest was sealed.
    reader._segments = lambda partition: seen[partition]
    events = await reader.events(Selection())
    assert [event.seq for event in events] == list(range(1, archiving.store.position().seq + 1))
    archiving.store.close()
    await archiving.pipeline.aclose()


@dataclass(frozen=True, slots=True)
class LateSource(LedgerSource):
    """The first read of the archive lacks the newest segments, but the stream is already trimmed."""

    looks: tuple[list[int], ...] = ()

    async def events(self, *args: Any, **kwargs: Any) -> AsyncGenerator[pa.Table]:
        looks, source = self.looks[0], LedgerSource(self.ledger_id, self.keys, self.archive, self.redis)
        looks.append(1)
        if len(looks) == 1:
            source = LedgerSource(self.ledger_id, self.keys, None, self.redis)
        async for events in source.events(*args, **kwargs):
            yield events


@pytest.mark.slow
async def test_a_stream_trimmed_after_the_archive_was_read_is_read_again(archiving: Archiving) -> None:
    looks: list[int] = []
    reader = AuditReader(LateSource(LEDGER, (KEYS,), archiving.archive, archiving.redis, (looks,)))
    seen = {0: archiving.archive.segments(0)[:2]}
    reader._segments = lambda partition: seen[partition]
    events = await reader.events(Selection())
    assert [event.seq for event in events] == list(range(1, archiving.store.position().seq + 1))
    assert len(looks) == 2


@pytest.mark.parametrize(
    ("filters", "option"),
    [
        ({"types": ("paid",)}, "--type"),
        ({"outcome": "lost"}, "--outcome"),
        ({"since": "yesterday"}, "--since"),
        ({"until": "1764"}, "--until"),
        ({"least_usd": "0.0000000001"}, "--min"),
        ({"least_usd": "NaN"}, "--min"),
        ({"most_usd": "1e999999"}, "--max"),
        ({"most_usd": "much"}, "--max"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(filters: dict[str, Any], option: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        read_search(**filters)
    assert refused.value.param_hint == option


@pytest.mark.slow
async def test_found_events_have_the_columns_and_values_of_the_projection(archiving: Archiving) -> None:
    rows: list[dict[str, Any]] = []
    async for table in search(reader_of(archiving), Search()):
        rows += table.to_pylist()
    assert rows == archiving.store.query("FROM events ORDER BY partition, seq")
