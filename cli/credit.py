"""`tollbook credit`: let users spend more in a billing period, take it back, and list what was granted."""

import asyncio
import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli import prepaid
from tollbook.cli.money import (
    AmountCommand,
    AuthorOption,
    KeyOption,
    YesOption,
    check_amount,
    confirm,
    run_signed,
    tell,
    usd,
)
from tollbook.cli.options import JsonOption, data_settings, read_id, read_period
from tollbook.cli.user_ids import on_ledger_or_none, plain_ids
from tollbook.schemas.money import format_usd, usd_text

if TYPE_CHECKING:
    from tollbook.audit.accounts import Grant
    from tollbook.inference.administration import Administration
    from tollbook.ledger.signature import Signature

app = typer.Typer(help="Credit above the cap.", no_args_is_help=True)

UserOption = Annotated[
    str | None, typer.Argument(metavar="USER", help="User id, unless --budget is given.", callback=read_id)
]
OptionalReason = Annotated[str | None, typer.Option(help="The reason; recorded on the ledger.")]
BudgetOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="A budget of the policy with window `total`, instead of USER.")
]
ValueOption = Annotated[
    str | None, typer.Option(help="The value of the budget, such as a customer; join several with commas.")
]
IdOption = Annotated[
    str | None,
    typer.Option(
        "--id", help="Id of the budget's credit, such as the payment's; each id is granted once.", callback=read_id
    ),
]
PeriodOption = Annotated[
    str | None, typer.Option(help="Billing period, YYYY-MM; by default the current one.", callback=read_period)
]


