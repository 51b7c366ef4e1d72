"""Budgets by any attribute, from the policy file to the projection; prepaid credit; alerts."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling
from tests.system import run_cli
from tollbook.consumers.credit_expiry import CreditExpiry
from tollbook.inference.administration import Administration
from tollbook.inference.prepaid import Credit
from tollbook.inference.runtime import build_gates
from tollbook.ledger.errors import BudgetCreditTooLow, IdempotencyConflict
from tollbook.ledger.gate.requests import Waiting
from tollbook.ledger.signature import Signature
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus

PRICE = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
BOUND = PROMPT_BOUND * 3_750 + 2_000 * 15_000
SHOP = Signature("shop", "payment")


@asynccontextmanager
async def calling_with(server_url: str, directory: Path, policy: str) -> AsyncGenerator[Calling]:
    path = directory / "tollbook.toml"
    path.write_text(policy)
    async with open_calling(server_url, directory, policy_file=path) as calling:
        yield calling
        await calling.check_guarantees()


async def run(calling: Calling, call_id: str, **fields: Any) -> InferenceResult | Waiting:
    async with calling.runner() as (runner, _):
        reply = await runner.run(calling.call(call_id, **fields))
    assert isinstance(reply, InferenceResult | Waiting)
    return reply


async def status(calling: Calling, call_id: str, **fields: Any) -> TaskStatus:
    reply = await run(calling, call_id, **fields)
    assert isinstance(reply, InferenceResult)
    return reply.status


def dollars(nanousd: int) -> Decimal:
    return usd_from_nanousd(nanousd)


async def test_a_teams_week_is_kept_from_task_to_spend(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    policy = f"""
        [[budgets]]
        name = "team-week"
        by = ["team"]
        window = "week"
        cap_usd = "{dollars(BOUND + PRICE - 1)}"
        caps = {{ blue = "{dollars(BOUND + PRICE)}" }}
        alerts = [0.25, 1.0]
    """
    async with calling_with(server_url, tmp_path, policy) as calling:
        for team, expected in (("red", TaskStatus.DENIED), ("blue", TaskStatus.DONE)):
            assert await status(calling, f"{team}1", user_id=f"{team}-ann", tags={"team": team}) is TaskStatus.DONE
            assert await status(calling, f"{team}2", user_id=f"{team}-bob", tags={"team": team}) is expected
        # A call without the attribute is not held against the budget.
        assert await status(calling, "none", user_id="red-ann") is TaskStatus.DONE
        denied = await run(calling, "red2", user_id="red-bob", tags={"team": "red"})
        assert isinstance(denied, InferenceResult)
        assert denied.error_code is ErrorCode.PLAN_LIMIT_REACHED
        assert "budget team-week of red, week 20" in (denied.error or "")
        await calling.folded()
        rows = await calling.query(
            "SELECT value, cap_usd, spent_usd FROM budget_use WHERE name = 'team-week' ORDER BY value"
        )
        assert rows == [
            {"value": "blue", "cap_usd": dollars(BOUND + PRICE), "spent_usd": dollars(2 * PRICE)},
            {"value": "red", "cap_usd": dollars(BOUND + PRICE - 1), "spent_usd": dollars(PRICE)},
        ]
        alerts = await calling.query("SELECT value, fraction, call_id FROM alerts ORDER BY value, fraction")
        first = {"value": "red", "fraction": Decimal("0.2500"), "call_id": "red1"}
        refused = {"value": "red", "fraction": Decimal("1.0000"), "call_id": "red2"}
        reached = [row for row in alerts if row["value"] == "red"]
        assert reached == ([first, refused] if 4 * PRICE >= BOUND + PRICE - 1 else [refused])


async def test_several_budgets_are_all_or_nothing(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    policy = f"""
        timezone = "Europe/Berlin"
        [[budgets]]
        name = "everybody"
        window = "day"
        cap_usd = "{dollars(BOUND)}"
        [[budgets]]
        name = "by-model-and-plan"
        by = ["model", "plan"]
        window = "month"
        cap_usd = 100
    """
    async with calling_with(server_url, tmp_path, policy) as calling:
        assert await status(calling, "t1") is TaskStatus.DONE
        assert await status(calling, "t2", user_id="u2") is TaskStatus.DENIED
        await calling.folded()
        rows = await calling.query("SELECT name, value, held_usd, settled_usd FROM budgets ORDER BY name")
        assert [(row["name"], row["value"], row["settled_usd"]) for row in rows] == [
            ("by-model-and-plan", "anthropic/claude-sonnet-4,trial", dollars(PRICE)),
            ("everybody", "all", dollars(PRICE)),
            ("user", "u1", dollars(PRICE)),
        ]


PREPAID = """
    [[budgets]]
    name = "prepaid"
    by = ["customer"]
    window = "total"
    cap_usd = 0
    alerts = [0.5]
