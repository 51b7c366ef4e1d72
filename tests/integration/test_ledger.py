"""The ledger as callers use it: it handles STALE, lost connections, lost libraries and a new period."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.proxy import FaultyProxy, faulty_proxy
from tests.servers import drop_functions
from tollbook.ledger.errors import BaselineUnavailable, LedgerReplaced, LedgerUnavailable
from tollbook.ledger.gate.baselines import BaselinePage, Baselines
from tollbook.ledger.gate.functions import LIBRARY, load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.ledger import Ledger, Patience
from tollbook.ledger.gate.requests import (
    AdjustRequest,
    AssignRequest,
    BudgetCap,
    ChargeRequest,
    Denied,
    OpenCall,
    Position,
    RecordRequest,
    Reserved,
    ReserveRequest,
    Settled,
    SettleRequest,
)
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import Window, partition_of

OWN = "user:u:2026-11"
BUDGETS = (BudgetCap(OWN, 10),)
NOVEMBER = Window("2026-11", 0, 2**52)


@dataclass
class Projection:
    """What DuckDB would say: set by the test, at the boundary where the projection is read."""

    position: Position = field(default_factory=Position)
    balances: dict[str, tuple[int, int]] = field(default_factory=dict)
    is_down: bool = False
    reads: int = 0

    async def __call__(self, names: Sequence[str], /) -> BaselinePage:
        self.reads += 1
        if self.is_down:
            raise BaselineUnavailable("DuckDB is down")
        return BaselinePage({0: self.position}, {name: self.balances[name] for name in names if name in self.balances})


@dataclass
class Pauses:
    """The pauses between tries, none of which is slept; `end` is what happens in one that makes the sum `at`."""

    seconds: list[float] = field(default_factory=list)
    at: float = 0.0
    end: Callable[[], Awaitable[None]] | None = None

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if self.end is not None and sum(self.seconds) >= self.at:
            await self.end()


@dataclass
class Bench:
    redis: Redis
    proxy: FaultyProxy
    ledger: Ledger
    gate: Gate
    projection: Projection
    pauses: Pauses
    gate_pipeline: CommandPipeline

    async def fold(self, settled: int, held: int) -> None:
        """Let the projection catch up with the ledger."""
        state = await create_ledger(self.gate_pipeline, self.gate.keys, ledger_id="ledger-1", partitions=1)
        self.projection.position, self.projection.balances = state.head, {OWN: (settled, held)}

    async def entries(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        entries: Any = await self.redis.xrange(self.gate.keys.ledger)
        return entries

    async def types(self) -> list[str]:
        return [fields[b"type"].decode() for _, fields in await self.entries()]

    def lose_replies_until_a_pause(self) -> None:
        async def end() -> None:
            self.proxy.loses_replies = False

        self.proxy.loses_replies, self.pauses.end = True, end


@pytest.fixture
async def bench(redis_client: Redis, server_url: str) -> AsyncIterator[Bench]:
    await load_library(redis_client)
    async with faulty_proxy(server_url) as proxy, connect(proxy.url) as client:
        pipeline = CommandPipeline(client)
        keys = Keys("bench")
        await create_ledger(pipeline, keys, ledger_id="ledger-1", partitions=1)
        gate = Gate(pipeline, keys, "ledger-1", idempotency_ttl_s=3_600, result_ttl_s=600)
        projection = Projection()
        pauses = Pauses()
        ledger = Ledger(
            client,
            [gate],
            [Baselines(projection, 0, monotonic=lambda: 0.0)],
            patience=Patience(reserve_s=1.0, settle_s=10.0, first_pause_s=0.1, max_pause_s=0.4),
            sleep=pauses,
            jitter=lambda: 0.5,
        )
        yield Bench(redis_client, proxy, ledger, gate, projection, pauses, pipeline)
        await pipeline.aclose()


def _reserve(call_id: str = "a", amount: int = 4, *, window: Window = NOVEMBER) -> ReserveRequest:
    return ReserveRequest(
        call_id=call_id, user_id="u", window=window, content_hash="c", amount_nanousd=amount, worker="w",
        lease_ms=60_000, payload="{}", budgets=(BudgetCap(f"user:u:{window.name}", 10),),
    )  # fmt: skip


def _settle(call_id: str = "a", cost: int = 3) -> SettleRequest:
    return SettleRequest(
        call_id=call_id, user_id="u", hold=1, cost_nanousd=cost, assumed_nanousd=0, attempt=1, is_final=True,
        payload="{}", budgets=(OWN,), result="{}",
    )  # fmt: skip


def _adjust(cost: int, budgets: tuple[str, ...] = (OWN,)) -> AdjustRequest:
    return AdjustRequest(
        call_id="a", user_id="u", hold=1, cost_nanousd=cost, assumed_nanousd=0, attempt=1, payload="{}",
        budgets=budgets,
    )  # fmt: skip


def _record(extension: int) -> RecordRequest:
    return RecordRequest(
        call_id="a", user_id="u", hold=1, attempts_begun=2, spent_nanousd=0, assumed_nanousd=0, events=(),
        budgets=BUDGETS, extension_nanousd=extension,
    )  # fmt: skip


def _charge() -> ChargeRequest:
    return ChargeRequest(
        call_id="c", user_id="u", period="2026-11", content_hash="c", cost_nanousd=1, assumed_nanousd=0,
        payload="{}", budgets=(OWN,),
    )  # fmt: skip


async def _trim(bench: Bench) -> None:
    await bench.gate.trim(
        (await create_ledger(bench.gate_pipeline, bench.gate.keys, ledger_id="-", partitions=1)).head.entry, [OWN]
    )


# -- Baselines


async def test_a_kept_baseline_serves_while_the_tail_reaches_back_to_it(bench: Bench) -> None:
    for number in range(5):
        assert isinstance(await bench.ledger.reserve(lambda _, n=number: _reserve(f"c{n}", 2), 0), Reserved)
    assert isinstance(await bench.ledger.reserve(lambda _: _reserve("last", 11), 0), Denied)
    assert bench.projection.reads == 1


async def test_a_stale_baseline_is_read_again(bench: Bench) -> None:
    """G6: the answer does not depend on the projector's lag."""
    await bench.ledger.reserve(lambda _: _reserve("a", 4), 0)
    await bench.ledger.settle(_settle("a", 4))
    await bench.fold(4, 0)
    await _trim(bench)
    reply = await bench.ledger.reserve(lambda _: _reserve("b", 6), 0)
    assert isinstance(reply, Reserved)
    assert reply.committed_nanousd == 4 + 6
    assert bench.projection.reads == 2


