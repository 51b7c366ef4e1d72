"""The projector on a real server with the real gate: follows, trims, waits for Redis, and stops rather than skip."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.proxy import faulty_proxy
from tests.servers import PATIENCE_S
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.errors import LedgerAhead, LedgerReplaced
from tollbook.ledger.gate.functions import function, load_library
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.fold import LedgerGap
from tollbook.ledger.projection.follower import LedgerRewritten
from tollbook.ledger.projection.projector import Projector, ProjectorSettings
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.events import ENVELOPE_FIELDS, BoundPrice, BudgetReserved, CostRecorded, payload_json
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId
from tollbook.schemas.upcasters import UnreadableEvent

KEYS = Keys("test", 0)
LEDGER = "ledger-1"
PERIOD = "2026-11"
CAP = 5_000_000_000
QUICK = ProjectorSettings(pause_ms=0, block_ms=50, tail_keep_ms=0, first_backoff_s=0.01)


class DirectGate:
    """The gate's functions as they are called over the wire, without the code around them."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.store: Store | None = None

    async def call(self, name: str, keys: Sequence[str], *arguments: str | int) -> list[Any]:
        reply = await cast("Awaitable[Any]", self.redis.fcall(function(name), len(keys), *keys, LEDGER, *arguments))  # type: ignore[arg-type]
        if reply[0] == b"LEDGER":
            raise LedgerReplaced(expected=LEDGER, found=reply[1].decode())
        assert reply[0] == b"OK", reply
        return reply

    async def create(self) -> None:
        await load_library(self.redis)
        await self.call("create", [KEYS.meta, KEYS.ledger], 1)

    async def reserve(self, call_id: str, amount: int, *, user: str = "u1") -> EntryId:
        budgets = [f"user:{user}:{PERIOD}", f"campaign:c1:{PERIOD}"]
        payload = payload_json(BudgetReserved(
            task_type="score_post", plan="trial", worker="w", campaign_id="c1",
            bound=BoundPrice(model="m", prompt_tokens=1, completion_tokens=1, prompt_nanousd_per_mtok=1,
                             completion_nanousd_per_mtok=1),
        ))  # fmt: skip
        keys = [KEYS.meta, KEYS.ledger, KEYS.holds, KEYS.waiters, KEYS.account(user), KEYS.call(call_id),
                KEYS.result(call_id), *map(KEYS.tail, budgets)]  # fmt: skip
        terms = f"{user} {PERIOD} hash w {amount} 60000 0 {2**53 - 1} 0 3600"
        reply = await self.call("reserve", keys, call_id, terms, payload, *map(self._budget, budgets))
        return EntryId.parse(reply[1].decode())

    def _budget(self, name: str) -> str:
        """Cap and baseline; without a store zeros at the beginning, exact as long as no tail was trimmed."""
        if self.store is None:
            return f"{CAP} 0 0 0 0 0 {name}"
        page = self.store.baselines([name])
        settled, held = page.balances.get(name, (0, 0))
        position = page.positions[0]
        return f"{CAP} {settled} {held} {position.entry.ms} {position.entry.seq} {position.seq} {name}"

    async def settle(self, call_id: str, cost: int, *, user: str = "u1") -> EntryId:
        budgets = [f"user:{user}:{PERIOD}", f"campaign:c1:{PERIOD}"]
        payload = payload_json(CostRecorded(basis="reported", outcome="done"))
        keys = [KEYS.meta, KEYS.ledger, KEYS.holds, KEYS.waiters, KEYS.call(call_id), KEYS.result(call_id),
                *map(KEYS.tail, budgets)]  # fmt: skip
        reply = await self.call("settle", keys, call_id, f"1 {cost} 0 1 1 60 3600 0", "", payload, *budgets)
        return EntryId.parse(reply[1].decode())

    async def trim(self, partition: int, watermark: EntryId, names: Sequence[str]) -> None:
        await self.call("trim", [KEYS.meta, KEYS.ledger, *map(KEYS.tail, names)], str(watermark))

    async def trimmed_to(self) -> EntryId:
        value = await cast("Awaitable[bytes]", self.redis.hget(KEYS.meta, "trimmed_to"))
        return EntryId.parse(value.decode())


@pytest.fixture
async def gate(redis_client: Redis) -> DirectGate:
    made = DirectGate(redis_client)
    await made.create()
    return made


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store.open(tmp_path / "t.duckdb", LEDGER)
    yield opened
    opened.close()