"""


async def test_a_prepaid_balance_lives_on_credit(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    acme = {"tags": {"customer": "acme"}}
    async with calling_with(server_url, tmp_path, PREPAID) as calling:
        prepaid = Administration(calling.runtime.ledger, calling.runtime.policies, calling.runtime.user_ids).prepaid
        assert await status(calling, "t1", **acme) is TaskStatus.DENIED
        payment = Credit("prepaid", "acme", "pay_1")
        granted = await prepaid.grant(payment, BOUND, SHOP)
        assert (granted.is_new, granted.change_nanousd) == (True, BOUND)
        assert not (await prepaid.grant(payment, BOUND, Signature("shop", "repeated by the provider"))).is_new
        with pytest.raises(IdempotencyConflict):
            await prepaid.grant(payment, BOUND + 1, SHOP)
        assert await status(calling, "t2", **acme) is TaskStatus.DONE
        assert await status(calling, "t3", **acme) is TaskStatus.DENIED
        assert await status(calling, "other", tags={"customer": "other"}) is TaskStatus.DENIED
        with pytest.raises(BudgetCreditTooLow):
            await prepaid.revoke(payment, SHOP, amount_nanousd=BOUND - PRICE + 1)
        revoked = await prepaid.revoke(payment, SHOP)
        assert revoked.change_nanousd == PRICE - BOUND
        await calling.folded()
        rows = await calling.query("SELECT cap_usd, credit_usd, spent_usd FROM budget_use WHERE value = 'acme'")
        assert rows == [{"cap_usd": dollars(PRICE), "credit_usd": dollars(PRICE), "spent_usd": dollars(PRICE)}]


async def test_what_is_left_of_a_credit_expires(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    acme = {"tags": {"customer": "acme"}}
    async with calling_with(server_url, tmp_path, PREPAID) as calling:
        runtime = calling.runtime
        prepaid = Administration(runtime.ledger, runtime.policies, runtime.user_ids).prepaid
        gates = build_gates(runtime.handle, runtime.settings)
        expiry = CreditExpiry(gates, runtime.policies, lambda: calling.store)
        now_ms = await gates[0].now_ms()
        await prepaid.grant(Credit("prepaid", "acme", "later", now_ms + 3_600_000), 5 * BOUND, SHOP)
        await prepaid.grant(Credit("prepaid", "acme", "never"), 3 * BOUND, SHOP)
        await prepaid.grant(Credit("prepaid", "acme", "soon", now_ms - 1), 2 * BOUND, SHOP)
        assert await status(calling, "t1", **acme) is TaskStatus.DONE
        await calling.folded()
        assert await expiry.expire_due() == 1
        assert await expiry.expire_due() == 0
        await calling.folded()
        assert await expiry.expire_due() == 0
        rows = await calling.query("SELECT credit, granted_usd, expired_usd FROM credits ORDER BY credit")
        assert [(row["credit"], row["expired_usd"]) for row in rows] == [
            ("later", Decimal(0)),
            ("never", Decimal(0)),
            # The call was paid by the credit that expires first.
            ("soon", dollars(2 * BOUND - PRICE)),
        ]
        (left,) = await calling.query("SELECT cap_usd - spent_usd AS usd FROM budget_use WHERE value = 'acme'")
        assert left["usd"] == dollars(8 * BOUND)


@pytest.mark.slow
async def test_an_expiry_whose_id_is_taken_keeps_no_other_credit(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """Before task ids were refused that look like it, a publisher could take the id."""
    async with calling_with(server_url, tmp_path, PREPAID) as calling:
        runtime = calling.runtime
        prepaid = Administration(runtime.ledger, runtime.policies, runtime.user_ids).prepaid
        gates = build_gates(runtime.handle, runtime.settings)
        expiry = CreditExpiry(gates, runtime.policies, lambda: calling.store)
        now_ms = await gates[0].now_ms()
        await prepaid.grant(Credit("prepaid", "globex", "taken", now_ms - 2), 5 * BOUND, SHOP)
        await prepaid.grant(Credit("prepaid", "globex", "not taken", now_ms - 1), 2 * BOUND, SHOP)
        keys = runtime.handle.keys[0]
        record = await runtime.handle.redis.get(keys.call("credit taken"))
        await runtime.handle.redis.set(keys.call("credit-expired taken"), record or b"")
        await calling.folded()
        await expiry.expire_due()
        await calling.folded()
        assert await expiry.expire_due() == 0
        rows = await calling.query("SELECT credit, expired_usd FROM credits WHERE value = 'globex' ORDER BY credit")
        assert [tuple(row.values()) for row in rows] == [("not taken", dollars(2 * BOUND)), ("taken", Decimal(0))]


async def test_a_credit_may_have_an_id_with_spaces(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with calling_with(server_url, tmp_path, PREPAID) as calling:
        runtime = calling.runtime
        prepaid = Administration(runtime.ledger, runtime.policies, runtime.user_ids).prepaid
        for credit_id in ("invoice 1043", "invoice 1 2 3", "invoice"):
            await prepaid.grant(Credit("prepaid", "initech", credit_id), BOUND, SHOP)
        assert (await prepaid.revoke(Credit("prepaid", "initech", "invoice 1 2 3"), SHOP)).change_nanousd == -BOUND
        with pytest.raises(BudgetCreditTooLow):
            await prepaid.revoke(Credit("prepaid", "initech", "invoice 1043"), SHOP, amount_nanousd=BOUND + 1)


@pytest.mark.slow
async def test_commands_know_budgets_credits_and_alerts(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    policy = PREPAID.replace("alerts = [0.5]", "alerts = [0.0001]")
    acme = {"tags": {"customer": "acme"}}
    (tmp_path / "tollbook.toml").write_text(policy)
    env = {"REDIS_URL": server_url, "TOLLBOOK_DATA_DIR": str(tmp_path / "data")}

    async def cli(*arguments: str) -> Any:
        return await run_cli(*arguments, cwd=tmp_path, env=env)

    async with open_calling(server_url, tmp_path, is_served=True, policy_file=tmp_path / "tollbook.toml") as calling:
        grant = ("credit", "grant", "--budget", "prepaid", "--value", "acme", "--usd", "5", "--id", "pay_1")
        granted = await cli(*grant)
        assert (granted.stdout, granted.stderr) == ("budget prepaid of acme has $5.00 more\n", "")
        assert (await cli(*grant, "--expires", "2099-01-01")).code == 1
        assert (await cli(*grant, "--json")).json()["is_new"] is False
        assert await status(calling, "t1", **acme) is TaskStatus.DONE
        revoke = ("credit", "revoke", "--budget", "prepaid", "--value", "acme", "--id", "pay_1", "--usd", "1")
        assert (await cli(*revoke)).stdout == "budget prepaid of acme has $1.00 less\n"
        await calling.folded()
        (budget,) = (await cli("spend", "--budgets", "--json")).json()
        assert (budget["name"], budget["value"], Decimal(budget["cap_usd"])) == ("prepaid", "acme", 4)
        assert Decimal(budget["spent_usd"]) == dollars(PRICE)
        assert "prepaid" in (await cli("spend", "--budgets")).stdout
        listed = await cli("alerts", "list", "--budget", "prepaid", "--json")
        assert listed.stderr == ""
        (alert,) = listed.json()
        assert (alert["value"], alert["call_id"]) == ("acme", "t1")
        assert "budget prepaid of acme, in total" in (await cli("alerts", "list")).stdout
        (credit,) = (await cli("credit", "list", "--budget", "prepaid", "--json")).json()
        assert (credit["credit"], Decimal(credit["revoked_usd"])) == ("pay_1", 1)
        for wrong, word in (
            (["--budget", "prepayd", "--value", "acme", "--usd", "5", "--id", "x"], "did you mean 'prepaid'"),
            (["--budget", "prepaid", "--usd", "5", "--id", "x"], "give a value"),
            (["--budget", "prepaid", "--value", "acme", "--usd", "5"], "--id"),
            (
                ["--budget", "prepaid", "--value", "acme", "--usd", "5", "--id", "x", "--expires", "2020-01-01"],
                "--expires: 2020-01-01 is in the past: a credit must expire later",
            ),
            (["u1", "5", "--budget", "prepaid", "--id", "x"], "cannot be combined with --budget"),
            (["u1", "5", "--reason", "r", "--id", "x"], "only with --budget"),
            (["u1", "5"], "--reason"),
        ):
            refused = await run_cli("credit", "grant", *wrong, cwd=tmp_path, env=env)
            assert refused.code == 2
            assert word in refused.stderr
        # A command that is repeated after the credit's end has nothing to do.
        over = Credit("prepaid", "acme", "over", int(datetime(2020, 1, 1, tzinfo=UTC).timestamp() * 1000))
        administration = Administration(calling.runtime.ledger, calling.runtime.policies, calling.runtime.user_ids)
        await administration.prepaid.grant(over, 5_000_000_000, SHOP)
        assert (await cli(*grant[:-1], "over", "--expires", "2020-01-01", "--json")).json()["is_new"] is False
