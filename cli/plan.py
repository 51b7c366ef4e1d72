"""`tollbook plan`: set a user's plan, show or list the plans that were set, and clear them."""

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli.money import (
    AuthorOption,
    KeyOption,
    ReasonOption,
    YesOption,
    confirm,
    run_signed,
    tell,
    usd,
)
from tollbook.cli.options import JsonOption, UserArgument, check_usd, complete_plan, data_settings
from tollbook.cli.user_ids import on_ledger_or_none, plain_ids
from tollbook.schemas.money import format_usd, nanousd_from_usd, usd_text
from tollbook.schemas.tasks import InvalidTask

if TYPE_CHECKING:
    from tollbook.inference.administration import Administration
    from tollbook.ledger.signature import Signature
    from tollbook.schemas.events import Event

app = typer.Typer(help="Users' plans.", no_args_is_help=True)


@app.command("set")
def set_plan(
    user: UserArgument,
    plan: Annotated[
        str,
        typer.Argument(metavar="PLAN", help="The new plan; one of the policy's.", autocompletion=complete_plan),
    ],
    reason: ReasonOption,
    cap: Annotated[str | None, typer.Option(help="Cap per billing period in dollars, instead of the plan's.")] = None,
    author: AuthorOption = None,
    key: KeyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Set a user's plan. From now on it applies, whatever plan the user's tasks name.

    Example: tollbook plan set u42 growth --reason "upgraded, invoice 1043"
    Example: tollbook plan set u42 growth --cap 500 --reason "contract of November" --yes
    """
    given_nanousd = None if cap is None else check_usd(cap, "--cap")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        try:
            plan_cap_nanousd = administration.plan_cap_nanousd(plan)
        except InvalidTask as exc:
            raise typer.BadParameter(str(exc), param_hint="PLAN") from None
        cap_nanousd = plan_cap_nanousd if given_nanousd is None else given_nanousd
        account = await administration.account(user)
        before = "the plan that tasks name"
        if account.plan is not None and account.cap_nanousd is not None:
            before = f"plan {account.plan} with a cap of {usd(account.cap_nanousd)}"
        text = f"{user}: {before} -> plan {plan} with a cap of {usd(cap_nanousd)} a billing period"
        confirm(text, abs(cap_nanousd - (account.cap_nanousd or 0)), yes=yes)
        is_new = await administration.set_plan(user, plan, signature, cap_nanousd=cap_nanousd)
        return {"user_id": user, "plan": plan, "cap_nanousd": cap_nanousd, "is_new": is_new}

    done = run_signed(run, author, reason, key)
    cap_usd = format_usd(done["cap_nanousd"])
    return tell(done, f"{user} is on plan {plan}, with a cap of {cap_usd} a billing period", as_json=as_json)


@app.command("clear")
def clear_plan(
    user: UserArgument,
    reason: ReasonOption,
    author: AuthorOption = None,
    key: KeyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Clear the plan that was set for a user: the plan that each task names applies again, by default trial.

    Example: tollbook plan clear u42 --reason "contract ended"
    """

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        account = await administration.account(user)
        cap_nanousd = account.cap_nanousd or 0
        text = f"{user}: plan {account.plan} with a cap of {usd(cap_nanousd)} -> the plan that tasks name"
        confirm(text, cap_nanousd, yes=yes)
        return {"user_id": user, "plan": account.plan, "is_new": await administration.clear_plan(user, signature)}

    done = run_signed(run, author, reason, key)
    return tell(done, f"no plan is set for {user}: the plan that each task names applies", as_json=as_json)


@app.command("show")
def show_plan(user: UserArgument, as_json: JsonOption = False) -> int:
    """Show the plan that was set for a user: cap, who set it, why and when.

    Example: tollbook plan show u42
    """
    found = _read(user)
    if as_json:
        typer.echo(json.dumps(_document(found[0]) | {"user_id": user} if found else {"user_id": user, "plan": None}))
    elif found:
        for name, value in (_document(found[0]) | {"user_id": user}).items():
            typer.echo(f"{name:<8} {value}")
    else:
        typer.echo(f"no plan is set for {user}: the plan that each task names applies, by default trial")
    return 0


@app.command("list")
def list_plans(as_json: JsonOption = False) -> int:
    """List the users whose plan was set.

    Example: tollbook plan list
    """
    from tollbook.views.tables import Printer, printable

    documents = [_document(event) for event in _read(None)]
    plain = plain_ids(data_settings(), (each["user_id"] for each in documents))
    documents = [each | {"user_id": plain(each["user_id"])} for each in documents]
    if as_json:
        typer.echo(json.dumps(documents))
    elif documents:
        columns = ("user", "plan", "cap>", "set (UTC)", "author", "reason")
        rows = [
            [
                each["user_id"], each["plan"], usd(nanousd_from_usd(each["cap_usd"])), each["set_at"],
                printable(each["author"]), printable(each["reason"]),
            ]
            for each in documents
        ]  # fmt: skip
        Printer().table(columns, rows, "Plans that were set")
    else:
        typer.echo("no plan is set for any user: the plan that each task names applies, by default trial")
    return 0


def _read(user: str | None) -> "list[Event]":
    from tollbook.audit.accounts import read_plans
    from tollbook.cli.audit import open_reader

    kept = on_ledger_or_none(data_settings(), user)

    async def read() -> "list[Event]":
        async with open_reader() as reader:
            return await read_plans(reader, user_id=kept)

    return asyncio.run(read())


def _document(event: "Event") -> dict[str, Any]:
    from tollbook.schemas.events import PlanAssigned
    from tollbook.views.audit.texts import iso

    assert isinstance(event.payload, PlanAssigned)
    return {
        "user_id": event.user_id,
        "plan": event.payload.plan,
        "cap_usd": usd_text(event.payload.cap_nanousd),
        "set_at": iso(event),
        "author": event.payload.author,
        "reason": event.payload.reason,
    }
