"""Plans, credits and corrections by people: in force at once, done once, signed on the ledger."""

import asyncio
import re
from collections.abc import AsyncGenerator
from decimal import Decimal
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.calling import PROMPT, Calling, open_calling
from tollbook import CostTracker, InferenceClient
from tollbook.audit.accounts import read_grants, read_plans
from tollbook.audit.reader import AuditReader
from tollbook.inference.administration import Administration, NothingToCorrect
from tollbook.inference.errors import AppError
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.errors import CallUnknown, CreditTooLow, IdempotencyConflict, NoPlanAssigned
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import CostAdjusted, CreditGranted, CreditRevoked, PlanAssigned
from tollbook.schemas.results import ErrorCode

DOLLAR = 1_000_000_000
SIGNED = Signature("ann", "invoice 1043", key="k1")


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncGenerator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        yield calling


@pytest.fixture
def administration(calling: Calling) -> Administration:
    return Administration(calling.runtime.ledger, calling.runtime.policies, calling.runtime.user_ids)


async def cap_of(calling: Calling, user_id: str, plan: str = "trial") -> Decimal:
    return (await CostTracker(calling.runtime).get_usage_summary(user_id, plan)).cap_usd


async def test_the_plan_on_the_ledger_wins_over_the_one_a_task_names(
    calling: Calling, administration: Administration
) -> None:
    assert await administration.set_plan("u1", "growth", SIGNED)
    assert await cap_of(calling, "u1", "trial") == 40
    assert await administration.set_plan("u1", "trial", Signature("ann", "downgraded"))
    assert await cap_of(calling, "u1", "growth") == 5
    payloads = [event.payload for event in await calling.events()]
    assert isinstance(payloads[0], PlanAssigned)
    assert re.fullmatch("[0-9a-f]{32}", payloads[0].content_hash or "")
    assert payloads[0].model_copy(update={"content_hash": None}) == PlanAssigned(
        plan="growth", cap_nanousd=40 * DOLLAR, author="ann", reason="invoice 1043"
    )


async def test_a_plan_may_have_a_cap_of_its_own(calling: Calling, administration: Administration) -> None:
    await administration.set_plan("u1", "starter", SIGNED, cap_nanousd=100 * DOLLAR)
    assert await cap_of(calling, "u1") == 100


async def test_a_credit_is_granted_once_per_key_and_adds_up(calling: Calling, administration: Administration) -> None:
    assert await administration.grant_credit("u1", 2 * DOLLAR, SIGNED)
    assert not await administration.grant_credit("u1", 2 * DOLLAR, SIGNED)
    assert await cap_of(calling, "u1") == 5 + 2
    assert await administration.grant_credit("u1", 3 * DOLLAR, Signature("ann", "again"))
    assert await cap_of(calling, "u1") == 5 + 2 + 3
    grants = [event for event in await calling.events() if isinstance(event.payload, CreditGranted)]
    assert [event.amount for event in grants] == [2 * DOLLAR, 3 * DOLLAR]


async def test_a_key_with_other_content_is_a_conflict(calling: Calling, administration: Administration) -> None:
    await administration.grant_credit("u1", 2 * DOLLAR, SIGNED)
    with pytest.raises(IdempotencyConflict, match=f"^key {SIGNED.key} was used before with other content"):
        await administration.grant_credit("u1", 3 * DOLLAR, SIGNED)
    assert await cap_of(calling, "u1") == 5 + 2


async def test_a_credit_counts_in_its_own_period_only(calling: Calling, administration: Administration) -> None:
    await administration.grant_credit("u1", 2 * DOLLAR, SIGNED, period="2020-01")
    assert await cap_of(calling, "u1") == 5


async def test_a_refused_user_is_served_after_a_credit(calling: Calling, administration: Administration) -> None:
    await calling.set_cap(1)
    client = InferenceClient("generate_draft", calling.runtime)
    with pytest.raises(AppError) as refused:
        await client.call(PROMPT, user_id="u1", plan="trial")
    assert refused.value.code is ErrorCode.PLAN_LIMIT_REACHED
    await administration.grant_credit("u1", DOLLAR, SIGNED)
    assert (await client.call(PROMPT, user_id="u1", plan="trial")).cost_usd > 0


async def test_a_correction_states_the_true_cost_and_is_done_once(
    calling: Calling, administration: Administration
) -> None:
    result = await InferenceClient("generate_draft", calling.runtime).call(PROMPT, user_id="u1", plan="trial")
    booked = await calling.spent()
    for before in (booked, 7):
        done = await administration.adjust_cost(result.task_id, 7, Signature("ann", "invoice"))
        assert (done.user_id, done.before_nanousd, done.after_nanousd) == ("u1", before, 7)
    assert await calling.spent() == 7
    adjusted = [event for event in await calling.events() if isinstance(event.payload, CostAdjusted)]
    assert [event.amount for event in adjusted] == [7 - booked]
    assert adjusted[0].payload == CostAdjusted(
        hold=1, basis="reported", reason="invoice", author="ann", assumed_nanousd=0, generation_id=None
    )


async def test_recorded_usage_can_be_corrected_too(calling: Calling, administration: Administration) -> None:
    await CostTracker(calling.runtime).record_usage("u1", "0.5", idempotency_key="order-1")
    await administration.adjust_cost("order-1", DOLLAR, Signature("ann", "invoice"))
    assert await calling.spent() == DOLLAR


async def test_what_cannot_be_corrected_says_why(calling: Calling, administration: Administration) -> None:
    with pytest.raises(CallUnknown):
        await administration.adjust_cost("nobody", 1, SIGNED)
    await calling.set_cap(1)
    with pytest.raises(AppError):
        await InferenceClient("generate_draft", calling.runtime).call(
            PROMPT, user_id="u1", plan="trial", task_id="refused"
        )
    with pytest.raises(NothingToCorrect):
        await administration.adjust_cost("refused", 1, SIGNED)


