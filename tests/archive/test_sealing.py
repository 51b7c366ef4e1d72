"""Sealing on a real server: trimmed events are in the archive, and a replay reads both without a gap (G7, G5)."""

import json
import pkgutil
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.archive_files import directory_of, file_of
from tests.ledger_maker import LedgerMaker
from tests.proxy import faulty_proxy
from tollbook.ledger.archive import chain
from tollbook.ledger.archive.manifests import ArchiveDamaged
from tollbook.ledger.archive.replay import fold_archive, rebuild
from tollbook.ledger.archive.sealing import ArchiveBehind, Sealer, SealingSettings
from tollbook.ledger.archive.segments import Archive, check_segment
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import create_ledger
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.identifiers import EntryId

KEYS = Keys("test", 0)
LEDGER = "ledger-1"
# Made events are old: only their number makes a segment due.
NEVER = 10.0**9
AT_ONCE = SealingSettings(segment_events=50, segment_age_s=NEVER, keep_s=0, keep_events=0)


class Archiving:
    """A ledger of made events on a server, its projection, and its archive."""

    def __init__(self, redis: Redis, directory: Path) -> None:
        self.redis = redis
        self.directory = directory
        self.archive = Archive(directory / "archive")
        self.pipeline = CommandPipeline(redis)
        self.store = Store.open(directory / "live.duckdb", LEDGER)

    async def fill(self, steps: int, *, seed: int = 1) -> None:
        await load_library(self.redis)
        await create_ledger(self.pipeline, KEYS, ledger_id=LEDGER, partitions=1)
        await self.append(LedgerMaker(seed).run(steps).entries)

    async def append(self, entries: list[Any]) -> None:
        """Put made events on the stream and fold them."""
        pipe = self.redis.pipeline(transaction=False)
        for entry_id, fields in entries:
            pipe.xadd(KEYS.ledger, dict(zip(fields[0::2], fields[1::2], strict=True)), id=entry_id)
        await pipe.execute()
        await self.fold()

    async def fold(self) -> None:
        reader = StreamReader(self.redis, KEYS)
        while batch := await reader.read_after(self.store.position().entry, count=1000):
            self.store.fold(batch)
        await reader.aclose()

    def sealer(
        self,
        settings: SealingSettings = AT_ONCE,
        archive: Archive | None = None,
        pipeline: CommandPipeline | None = None,
    ) -> Sealer:
        async def folded() -> Position:
            return self.store.position()

        return Sealer(
            self.redis, pipeline or self.pipeline, KEYS, archive or self.archive, ledger_id=LEDGER, settings=settings,
            folded=folded,
        )  # fmt: skip

    async def length(self) -> int:
        return await self.redis.xlen(KEYS.ledger)


@pytest.fixture
async def archiving(redis_client: Redis, tmp_path: Path) -> AsyncIterator[Archiving]:
    made = Archiving(redis_client, tmp_path)
    yield made
    made.store.close()
    await made.pipeline.aclose()


async def seal_all(sealer: Sealer) -> int:
    sealed = 0
    while await sealer.seal():
        sealed += 1
    return sealed


