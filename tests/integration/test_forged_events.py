"""Events that another program put on the ledger stop the projector; what the gate writes never does."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, cast

import pytest
from redis.asyncio import Redis

from tests.archive.gate_ledger import LEDGER, GateLedger
from tests.integration.test_projector import CAP, KEYS, PERIOD, DirectGate, projecting
from tests.integration.test_projector import LEDGER as PLAIN_LEDGER
from tests.quick import one_of_each
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.errors import LedgerRefused
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.fold import LedgerGap
from tollbook.ledger.projection.projector import Projector, ProjectorSettings
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreChanged
from tollbook.ledger.projection.traces import ForgedEvent, TailChanged
from tollbook.schemas.events import ENVELOPE_FIELDS
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.upcasters import UnreadableEvent

U1: Final = f"user:u1:{PERIOD}"


async def no_trim(*_: Any) -> None:
    """Leave the tails alone: this ledger's calls come with an old baseline."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "batch", "max_batches"),
    [
        (1, 1, 1),
        (2, 3, 2),
        (3, 10_000, 13),
        (4, 50, 13),
    ],
)
async def test_what_the_gate_writes_never_stops_the_projector(
    redis_client: Redis, tmp_path: Path, seed: int, batch: int, max_batches: int
) -> None:
    """Every kind of event, while it is written; and again from the beginning, with tails that were trimmed in part."""
    made = GateLedger(redis_client, tmp_path, seed, partitions=2)
    await made.begin()
    settings = ProjectorSettings(batch_events=batch, max_batches=max_batches, pause_ms=0, block_ms=20, tail_keep_ms=0)
    for trim, name in ((no_trim, "first"), (made.trim, "second"), (made.trim, "third")):
        store = Store.open(tmp_path / f"{name}.duckdb", LEDGER, 2)
        projector = Projector(store, redis_client, made.keys, trim=trim, settings=settings)
        folding = asyncio.create_task(projector.run())
        if name == "first":
            await made.run({1: 40, 50: 100}.get(batch, 250))
        await asyncio.wait({folding, asyncio.create_task(projector.catch_up())}, return_when=asyncio.FIRST_COMPLETED)
        assert projector.failure is None
        folding.cancel()
        await asyncio.gather(folding, return_exceptions=True)
        rebuilt = await rebuild(redis_client, made.keys, LEDGER, tmp_path / f"{name}-again.duckdb")
        assert await asyncio.to_thread(compare, store, rebuilt) == []
        store.check()
        rebuilt.close()
        store.close()
    await made.aclose()


@pytest.mark.slow
async def test_a_budget_with_very_many_moves_is_compared_in_parts(redis_client: Redis, tmp_path: Path) -> None:
    gate = await plain_gate(redis_client)
    last = await gate.reserve("first", 5)
    for n in range(2_100):
        await gate.reserve(f"c{n}", 5)
        last = await gate.settle(f"c{n}", n % 5)
    store = Store.open(tmp_path / "t.duckdb", PLAIN_LEDGER)
    async with projecting(store, gate) as (projector, _):
        await projector.wait_for(0, last)
    assert store.position().seq == 4_201
    store.close()


async def plain_gate(redis: Redis) -> DirectGate:
    gate = DirectGate(redis)
    await gate.create()
    return gate


@pytest.fixture
async def gate(redis_client: Redis) -> DirectGate:
    return await plain_gate(redis_client)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = Store.open(tmp_path / "t.duckdb", PLAIN_LEDGER)
    yield opened
    opened.close()


async def forge(gate: DirectGate, kind: str, payload: dict[str, Any], changes: dict[str, str | int]) -> EntryId:
    """Put an event on the stream, with the best stamps that a forger can compute."""
    values: dict[Any, Any] = {
        "type": kind, "v": 1, "seq": 5, "user_id": "u1", "period": PERIOD, "call_id": "c1", "attempt": 1,
        "amount": 0, "committed": 300, "payload": json.dumps(payload),
    } | changes  # fmt: skip
    assert tuple(values) == ENVELOPE_FIELDS
    entry_id = await cast("Awaitable[bytes]", gate.redis.xadd(KEYS.ledger, values))
    return EntryId.parse(entry_id.decode())