async def test_a_projection_behind_the_watermark_fails_closed(bench: Bench) -> None:
    """G8: DuckDB is being rebuilt; a guess would pass the cap."""
    await bench.ledger.reserve(lambda _: _reserve("a", 10), 0)
    await bench.ledger.settle(_settle("a", 10))
    await _trim(bench)
    with pytest.raises(BaselineUnavailable, match="being rebuilt"):
        await bench.ledger.reserve(lambda _: _reserve("b", 10), 0)
    for step in (
        bench.ledger.charge(_charge()),
        bench.ledger.balance(user_id="u", period="2026-11", budgets=BUDGETS),
        bench.ledger.adjust(_adjust(1)),
    ):
        with pytest.raises(BaselineUnavailable, match="being rebuilt"):
            await step
    assert await bench.types() == ["budget-reserved", "cost-recorded"]
    assert bench.pauses.seconds == []


async def test_without_a_projection_no_new_hold_is_made(bench: Bench) -> None:
    """G8: it fails at once, since waiting for Redis would not help."""
    bench.projection.is_down = True
    with pytest.raises(BaselineUnavailable, match="DuckDB is down"):
        await bench.ledger.reserve(lambda _: _reserve(), 0)
    assert (await bench.types(), bench.pauses.seconds) == ([], [])