@pytest.mark.slow
async def test_sealed_and_trimmed_events_replay_to_the_same_tables(archiving: Archiving, tmp_path: Path) -> None:
    await archiving.fill(520)
    events = archiving.store.position().seq
    sealer = archiving.sealer()
    assert await seal_all(sealer) == events // 50
    await archiving.fold()
    assert await sealer.trim() == 50 * (events // 50)
    assert await archiving.length() == events % 50 + events // 50, "what is not sealed, and the news of the sealing"
    rebuilt = await rebuild(archiving.redis, [KEYS], LEDGER, tmp_path / "r.duckdb", archive=archiving.archive)
    assert compare(archiving.store, rebuilt) == []
    rebuilt.close()


async def test_the_chain_of_the_segments_is_that_of_the_raw_entries(archiving: Archiving) -> None:
    await archiving.fill(120)
    raw: Any = await archiving.redis.xrange(KEYS.ledger)
    await seal_all(archiving.sealer())
    segments = archiving.archive.segments(0)
    head = chain.genesis(LEDGER, 0)
    for segment in segments:
        assert segment.manifest.chain_before == head.hex()
        entries = raw[segment.manifest.first_seq - 1 : segment.manifest.last_seq]
        head = chain.extend(head, [chain.digest(entry_id, fields.values()) for entry_id, fields in entries])
        assert segment.manifest.chain_after == head.hex()
        check_segment(segment)


async def test_nothing_is_sealed_before_it_is_due(archiving: Archiving) -> None:
    await archiving.fill(30)
    assert not await archiving.sealer().seal()
    assert await archiving.sealer().seal(is_forced=True)
    assert not await archiving.sealer().seal(is_forced=True), "nothing is folded beyond the segment"
    await archiving.fold()
    assert not await archiving.sealer(SealingSettings(segment_age_s=0)).seal(), "only the news of the sealing is left"


async def test_an_old_event_makes_a_small_segment_due(archiving: Archiving) -> None:
    await archiving.fill(30)
    assert await archiving.sealer(SealingSettings(segment_age_s=0)).seal()


async def test_what_is_not_folded_is_neither_sealed_nor_trimmed(archiving: Archiving) -> None:
    await archiving.fill(120)
    behind = Position(archiving.store.position().entry, 60)
    sealer = archiving.sealer()
    sealer._folded = lambda: _resolved(behind)
    assert await seal_all(sealer) == 1
    sealer._folded = lambda: _resolved(Position(behind.entry, 49))
    assert await sealer.trim() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        (SealingSettings(segment_events=50, segment_age_s=NEVER, keep_s=10**9, keep_events=10**9), 0),
        (SealingSettings(segment_events=50, segment_age_s=NEVER, keep_s=0, keep_events=10**9), 100),
        (SealingSettings(segment_events=50, segment_age_s=NEVER, keep_s=10**9, keep_events=0), 100),
        (SealingSettings(segment_events=50, segment_age_s=NEVER, keep_s=10**9, keep_events=70), 50),
    ],
)
async def test_retention_is_by_age_and_by_number(archiving: Archiving, settings: SealingSettings, gone: int) -> None:
    await archiving.fill(130)
    sealer = archiving.sealer(settings)
    assert await seal_all(sealer) == 2
    assert await sealer.trim() == gone


class Crash(Exception):
    """Stands for a process that dies."""


