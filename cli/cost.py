"""`tollbook cost`: correct what one call cost, or give back many charges that are only assumed."""

import asyncio
import json
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tollbook.cli.moments import parse_moment, parse_since
from tollbook.cli.money import (
    AmountCommand,
    AuthorOption,
    ReasonOption,
    YesOption,
    confirm,
    run_signed,
    sign,
    tell,
    usd,
)
from tollbook.cli.options import JsonOption, check_usd, data_settings, read_call, read_id
from tollbook.cli.user_ids import on_ledger_or_none, plain_ids
from tollbook.schemas.money import format_usd, usd_text

if TYPE_CHECKING:
    from tollbook.audit.assumed_charges import Found
    from tollbook.inference.administration import Administration
    from tollbook.ledger.signature import Signature

app = typer.Typer(help="Corrections of costs.", no_args_is_help=True)

_MAX_USERS: Final = 20


@app.command("adjust", cls=AmountCommand)
def adjust_cost(
    call: Annotated[str, typer.Argument(metavar="CALL", help="Call id, which is the task's id.", callback=read_call)],
    cost: Annotated[str, typer.Argument(metavar="COST", help="What the call really cost in all, in dollars.")],
    reason: ReasonOption,
    author: AuthorOption = None,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> int:
    """Set what a call really cost. Repeating it changes nothing.

    Example: tollbook cost adjust 5f1c0e0e 0.0125 --reason "provider's invoice of November"
    """
    cost_nanousd = check_usd(cost, "COST")

    async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
        found = await administration.find_cost(call)
        known = await administration.user_ids.plain([found.user_id])
        user = known.get(found.user_id, found.user_id)
        text = f"{call} of {user}: {usd(found.before_nanousd)} -> {usd(cost_nanousd)}"
        confirm(text, abs(cost_nanousd - found.before_nanousd), yes=yes)
        done = await administration.adjust_cost(call, cost_nanousd, signature)
        return {
            "call_id": call,
            "user_id": user,
            "before_nanousd": done.before_nanousd,
            "after_nanousd": done.after_nanousd,
            "is_new": done.before_nanousd != done.after_nanousd,
        }

    done = run_signed(run, author, reason)
    change = f"{format_usd(done['before_nanousd'], places=6)} -> {format_usd(cost_nanousd, places=6)}"
    return tell(done, f"{call} of {done['user_id']}: {change}", as_json=as_json)


@app.command("release")
def release_costs(
    outcome: Annotated[
        list[str],
        typer.Option(help="How the requests ended, e.g. http_error, connection_error; repeatable."),
    ],
    since: Annotated[str, typer.Option(help="Requests that ended at this time or later: 2026-11-24T12:00:00Z.")],
    until: Annotated[str, typer.Option(help="Up to and including this time or entry id.")],
    reason: ReasonOption,
    user: Annotated[str | None, typer.Option(help="Only charges of this user.", callback=read_id)] = None,
    author: AuthorOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Give the charges back; without it, they are only shown.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Give back assumed charges of requests that, as you know, cost nothing.

    Without --yes, it shows the charges and changes nothing. Charges that were corrected later are left alone.
    Repeating it gives nothing back twice.

    Example: tollbook cost release --outcome http_error --since 2026-11-24 --until 2026-11-25 --reason proxy --yes
    """
    sign(author, reason)
    found = _find(outcome, since, until, user)
    if found.charges and yes:

        async def run(administration: "Administration", signature: "Signature") -> dict[str, Any]:
            return asdict(await administration.release(found.charges, signature))

        done: dict[str, Any] | None = run_signed(run, author, reason)
    else:
        done = None
    plain = plain_ids(data_settings(), (charge.user_id for charge in found.charges))
    shown = replace(found, charges=tuple(replace(each, user_id=plain(each.user_id)) for each in found.charges))
    if as_json:
        typer.echo(json.dumps(_document(shown, done)))
    else:
        _print(shown, done, yes=yes)
    return 0


def _find(outcomes: list[str], since: str, until: str, user: str | None) -> "Found":
    from tollbook.audit.assumed_charges import OUTCOMES, find_assumed_charges
    from tollbook.cli.audit import open_reader
    from tollbook.schemas.problems import unknown_name

    for name in outcomes:
        if name not in OUTCOMES:
            raise typer.BadParameter(unknown_name("outcome", name, OUTCOMES), param_hint="--outcome")
    since_ms, last = parse_since(since, "--since"), parse_moment(until, "--until")
    if last.ms < since_ms:
        raise typer.BadParameter(f"{until} is before {since}", param_hint="--until")

    kept = on_ledger_or_none(data_settings(), user)

    async def read() -> "Found":
        async with open_reader() as reader:
            return await find_assumed_charges(reader, outcomes=outcomes, since_ms=since_ms, until=last, user_id=kept)

    return asyncio.run(read())


def _document(found: "Found", done: dict[str, Any] | None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "charges": len(found.charges),
        "users": len({charge.user_id for charge in found.charges}),
        "assumed_usd": usd_text(sum(charge.amount_nanousd for charge in found.charges)),
        "corrected": found.corrected,
        "is_dry_run": done is None,
        "found": [asdict(charge) for charge in found.charges],
    }
    return document | (done or {})


def _print(found: "Found", done: dict[str, Any] | None, *, yes: bool) -> None:
    from tollbook.views.tables import Printer, printable

    numbers, sums = Counter[str](), Counter[str]()
    for charge in found.charges:
        numbers[charge.user_id] += 1
        sums[charge.user_id] += charge.amount_nanousd
    if found.charges:
        rows = [[printable(name), f"{numbers[name]:,}", usd(nanousd)] for name, nanousd in sums.most_common(_MAX_USERS)]
        Printer().table(("user", "charges>", "assumed>"), rows, "Charges that are only assumed")
    total = usd(sum(sums.values()))
    typer.echo(f"{len(found.charges):,} assumed charges of {len(sums):,} users, {total} in all")
    if found.corrected:
        typer.echo(f"{found.corrected:,} more were corrected later, and are left alone")
    if done is not None:
        typer.echo(f"given back: {done['released']:,} charges, {usd(done['released_nanousd'])}")
        if left := done["changed"] + done["too_old"]:
            typer.echo(f"left alone: {left:,}, which changed in the meantime or are too old to be corrected")
    elif found.charges and not yes:
        typer.echo("nothing was changed; to give them back, add --yes")
