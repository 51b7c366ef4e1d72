"""A ledger that went back in time is noticed, before anything is written, by each process that has seen more.

The tests restore older values of all the ledger's keys, as a restored backup does.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.gate_bench import CAP, GateBench, open_bench
from tollbook.ledger.errors import LedgerWentBack
from tollbook.ledger.gate.functions import library_code
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.requests import Baseline, BudgetCap, Position, Reserved

NOTHING: Final = [Baseline(0, 0, Position())]


@pytest.fixture
async def bench(redis_client: Redis) -> AsyncIterator[GateBench]:
    async with open_bench(redis_client) as bench:
        yield bench


async def go_back(redis: Redis, before: dict[bytes, bytes | None]) -> None:
    """Put every key of the ledger back to what it was."""
    for key in [key async for key in redis.scan_iter()]:
        await redis.delete(key)
    for key, value in before.items():
        assert value is not None
        await redis.restore(key, 0, value)


def another_process(bench: GateBench) -> Gate:
    """A gate that knows nothing but the ledger as it is now."""
    return Gate(bench.pipeline, bench.keys, "ledger-1", idempotency_ttl_s=3_600, result_ttl_s=600)


STEPS: dict[str, Callable[[GateBench], Awaitable[object]]] = {
    "reserve": lambda bench: bench.reserve("new"),
    "reserve again what was lost": lambda bench: bench.reserve("lost"),
    "record": lambda bench: bench.record("kept", extension=1),
    "settle": lambda bench: bench.settle("kept"),
    "settle what was lost": lambda bench: bench.settle("lost"),
    "adjust": lambda bench: bench.adjust("settled", cost=1),
    "charge": lambda bench: bench.charge("elsewhere"),
    "balance": lambda bench: bench.gate.balance(
        user_id="u", period="2026-11", budgets=[BudgetCap("user:u:2026-11", CAP)], baselines=NOTHING
    ),
}


@pytest.mark.parametrize("step", STEPS)
async def test_no_step_is_taken_on_a_ledger_that_lacks_an_event_we_have_seen(bench: GateBench, step: str) -> None:
    await bench.reserve("settled", amount=1)
    await bench.settle("settled", cost=1)
    await bench.reserve("kept", amount=1)
    before = await bench.everything()
    await bench.reserve("lost", amount=1)
    await go_back(bench.redis, before)

    with pytest.raises(LedgerWentBack, match="is no longer on the ledger"):
        await STEPS[step](bench)

    assert await bench.everything() == before


@pytest.mark.parametrize("written_since", [("b",), ("b", "c", "d")], ids=["as many", "more"])
async def test_a_loss_is_noticed_after_others_have_written_past_the_lost_event(
    bench: GateBench, written_since: tuple[str, ...]
) -> None:
    """The position alone would look right again."""
    await bench.reserve("kept", amount=1)
    before = await bench.everything()
    await bench.reserve("lost", amount=1)
    await go_back(bench.redis, before)
    own, bench.gate = bench.gate, another_process(bench)
    for call in written_since:
        assert isinstance(await bench.reserve(call, amount=1), Reserved)
    written, bench.gate = await bench.everything(), own

    with pytest.raises(LedgerWentBack):
        await bench.reserve("e", amount=1)

    assert await bench.everything() == written


async def test_a_loss_is_noticed_by_an_idle_process_that_had_just_checked(bench: GateBench) -> None:
    """The events that the server remembers must be forgotten when its history is replaced."""
    await bench.reserve("kept", amount=1)
    before = await bench.everything()
    await bench.reserve("lost", amount=1)
    assert await bench.do("balance") == ("OK", (0, 2, CAP))
    await go_back(bench.redis, before)
    own, bench.gate = bench.gate, another_process(bench)
    for call in ("b", "c"):
        await bench.reserve(call, amount=1)
    bench.gate = own

    with pytest.raises(LedgerWentBack):
        await bench.reserve("d", amount=1)


async def test_a_loss_is_noticed_if_another_server_has_written_more_since(bench: GateBench) -> None:
    """A history that grew on another server is checked again, although it is longer than the one this server knew."""
    await bench.reserve("kept", amount=1)
    before = await bench.everything()
    for call in ("b", "c"):
        await bench.reserve(call, amount=1)
    elsewhere, own = await bench.everything(), bench.gate
    await go_back(bench.redis, before)
    bench.gate = another_process(bench)
    await bench.reserve("lost", amount=1)
    own.see(bench.gate.seen)
    bench.gate = own
    await go_back(bench.redis, elsewhere)

    with pytest.raises(LedgerWentBack):
        await bench.reserve("e", amount=1)


async def test_an_event_of_this_server_is_not_looked_up_again(bench: GateBench) -> None:
    await bench.reserve("first", amount=1)
    looks = await number_of_looks(bench.redis)
    for number in range(600):
        await bench.reserve(f"r{number}", amount=1)
    assert await number_of_looks(bench.redis) == looks


async def test_an_event_that_was_found_is_not_looked_up_again(bench: GateBench) -> None:
    await bench.reserve("first", amount=1)
    await bench.redis.function_load(library_code(), replace=True)
    looks = await number_of_looks(bench.redis)
    for _ in range(3):
        assert await bench.do("balance") == ("OK", (0, 1, CAP))
    assert await number_of_looks(bench.redis) == looks + 1


async def number_of_looks(redis: Redis) -> int:
    """How often the server has looked an event up."""
    stats: dict[str, Any] = await redis.info("commandstats")
    return stats.get("cmdstat_xrange", {}).get("calls", 0)


async def test_calls_go_on_once_the_newer_data_is_back(bench: GateBench) -> None:
    await bench.reserve("kept", amount=1)
    before = await bench.everything()
    await bench.reserve("lost", amount=1)
    newer = await bench.everything()
    await go_back(bench.redis, before)
    with pytest.raises(LedgerWentBack):
        await bench.settle("lost")
    await go_back(bench.redis, newer)

    assert await bench.do("settle", call="lost", cost=1) == ("OK", 1 + 1)


async def test_an_event_that_was_archived_and_trimmed_does_not_count_as_lost(bench: GateBench) -> None:
    """Sealing is not going back: `removed_to` says up to where the stream was trimmed."""
    await bench.reserve("a", amount=1)
    await bench.settle("a", cost=1)
    head = await bench.head()
    await bench.redis.xtrim(bench.keys.ledger, maxlen=0, approximate=False)
    await bench.redis.hset(bench.keys.meta, mapping={"removed": head.seq, "removed_to": str(head.entry)})

    assert isinstance(await bench.reserve("b", amount=1), Reserved)


@pytest.mark.parametrize("found", ["its own hold", "a finished call", "its own settlement", "its charge"])
async def test_a_repeat_learns_the_id_of_the_first_event(bench: GateBench, found: str) -> None:
    """G3, G4: the reply to the first try was lost, and with it the event's id; the repeat must not stay without one."""
    await bench.reserve("kept", amount=1)
    before, own = await bench.everything(), bench.gate
    # The step of the process, whose reply was lost.
    bench.gate = another_process(bench)
    await bench.reserve("lost", amount=1)
    if found in ("a finished call", "its own settlement"):
        await bench.settle("lost", cost=1)
    await bench.charge("elsewhere")
    bench.gate = own
    if found == "its charge":
        await bench.charge("elsewhere")
    elif found == "its own settlement":
        await bench.settle("lost", cost=1)
    else:
        await bench.reserve("lost", amount=1)
    await go_back(bench.redis, before)

    with pytest.raises(LedgerWentBack):
        await bench.settle("lost", cost=1)