async def test_a_call_under_way_is_settled_without_the_projection(bench: Bench) -> None:
    """G3: the provider has taken the money, whether DuckDB can be read or not."""
    await bench.ledger.reserve(lambda _: _reserve(), 0)
    await _trim(bench)
    bench.projection.is_down = True
    assert await bench.ledger.settle(_settle()) == Settled((await bench.entries())[-1][0].decode(), 3)
    assert bench.projection.reads == 1


async def test_a_correction_reads_the_projection_only_where_the_tail_is_gone(bench: Bench) -> None:
    await bench.ledger.reserve(lambda _: _reserve(), 0)
    await bench.ledger.settle(_settle())
    assert (await bench.ledger.adjust(_adjust(2))).difference_nanousd == -1
    assert bench.projection.reads == 1
    await bench.fold(2, 0)
    await _trim(bench)
    assert (await bench.ledger.adjust(_adjust(5))).difference_nanousd == 3
    (balance,) = await bench.ledger.balance(user_id="u", period="2026-11", budgets=BUDGETS)
    assert (balance.settled_nanousd, balance.remaining_nanousd) == (5, 5)


async def test_a_correction_finds_the_budgets_of_its_hold(bench: Bench) -> None:
    """A reader of the call's record knows the budgets of the latest hold only."""
    await bench.ledger.reserve(lambda _: _reserve(), 0)
    await bench.ledger.settle(_settle())
    adjusted = await bench.ledger.adjust(_adjust(1, budgets=("user:u:2026-12",)))
    assert adjusted.difference_nanousd == 1 - 3
    (balance,) = await bench.ledger.balance(user_id="u", period="2026-11", budgets=BUDGETS)
    assert balance.settled_nanousd == 1


# -- Time


async def test_a_new_period_by_the_redis_clock_makes_the_request_anew(bench: Bench) -> None:
    asked: list[int] = []

    def make(now_ms: int) -> ReserveRequest:
        asked.append(now_ms)
        return _reserve(window=Window("2026-10", 0, 5) if now_ms < 5 else NOVEMBER)

    before = await bench.gate.now_ms()
    assert isinstance(await bench.ledger.reserve(make, 1), Reserved)
    assert asked[0] == 1
    assert len(asked) == 2
    assert asked[1] >= before
    assert [fields[b"period"] for _, fields in await bench.entries()] == [b"2026-11"]


# -- Redis away


async def test_a_lost_answer_is_asked_for_again_and_the_hold_is_one(bench: Bench) -> None:
    """G1, G2: what was done under the lost answer is found, not done twice."""
    bench.lose_replies_until_a_pause()
    reply = await bench.ledger.reserve(lambda _: _reserve(), 0)
    assert len(bench.pauses.seconds) == 1
    assert isinstance(reply, OpenCall)
    assert (reply.worker, reply.hold, reply.amount_nanousd) == ("w", 1, 4)
    assert await bench.types() == ["budget-reserved"]


async def test_a_settlement_whose_answer_was_lost_is_not_made_twice(bench: Bench) -> None:
    """G2."""
    await bench.ledger.reserve(lambda _: _reserve(), 0)
    bench.lose_replies_until_a_pause()
    assert await bench.ledger.settle(_settle()) == Settled("", None)
    assert await bench.types() == ["budget-reserved", "cost-recorded"]


async def test_an_extension_whose_answer_was_lost_is_not_made_twice(bench: Bench) -> None:
    await bench.ledger.reserve(lambda _: _reserve(), 0)
    bench.lose_replies_until_a_pause()
    assert await bench.ledger.record(_record(3)) == 4 + 3
    assert await bench.types() == ["budget-reserved", "budget-reserved"]


async def test_retries_of_a_reservation_end(bench: Bench) -> None:
    """Pauses double up to the longest, until their sum is the limit; jitter is 1 here."""
    await bench.ledger.balance(user_id="u", period="2026-11", budgets=BUDGETS)
    await bench.proxy.stop()
    with pytest.raises(LedgerUnavailable):
        await bench.ledger.reserve(lambda _: _reserve(), 0)
    assert bench.pauses.seconds == [0.1, 0.2, 0.4, 0.4]


