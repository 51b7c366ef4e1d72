"""Budget questions and spend that was made elsewhere: exact at once, however far DuckDB is behind (G6)."""

import asyncio
from collections.abc import AsyncGenerator
from decimal import ROUND_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling, period
from tests.servers import wait_until
from tollbook import (
    AppError,
    CostTracker,
    IdempotencyConflict,
    InferenceClient,
    InvalidTask,
    LedgerRefused,
    PlanLimitReached,
)
from tollbook.inference.cost_tracker import UsageSummary
from tollbook.inference.policy_changes import apply_policy
from tollbook.inference.runtime import build_gates
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import AlertRaised, CostRecorded
from tollbook.schemas.money import NANOUSD_PER_USD, nanousd_from_usd, usd_from_nanousd
from tollbook.schemas.policy import default_policy
from tollbook.schemas.results import ErrorCode

PRICE = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
BOUND = PROMPT_BOUND * 3_750 + 2_000 * 15_000
NANODOLLAR = Decimal("0.000000001")
MICRO = Decimal("0.000001")


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncGenerator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        yield calling


@pytest.fixture
def tracker(calling: Calling) -> CostTracker:
    return CostTracker(calling.runtime)


async def refusal(awaitable: Any) -> AppError:
    with pytest.raises(AppError) as refused:
        await awaitable
    return refused.value


async def test_new_user_has_the_whole_cap_of_the_plan(tracker: CostTracker) -> None:
    for plan, cap in (("trial", 5), ("starter", 15), ("growth", 40)):
        assert await tracker.get_usage_summary("new", plan) == UsageSummary(
            user_id="new",
            period=period(),
            plan=plan,
            cap_usd=Decimal(cap),
            spent_usd=Decimal(0),
            reserved_usd=Decimal(0),
            remaining_usd=Decimal(cap),
        )


async def test_user_without_a_plan_is_held_to_the_smallest_cap(tracker: CostTracker) -> None:
    assert (await tracker.get_usage_summary("new")).cap_usd == 5


async def test_summary_has_spend_and_open_holds_at_once(calling: Calling, tracker: CostTracker) -> None:
    # G6: nothing is folded meanwhile.
    calling.projector.pause()
    client = InferenceClient("generate_draft", calling.runtime)
    await client.call(PROMPT, "u1")
    calling.script("hang")
    holding = asyncio.create_task(client.call(PROMPT, "u1"))
    await wait_until(lambda: calling.provider.requests == 2)
    summary = await tracker.get_usage_summary("u1")
    assert (summary.spent_usd, summary.reserved_usd) == (usd_from_nanousd(PRICE), usd_from_nanousd(BOUND))
    assert summary.remaining_usd == 5 - usd_from_nanousd(PRICE + BOUND)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    assert (await tracker.get_usage_summary("u1")).reserved_usd == 0


async def test_summary_of_a_user_asks_and_changes_nothing(calling: Calling, tracker: CostTracker) -> None:
    await tracker.get_usage_summary("u1")
    await tracker.check_budget("u1")
    assert await calling.events() == []


# Recorded spend, estimated cost -> whether it fits into the $5 of a trial.
FITS: list[tuple[str, Decimal | str | int, bool]] = [
    ("0", "5", True),
    ("0", "5.000000001", False),
    ("0", 5, True),
    ("4.5", "0.5", True),
    ("4.5", Decimal("0.5") + NANODOLLAR, False),
    ("4.999999999", 0, True),
    # Nothing is left: not even a call that costs next to nothing fits.
    ("5", 0, False),
    ("6", 0, False),
]


async def test_budget_is_checked_to_the_nanodollar(tracker: CostTracker) -> None:
    for number, (spent, estimate, fits) in enumerate(FITS):
        user = f"u{number}"
        await tracker.record_usage(user, spent)
        if fits:
            summary = await tracker.check_budget(user, estimated_cost_usd=estimate)
            assert summary.spent_usd == Decimal(spent)
        else:
            error = await refusal(tracker.check_budget(user, estimated_cost_usd=estimate))
            assert isinstance(error, PlanLimitReached)
            assert error.code is ErrorCode.PLAN_LIMIT_REACHED, (spent, estimate)
            assert not error.is_temporary
            assert error.data == {
                "cap_usd": 5,
                "spent_usd": Decimal(spent),
                "reserved_usd": 0,
                "estimated_cost_usd": Decimal(estimate),
                "is_temporary": False,
            }
            requested, settled = (usd_from_nanousd(nanousd_from_usd(usd)) for usd in (estimate, spent))
            assert error.message == (
                f"user {user}, period {period()}: a call of up to ${requested.quantize(MICRO, ROUND_UP)} does not fit "
                f"the cap of $5.00, of which ${settled.quantize(MICRO, ROUND_UP)} are spent and $0.000000 held by open "
                "calls"
            )


