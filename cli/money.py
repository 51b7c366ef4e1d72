"""`tollbook plan set`, `credit grant` and `cost adjust`: changes by people, with author and reason."""

import asyncio
import getpass
import json
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tollbook.cli.options import JsonOption, check_id, check_usd, load_redis_alone
from tollbook.schemas.money import format_usd
from tollbook.schemas.plans import Plan

if TYPE_CHECKING:
    from tollbook.inference.administration import Administration, Signature

plan_app = typer.Typer(help="Users' plans.", no_args_is_help=True)
credit_app = typer.Typer(help="Credit above the cap.", no_args_is_help=True)
cost_app = typer.Typer(help="Corrections of costs.", no_args_is_help=True)

User = Annotated[str, typer.Argument(metavar="USER", help="User id.")]
Reason = Annotated[str, typer.Option(help="The reason; recorded on the ledger.")]
Author = Annotated[str | None, typer.Option(help="Who; your login name by default.")]
Key = Annotated[str | None, typer.Option(help="Idempotency key: the same key and content is done once.")]


class _AmountCommand(TyperCommand):
    """A command whose argument is an amount: `-2.50` is a negative amount, not an unknown option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        negative = next((each for each in args if re.fullmatch(r"-\.?\d[\d.,]*", each)), None)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as exc:
            if negative is None or not hasattr(exc, "option_name"):
                raise
            rule = "a credit must be greater than zero" if self.name == "grant" else "a cost cannot be negative"
            raise typer.BadParameter(f"{rule}, got {negative}") from None


@plan_app.command("set")
def set_plan(
    user: User,
    plan: Annotated[Plan, typer.Argument(metavar="PLAN", help="The plan from now on: trial, starter or growth.")],
    reason: Reason,
    cap: Annotated[str | None, typer.Option(help="Cap of a billing period in dollars, instead of the plan's.")] = None,
    author: Author = None,
    key: Key = None,
    as_json: JsonOption = False,
) -> int:
    """Put a user on a plan. From now on it counts, whatever plan the user's tasks name.

    Example: tollbook plan set u42 growth --reason "upgraded, invoice 1043"
    Example: tollbook plan set u42 growth --cap 500 --reason "contract of November"
    """
    check_id(user, "USER")
    given_nanousd = None if cap is None else check_usd(cap, "--cap")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        cap_nanousd = administration.plan_cap_nanousd(plan) if given_nanousd is None else given_nanousd
        is_new = await administration.set_plan(user, plan, signature, cap_nanousd=cap_nanousd)
        return {"user_id": user, "plan": plan.value, "cap_nanousd": cap_nanousd, "is_new": is_new}

    done = _run(run, author, reason, key)
    cap_usd = format_usd(done["cap_nanousd"])
    return _show(done, f"{user} is on plan {plan.value}, with a cap of {cap_usd} a billing period", as_json=as_json)


@credit_app.command("grant", cls=_AmountCommand)
def grant_credit(
    user: User,
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="Dollars, for example 2.50.")],
    reason: Reason,
    period: Annotated[str | None, typer.Option(help="Billing period, YYYY-MM; the present one by default.")] = None,
    author: Author = None,
    key: Key = None,
    as_json: JsonOption = False,
) -> int:
    """Give a user credit above the cap, for one billing period.

    Example: tollbook credit grant u42 2.50 --reason "sorry for the outage" --key outage-2026-11
    """
    from tollbook.cli.spend import check_period

    check_id(user, "USER")
    amount_nanousd = check_usd(amount, "AMOUNT")
    if amount_nanousd == 0:
        raise typer.BadParameter(f"a credit must be greater than zero, got {amount}", param_hint="AMOUNT")
    chosen = None if period is None else check_period(period)

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        is_new = await administration.grant_credit(user, amount_nanousd, signature, period=chosen)
        return {"user_id": user, "amount_nanousd": amount_nanousd, "is_new": is_new}

    done = _run(run, author, reason, key)
    when = f"in {chosen}" if chosen else "in the present billing period"
    return _show(done, f"{user} has {format_usd(amount_nanousd)} more to spend {when}", as_json=as_json)


@cost_app.command("adjust", cls=_AmountCommand)
def adjust_cost(
    call: Annotated[str, typer.Argument(metavar="CALL", help="Call id, which is the task's id.")],
    cost: Annotated[str, typer.Argument(metavar="COST", help="What the call really cost in all, in dollars.")],
    reason: Reason,
    author: Author = None,
    as_json: JsonOption = False,
) -> int:
    """Correct what a call cost to the amount given. Repeating it changes nothing.

    Example: tollbook cost adjust 5f1c0e0e 0.0125 --reason "provider's invoice of November"
    """
    cost_nanousd = check_usd(cost, "COST")

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
    load_redis_alone()
    from tollbook.inference.administration import Signature, connect_administration

    if not reason.strip():
        raise typer.BadParameter("say why", param_hint="--reason")
    if key is not None:
        check_id(key, "--key")
    signature = Signature(author or login_name(), reason.strip()[:500], key)

    async def connect() -> dict[str, Any]:
        async with connect_administration() as administration:
            return await command(administration, signature)

    return asyncio.run(connect())


def login_name() -> str:
    """Return who runs this command. Errors: typer.BadParameter where the system does not know."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container whose user has no name.
        raise typer.BadParameter("your login name is not known: say who you are", param_hint="--author") from None


def _show(done: dict[str, Any], text: str, *, as_json: bool) -> int:
    if as_json:
        typer.echo(json.dumps(done))
    else:
        typer.echo(text if done["is_new"] else f"nothing to do: {text}")
    return 0