async def test_credit_is_taken_back_once_per_key_and_never_below_zero(
    calling: Calling, administration: Administration
) -> None:
    await administration.grant_credit("u1", 5 * DOLLAR, SIGNED)
    assert await administration.revoke_credit("u1", 2 * DOLLAR, SIGNED)
    assert not await administration.revoke_credit("u1", 2 * DOLLAR, SIGNED)
    assert await cap_of(calling, "u1") == 5 + 3
    with pytest.raises(CreditTooLow, match=r"^u1 has \$3\.00 of credit in 20..-.., no more$"):
        await administration.revoke_credit("u1", 3 * DOLLAR + 1, Signature("ann", "again"))
    await administration.revoke_credit("u1", 3 * DOLLAR, Signature("ann", "again"))
    assert await cap_of(calling, "u1") == 5
    revoked = [event for event in await calling.events() if isinstance(event.payload, CreditRevoked)]
    assert [event.amount for event in revoked] == [-2 * DOLLAR, -3 * DOLLAR]
    assert revoked[0].payload.model_copy(update={"content_hash": None}) == CreditRevoked(
        author="ann", reason="invoice 1043"
    )


async def test_a_grant_is_taken_back_once_whoever_does_it(calling: Calling, administration: Administration) -> None:
    await administration.grant_credit("u1", 2 * DOLLAR, SIGNED)
    await administration.grant_credit("u1", 2 * DOLLAR, Signature("ann", "more"))
    grant = (await calling.events())[0].id
    done = await asyncio.gather(
        *(
            administration.revoke_credit("u1", 2 * DOLLAR, Signature(who, "twice"), grant=grant)
            for who in ("ann", "bob")
        )
    )
    assert sorted(done) == [False, True]
    assert await cap_of(calling, "u1") == 5 + 2


async def test_a_revoke_below_what_is_spent_refuses_the_next_call_and_changes_no_spend(
    calling: Calling, administration: Administration
) -> None:
    """G1 is about holds: none is made over the cap, and what was spent under the old one stays."""
    await calling.set_cap(1)
    await administration.grant_credit("u1", DOLLAR, SIGNED)
    client = InferenceClient("generate_draft", calling.runtime)
    await client.call(PROMPT, user_id="u1", plan="trial")
    spent = await calling.spent()
    await administration.revoke_credit("u1", DOLLAR, SIGNED)
    with pytest.raises(AppError) as refused:
        await client.call(PROMPT, user_id="u1", plan="trial")
    assert refused.value.code is ErrorCode.PLAN_LIMIT_REACHED
    assert await calling.spent() == spent > 1
    await calling.check_guarantees()


async def test_a_cleared_plan_gives_way_to_the_one_a_task_names(
    calling: Calling, administration: Administration
) -> None:
    with pytest.raises(NoPlanAssigned, match=r"^no plan is set for u1"):
        await administration.clear_plan("u1", Signature("ann", "ended"))
    await administration.set_plan("u1", "growth", SIGNED, cap_nanousd=500 * DOLLAR)
    assert await administration.clear_plan("u1", SIGNED)
    assert not await administration.clear_plan("u1", SIGNED)
    assert await cap_of(calling, "u1", "starter") == 15
    await administration.set_plan("u1", "trial", Signature("ann", "again"))
    assert await cap_of(calling, "u1", "starter") == 5
    account = await administration.account("u1")
    assert (account.plan, account.cap_nanousd) == ("trial", 5 * DOLLAR)


def reader_of(calling: Calling) -> AuditReader:
    handle = calling.runtime.handle
    return AuditReader(LedgerSource(handle.ledger_id, handle.keys, None, handle.redis))


async def test_the_rest_of_each_grant_is_shown(calling: Calling, administration: Administration) -> None:
    for number, dollars in enumerate((1, 2, 4)):
        await administration.grant_credit("u1", dollars * DOLLAR, Signature("ann", f"grant {number}"))
    await administration.grant_credit("u2", DOLLAR, Signature("ann", "other"))
    reader = reader_of(calling)
    grants = await read_grants(reader, user_id="u1")
    await administration.revoke_credit("u1", DOLLAR, Signature("ann", "named"), grant=grants[0].event.id)
    # Without a name, the newest gives first.
    await administration.revoke_credit("u1", 5 * DOLLAR, Signature("ann", "any"))
    grants = await read_grants(reader, user_id="u1")
    assert [grant.left_nanousd for grant in grants] == [0, DOLLAR, 0]
    assert len(await read_grants(reader)) == 4
    assert await read_grants(reader, period="2020-01") == []
    reader.close()
    assert await cap_of(calling, "u1") == 5 + 1


async def test_the_plans_in_force_are_listed_by_user(calling: Calling, administration: Administration) -> None:
    await administration.set_plan("u2", "growth", Signature("ann", "one"))
    await administration.set_plan("u1", "growth", Signature("ann", "two"))
    await administration.set_plan("u1", "starter", Signature("ann", "three"))
    await administration.set_plan("u3", "starter", Signature("ann", "four"))
    await administration.clear_plan("u3", Signature("ann", "five"))
    reader = reader_of(calling)
    plans = await read_plans(reader)
    assert [(event.user_id, event.payload.model_copy(update={"content_hash": None})) for event in plans] == [
        ("u1", PlanAssigned(plan="starter", cap_nanousd=15 * DOLLAR, author="ann", reason="three")),
        ("u2", PlanAssigned(plan="growth", cap_nanousd=40 * DOLLAR, author="ann", reason="one")),
    ]
    assert await read_plans(reader, user_id="u3") == []
    reader.close()
