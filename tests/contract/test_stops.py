"""The mark that stops calls: what it stops and what not, and which projector may set and lift it (G8)."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.gate_bench import CAP, GateBench, open_bench
from tollbook.ledger.errors import CallsStopped, IdempotencyConflict, LedgerReplaced, LedgerWentBack
from tollbook.ledger.gate.requests import Adjusted, FinishedCall, OpenCall, Reserved, Settled
from tollbook.ledger.gate.stops import CallSwitch, ProjectorFenced, read_stop
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

LOST: Final = EntryId(2**45, 7)
REASON: Final = "the ledger has only 1 event"


@pytest.fixture
async def bench(redis_client: Redis) -> AsyncIterator[GateBench]:
    async with open_bench(redis_client) as bench:
        yield bench


def projector(bench: GateBench, epoch: int, *, place: str = "here", ledger_id: str = "ledger-1") -> CallSwitch:
    return CallSwitch(bench.pipeline, bench.keys, ledger_id, projector=f"p{epoch}", epoch=epoch, place=place)


async def stop_of(bench: GateBench) -> str | None:
    return await read_stop(bench.pipeline, (bench.keys,))


async def test_while_calls_are_stopped_none_begins_and_the_reason_is_given(bench: GateBench) -> None:
    await projector(bench, 1).stop("the ledger has\nonly  1 event", ZERO_ENTRY)
    before = await bench.everything()

    with pytest.raises(CallsStopped, match=f"calls are stopped: {REASON}"):
        await bench.reserve("new")
    with pytest.raises(CallsStopped):
        await bench.balance()

    assert await bench.everything() == before
    assert await stop_of(bench) == REASON


async def test_while_calls_are_stopped_begun_calls_are_answered_and_settled(bench: GateBench) -> None:
    for call in ("finished", "open", "open with a second attempt"):
        await bench.reserve(call, amount=1)
    await bench.settle("finished", cost=1)
    await projector(bench, 1).stop(REASON, ZERO_ENTRY)

    assert isinstance(await bench.reserve("finished", amount=1), FinishedCall)
    assert isinstance(await bench.reserve("open", amount=1), OpenCall)
    with pytest.raises(IdempotencyConflict):
        await bench.reserve("open", amount=1, content="other")
    assert await bench.adjust("finished", cost=2) == Adjusted(1, is_call_over=True)
    assert await bench.charge("elsewhere")
    assert await bench.record("open with a second attempt", spent=1) == 1
    for call in ("open with a second attempt", "open"):
        assert isinstance(await bench.settle(call, cost=0), Settled)


async def test_a_hold_is_not_extended_and_nothing_of_the_attempt_is_lost(bench: GateBench) -> None:
    await bench.reserve("open", amount=1)
    await projector(bench, 1).stop(REASON, ZERO_ENTRY)
    before = await bench.everything()

    with pytest.raises(CallsStopped):
        await bench.record("open", spent=1, extension=1)

    assert await bench.everything() == before
    assert isinstance(await bench.settle("open", cost=1), Settled)


async def test_a_call_that_was_closed_without_an_answer_does_not_begin_again(bench: GateBench) -> None:
    await bench.reserve("closed", amount=1)
    await bench.settle("closed", cost=1, final=False, result="")
    await projector(bench, 1).stop(REASON, ZERO_ENTRY)

    with pytest.raises(CallsStopped):
        await bench.reserve("closed", amount=1)


async def test_calls_begin_again_once_the_projector_says_so(bench: GateBench) -> None:
    await projector(bench, 1).stop(REASON, ZERO_ENTRY)
    assert await projector(bench, 2).claim() == REASON
    with pytest.raises(CallsStopped):
        await bench.reserve("new")

    await projector(bench, 2).resume(ZERO_ENTRY)

    assert isinstance(await bench.reserve("new"), Reserved)
    assert await stop_of(bench) is None


@pytest.mark.parametrize("word", ["claim", "stop", "resume"])
async def test_a_projector_that_lost_its_lease_is_fenced(bench: GateBench, word: str) -> None:
    await projector(bench, 2).stop(REASON, ZERO_ENTRY)
    before = await bench.everything()
    words: dict[str, Any] = {
        "claim": lambda one: one.claim(),
        "stop": lambda one: one.stop("another reason", ZERO_ENTRY),
        "resume": lambda one: one.resume(ZERO_ENTRY),
    }

    with pytest.raises(ProjectorFenced, match=r"another projector \(p2\) has taken over"):
        await words[word](projector(bench, 1))

    assert await bench.everything() == before


async def test_only_one_of_two_projectors_of_one_epoch_is_accepted(bench: GateBench) -> None:
    """The clock was put back, and both have asked for the next epoch."""
    await projector(bench, 2).claim()
    with pytest.raises(ProjectorFenced):
        await replace(projector(bench, 2), projector="other").stop(REASON, ZERO_ENTRY)


async def test_a_new_projector_fences_earlier_ones_at_once(bench: GateBench) -> None:
    assert await projector(bench, 2).claim() is None
    with pytest.raises(ProjectorFenced):
        await projector(bench, 1).stop(REASON, ZERO_ENTRY)
    assert await stop_of(bench) is None


async def test_a_projector_that_has_seen_less_does_not_let_calls_begin_on_a_ledger_that_went_back(
    bench: GateBench,
) -> None:
    """A standby elsewhere takes over by itself; no person has decided anything."""
    await bench.reserve("kept", amount=1)
    head = (await bench.head()).entry
    await projector(bench, 1, place="here").stop(REASON, LOST)

    with pytest.raises(LedgerWentBack, match=str(LOST)):
        await projector(bench, 2, place="elsewhere").resume(head)
    assert await stop_of(bench) == REASON

    await projector(bench, 3, place="elsewhere").stop("a reason of its own", head)
    assert await stop_of(bench) == REASON

    await bench.redis.xadd(bench.keys.ledger, {"type": "put back"}, id=str(LOST))
    await projector(bench, 4, place="elsewhere").resume(LOST)
    assert await stop_of(bench) is None


async def test_a_projector_of_the_same_directory_resumes_after_a_person_set_the_file_aside(bench: GateBench) -> None:
    await bench.reserve("kept", amount=1)
    await projector(bench, 1).stop(REASON, LOST)

    await projector(bench, 2).resume((await bench.head()).entry)

    assert isinstance(await bench.reserve("new", amount=1), Reserved)


async def test_calls_do_not_begin_where_the_ledger_went_back_after_the_check(bench: GateBench) -> None:
    await projector(bench, 1).stop(REASON, ZERO_ENTRY)

    with pytest.raises(LedgerWentBack):
        await projector(bench, 2).resume(LOST)

    assert await stop_of(bench) == REASON


async def test_calls_of_another_ledger_are_not_stopped(bench: GateBench) -> None:
    await bench.reserve("kept", amount=1)
    with pytest.raises(LedgerReplaced):
        await projector(bench, 1, ledger_id="ledger-2").stop(REASON, ZERO_ENTRY)
    assert (await bench.do("balance"))[1] == (0, 1, CAP)