async def test_check_agrees_with_the_gate_about_a_cap_set_on_the_ledger(calling: Calling, tracker: CostTracker) -> None:
    await calling.set_cap(BOUND)
    summary = await tracker.check_budget("u1", "growth", estimated_cost_usd=usd_from_nanousd(BOUND))
    assert summary.cap_usd == usd_from_nanousd(BOUND)
    await refusal(tracker.check_budget("u1", "growth", estimated_cost_usd=usd_from_nanousd(BOUND + 1)))


async def test_recorded_spend_is_on_the_ledger_and_counts_for_the_next_call(
    calling: Calling, tracker: CostTracker
) -> None:
    assert await tracker.record_usage("u1", "1.5", model="openai/gpt-4o-mini", reason="batch job")
    event = (await calling.events())[0]
    assert (event.type, event.user_id, event.amount) == ("cost-recorded", "u1", 1_500_000_000)
    assert isinstance(event.payload, CostRecorded)
    assert (event.payload.basis, event.payload.outcome) == ("reported", "recorded")
    assert (event.payload.model, event.payload.reason) == ("openai/gpt-4o-mini", "batch job")
    await calling.set_cap(1_500_000_000 + BOUND - 1)
    error = await refusal(InferenceClient("generate_draft", calling.runtime).call(PROMPT, "u1"))
    assert error.code is ErrorCode.PLAN_LIMIT_REACHED
    await calling.folded()
    assert (await calling.query("SELECT spent_usd FROM spend"))[0]["spent_usd"] == Decimal("1.5")
    assert await calling.query("SELECT * FROM discrepancies") == []


async def test_spend_over_the_cap_is_recorded(tracker: CostTracker) -> None:
    # G3: it has been spent.
    await tracker.record_usage("u1", "7")
    summary = await tracker.get_usage_summary("u1")
    assert (summary.spent_usd, summary.remaining_usd) == (7, 0)


async def test_same_key_is_recorded_once(calling: Calling, tracker: CostTracker) -> None:
    # G4
    records = await asyncio.gather(*(tracker.record_usage("u1", "0.25", idempotency_key="job-1") for _ in range(5)))
    assert sorted(records) == [False] * 4 + [True]
    assert await calling.spent() == 250_000_000
    for changed in ({"cost_usd": "0.26"}, {"user_id": "u2"}, {"model": "m"}, {"reason": "other"}):
        arguments: dict[str, Any] = {"user_id": "u1", "cost_usd": "0.25", **changed}
        error = await refusal(tracker.record_usage(**arguments, idempotency_key="job-1"))
        assert isinstance(error, IdempotencyConflict)
        assert error.code is ErrorCode.IDEMPOTENCY_CONFLICT
        assert error.message == ("idempotency key job-1 was used before with other content; use a new idempotency key")
    assert await calling.spent() == 250_000_000


async def test_a_key_is_not_the_task_of_the_same_name(calling: Calling, tracker: CostTracker) -> None:
    """Whichever comes first: neither is taken for the other, and both are paid for."""
    client = InferenceClient("generate_draft", calling.runtime)
    first = await client.call(PROMPT, "u1", task_id="first")
    assert await tracker.record_usage("u1", "0.25", idempotency_key="first")
    assert await tracker.record_usage("u1", "0.25", idempotency_key="second")
    second = await client.call(PROMPT, "u1", task_id="second")
    assert (first.cost_usd, second.cost_usd) == (usd_from_nanousd(PRICE),) * 2
    assert await calling.spent() == 2 * PRICE + 2 * 250_000_000
    settled = [event.call_id for event in await calling.events() if isinstance(event.payload, CostRecorded)]
    assert settled == ["first", "usage first", "usage second", "second"]


async def test_spend_without_a_key_is_recorded_each_time(calling: Calling, tracker: CostTracker) -> None:
    for _ in range(3):
        assert await tracker.record_usage("u1", "0.25")
    assert await calling.spent() == 3 * 250_000_000


async def test_part_of_a_nanodollar_is_rounded_up(calling: Calling, tracker: CostTracker) -> None:
    await tracker.record_usage("u1", "0.0000000001")
    assert await calling.spent() == 1


async def test_amount_that_is_no_money_is_refused(calling: Calling, tracker: CostTracker) -> None:
    amounts: list[Any] = [0.1, True, None, "-1", "nan", "1e7", Decimal("Infinity"), "a lot"]
    for usd in amounts:
        for awaitable in (tracker.record_usage("u1", usd), tracker.check_budget("u1", estimated_cost_usd=usd)):
            assert isinstance(error := await refusal(awaitable), InvalidTask), usd
            assert error.code is ErrorCode.INVALID_TASK
    assert await calling.events() == []


