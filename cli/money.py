"""`tollbook plan set`, `credit grant` and `cost adjust`: changes by people, with author and reason."""

import asyncio
import getpass
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.schemas.identifiers import check_id
from tollbook.schemas.money import MoneyError, format_usd, nanousd_from_usd
from tollbook.schemas.plans import Plan

if TYPE_CHECKING:
    from tollbook.inference.administration import Administration, Signature

plan_app = typer.Typer(name="plan", help="Users' plans.", no_args_is_help=True)
credit_app = typer.Typer(name="credit", help="Room above a cap.", no_args_is_help=True)
cost_app = typer.Typer(name="cost", help="Corrections of costs.", no_args_is_help=True)

User = Annotated[str, typer.Argument(help="User id.")]
Reason = Annotated[str, typer.Option(help="Why; stands on the ledger.")]
Author = Annotated[str | None, typer.Option(help="Who; your login name by default.")]
Key = Annotated[str | None, typer.Option(help="Idempotency key: the same key and content is done once.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@plan_app.command("set")
def set_plan(
    user: User,
    plan: Annotated[Plan, typer.Argument(help="The plan from now on.")],
    reason: Reason,
    cap: Annotated[str | None, typer.Option(help="Cap of a period in dollars, instead of the plan's.")] = None,
    author: Author = None,
    key: Key = None,
    as_json: Json = False,
) -> int:
    """Put a user on a plan; whatever plan their tasks name, this one counts from now on.

    Example: tollbook plan set u42 growth --reason "upgraded, invoice 1043"
    """
    user = _user(user)
    cap_nanousd = None if cap is None else _amount(cap, "--cap")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        is_new = await administration.set_plan(user, plan, signature, cap_nanousd=cap_nanousd)
        return {"user_id": user, "plan": plan.value, "is_new": is_new}

    done = _run(run, author, reason, key)
    return _show(done, f"{user} is on plan {plan.value}", as_json=as_json)


@credit_app.command("grant")
def grant_credit(
    user: User,
    amount: Annotated[str, typer.Argument(help="Dollars, for example 2.50.")],
    reason: Reason,
    period: Annotated[str | None, typer.Option(help="Billing period, YYYY-MM; the present one by default.")] = None,
    author: Author = None,
    key: Key = None,
    as_json: Json = False,
) -> int:
    """Give a user room above the cap for one billing period.

    Example: tollbook credit grant u42 2.50 --reason "sorry for the outage" --key outage-2026-11
    """
    from tollbook.cli.spend import check_period

    user, amount_nanousd = _user(user), _amount(amount, "amount")
    if amount_nanousd == 0:
        raise typer.BadParameter("a credit is more than nothing", param_hint="amount")
    chosen = None if period is None else check_period(period)

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        is_new = await administration.grant_credit(user, amount_nanousd, signature, period=chosen)
        return {"user_id": user, "amount_nanousd": amount_nanousd, "is_new": is_new}

    done = _run(run, author, reason, key)
    return _show(done, f"{user} has {format_usd(amount_nanousd)} of credit more", as_json=as_json)


@cost_app.command("adjust")
def adjust_cost(
    call: Annotated[str, typer.Argument(help="Call id, which is the task's id.")],
    cost: Annotated[str, typer.Argument(help="What the call really cost in all, in dollars.")],
    reason: Reason,
    author: Author = None,
    as_json: Json = False,
) -> int:
    """Correct what a call cost to the amount given. Repeating it changes nothing.

    Example: tollbook cost adjust 5f1c0e0e 0.0125 --reason "provider's invoice of November"
    """
    cost_nanousd = _amount(cost, "cost")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        done = await administration.adjust_cost(call, cost_nanousd, signature)
        return {
            "call_id": call,
            "user_id": done.user_id,
            "before_nanousd": done.before_nanousd,
            "after_nanousd": done.after_nanousd,
            "is_new": done.before_nanousd != done.after_nanousd,
        }

    done = _run(run, author, reason, None)
    change = f"{format_usd(done['before_nanousd'], places=6)} -> {format_usd(cost_nanousd, places=6)}"
    return _show(done, f"{call} of {done['user_id']}: {change}", as_json=as_json)


def _run(
    command: "Callable[[Administration, Signature], Awaitable[dict[str, Any]]]",
    author: str | None,
    reason: str,
    key: str | None,
) -> dict[str, Any]:
    from tollbook.inference.administration import Administration, Signature
    from tollbook.inference.current_runtime import connect_runtime, using_runtime

    if not reason.strip():
        raise typer.BadParameter("say why", param_hint="--reason")
    if key is not None:
        _checked(key, "--key")
    signature = Signature(author or getpass.getuser(), reason.strip()[:500], key)

    async def connect() -> dict[str, Any]:
        async with connect_runtime(), using_runtime() as runtime:
            return await command(Administration(runtime), signature)

    return asyncio.run(connect())


def _show(done: dict[str, Any], text: str, *, as_json: bool) -> int:
    if as_json:
        typer.echo(json.dumps(done))
    else:
        typer.echo(text if done["is_new"] else f"nothing to do: {text}")
    return 0


def _user(user: str) -> str:
    return _checked(user, "user")


def _checked(value: str, hint: str) -> str:
    try:
        return check_id(value)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=hint) from None


def _amount(dollars: str, hint: str) -> int:
    try:
        return nanousd_from_usd(dollars)
    except MoneyError as exc:
        raise typer.BadParameter(str(exc), param_hint=hint) from None