@asynccontextmanager
async def projecting(
    store: Store, gate: DirectGate, settings: ProjectorSettings = QUICK
) -> AsyncIterator[tuple[Projector, asyncio.Task[None]]]:
    gate.store = store
    projector = Projector(store, gate.redis, [KEYS], trim=gate.trim, settings=settings)
    task = asyncio.create_task(projector.run())
    try:
        yield projector, task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_events_gather_between_folds_until_somebody_waits_for_them(store: Store, gate: DirectGate) -> None:
    gate.store = store
    first = await gate.reserve("c1", 5)
    pauses_s, pausing = list[float](), asyncio.Event()

    async def sleep(seconds: float) -> None:
        pauses_s.append(seconds)
        pausing.set()
        await asyncio.Event().wait()

    settings = replace(QUICK, pause_ms=100)
    projector = Projector(store, gate.redis, [KEYS], trim=gate.trim, settings=settings, sleep=sleep)
    folding = asyncio.create_task(projector.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            await pausing.wait()
            assert store.position().entry == first
            second = await gate.reserve("c2", 5)
            await projector.wait_for(0, second)
        assert 0.1 <= pauses_s[0] <= 0.5
    finally:
        folding.cancel()
        await asyncio.wait([folding])


async def test_a_start_on_what_is_folded_already_wakes_those_who_wait(store: Store, gate: DirectGate) -> None:
    """A caller that asked before the position was read from DuckDB must not wait for an event that may never come."""
    last = await gate.reserve("c1", 5)
    async with projecting(store, gate) as (projector, _):
        await projector.wait_for(0, last)
    projector = Projector(store, gate.redis, [KEYS], trim=gate.trim, settings=QUICK)
    waiting = asyncio.create_task(projector.wait_for(0, last))
    await asyncio.sleep(0)
    folding = asyncio.create_task(projector.run())
    try:
        async with asyncio.timeout(10):
            await waiting
    finally:
        folding.cancel()
        await asyncio.wait([folding])


async def append_raw(redis: Redis, seq: int, **changes: str) -> EntryId:
    payload = {"task_type": "score_post", "plan": "trial", "cap_nanousd": CAP, "hold": 1}
    values = ("budget-reserved", "1", str(seq), "u9", PERIOD, f"c{seq}", "1", "1", str(seq), json.dumps(payload))
    fields: dict[Any, Any] = dict(zip(ENVELOPE_FIELDS, values, strict=True)) | changes
    entry_id = cast("bytes", await redis.xadd(KEYS.ledger, fields))
    return EntryId.parse(entry_id.decode())


async def test_reader_pages_through_the_stream_and_waits_at_its_head(gate: DirectGate) -> None:
    ids = [await gate.reserve(f"c{n}", 5) for n in range(5)]
    reader = StreamReader(gate.redis, KEYS)
    first = await reader.read_after(count=3)
    second = await reader.read_after(first.last_id, count=3)
    assert [len(first), len(second), second.last_id] == [3, 2, ids[-1]]
    assert len(await reader.read_after(ids[-1], count=3)) == 0
    assert len(await reader.read_after(ids[-1], count=3, block_ms=1)) == 0
    waiting = asyncio.create_task(reader.read_after(ids[-1], count=3, block_ms=10_000))
    last = await gate.reserve("late", 5)
    assert (await waiting).last_id == last
    table = first.to_table()
    assert table.column_names[:5] == ["partition", "id", "ms", "n", "seq"]
    assert table["seq"].to_pylist() == [1, 2, 3]
    await reader.aclose()


async def test_projector_folds_what_the_gate_appends(gate: DirectGate, store: Store) -> None:
    await gate.reserve("before", 100)
    async with projecting(store, gate) as (projector, _):
        await gate.reserve("c1", 1_000)
        await projector.wait_for(0, await gate.settle("c1", 300))
        page = store.baselines([f"user:u1:{PERIOD}", f"campaign:c1:{PERIOD}"])
        assert set(page.balances.values()) == {(300, 100)}
        assert await projector.lag() == await projector.lag()
        assert (await projector.lag()).events == 0
        assert store.query("SELECT * FROM discrepancies") == []


@pytest.mark.slow
async def test_a_live_projection_equals_a_rebuilt_one(gate: DirectGate, store: Store, tmp_path: Path) -> None:
    last = ZERO_ENTRY
    async with projecting(store, gate) as (projector, _):
        for n in range(40):
            await gate.reserve(f"c{n}", 10 + n, user=f"u{n % 3}")
            last = await gate.settle(f"c{n}", n, user=f"u{n % 3}") if n % 4 else await gate.reserve(f"d{n}", 7)
        await projector.wait_for(0, last)
    rebuilt = await rebuild(gate.redis, [KEYS], LEDGER, tmp_path / "rebuilt.duckdb")
    assert await asyncio.to_thread(compare, store, rebuilt) == []
    assert rebuilt.position().entry == last
    rebuilt.close()


async def test_a_backlog_of_many_batches_is_caught_up(gate: DirectGate, store: Store) -> None:
    last = ZERO_ENTRY
    for n in range(60):
        last = await gate.reserve(f"c{n}", 1)
    settings = ProjectorSettings(batch_events=7, pause_ms=0, block_ms=50, tail_keep_ms=0)
    async with projecting(store, gate, settings) as (projector, _):
        await projector.wait_for(0, last)
    assert store.position().seq == 60


async def test_paused_projector_folds_nothing_until_resumed(gate: DirectGate, store: Store) -> None:
    async with projecting(store, gate) as (projector, _):
        await projector.wait_for(0, await gate.reserve("c0", 1))
        projector.pause()
        last = await gate.reserve("c1", 1)
        waiting = asyncio.create_task(projector.wait_for(0, last))
        # Longer than a block, so that a projector that did not mind the pause would have folded.
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        lag = await projector.lag()
        assert lag.events == 1
        assert lag.seconds > 0.1
        projector.resume()
        await waiting
    assert store.position().seq == 2


async def wait_for_watermark(gate: DirectGate, at_least: EntryId) -> None:
    while await gate.trimmed_to() < at_least:  # noqa: ASYNC110 - the watermark has no signal; each round asks the server.
        await asyncio.sleep(0)


async def test_tails_are_trimmed_up_to_what_is_folded(gate: DirectGate, store: Store) -> None:
    async with projecting(store, gate) as (projector, _):
        await gate.reserve("c1", 1_000)
        open_hold = await gate.reserve("c2", 50, user="u2")
        settled = await gate.settle("c1", 300)
        await projector.wait_for(0, settled)
        await wait_for_watermark(gate, settled)
        assert open_hold < settled
        tails = {key.decode() async for key in gate.redis.scan_iter(match=KEYS.tail_pattern)}
    # A tail whose newest entry carries an open hold keeps it.
    assert tails == {KEYS.tail(f"user:u2:{PERIOD}"), KEYS.tail(f"campaign:c1:{PERIOD}")}


async def test_the_watermark_stays_behind_by_the_setting(gate: DirectGate, store: Store) -> None:
    settings = ProjectorSettings(pause_ms=0, block_ms=20, tail_keep_ms=3_600_000)
    async with projecting(store, gate, settings) as (projector, _):
        for n in range(5):
            await gate.reserve(f"c{n}", 1)
            await projector.wait_for(0, await gate.settle(f"c{n}", 1))
    assert await gate.trimmed_to() == ZERO_ENTRY
    assert await cast("Awaitable[int]", gate.redis.llen(KEYS.tail(f"user:u1:{PERIOD}"))) == 10


async def test_tails_left_by_a_former_run_are_found(gate: DirectGate, store: Store) -> None:
    settings = ProjectorSettings(pause_ms=0, block_ms=20, tail_keep_ms=3_600_000)
    await gate.reserve("c1", 5)
    last = await gate.settle("c1", 5)
    async with projecting(store, gate, settings) as (projector, _):
        await projector.wait_for(0, last)
    async with projecting(store, gate):
        await wait_for_watermark(gate, last)
    assert [key async for key in gate.redis.scan_iter(match=KEYS.tail_pattern)] == []


async def test_a_standby_whose_events_are_trimmed_before_it_has_folded_them_reads_them_again(
    gate: DirectGate, store: Store, server_url: str, tmp_path: Path
) -> None:
    """That is how it goes beside a quicker projector, so nobody is warned."""

    async def trim_nothing(*_: Any) -> None:
        pass

    with closing(Store.open(tmp_path / "standby.duckdb", LEDGER)) as own, capture_logs() as logs:
        async with faulty_proxy(server_url) as link, connect(link.url) as redis, projecting(store, gate) as (active, _):
            standby = Projector(own, redis, [KEYS], trim=trim_nothing, settings=QUICK)
            running = asyncio.create_task(standby.run())
            await standby.wait_for(0, await gate.reserve("c1", 1_000))
            link.holds_replies_to = b"XREAD"
            settled = await gate.settle("c1", 300)
            await active.wait_for(0, settled)
            await wait_for_watermark(gate, settled)
            link.let_replies_pass()
            await standby.wait_for(0, settled)
            running.cancel()
            await asyncio.wait([running])
    lines = [(line["event"], line["log_level"]) for line in logs]
    assert ("projection.read_again", "debug") in lines
    assert not [line for line in lines if line[1] != "debug"]


async def failure_of(task: asyncio.Task[None]) -> BaseException:
    await asyncio.wait([task], timeout=10)
    problem = task.exception()
    assert problem is not None
    return problem


async def test_an_unreadable_entry_stops_the_projector_and_is_named(gate: DirectGate, store: Store) -> None:
    folded = await gate.reserve("c1", 5)
    async with projecting(store, gate) as (projector, task):
        await projector.wait_for(0, folded)
        bad = await append_raw(gate.redis, 2, v="9")
        waiting = asyncio.create_task(projector.wait_for(0, bad))
        problem = await failure_of(task)
        assert isinstance(problem, UnreadableEvent)
        assert problem.entry_id == str(bad)
        assert projector.failure is problem
        with pytest.raises(UnreadableEvent):
            await waiting
        with pytest.raises(UnreadableEvent):
            await projector.wait_for(0, bad)
    assert store.position().entry == folded


async def test_a_trimmed_stream_is_a_gap(gate: DirectGate, store: Store) -> None:
    for n in range(4):
        await gate.reserve(f"c{n}", 5)
    await gate.redis.xtrim(KEYS.ledger, maxlen=2, approximate=False)
    async with projecting(store, gate) as (projector, task):
        assert isinstance(await failure_of(task), LedgerGap)
        assert isinstance(projector.failure, LedgerGap)


async def test_a_replaced_or_emptied_redis_stops_the_projector(gate: DirectGate, store: Store) -> None:
    async with projecting(store, gate) as (projector, task):
        await projector.wait_for(0, await gate.reserve("c1", 5))
        await gate.redis.flushall()
        assert isinstance(await failure_of(task), LedgerReplaced)


async def test_a_redis_restored_from_an_older_backup_stops_the_projector(gate: DirectGate, store: Store) -> None:
    last = ZERO_ENTRY
    async with projecting(store, gate) as (projector, _):
        for n in range(3):
            last = await gate.reserve(f"c{n}", 5)
        await projector.wait_for(0, last)
    await gate.redis.flushall()
    await gate.create()
    gate.store = None  # A worker that has not read DuckDB yet; one that has is refused by the gate.
    await gate.reserve("c0", 5)
    async with projecting(store, gate) as (_, task):
        assert isinstance(await failure_of(task), LedgerAhead)
    gate.store = None
    for n in range(1, 3):
        await gate.reserve(f"c{n}", 5)
    async with projecting(store, gate) as (_, task):
        assert isinstance(await failure_of(task), LedgerRewritten)


async def test_projector_survives_a_crash_of_redis(private_server: EmbeddedServer, store: Store) -> None:
    async with connect(private_server.url) as client:
        gate = DirectGate(client)
        await gate.create()
        async with projecting(store, gate) as (projector, _):
            await projector.wait_for(0, await gate.reserve("c0", 5))
            await private_server.kill()
            await private_server.start()
            # The client of the test may not have seen yet that its connection is gone.
            await client.connection_pool.disconnect()
            last = await gate.reserve("c1", 5)
            await projector.wait_for(0, last)
        assert store.position().seq == 2


async def test_stopping_the_projector_ends_the_waits(gate: DirectGate, store: Store) -> None:
    async with projecting(store, gate) as (projector, _):
        waiting = asyncio.create_task(projector.wait_for(0, EntryId(2**52, 0)))
        await projector.wait_for(0, await gate.reserve("c0", 5))
    with pytest.raises(Exception, match="projector has stopped"):
        await waiting