async def test_unknown_plan_or_malformed_user_is_refused(calling: Calling, tracker: CostTracker) -> None:
    for user_id, plan in (("", "trial"), ('two "words"', "trial"), ("u1", "platinum")):
        for awaitable in (
            tracker.get_usage_summary(user_id, plan),
            tracker.check_budget(user_id, plan),
            tracker.record_usage(user_id, "1", plan=plan),
        ):
            assert isinstance(error := await refusal(awaitable), InvalidTask), (user_id, plan)
            assert error.code is ErrorCode.INVALID_TASK
    assert await calling.events() == []


async def test_malformed_idempotency_key_is_refused(calling: Calling, tracker: CostTracker) -> None:
    # An empty one above all: taken for none, it would make every repeat a new charge.
    for key in ("", 'two "words"', "x" * 201, "line\nbreak"):
        error = await refusal(tracker.record_usage("u1", "1", idempotency_key=key))
        assert isinstance(error, InvalidTask), key
        assert "'idempotency_key' " in error.message
    assert await calling.events() == []


async def test_further_budgets_are_charged_too(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path, day_cap_nanousd="2") as calling:
        await CostTracker(calling.runtime).record_usage("u1", "1.5")
        await calling.folded()
        rows = await calling.query("SELECT name, settled_usd FROM budgets ORDER BY name")
        assert [(row["name"], row["settled_usd"]) for row in rows] == [
            ("day", Decimal("1.5")),
            ("user", Decimal("1.5")),
        ]


async def test_ledger_that_cannot_be_asked_is_an_error_of_its_own(calling: Calling, tracker: CostTracker) -> None:
    # G8
    handle = calling.runtime.handle
    await handle.pipeline.execute("HSET", handle.keys[0].meta, "ledger_id", "another")
    for awaitable in (tracker.get_usage_summary("u1"), tracker.check_budget("u1"), tracker.record_usage("u1", 1)):
        assert isinstance(error := await refusal(awaitable), LedgerRefused)
        assert error.code is ErrorCode.LEDGER_UNAVAILABLE


async def test_recorded_spend_has_a_campaign_and_tags_and_raises_the_plans_alerts(
    calling: Calling, tracker: CostTracker
) -> None:
    budgets = [{"name": "team", "by": ["team", "campaign"], "window": "month", "cap_usd": 20}]
    policy = default_policy({"plans": {"trial": {"cap_usd": 5, "alerts": [0.5]}}, "budgets": budgets})
    await apply_policy(build_gates(calling.runtime.handle, calling.runtime.settings), policy, Signature("ops", "test"))
    given: dict[str, Any] = {"campaign_id": "spring", "tags": {"team": "a,b"}, "idempotency_key": "k"}
    assert await tracker.record_usage("u1", "2", **given)
    assert not await tracker.record_usage("u1", "2", **given)
    changes: list[dict[str, Any]] = [{"campaign_id": "autumn"}, {"tags": {"team": "red"}}, {"tags": None}]
    for changed in changes:
        with pytest.raises(IdempotencyConflict):
            await tracker.record_usage("u1", "2", **(given | changed))
    (charge,) = [each.payload for each in await calling.events() if isinstance(each.payload, CostRecorded)]
    assert (charge.plan, charge.campaign_id, charge.tags) == ("trial", "spring", {"team": "a,b"})
    assert [stamp.budget for stamp in charge.budgets] == [f"team:a%2Cb,spring:{period()}"]
    assert not await raised(calling)
    # The plan's cap, and then the one that the ledger has assigned.
    await tracker.record_usage("u1", "0.6")
    assert await raised(calling) == [(f"user:u1:{period()}", "0.5", 5 * NANOUSD_PER_USD)]
    await calling.set_cap(10 * NANOUSD_PER_USD, "u2")
    await tracker.record_usage("u2", "3")
    await tracker.record_usage("u2", "2")
    assert (await raised(calling))[1:] == [(f"user:u2:{period()}", "0.5", 10 * NANOUSD_PER_USD)]
    charged = (await calling.events())[-2].payload
    assert isinstance(charged, CostRecorded)
    assert charged.assigned_plan == "trial"
    with pytest.raises(InvalidTask, match="'tags' must not be named 'user'"):
        await tracker.record_usage("u1", "1", tags={"user": "u2"})


async def raised(calling: Calling) -> list[tuple[str, str, int]]:
    alerts = [each.payload for each in await calling.events() if isinstance(each.payload, AlertRaised)]
    return [(each.budget, each.fraction, each.cap_nanousd) for each in alerts]
