"""A made ledger of every type of event: onto the stream, folded, sealed, trimmed, replayed, verified (G5, G7).

SQL makes it with its stamps (benchmarks/ledger.py), so the result of a replay is known without any fold.
"""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from benchmarks.ledger import MadeLedger
from benchmarks.verify_speed import append, put_gate_state
from tollbook.audit.verification.live_projection import LiveProjection
from tollbook.audit.verification.verification import Options, verify
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.replay import ReplayLimits, replay
from tollbook.ledger.archive.sealing import Sealer, SealingSettings
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import create_ledger
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.identifiers import EntryId

pytestmark = pytest.mark.slow

KEYS = Keys("round-trip")
NEVER = 10.0**9
# Folded live in pages that match neither the segments nor the reads of a replay.
PAGE = 7_001


class RoundTrip:
    """A ledger on a server, its projection folded live, and its archive."""

    def __init__(self, redis: Redis, directory: Path, made: MadeLedger) -> None:
        self.made = made
        self.redis = redis
        self.archive = Archive(directory / "archive")
        self.live = Store.open(directory / "live.duckdb", made.ledger_id)
        self.pipeline = CommandPipeline(redis)
        self.source = LedgerSource(made.ledger_id, (KEYS,), self.archive, redis)

    async def begin(self) -> None:
        await load_library(self.redis)
        await create_ledger(self.pipeline, KEYS, ledger_id=self.made.ledger_id, partitions=1)
        for events in self.made.tables(20_000):
            await append(self.redis, KEYS, events)
        await self.redis.zadd(KEYS.holds, dict(self.made.open_holds()))
        await self.fold()

    async def fold(self) -> None:
        reader = StreamReader(self.redis, KEYS)
        while batch := await reader.read_after(self.live.position().entry, count=PAGE):
            self.live.fold(batch)
        await reader.aclose()

    async def seal(self, segment_events: int) -> int:
        """Seal what fills segments and trim most of it; return how many events are gone from the stream."""

        async def folded() -> Position:
            return self.live.position()

        settings = SealingSettings(
            segment_events=segment_events,
            segment_age_s=NEVER,
            keep_s=NEVER,
            keep_events=self.keep_events(segment_events),
        )
        sealer = Sealer(
            self.redis, self.pipeline, KEYS, self.archive,
            ledger_id=self.made.ledger_id, settings=settings, folded=folded,
        )  # fmt: skip
        while await sealer.seal():
            pass
        gone = await sealer.trim()
        await self.fold()
        return gone

    @staticmethod
    def keep_events(segment_events: int) -> int:
        return segment_events * 3 // 2

    def stamped_at(self, seq: int) -> dict[str, int]:
        """Return what is committed of each user's budget at an event, by the ledger itself."""
        rows = self.made.connection.execute(
            "SELECT 'user:user-' || user || ':' || period, arg_max(settled + held, seq) FROM plan "
            "WHERE seq <= ? GROUP BY ALL",
            [seq],
        ).fetchall()
        return dict(rows)

    def entry(self, seq: int) -> EntryId:
        row = self.made.connection.execute("SELECT ms, n FROM plan WHERE seq = ?", [seq]).fetchone()
        assert row is not None
        return EntryId(*row)

    async def aclose(self) -> None:
        self.live.close()
        await self.pipeline.aclose()


async def went_round(redis: Redis, directory: Path, *, events: int, users: int, segment_events: int) -> RoundTrip:
    trip = RoundTrip(redis, directory, MadeLedger.draw(events, users=users))
    await trip.begin()
    gone = await trip.seal(segment_events)
    # Events over the limit are trimmed by whole segments; each sealing adds an event to the ledger too.
    surplus = events + events // segment_events - trip.keep_events(segment_events)
    assert gone == surplus // segment_events * segment_events
    return trip


async def assert_goes_round(trip: RoundTrip, directory: Path) -> None:
    replayed = await replay(trip.source, directory / "replayed.duckdb")
    assert compare(replayed, trip.live) == []
    outcomes = replayed.query("SELECT DISTINCT outcome FROM events WHERE type = 'cost-recorded'")
    assert {row["outcome"] for row in outcomes} == {"done", "failed", "expired", "taken_over", "recorded"}
    assert len(replayed.query("SELECT DISTINCT type FROM events")) == 10
    assert len(replayed.query("SELECT DISTINCT period FROM spend")) == 3
    assert replayed.query("FROM discrepancies") == []
    replayed.close()
    # The ledger is not written by the gate, which would also have written this key.
    await put_gate_state(trip.redis, KEYS, trip.live)
    verdict = await verify(trip.source, Options(directory / "verify"), live=LiveProjection.look(trip.live))
    assert verdict.findings == []
    assert verdict.events == trip.live.position().seq


async def assert_points_in_time(trip: RoundTrip, directory: Path, *, points: int) -> None:
    for seq in random.Random(7).sample(range(1, trip.made.events), points):
        until = ReplayLimits(trip.entry(seq))
        store = await replay(trip.source, directory / f"{seq}.duckdb", until)
        rows = store.query(
            "SELECT budget, nanousd(settled_usd + held_usd) AS committed FROM budgets WHERE name = 'user'"
        )
        committed = {row["budget"]: row["committed"] for row in rows}
        # A budget that only credit or refusals speak of has no row.
        assert committed == {name: sum_ for name, sum_ in trip.stamped_at(seq).items() if name in committed or sum_}
        assert store.position().seq == seq
        store.close()
        store.path.unlink()


@pytest.fixture
async def small(redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RoundTrip]:
    # Each append of a replay begins and ends within a segment.
    monkeypatch.setattr("tollbook.ledger.archive.rebuilding._ROWS", 5_000)
    trip = await went_round(redis_client, tmp_path, events=30_000, users=300, segment_events=4_000)
    yield trip
    await trip.aclose()


async def test_a_ledger_survives_the_round_trip_through_the_archive(small: RoundTrip, tmp_path: Path) -> None:
    await assert_goes_round(small, tmp_path)


@pytest.mark.soak
async def test_a_million_events_survive_the_round_trip(redis_client: Redis, tmp_path: Path) -> None:
    trip = await went_round(redis_client, tmp_path, events=1_000_000, users=5_000, segment_events=100_000)
    await assert_goes_round(trip, tmp_path)
    await assert_points_in_time(trip, tmp_path, points=50)
    await trip.aclose()
