"""`policy apply --backfill`: budgets that begin with what was spent before in their window."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.calling import Calling, open_calling, period
from tests.integration.test_policies import LIMITS, ME, findings, open_gates, run, versions
from tollbook.audit.calls import find_call
from tollbook.audit.explanations import explain
from tollbook.audit.opening_balances import spent_reader
from tollbook.audit.reader import AuditReader
from tollbook.inference.calls.call import Call
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.runner import CallTakenOver
from tollbook.inference.current_policy import policy_in_force
from tollbook.inference.opening_balances import OpeningTally, ReadSpent, SpentRow
from tollbook.inference.policy_changes import PolicyRefused, apply_policy, remarks_on, start_policy
from tollbook.inference.runtime import build_gates
from tollbook.inference.settings import load_settings
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.gate.policies import EventsNotCounted, Opened, Opening, OpeningHold, PolicyRequest
from tollbook.ledger.gate.requests import AdjustRequest, Baseline, ChargeRequest, OpenCall, Position
from tollbook.schemas.events import (
    BudgetOpened,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    PolicyApplied,
    payload_json,
)
from tollbook.schemas.identifiers import budget_name, partition_of
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.policy import default_policy
from tollbook.schemas.results import TaskStatus

TEAM: Final = {"name": "team", "by": ["team", "plan"], "window": "week", "cap_usd": 20}


@pytest.fixture(autouse=True)
def _is_empty(redis_client: Redis) -> None:
    """Begin with an empty server."""


def reader_of(calling: Calling) -> ReadSpent:
    handle = calling.runtime.handle
    return spent_reader(LedgerSource(handle.ledger_id, tuple(handle.keys), None, handle.redis))


async def backfill(calling: Calling, *budgets: dict[str, Any], read: ReadSpent | None = None) -> None:
    gates = build_gates(calling.runtime.handle, calling.runtime.settings)
    policy = default_policy({"budgets": list(budgets)})
    await apply_policy(gates, policy, ME, read_spent=read or reader_of(calling), backfills=True)


async def opened(calling: Calling) -> dict[str, int]:
    return {
        event.payload.budgets[0].budget: event.amount
        for event in await calling.events()
        if isinstance(event.payload, BudgetOpened)
    }


async def costs(calling: Calling) -> dict[str, int]:
    await calling.folded()
    return {
        row["call_id"]: int(row["cost_usd"].scaleb(9))
        for row in await calling.query("SELECT call_id, cost_usd FROM calls")
    }


async def test_a_new_budget_begins_with_what_was_spent_in_its_window(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await apply_policy(build_gates(calling.runtime.handle, calling.runtime.settings), default_policy(), ME)
        for call_id, team in (("one", "red"), ("two", "red"), ("three", "a%,:b"), ("four", None)):
            await run(calling, call_id, **({"tags": {"team": team}} if team else {}))
        before = await costs(calling)
        total = {"name": "ever", "window": "total", "cap_usd": 9}
        await backfill(calling, TEAM, total)

        begun = await opened(calling)
        by_value = {key.rsplit(":", 1)[0]: amount for key, amount in begun.items()}
        assert by_value == {
            "team~2:red,trial": before["one"] + before["two"],
            "team~2:a%25%2C:b,trial": before["three"],
            "ever~2:all": sum(before.values()),
        }
        # The decision, DuckDB, and the events one by one have the same balance.
        await run(calling, "five", tags={"team": "red"})
        cost = (await costs(calling))["five"]
        rows = await calling.query("SELECT name, value, settled_usd, cap_usd FROM budgets WHERE name <> 'user'")
        settled = {f"{row['name']}:{row['value']}": int(row["settled_usd"].scaleb(9)) for row in rows}
        assert settled["team~2:red,trial"] == before["one"] + before["two"] + cost
        assert settled["ever~2:all"] == sum(before.values()) + cost
        assert {row["cap_usd"] for row in rows} == {20, 9}
        await calling.check_guarantees()
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_a_cap_that_is_used_up_by_what_was_spent_before_refuses(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await apply_policy(build_gates(calling.runtime.handle, calling.runtime.settings), default_policy(), ME)
        await run(calling, "one", tags={"team": "red"})
        await backfill(calling, TEAM | {"cap_usd": "0.0001"})
        assert (await run(calling, "two", tags={"team": "red"})).status is TaskStatus.DENIED
        free = default_policy(
            {
                "budgets": [TEAM | {"cap_usd": "0.0001"}],
                "prices": {"openai/gpt-4o-mini": {"prompt": 0, "completion": 0}},
            }
        )
        await apply_policy(build_gates(calling.runtime.handle, calling.runtime.settings), free, ME)
        # G9, also for those who audit it: what costs nothing is held although the cap is passed.
        done = await run(calling, "three", tags={"team": "red"}, model="openai/gpt-4o-mini")
        assert done.status is TaskStatus.DONE
        await calling.check_guarantees()
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_what_is_booked_while_it_is_counted_is_counted_too(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await apply_policy(build_gates(calling.runtime.handle, calling.runtime.settings), default_policy(), ME)
        await run(calling, "one", tags={"team": "red"})
        read, reads = reader_of(calling), list[Position | None]()

        async def read_and_spend(partition: int, tally: OpeningTally, after: Position | None) -> Position:
            reads.append(after)
            counted = await read(partition, tally, after)
            if len(reads) == 1:
                await run(calling, "two", tags={"team": "red"})
            return counted

        await backfill(calling, TEAM, read=read_and_spend)
        before = await costs(calling)
        assert sum((await opened(calling)).values()) == before["one"] + before["two"]
        assert len(reads) == 2
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_a_budget_that_only_gets_another_cap_keeps_its_balance(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await backfill(calling, TEAM)
        await run(calling, "one", tags={"team": "red"})
        await backfill(calling, TEAM | {"cap_usd": 30})
        assert await opened(calling) == {}
        await backfill(calling, TEAM | {"window": "month"})
        assert await opened(calling) == {
            budget_name("team~3", "red,trial", period()): (await costs(calling))["one"],
        }
        assert await findings(calling, tmp_path) == []


async def test_a_backfill_of_budgets_already_in_force_is_refused(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        gates = build_gates(calling.runtime.handle, calling.runtime.settings)
        await apply_policy(gates, default_policy({"budgets": [TEAM]}), ME)
        await run(calling, "one", tags={"team": "red"})
        with pytest.raises(PolicyRefused, match=r"already in force .* add it under another name"):
            await backfill(calling, TEAM)
        assert await opened(calling) == {}
        renamed = TEAM | {"name": "squad"}
        for _ in range(2):  # A repeat finds it done.
            await backfill(calling, renamed)
        assert sum((await opened(calling)).values()) == (await costs(calling))["one"]
        applied = [each.payload for each in await calling.events() if isinstance(each.payload, PolicyApplied)]
        assert applied[-1].version == len(applied)
        before, more = (
            policy_in_force(await gates[0].policy()),
            default_policy({"budgets": [renamed | {"cap_usd": 30}]}),
        )
        prices = calling.runtime.policies.newest.prices
        (remark,) = [
            each for each in remarks_on(before, more, 0, prices=prices, backfills=True) if "--backfill" in each
        ]
        assert remark == "no budget is new or defined anew, so --backfill counts nothing"


@pytest.mark.slow
async def test_verify_counts_again_what_a_budget_began_with(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await apply_policy(build_gates(calling.runtime.handle, calling.runtime.settings), default_policy(), ME)
        await run(calling, "one", tags={"team": "red"})
        await backfill(calling, TEAM)
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        entries = await calling.raw_events()
        await redis.delete(key.ledger)
        for entry_id, fields in entries:
            changed = dict(fields)
            if fields[b"type"] == b"budget-opened":
                payload = json.loads(fields[b"payload"])
                payload["budgets"][0]["committed_nanousd"] = 5
                changed |= {b"amount": b"5", b"payload": json.dumps(payload).encode()}
            await redis.xadd(key.ledger, changed, id=entry_id)  # pyright: ignore[reportArgumentType]
        found = await findings(calling, tmp_path)
        assert [each for each in found if "begins with 5 nano-dollars by policy 2, the events before give" in each]


async def charge(gates: list[Any], user_id: str, key: str, nanousd: int) -> None:
    own = budget_name("user", user_id, period())
    payload = payload_json(CostRecorded(basis="reported", outcome="recorded", plan="trial", tags={"team": "red"}))
    gate = gates[partition_of(user_id, len(gates))]
    await gate.charge(
        ChargeRequest(
            call_id=key, user_id=user_id, period=period(), content_hash="c", cost_nanousd=nanousd, assumed_nanousd=0,
            payload=payload, budgets=(own,),
        ),
        (Baseline(0, 0, Position()),),
    )  # fmt: skip


async def test_a_change_that_ended_half_way_is_completed_with_what_was_spent(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    users = ["u1", next(f"u{n}" for n in range(2, 99) if partition_of(f"u{n}", 2) != partition_of("u1", 2))]
    policy = default_policy({"budgets": [TEAM | {"by": ["user", "team"], "window": "month"}]})
    async with open_gates(redis_client, 2) as gates:
        read = spent_reader(LedgerSource("ledger-1", tuple(gate.keys for gate in gates), None, redis_client))
        await apply_policy(gates, default_policy(), ME)
        for user_id in users:
            await charge(gates, user_id, f"{user_id}-1", 700)
        await apply_policy(gates[:1], policy, ME, read_spent=read, backfills=True)
        assert await versions(gates) == [2, 1]
        # What is spent in the other partition until then is spent before.
        behind = next(user for user in users if partition_of(user, 2) == 1)
        await charge(gates, behind, "later", 40)
        with pytest.raises(PolicyRefused, match="policy 2 begins with what was spent before"):
            await apply_policy(gates, policy, ME)
        settings = load_settings(env_file=None, redis_url=server_url, data_dir=tmp_path, namespace="policies")
        await start_policy(settings, gates, "tollbook up", read_spent=read)
        assert await versions(gates) == [2, 2]
        amounts: dict[str, int] = {}
        for gate in gates:
            entries: Any = await redis_client.xrange(gate.keys.ledger)
            for _, fields in entries:
                if fields[b"type"] == b"budget-opened":
                    (stamp,) = json.loads(fields[b"payload"])["budgets"]
                    amounts[stamp["budget"].split(":")[1]] = int(fields[b"amount"])
        assert amounts == {f"{user},red": 740 if user == behind else 700 for user in users}


async def test_a_window_that_ended_during_the_count_is_counted_again(redis_client: Redis) -> None:
    async with open_gates(redis_client, 1) as gates:
        (gate,) = gates
        request = PolicyRequest(in_force=0, version=1, digest="d", payload="{}", opened=Opened((), 0, 1))
        with pytest.raises(EventsNotCounted):
            await gate.apply_policy(request)
        await gate.apply_policy(replace(request, opened=Opened((), 0, 2**45)))
        assert await versions(gates) == [1]


def test_a_cost_counts_in_the_window_and_by_the_attributes_of_its_hold() -> None:
    policy = default_policy({"budgets": [{"name": "day", "by": ["user"], "window": "day", "cap_usd": 1}]})
    hour = 3_600_000
    tally = OpeningTally(policy, {}, ["day"], 30 * hour, takes_holds=True)
    hold = json.dumps({"hold": 1, "plan": "trial", "task_type": "t", "bound": {"model": "m"}})
    more = json.dumps({"hold": 1, "plan": "trial", "task_type": "t", "kind": "extension", "bound": {"model": "n"}})
    cost = json.dumps({"hold": 1})
    tally.add(
        [
            SpentRow(23 * hour, "budget-reserved", "u1", "yesterday", 5, hold),
            SpentRow(25 * hour, "cost-recorded", "u1", "yesterday", 4, cost),
            SpentRow(25 * hour, "budget-reserved", "u1", "today", 50, hold),
            SpentRow(25 * hour, "budget-reserved", "u1", "today", 20, more),
            SpentRow(26 * hour, "cost-recorded", "u1", "today", 40, cost),
            SpentRow(27 * hour, "cost-adjusted", "u1", "today", -9, cost),
            SpentRow(28 * hour, "budget-reserved", "u1", "open", 600, hold),
            SpentRow(28 * hour, "cost-recorded", "u2", "usage", 7, json.dumps({"plan": "trial"})),
        ]
    )
    assert {each.budget: each.spent_nanousd for each in tally.openings()} == {
        "day:u1:1970-01-02": 31,
        "day:u2:1970-01-02": 7,
    }
    assert [each.holds for each in tally.openings()] == [(OpeningHold("open", 1, 600),), ()]


async def held(calling: Calling, call_id: str, **fields: Any) -> tuple[Call, Hold]:
    call = calling.call(call_id, run_id=call_id, tags={"team": "red"}, **fields)
    acquired = await calling.runtime.reservations.acquire(call, LIMITS)
    assert acquired.hold is not None
    return acquired.call, acquired.hold


async def team_balance(calling: Calling) -> tuple[int, int]:
    await calling.folded()
    (row,) = await calling.query("SELECT settled_usd, held_usd FROM budgets WHERE name LIKE 'team%'")
    return int(row["settled_usd"].scaleb(9)), int(row["held_usd"].scaleb(9))


async def begin_without_budgets(calling: Calling) -> None:
    await apply_policy(build_gates(calling.runtime.handle, calling.runtime.settings), default_policy(), ME)


async def test_a_call_that_is_open_counts_in_a_new_budget_until_and_after_it_is_settled(
    server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await begin_without_budgets(calling)
        await run(calling, "one", tags={"team": "red"})
        before = (await costs(calling))["one"]
        call, hold = await held(calling, "two")
        await run(calling, "other", tags={"team": "blue"})
        # There is room for what was spent and for the open call, and for no other call beside it.
        room = before + hold.amount_nanousd + 1
        await backfill(calling, TEAM | {"by": ["team"], "caps": {"red": str(usd_from_nanousd(room))}})
        assert (await run(calling, "three", tags={"team": "red"})).status is TaskStatus.DENIED
        assert await findings(calling, tmp_path) == []
        await calling.runtime.runner.run(call, hold)
        cost = (await costs(calling))["two"]
        rows = await calling.query("SELECT value, settled_usd, held_usd FROM budgets WHERE name = 'team~2'")
        red = next(row for row in rows if row["value"] == "red")
        assert (int(red["settled_usd"].scaleb(9)), red["held_usd"]) == (before + cost, 0)
        await calling.check_guarantees()
        assert await findings(calling, tmp_path) == []


async def test_a_budget_may_be_opened_in_which_more_is_held_than_its_cap(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await begin_without_budgets(calling)
        call, hold = await held(calling, "one")
        await backfill(calling, TEAM | {"cap_usd": str(usd_from_nanousd(hold.amount_nanousd - 1))})
        assert await team_balance(calling) == (0, hold.amount_nanousd)
        assert (await run(calling, "two", tags={"team": "red"})).status is TaskStatus.DENIED
        assert await findings(calling, tmp_path) == []
        await calling.runtime.runner.run(call, hold)
        await calling.check_guarantees()
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_an_open_call_is_extended_corrected_and_refunded_in_the_budget_that_was_opened(
    server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path, retries=0) as calling:
        await begin_without_budgets(calling)
        call, hold = await held(calling, "one")
        await backfill(calling, TEAM)
        assert await team_balance(calling) == (0, hold.amount_nanousd)
        calling.script("hang_charged", None)
        result = await calling.runtime.runner.run(call, hold)
        assert result.status is TaskStatus.DONE
        extension = next(
            each for each in await calling.events("one") if getattr(each.payload, "kind", None) == "extension"
        )
        assert isinstance(extension.payload, BudgetReserved)
        assert [stamp.budget.split(":")[0] for stamp in extension.payload.budgets] == ["team~2"]
        spent = await calling.spent()
        assert await team_balance(calling) == (spent, 0)
        # A caller that knows the budgets of the hold as it was opened corrects it everywhere all the same.
        own = budget_name("user", "u1", period())
        for cost in (spent + 70, spent // 2):
            adjusted = CostAdjusted(basis="reported", reason="generation_looked_up", author="reconcile")
            await calling.runtime.ledger.adjust(
                AdjustRequest(
                    call_id="one", user_id="u1", hold=1, cost_nanousd=cost, assumed_nanousd=0, attempt=2,
                    payload=payload_json(adjusted), budgets=(own,),
                )
            )  # fmt: skip
            assert await team_balance(calling) == (cost, 0)
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_an_open_call_is_not_extended_beyond_the_cap_of_the_budget_that_was_opened(
    server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path, retries=0) as calling:
        await begin_without_budgets(calling)
        call, hold = await held(calling, "one")
        await backfill(calling, TEAM | {"cap_usd": str(usd_from_nanousd(hold.amount_nanousd))})
        calling.script("hang_charged", None)
        result = await calling.runtime.runner.run(call, hold)
        assert result.status is TaskStatus.FAILED
        assert "more do not fit the cap" in str(result.error)
        assert calling.provider.requests == 1
        await calling.check_guarantees(is_exact=False)
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_the_hold_of_a_dead_run_and_its_late_answer_count_in_the_budget_that_was_opened(
    server_url: str, tmp_path: Path
) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await begin_without_budgets(calling)
        call, hold = await held(calling, "one")
        await backfill(calling, TEAM)
        again = calling.call("one", run_id="later", tags={"team": "red"})
        found = await calling.runtime.reservations.reserve(again)
        assert isinstance(found, OpenCall)
        await calling.runtime.reservations.take_over(again, found, give_up="enough")
        settled, open_now = await team_balance(calling)
        assert (settled, open_now) == (await calling.spent(), 0)
        with contextlib.suppress(CallTakenOver):
            await calling.runtime.runner.run(call, hold)
        assert await calling.spent() == calling.booked()
        assert await team_balance(calling) == (calling.booked(), 0)
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_a_charge_that_was_settled_before_keeps_its_amount_in_a_new_budget(
    server_url: str, tmp_path: Path
) -> None:
    """The hold was assumed at its bound: what it is corrected to later is less."""
    async with open_calling(server_url, tmp_path) as calling:
        await begin_without_budgets(calling)
        call, hold = await held(calling, "one")
        again = calling.call("one", run_id="later", tags={"team": "red"})
        found = await calling.runtime.reservations.reserve(again)
        assert isinstance(found, OpenCall)
        await calling.runtime.reservations.take_over(again, found, give_up="enough")
        assumed = await calling.spent()
        await backfill(calling, TEAM)
        with contextlib.suppress(CallTakenOver):
            await calling.runtime.runner.run(call, hold)
        assert await calling.spent() < assumed
        assert await team_balance(calling) == (assumed, 0)
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_openings_of_earlier_versions_have_no_holds_and_are_verified(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await begin_without_budgets(calling)
        await run(calling, "one", tags={"team": "red"})
        call, hold = await held(calling, "two")
        spent, policy = await calling.spent(), default_policy({"budgets": [TEAM | {"window": "month"}]})
        applied = PolicyApplied(
            version=2, digest=policy.digest, content=policy.content(), definitions={"team": 2}, backfilled=("team",),
            author="ops", reason="asked",
        )  # fmt: skip
        opening = Opening(budget_name("team~2", "red,trial", period()), spent, 20_000_000_000)
        (gate,) = build_gates(calling.runtime.handle, calling.runtime.settings)
        await gate.apply_policy(
            PolicyRequest(
                in_force=1, version=2, digest=applied.digest, payload=payload_json(applied), opened=Opened((opening,))
            )
        )
        await calling.runtime.runner.run(call, hold)
        assert await team_balance(calling) == (spent, 0)
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"hold_nanousd": 5, "holds": [{"call_id": "one", "hold": 1, "amount_nanousd": 5}]},
            "begins with holds of 5 nano-dollars by policy 2, the events before give",
        ),
        ({"hold_nanousd": 0, "holds": []}, "begins with holds of 0 nano-dollars by policy 2, the events before give"),
        ({"holds": []}, "begins with 0 holds by policy 2, the events before give 1 others"),
    ],
)
async def test_verify_finds_the_holds_that_a_budget_began_with(
    server_url: str, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await begin_without_budgets(calling)
        await held(calling, "one")
        await backfill(calling, TEAM)
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        entries = await calling.raw_events()
        await redis.delete(key.ledger)
        for entry_id, fields in entries:
            changed = dict(fields)
            if fields[b"type"] == b"budget-opened":
                payload = json.loads(fields[b"payload"]) | change
                payload["budgets"][0]["committed_nanousd"] = payload["hold_nanousd"]
                changed[b"payload"] = json.dumps(payload).encode()
            await redis.xadd(key.ledger, changed, id=entry_id)  # pyright: ignore[reportArgumentType]
        assert [each for each in await findings(calling, tmp_path) if problem in each]


async def test_explain_names_the_open_calls_that_a_budget_began_with(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await begin_without_budgets(calling)
        _, hold = await held(calling, "one")
        await backfill(calling, TEAM | {"cap_usd": str(usd_from_nanousd(hold.amount_nanousd))})
        assert (await run(calling, "two", tags={"team": "red"})).status is TaskStatus.DENIED
        handle = calling.runtime.handle
        reader = AuditReader(LedgerSource(handle.ledger_id, tuple(handle.keys), None, handle.redis))
        try:
            (life,) = await find_call(reader, "two")
            (decision,) = await explain(reader, life)
        finally:
            reader.close()
        (weighing,) = decision.weighings  # The budget that refused.
        assert weighing.is_agreed
        assert [(other.call_id, other.amount_nanousd) for other in weighing.others] == [("one", hold.amount_nanousd)]
