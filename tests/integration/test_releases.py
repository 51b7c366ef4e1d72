"""Giving back assumed charges in bulk: only the selected ones, each once, even if two people do it at once."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tollbook.audit.assumed_charges import Found, find_assumed_charges
from tollbook.audit.reader import AuditReader
from tollbook.inference.administration import Administration
from tollbook.inference.calls.earlier_runs import settle_dead_hold
from tollbook.inference.calls.holds import Hold
from tollbook.inference.cost_lookup import CostLookup
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.reconcile import reconcile
from tollbook.inference.releases import AssumedCharge
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import CostAdjusted
from tollbook.schemas.identifiers import EntryId

BOUND: Final = PROMPT_BOUND * 3_750 + 2_000 * 15_000
BOUND_OF_FALLBACK: Final = PROMPT_BOUND * 150 + 2_000 * 600
PRICE: Final = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
PRICE_OF_FALLBACK: Final = PROMPT_TOKENS * 150 + COMPLETION_TOKENS * 600
SIGNED: Final = Signature("ann", "the proxy's page")
EVER: Final = EntryId(2**45, 0)


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        yield calling
        await calling.check_guarantees()


@pytest.fixture
def administration(calling: Calling) -> Administration:
    return Administration(calling.runtime.ledger, calling.runtime.policies, calling.runtime.user_ids)


async def find(calling: Calling, *outcomes: str, since_ms: int = 0, until: EntryId = EVER, user: Any = None) -> Found:
    handle = calling.runtime.handle
    reader = AuditReader(LedgerSource(handle.ledger_id, handle.keys, None, handle.redis))
    try:
        return await find_assumed_charges(reader, outcomes=outcomes, since_ms=since_ms, until=until, user_id=user)
    finally:
        reader.close()


async def run(calling: Calling, call_id: str, *faults: str | None, user: str = "u1") -> None:
    calling.script(*faults)
    async with calling.runner() as (runner, _):
        await runner.run(calling.call(call_id, user_id=user))


async def test_charges_of_the_outcome_are_given_back_signed_and_no_others(
    calling: Calling, administration: Administration
) -> None:
    await run(calling, "t1", "reset_before_charge", None)
    await run(calling, "t2", "http_524", None)
    await run(calling, "t3", "reset_before_charge", None, user="u2")
    await run(calling, "t4", None)
    found = await find(calling, "connection_error")
    assert [(each.call_id, each.user_id, each.amount_nanousd) for each in found.charges] == [
        ("t1", "u1", BOUND),
        ("t3", "u2", BOUND),
    ]
    before = await calling.spent(), await calling.assumed()
    done = await administration.release(found.charges, SIGNED)
    assert (done.released, done.released_nanousd, done.changed, done.too_old) == (2, 2 * BOUND, 0, 0)
    assert (await calling.spent(), await calling.assumed()) == (before[0] - BOUND, before[1] - BOUND)
    assert await calling.spent("u2") == PRICE_OF_FALLBACK
    last = (await calling.events("t1"))[-1]
    assert (last.amount, last.payload) == (
        -BOUND,
        CostAdjusted(hold=1, basis="released", author="ann", reason="the proxy's page", assumed_nanousd=-BOUND),
    )


async def test_done_twice_nothing_is_given_back_twice(calling: Calling, administration: Administration) -> None:
    await run(calling, "t1", "reset_before_charge", "reset_before_charge", None)
    found = await find(calling, "connection_error")
    assert [each.attempt for each in found.charges] == [1, 2]
    assert (await administration.release(found.charges, SIGNED)).released == 2
    events = await calling.events()
    assert await find(calling, "connection_error") == Found((), 0)
    # Read before the other's release, and done after it.
    again = await administration.release(found.charges, SIGNED)
    assert (again.released, again.changed) == (0, 2)
    assert await calling.events() == events


@pytest.mark.slow
async def test_two_at_once_give_back_each_charge_once(calling: Calling, administration: Administration) -> None:
    for number in range(6):
        await run(calling, f"t{number}", "reset_before_charge", "reset_before_charge", None)
    found = await find(calling, "connection_error")
    done = await asyncio.gather(*(administration.release(found.charges, SIGNED) for _ in range(3)))
    assert sum(each.released for each in done) == 12
    assert await calling.spent() == 6 * PRICE_OF_FALLBACK


@pytest.mark.slow
async def test_after_a_crash_between_two_events_the_rest_is_given_back(
    calling: Calling, administration: Administration
) -> None:
    for number in range(3):
        await run(calling, f"t{number}", "reset_before_charge", "reset_before_charge", None)
    found = await find(calling, "connection_error")

    def until_it_dies() -> Iterator[AssumedCharge]:
        yield from found.charges[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await administration.release(until_it_dies(), SIGNED)
    rest = await find(calling, "connection_error")
    assert len(rest.charges) == 3
    assert (await administration.release(rest.charges, SIGNED)).released == 3
    assert await calling.spent() == 3 * PRICE_OF_FALLBACK


async def test_what_was_corrected_since_is_left_alone(calling: Calling, administration: Administration) -> None:
    await run(calling, "t1", "reset_before_charge", None)
    await run(calling, "t2", "reset_before_charge", None)
    found = await find(calling, "connection_error")
    await administration.adjust_cost("t1", PRICE_OF_FALLBACK, Signature("eva", "invoice"))
    assert await find(calling, "connection_error") == Found(found.charges[1:], 1)
    # Corrected after it was read, too.
    done = await administration.release(found.charges, SIGNED)
    assert (done.released, done.changed) == (1, 1)
    assert await calling.spent() == 2 * PRICE_OF_FALLBACK


async def test_a_dead_workers_request_can_be_given_back(calling: Calling, administration: Administration) -> None:
    async with calling.runner() as (runner, _):
        assert isinstance(await runner.reserve(calling.call("t1")), Hold)
    record = await calling.runtime.ledger.gates[0].call_record("t1")
    assert record is not None
    request = settle_dead_hold(
        call_id="t1", user_id="u1", found=record.hold, outcome="expired", reason="the hold's deadline has passed"
    )
    await calling.runtime.ledger.settle(request)
    assert await calling.spent() == BOUND
    assert (await find(calling, "connection_error", "taken_over")).charges == ()
    found = await find(calling, "expired")
    assert (await administration.release(found.charges, SIGNED)).released == 1
    assert await calling.spent() == 0


@pytest.mark.slow
async def test_only_what_ended_in_the_time_and_of_the_user_is_found(calling: Calling) -> None:
    for number, user in enumerate(("u1", "u2", "u1")):
        await run(calling, f"t{number}", "reset_before_charge", None, user=user)
    ids = [
        EntryId.parse(event.id)
        for event in await calling.events()
        if event.type == "model-called" and event.attempt == 1
    ]

    async def calls(**bounds: Any) -> list[str]:
        return [each.call_id for each in (await find(calling, "connection_error", **bounds)).charges]

    assert await calls() == ["t0", "t1", "t2"]
    assert await calls(until=ids[1]) == ["t0", "t1"]
    assert await calls(since_ms=ids[1].ms) == ["t1", "t2"]
    assert await calls(user="u1") == ["t0", "t2"]
    assert await calls(since_ms=ids[2].ms + 1_000_000) == []


@pytest.mark.slow
async def test_what_the_provider_says_later_of_a_released_charge_counts(
    calling: Calling, administration: Administration
) -> None:
    await run(calling, "t1", "html_body", None)
    charged = calling.booked()
    found = await find(calling, "invalid_response")
    assert (await administration.release(found.charges, SIGNED)).released == 1
    assert await calling.spent() == PRICE_OF_FALLBACK
    await calling.folded()
    async with ProviderClients.from_settings(calling.runtime.settings) as providers:
        costs = CostLookup(providers, calling.runtime.rules)
        outcome = await reconcile(calling.query, calling.runtime.ledger, costs, author="test")
    assert outcome.adjusted == 1
    assert await calling.spent() == charged == PRICE + PRICE_OF_FALLBACK