@app.command("grant", cls=AmountCommand)
def grant_credit(
    user: UserOption = None,
    amount: Annotated[str | None, typer.Argument(metavar="AMOUNT", help="Dollars, for example 2.50.")] = None,
    reason: OptionalReason = None,
    period: PeriodOption = None,
    budget: BudgetOption = None,
    value: ValueOption = None,
    usd_: Annotated[str | None, typer.Option("--usd", metavar="AMOUNT", help="Dollars, with --budget.")] = None,
    credit_id: IdOption = None,
    expires: Annotated[
        str | None,
        typer.Option(
            metavar="MOMENT", help="When a budget's credit expires (UTC): 2027-01-31 or 2027-01-31T12:00:00Z."
        ),
    ] = None,
    author: AuthorOption = None,
    key: KeyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Give a user credit above the cap for one billing period, or give a prepaid budget credit.

    Example: tollbook credit grant u42 2.50 --reason "sorry for the outage" --key outage-2026-11
    Example: tollbook credit grant --budget prepaid --value acme --usd 50 --id pay_123 --expires 2027-12-31
    """
    if budget is not None:
        prepaid.check_options(user, amount, period, key, credit_id)
        return prepaid.grant(budget, value, usd_, credit_id or "", expires, author, reason, yes=yes, as_json=as_json)
    prepaid.check_no_options(value, usd_, credit_id, expires)
    user, reason = _require(user, "USER"), _require(reason, "--reason")
    amount_nanousd = check_amount(_require(amount, "AMOUNT"), "AMOUNT", "grant")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        credit = (await administration.account(user, period)).credit_nanousd
        when = period or administration.period
        confirm(f"credit of {user} in {when}: {usd(credit)} -> {usd(credit + amount_nanousd)}", amount_nanousd, yes=yes)
        is_new = await administration.grant_credit(user, amount_nanousd, signature, period=period)
        return {"user_id": user, "amount_nanousd": amount_nanousd, "is_new": is_new}

    done = run_signed(run, author, reason, key)
    return tell(done, f"{user} has {format_usd(amount_nanousd)} more to spend {_when(period)}", as_json=as_json)


@app.command("revoke", cls=AmountCommand)
def revoke_credit(
    user: UserOption = None,
    amount: Annotated[
        str | None, typer.Argument(metavar="AMOUNT", help="Dollars, for example 2.50, unless --grant is given.")
    ] = None,
    grant: Annotated[
        str | None, typer.Option(metavar="ID", help="Take back what is left of this grant; `credit list` shows its id.")
    ] = None,
    reason: OptionalReason = None,
    period: PeriodOption = None,
    budget: BudgetOption = None,
    value: ValueOption = None,
    usd_: Annotated[
        str | None, typer.Option("--usd", metavar="AMOUNT", help="Dollars, with --budget; by default all that is left.")
    ] = None,
    credit_id: IdOption = None,
    author: AuthorOption = None,
    key: KeyOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Take back credit: an amount, or what is left of one grant or of a budget's credit.

    Money that was spent stays spent. If it is then above the cap, the user's calls are refused for the rest of the
    period.

    Example: tollbook credit revoke u42 2.50 --reason "granted twice"
    Example: tollbook credit revoke u42 --grant 1795505017239-1 --reason "wrong user"
    Example: tollbook credit revoke --budget prepaid --value acme --id pay_123 --reason refund
    """
    if budget is not None:
        prepaid.check_options(user, amount or grant, period, None, credit_id)
        return prepaid.revoke(budget, value, usd_, credit_id or "", author, reason, key, yes=yes, as_json=as_json)
    prepaid.check_no_options(value, usd_, credit_id, None)
    user, reason = _require(user, "USER"), _require(reason, "--reason")
    from tollbook.ledger.errors import CreditTooLow

    if (amount is None) == (grant is None):
        raise typer.BadParameter("give either an amount, or --grant with the id of a grant", param_hint="AMOUNT")
    if grant is not None and (period is not None or key is not None):
        raise typer.BadParameter("cannot be combined with --period or --key", param_hint="--grant")
    if grant is not None:
        found = _find_grant(user, grant)
        amount_nanousd, period = found.left_nanousd, found.event.period
    else:
        amount_nanousd = check_amount(amount or "", "AMOUNT", "revoke")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        is_new = amount_nanousd > 0
        if is_new:
            credit = (await administration.account(user, period)).credit_nanousd
            when = period or administration.period
            if amount_nanousd <= credit:
                left = usd(credit - amount_nanousd)
                confirm(f"credit of {user} in {when}: {usd(credit)} -> {left}", amount_nanousd, yes=yes)
            elif key is None:
                raise CreditTooLow(user, when, credit)
            # With a key, this command may be a repeat; if not, the gate refuses the amount.
            is_new = await administration.revoke_credit(user, amount_nanousd, signature, period=period, grant=grant)
        return {"user_id": user, "amount_nanousd": amount_nanousd, "grant": grant, "is_new": is_new}

    done = run_signed(run, author, reason, key)
    text = f"{user} has {usd(amount_nanousd)} less to spend {_when(period)}"
    return tell(done, text if amount_nanousd else f"grant {grant} is already taken back", as_json=as_json)


@app.command("list")
def list_credits(
    user: Annotated[
        str | None, typer.Argument(metavar="USER", help="Only credits of this user.", callback=read_id)
    ] = None,
    period: Annotated[
        str | None, typer.Option(help="Only credits of this billing period, YYYY-MM.", callback=read_period)
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Credits of this budget of the policy, instead of users' credits."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """List the credits that were granted: to whom, by whom, why, when, and how much was not taken back.

    Example: tollbook credit list u42 --period 2026-11
    Example: tollbook credit list --budget prepaid
    """
    from tollbook.ledger.projection.sql_text import quoted

    if budget is not None:
        return prepaid.list_credits(quoted(budget), as_json=as_json)
    from tollbook.views.tables import Printer, Row, printable

    grants = _read(user, period)
    plain = plain_ids(data_settings(), (grant.event.user_id for grant in grants))
    documents = [_document(grant) | {"user_id": plain(grant.event.user_id)} for grant in grants]
    if as_json:
        typer.echo(json.dumps(documents))
    elif documents:
        rows = [
            Row(
                [each["user_id"], each["period"], each["id"], usd(grant.event.amount), usd(grant.left_nanousd)],
                [f"{each['granted_at']} by {printable(each['author'])}: {printable(each['reason'])}"],
            )
            for each, grant in zip(documents, grants, strict=True)
        ]
        Printer().table(("user", "period", "grant", "amount>", "left>"), rows, "Credits")
    else:
        typer.echo("no credit was granted")
    return 0


def _require(value: str | None, hint: str) -> str:
    if value is None:
        raise typer.BadParameter("missing; or give --budget", param_hint=hint)
    return value


def _find_grant(user: str, grant: str) -> "Grant":
    if not re.fullmatch(r"\d{1,20}-\d{1,20}", grant):
        raise typer.BadParameter(
            f"{grant!r:.80} is not the id of a grant; `tollbook credit list` shows the ids", param_hint="--grant"
        )
    for found in _read(user, None):
        if found.event.id == grant:
            return found
    raise typer.BadParameter(
        f"{user} has no grant {grant}; `tollbook credit list {user}` shows the user's grants", param_hint="--grant"
    )


def _read(user: str | None, period: str | None) -> "list[Grant]":
    from tollbook.audit.accounts import read_grants
    from tollbook.cli.audit import open_reader

    kept = on_ledger_or_none(data_settings(), user)

    async def read() -> "list[Grant]":
        async with open_reader() as reader:
            return await read_grants(reader, user_id=kept, period=period)

    return asyncio.run(read())


def _document(grant: "Grant") -> dict[str, Any]:
    from tollbook.schemas.events import CreditGranted
    from tollbook.views.audit.texts import iso

    event = grant.event
    assert isinstance(event.payload, CreditGranted)
    return {
        "user_id": event.user_id,
        "period": event.period,
        "id": event.id,
        "amount_usd": usd_text(event.amount),
        "left_usd": usd_text(grant.left_nanousd),
        "granted_at": iso(event),
        "author": event.payload.author,
        "reason": event.payload.reason,
    }


def _when(period: str | None) -> str:
    return f"in {period}" if period else "in the current billing period"