ORDER: Final = {"task_type": "score_post", "plan": "trial", "worker": "w", "cap_nanousd": CAP}
REFUND: Final = {"basis": "reported", "reason": "refund", "author": "me", "hold": 1}
FURTHER: Final = {"budgets": [{"budget": f"campaign:c1:{PERIOD}", "committed_nanousd": 1}]}
COST: Final = {"basis": "reported", "outcome": "done"}
CALLED: Final = {
    "model": "m",
    "outcome": "ok",
    "latency_ms": 5,
    "charge_nanousd": 7,
    "charge_basis": "reported",
    "hold": 1,
}

Forgery = tuple[str, dict[str, Any], dict[str, str | int], type[Exception], str]
FORGERIES: Final[dict[str, Forgery]] = {
    "a refund": (
        "cost-adjusted", REFUND, {"amount": -300, "committed": 0},
        ForgedEvent, "u1.* is not on the gate's tail",
    ),
    "a refund with a wrong stamp": (
        "cost-adjusted", REFUND, {"amount": -300},
        ForgedEvent, "is not on the gate's tail",
    ),
    "a settlement of no hold": (
        "cost-recorded", COST | {"hold": 1}, {"call_id": "x", "amount": 5, "committed": 305},
        ForgedEvent, "tail",
    ),
    "a settlement of an open hold": (
        "cost-recorded", COST | {"hold": 1, "hold_nanousd": 50}, {"user_id": "u2", "call_id": "c2", "committed": 0},
        ForgedEvent, "user u2.*tail",
    ),
    "a charge": (
        "cost-recorded", COST | {"outcome": "recorded"}, {"call_id": "x", "amount": 5, "committed": 305},
        ForgedEvent, "tail",
    ),
    "a hold": (
        "budget-reserved", ORDER | {"hold": 1}, {"call_id": "x", "amount": 5, "committed": 305},
        ForgedEvent, "tail",
    ),
    "a hold beyond the cap": (
        "budget-reserved", ORDER | {"hold": 1}, {"call_id": "x", "amount": CAP, "committed": CAP + 300},
        ForgedEvent, "tail",
    ),
    "a hold of nothing": ("budget-reserved", ORDER | {"hold": 1}, {"call_id": "x"}, ForgedEvent, "tail"),
    "a hold of a new user": (
        "budget-reserved", ORDER | {"hold": 1}, {"user_id": "new", "committed": 0},
        ForgedEvent, "user new.*tail",
    ),
    "a further budget": (
        "cost-adjusted", REFUND | FURTHER, {"user_id": "", "period": "", "amount": -349},
        ForgedEvent, "campaign c1",
    ),
    "a credit": (
        "credit-granted", {"author": "me", "reason": "mine"}, {"call_id": "x", "amount": 10**9},
        ForgedEvent, "credit-granted x has no record",
    ),
    "a credit under the id of a call": (
        "credit-granted", {"author": "me", "reason": "mine"}, {"amount": 10**9},
        ForgedEvent, "credit-granted c1 has the record of something else",
    ),
    "a refusal of a call that was settled": (
        "budget-denied", ORDER | {"budget": U1, "reason": "cap"}, {},
        ForgedEvent, "budget-denied c1 has the record of something else",
    ),
    "a plan": (
        "plan-assigned", {"plan": "gold", "cap_nanousd": 10**12, "author": "me", "reason": "mine"}, {"call_id": "x"},
        ForgedEvent, "plan-assigned x has no record",
    ),
    "a refusal": (
        "budget-denied", ORDER | {"budget": U1, "reason": "cap"}, {"call_id": "x"},
        ForgedEvent, "budget-denied x has no record",
    ),
    "an attempt with a wrong stamp": (
        "model-called", CALLED, {"committed": 4},
        ForgedEvent, r"stamped \$0\.000000004 committed, the events give \$0\.0000003",
    ),
    "an attempt that costs a negative amount": (
        "model-called", CALLED | {"charge_nanousd": -7}, {},
        UnreadableEvent, "a number is out of bounds",
    ),
    "an attempt that moves money": (
        "model-called", CALLED, {"amount": 7},
        UnreadableEvent, "a number is out of bounds",
    ),
    "a negative hold": (
        "budget-reserved", ORDER, {"amount": -300, "committed": 0},
        UnreadableEvent, "a number is out of bounds",
    ),
    "a negative cost": (
        "cost-recorded", COST, {"amount": -300, "committed": 0},
        UnreadableEvent, "a number is out of bounds",
    ),
    "an unknown type": ("refund", REFUND, {"amount": -300}, UnreadableEvent, "type"),
    "a number that comes again": (
        "cost-adjusted", REFUND, {"seq": 4, "amount": -300, "committed": 0},
        LedgerGap, "is repeated",
    ),
    "a number that leaves one out": (
        "cost-adjusted", REFUND, {"seq": 6, "amount": -300, "committed": 0},
        LedgerGap, "missing",
    ),
}  # fmt: skip