class Dying:
    """Makes a process die before or after one of the steps of sealing, as `kill -9` does: nothing is cleared away."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.at = at
        self.steps: list[str] = []
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        for name, step in (
            ("pathlib.Path.write_text", "write the manifest"),
            ("pyarrow.parquet.write_table", "write the segment"),
            ("tollbook.ledger.archive.storage._sync", "sync"),
            ("pathlib.Path.replace", "rename"),
        ):
            owner, _, attribute = name.rpartition(".")
            patch.setattr(name, self._step(step, getattr(pkgutil.resolve_name(owner), attribute)))
        real = Sealer._run

        async def run(sealer: Sealer, script: str, *arguments: str | int) -> list[bytes]:
            self._count(script)
            reply = await real(sealer, script, *arguments)
            self._count(script)
            return reply

        patch.setattr(Sealer, "_run", run)

    def _step(self, step: str, real: Callable[..., object]) -> Callable[..., object]:
        def dying(*arguments: Any, **options: Any) -> object:
            self._count(step)
            done = real(*arguments, **options)
            self._count(step)
            return done

        return dying

    def _count(self, step: str) -> None:
        self.steps.append(step)
        if len(self.steps) > self.at:
            raise Crash


@pytest.mark.slow
async def test_after_a_crash_at_any_step_the_next_start_loses_nothing(
    redis_client: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each step: in the end two segments are written, recorded and trimmed."""
    entries = LedgerMaker(1).run(400).entries[:110]
    position = Position(EntryId.parse(entries[-1][0].decode()), 110)
    pipeline = CommandPipeline(redis_client)

    def start(archive: Archive) -> Sealer:
        return Sealer(
            redis_client, pipeline, KEYS, archive,
            ledger_id=LEDGER, settings=AT_ONCE, folded=lambda: _resolved(position),
        )  # fmt: skip

    one = ["write the segment", "sync", "rename", "sync", "write the manifest", "sync", "rename", "sync", "seal"]
    every = [*one, *one, "discard", "discard"]
    # Before and after each step of the first segment and of trimming; and one process that does not die.
    first, trimming = range(2 * len(one)), range(4 * len(one), 2 * len(every))
    for at in (*first, *trimming, 2 * len(every)):
        await redis_client.flushall()
        await load_library(redis_client)
        await create_ledger(pipeline, KEYS, ledger_id=LEDGER, partitions=1)
        pipe = redis_client.pipeline(transaction=False)
        for entry_id, fields in entries:
            pipe.execute_command("XADD", KEYS.ledger, entry_id, *fields)
        await pipe.execute()
        raw: Any = await redis_client.xrange(KEYS.ledger)
        archive = Archive(tmp_path / str(at))
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _: None)
            dead = Dying(patch, at)
            with suppress(Crash):
                dying = start(archive)
                await seal_all(dying)
                await dying.trim()
        sealer = start(archive)
        await seal_all(sealer)
        assert await sealer.trim() == 100, dead.steps
        assert not list(directory_of(archive).rglob(".*")), dead.steps
        segments = archive.segments(0)
        assert [segment.manifest.first_seq for segment in segments] == [1, 51], dead.steps
        head = chain.genesis(LEDGER, 0)
        for segment in segments:
            check_segment(segment)
            of_segment = raw[segment.manifest.first_seq - 1 : segment.manifest.last_seq]
            head = chain.extend(head, [chain.digest(entry_id, fields.values()) for entry_id, fields in of_segment])
            assert segment.manifest.chain_after == head.hex(), dead.steps
        left: Any = await redis_client.xrange(KEYS.ledger)
        assert left[:10] == raw[100:], dead.steps
        recorded = [json.loads(fields[b"payload"])["segment"] for _, fields in left[10:]]
        assert recorded == [segment.manifest.segment for segment in segments], "each is recorded once"
        assert dead.steps[::2] == every[: at // 2 + 1], "no step is left out"
    await pipeline.aclose()


async def test_a_sealer_whose_record_got_no_reply_goes_on(archiving: Archiving, server_url: str) -> None:
    """The first segment of a process: it knows no earlier one, and finds this one when it looks again."""
    await archiving.fill(200)
    async with faulty_proxy(server_url) as link, connect(link.url) as redis:
        pipeline = CommandPipeline(redis, timeout_s=0.2)
        sealer = archiving.sealer(pipeline=pipeline)
        link.holds_replies_to = b"EVAL"
        with pytest.raises(LedgerUnavailable):
            await sealer.seal()
        link.let_replies_pass()
        sealed = await seal_all(sealer)
        await pipeline.aclose()
    segments = archiving.archive.segments(0)
    assert len(segments) == 1 + sealed > 2
    assert [segment.manifest.last_seq for segment in segments] == [50 * (1 + number) for number in range(1 + sealed)]


async def test_an_empty_archive_beside_a_sealed_ledger_is_refused(archiving: Archiving, tmp_path: Path) -> None:
    await archiving.fill(120)
    await seal_all(archiving.sealer())
    with pytest.raises(ArchiveBehind, match="up to event 100"):
        await archiving.sealer(archive=Archive(tmp_path / "other")).seal()


async def test_a_damaged_segment_is_never_trimmed(archiving: Archiving) -> None:
    await archiving.fill(120)
    sealer = archiving.sealer()
    await seal_all(sealer)
    path = file_of(archiving.archive.segments(0)[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArchiveDamaged, match="not the file that was sealed"):
        await sealer.trim()


async def test_a_lost_projection_is_rebuilt_from_the_archive_alone(archiving: Archiving, tmp_path: Path) -> None:
    await archiving.fill(100)
    assert await seal_all(archiving.sealer()) == archiving.store.position().seq // 50
    store = Store.open(tmp_path / "alone.duckdb", LEDGER)
    assert fold_archive(store, archiving.archive, 0) == 50 * (archiving.store.position().seq // 50)
    assert fold_archive(store, archiving.archive, 0) == 0
    store.close()


async def _resolved(position: Position) -> Position:
    return position