async def test_retries_of_a_settlement_last_longer(bench: Bench) -> None:
    """G3: the money is spent, so recording it is worth a longer wait."""
    await bench.ledger.reserve(lambda _: _reserve(), 0)
    await bench.proxy.stop()
    bench.pauses.at, bench.pauses.end = 5.0, bench.proxy.start
    assert isinstance(await bench.ledger.settle(_settle()), Settled)
    assert sum(bench.pauses.seconds) >= 5
    assert await bench.types() == ["budget-reserved", "cost-recorded"]


async def test_a_lost_library_is_put_back(bench: Bench) -> None:
    await drop_functions(bench.redis)
    assert isinstance(await bench.ledger.reserve(lambda _: _reserve(), 0), Reserved)
    assert await bench.redis.function_list(LIBRARY)


async def test_an_emptied_redis_is_refused_and_gets_no_new_ledger(bench: Bench) -> None:
    """G8: neither the library nor the identity is taken for granted."""
    await bench.redis.flushall()
    await drop_functions(bench.redis)
    with pytest.raises(LedgerReplaced, match="no ledger"):
        await bench.ledger.reserve(lambda _: _reserve(), 0)
    assert await bench.redis.keys() == []


# -- Plans, and partitions


async def test_a_plan_is_in_force_at_once(bench: Bench) -> None:
    request = AssignRequest(
        command_id="k", user_id="u", period="2026-11", content_hash="c", type="plan-assigned", plan="growth",
        amount_nanousd=40, payload="{}", budget=OWN,
    )  # fmt: skip
    assert await bench.ledger.assign(request)
    assert not await bench.ledger.assign(request)
    (balance,) = await bench.ledger.balance(user_id="u", period="2026-11", budgets=BUDGETS)
    assert balance.cap_nanousd == 40


async def test_a_user_is_always_in_the_same_partition(bench: Bench) -> None:
    gates = [
        Gate(bench.gate_pipeline, Keys("bench", number), "ledger-1", idempotency_ttl_s=60, result_ttl_s=60)
        for number in range(4)
    ]
    ledger = Ledger(bench.redis, gates, [])
    users = [f"user-{number}" for number in range(100)]
    assert [ledger.gate_of(user) for user in users] == [gates[partition_of(user, 4)] for user in users]
    assert {ledger.gate_of(user).keys.partition for user in users} == {0, 1, 2, 3}


async def test_a_paid_answer_waits_while_the_ledger_lacks_its_hold_and_is_booked_once(bench: Bench) -> None:
    """G3: the ledger went back to before the hold; the request had been sent."""
    await bench.ledger.reserve(lambda _: _reserve(), 0)
    newer = {key: await bench.redis.dump(key) async for key in bench.redis.scan_iter()}
    noted: dict[Any, Any] = {}

    async def restore_the_newer_data() -> None:
        bench.pauses.end = None
        noted.update(await bench.redis.hgetall(bench.gate.keys.unbooked))
        await bench.redis.delete(bench.gate.keys.ledger, bench.gate.keys.call("a"))
        for key, value in newer.items():
            await bench.redis.restore(key, 0, value or b"", replace=True)

    bench.pauses.at, bench.pauses.end = 1.0, restore_the_newer_data
    await bench.redis.delete(bench.gate.keys.call("a"), bench.gate.keys.tail(OWN))
    await bench.redis.xtrim(bench.gate.keys.ledger, maxlen=0, approximate=False)

    settled = await bench.ledger.settle(_settle(cost=3))

    assert isinstance(settled, Settled)
    assert settled.committed_nanousd == 3
    assert json.loads(noted[b"a 1"])["cost_nanousd"] == 3
    assert b"result" not in noted[b"a 1"], "the note has no completion (G10)"
    assert not await bench.redis.exists(bench.gate.keys.unbooked)
    assert await bench.types() == ["budget-reserved", "cost-recorded"]