def type_and_error(forgery: Forgery) -> tuple[str, type[Exception]]:
    return forgery[0], forgery[3]


@pytest.mark.parametrize("is_followed", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", one_of_each(type_and_error, FORGERIES))
async def test_a_forged_event_stops_the_projector_and_is_not_folded(
    gate: DirectGate, store: Store, name: str, *, is_followed: bool
) -> None:
    """G8: with the reason; what stands before it is folded, what follows is not."""
    kind, payload, changes, error, problem = FORGERIES[name]
    await gate.reserve("c0", 100)
    await gate.reserve("c1", 1_000)
    await gate.settle("c0", 0)
    folded = await gate.settle("c1", 300)
    await forge(gate, kind, payload, changes)
    if is_followed:
        await gate.reserve("c3", 70)
    async with projecting(store, gate) as (projector, task):
        await asyncio.wait([task], timeout=30)
        assert isinstance(projector.failure, error), projector.failure
        assert re.search(problem, str(projector.failure), re.DOTALL)
    if error is ForgedEvent:
        assert isinstance(projector.failure, ForgedEvent)
        assert projector.failure.seq == 5
        assert store.position().entry == folded
        assert store.baselines([U1]).balances[U1] == (300, 0)


async def refusal_of(gate: DirectGate, store: Store) -> Exception | None:
    async with projecting(store, gate) as (projector, task):
        await asyncio.wait([task], timeout=30)
        return projector.failure


async def test_two_forged_events_that_cancel_each_other_are_found(gate: DirectGate, store: Store) -> None:
    await gate.reserve("c1", 1_000)
    await gate.settle("c1", 300)
    await forge(gate, "cost-adjusted", REFUND, {"seq": 3, "amount": -300, "committed": 0})
    await forge(gate, "cost-adjusted", REFUND, {"seq": 4, "amount": 300})
    await gate.reserve("c2", 70)
    problem = await refusal_of(gate, store)
    assert isinstance(problem, ForgedEvent)
    assert problem.seq == 3


async def test_a_grant_that_is_written_once_more_is_found(gate: DirectGate, store: Store) -> None:
    """It has the record of the one that the gate has written."""
    keys = [KEYS.meta, KEYS.ledger, KEYS.account("u1"), KEYS.call("credit-granted k"), KEYS.tail(U1)]
    payload = json.dumps({"author": "ann", "reason": "a gift"})
    terms = ("credit-granted k", "u1", PERIOD, "hash", "credit-granted", "", 10**9, 86_400, payload)
    await gate.call("assign", keys, *terms)
    entries: Any = await gate.redis.xrange(KEYS.ledger)
    await gate.redis.xadd(KEYS.ledger, entries[-1][1] | {b"seq": b"2"})
    problem = await refusal_of(gate, store)
    assert isinstance(problem, ForgedEvent)
    assert problem.seq == 2
    assert "credit-granted k is repeated" in str(problem)


@pytest.mark.slow
async def test_a_grant_over_a_key_of_another_type_is_found(gate: DirectGate, store: Store) -> None:
    await gate.redis.hset(KEYS.call("x"), "no", "record")
    await gate.reserve("c1", 1_000)
    await forge(
        gate, "credit-granted", {"author": "me", "reason": "mine"},
        {"seq": 2, "call_id": "x", "amount": 10**9, "committed": 1_000},
    )  # fmt: skip
    assert "credit-granted x has a record that the gate did not write" in str(await refusal_of(gate, store))


async def test_a_replaced_newest_event_is_found(gate: DirectGate, store: Store) -> None:
    await gate.reserve("c1", 1_000)
    newest = await gate.settle("c1", 300)
    await gate.redis.xdel(KEYS.ledger, str(newest))
    await forge(gate, "cost-recorded", COST | {"hold": 1, "hold_nanousd": 1_000}, {"seq": 2, "amount": 300})
    problem = await refusal_of(gate, store)
    assert isinstance(problem, ForgedEvent)
    assert problem.seq == 2


async def lower_balance(gate: DirectGate) -> None:
    entry = await cast("Awaitable[bytes]", gate.redis.lindex(KEYS.tail(U1), -1))
    place = entry.decode().rsplit(" ", 2)[0]
    await cast("Awaitable[Any]", gate.redis.lset(KEYS.tail(U1), -1, f"{place} 1 0"))


async def add_entry(gate: DirectGate) -> None:
    entries = await cast("Awaitable[list[bytes]]", gate.redis.lrange(KEYS.tail(U1), 0, 0))
    place = EntryId.parse(entries[0].decode().split(" ")[0])
    await cast(
        "Awaitable[Any]",
        gate.redis.linsert(KEYS.tail(U1), "AFTER", entries[0].decode(), f"{place.ms}-{place.seq + 1} -5 0 -5 0"),
    )


async def delete_tail(gate: DirectGate) -> None:
    await gate.redis.delete(KEYS.tail(U1))


async def replace_tail(gate: DirectGate) -> None:
    await gate.redis.set(KEYS.tail(U1), "no list")


async def add_nonsense(gate: DirectGate) -> None:
    entries = await cast("Awaitable[list[bytes]]", gate.redis.lrange(KEYS.tail(U1), 0, 0))
    await cast("Awaitable[Any]", gate.redis.linsert(KEYS.tail(U1), "AFTER", entries[0].decode(), "nonsense"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lower_balance, TailChanged),
        (add_entry, TailChanged),
        (replace_tail, TailChanged),
        (add_nonsense, TailChanged),
        (delete_tail, ForgedEvent),
    ],
)
async def test_a_tail_changed_by_hand_stops_the_projector(
    gate: DirectGate, store: Store, change: Callable[[DirectGate], Awaitable[None]], error: type[LedgerRefused]
) -> None:
    await gate.reserve("c1", 1_000)
    await gate.settle("c1", 300)
    await change(gate)
    problem = await refusal_of(gate, store)
    assert isinstance(problem, error)
    assert store.position().seq == 0 or error is ForgedEvent


async def test_a_row_of_duckdb_changed_while_it_is_open_is_not_taken_for_a_forged_event(
    gate: DirectGate, store: Store
) -> None:
    """The check finds which of gate and DuckDB is wrong: here the file must be rebuilt."""
    settings = ProjectorSettings(pause_ms=0, block_ms=20, tail_keep_ms=3_600_000)
    async with projecting(store, gate, settings) as (projector, task):
        await gate.reserve("c1", 1_000)
        await projector.wait_for(0, await gate.settle("c1", 300))
        gate.store = None  # A worker that has not read DuckDB since.
        with store.connection.cursor() as cursor:
            cursor.execute("UPDATE budgets SET settled_usd = 0")
        await gate.reserve("c2", 70)
        await asyncio.wait([task], timeout=30)
        assert isinstance(projector.failure, StoreChanged)
        assert "campaign c1, period 2026-11: $0.00 settled" in str(projector.failure)
