"""`tollbook what-if`: the recorded ledger under other caps, prices or routes."""

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tollbook.cli.moments import UntilOption, parse_moment
from tollbook.cli.options import ArchiveOption
from tollbook.schemas.identifiers import EntryId, check_id
from tollbook.schemas.money import MoneyError, nanousd_from_usd, usd_from_nanousd
from tollbook.schemas.plans import Plan
from tollbook.schemas.problems import unknown_name

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from tollbook.audit.what_if import Alternatives, OtherRoute, Outcome, Refusal, Totals
    from tollbook.inference.prices.model_price import ModelPrice
    from tollbook.inference.settings import Settings


def what_if(
    cap: Annotated[list[str] | None, typer.Option(help="Another cap of a plan, in dollars: trial=3.")] = None,
    user_cap: Annotated[list[str] | None, typer.Option(help="Another cap of a user, in dollars: u42=8.")] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(help="Another price of a model, in dollars per million tokens: MODEL=PROMPT,COMPLETION."),
    ] = None,
    route: Annotated[
        list[str] | None,
        typer.Option(help="Other models for a task type, as if they had answered the same: TASK=MODEL[,FALLBACK]."),
    ] = None,
    fallback: Annotated[
        list[str] | None, typer.Option(help="Another fallback for a task type: TASK=MODEL, or TASK=none.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Report on this user alone.")] = None,
    period: Annotated[str | None, typer.Option(help="Report on this billing period alone, YYYY-MM.")] = None,
    until: UntilOption = None,
    top: Annotated[int, typer.Option(min=0, max=10_000, help="How many users, the most affected first.")] = 10,
    refusals: Annotated[
        int, typer.Option(min=0, max=100_000, help="How many of the calls that would have been refused, oldest first.")
    ] = 10,
    archive: ArchiveOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Say what would have been spent and refused with other caps, prices or fallbacks; nothing is changed.

    Every option that changes something can be given several times.
    Example: tollbook what-if --cap trial=3 --price claude-3-haiku=0.8,4
    """
    from tollbook.audit.what_if.assumptions import assumptions
    from tollbook.cli.spend import check_period
    from tollbook.inference.settings import load_settings

    alternatives = read_alternatives(cap or (), user_cap or (), price or (), route or (), fallback or ())
    if user is not None:
        _id(user, "--user")
    if period is not None:
        check_period(period)
    end = None if until is None else parse_moment(until, "--until")
    outcome = asyncio.run(_walk(load_settings(), alternatives, archive, end, kept_refusals=refusals, is_quiet=as_json))
    selected = outcome.select(user_id=user, period=period)
    assumed = assumptions(alternatives, selected.total())
    if as_json:
        typer.echo(json.dumps(_document(selected, top, assumed)))
    else:
        _print(selected, top, assumed)
    return 0


def read_alternatives(
    caps: Sequence[str] = (),
    user_caps: Sequence[str] = (),
    prices: Sequence[str] = (),
    routes: Sequence[str] = (),
    fallbacks: Sequence[str] = (),
) -> "Alternatives":
    """Read what the options change. Errors: typer.BadParameter."""
    from tollbook.audit.what_if import Alternatives

    return Alternatives(
        plan_caps_nanousd=dict(_plan_cap(text) for text in caps),
        user_caps_nanousd=dict(_user_cap(text) for text in user_caps),
        prices=dict(_price(text) for text in prices),
        routes=_routes(routes, fallbacks),
    )


async def _walk(
    settings: "Settings",
    alternatives: "Alternatives",
    archive: "Path | None",
    end: EntryId | None,
    *,
    kept_refusals: int,
    is_quiet: bool,
) -> "Outcome":
    from tollbook.audit.what_if import RecordedCaps, WhatIf
    from tollbook.cli.open_history import open_source
    from tollbook.cli.progress import progress
    from tollbook.inference.prices.catalogue import PriceCatalogue

    walk = WhatIf(
        alternatives,
        PriceCatalogue(settings.price_overrides, provider=settings.price_provider).price,
        recorded_caps=RecordedCaps(
            plans={plan.value: settings.plan_cap_nanousd(plan) for plan in Plan}, users=settings.user_caps_nanousd
        ),
        hold_wait_ms=round(settings.hold_wait_s * 1000),
        kept_refusals=kept_refusals,
    )
    async with open_source(settings, archive) as source:
        with progress("deciding", await source.count(), is_quiet=is_quiet) as advance:
            for keys in source.keys:
                async for events in source.events(keys.partition, until=end):
                    await asyncio.to_thread(walk.fold, events, keys.partition)
                    advance(events.num_rows)
    return walk.finish()


# --- Options


def _split(text: str, hint: str, form: str) -> tuple[str, str]:
    name, separator, value = text.rpartition("=")
    if not separator or not name or not value:
        raise typer.BadParameter(f"{text!r} is not written {form}", param_hint=hint)
    return name, value


def _plan_cap(text: str) -> tuple[str, int]:
    plan, dollars = _split(text, "--cap", "PLAN=DOLLARS")
    if plan not in list(Plan):
        raise typer.BadParameter(unknown_name("plan", plan, list(Plan)), param_hint="--cap")
    return plan, _amount(dollars, "--cap")


def _user_cap(text: str) -> tuple[str, int]:
    user_id, dollars = _split(text, "--user-cap", "USER=DOLLARS")
    return _id(user_id, "--user-cap"), _amount(dollars, "--user-cap")


def _price(text: str) -> "tuple[str, ModelPrice]":
    from tollbook.inference.prices.model_price import price_from_usd
    from tollbook.inference.routing import resolve_model

    name, values = _split(text, "--price", "MODEL=PROMPT,COMPLETION")
    parts = values.split(",")
    if len(parts) != 2:
        raise typer.BadParameter(f"{text!r} is not written MODEL=PROMPT,COMPLETION", param_hint="--price")
    for part in parts:
        _amount(part, "--price")
    prompt, completion = (Decimal(part) for part in parts)
    model = resolve_model(name)
    return model.lower(), price_from_usd(model, prompt=prompt, completion=completion)


def _routes(routes: Sequence[str], fallbacks: Sequence[str]) -> "dict[str, OtherRoute]":
    from tollbook.audit.what_if import OtherRoute
    from tollbook.inference.routing import resolve_model

    read: dict[str, OtherRoute] = {}
    for text in routes:
        task, models = _split(text, "--route", "TASK=MODEL[,FALLBACK]")
        names = models.split(",")
        if len(names) > 2 or not all(names):
            raise typer.BadParameter("a route has one model and at most one fallback", param_hint="--route")
        model, *fallback = (resolve_model(name) for name in names)
        read[_task(task, "--route")] = OtherRoute(model, fallback[0] if fallback else None)
    for text in fallbacks:
        task, name = _split(text, "--fallback", "TASK=MODEL")
        if "," in name:
            raise typer.BadParameter("a route has one fallback", param_hint="--fallback")
        model = read.get(_task(task, "--fallback"), OtherRoute()).model
        has_fallback = name != "none"
        read[task] = OtherRoute(model, resolve_model(name) if has_fallback else None, has_fallback)
    return read


def _task(name: str, hint: str) -> str:
    from tollbook.inference.routing import MODEL_ROUTING

    known = [task_type.value for task_type in MODEL_ROUTING]
    if name not in known:
        raise typer.BadParameter(unknown_name("task type", name, known), param_hint=hint)
    return name


def _id(value: str, hint: str) -> str:
    try:
        return check_id(value)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint=hint) from None


def _amount(dollars: str, hint: str) -> int:
    try:
        return nanousd_from_usd(dollars)
    except MoneyError as exc:
        raise typer.BadParameter(str(exc), param_hint=hint) from None


# --- Output


def _document(outcome: "Outcome", top: int, assumed: list[str]) -> dict[str, Any]:
    users = list(outcome.by_user().items())
    return {
        "events": outcome.events,
        "total": _numbers(outcome.total()),
        "plans": [
            {"plan": plan, "users": count, **_numbers(sums)} for plan, (count, sums) in outcome.by_plan().items()
        ],
        "affected_users": len(users),
        "users": [{"user_id": user_id, **_numbers(sums)} for user_id, sums in users[:top]],
        "first_refusals": [_refusal(refusal) for refusal in outcome.first_refusals()],
        "unexplained": outcome.unexplained,
        "assumes": assumed,
    }


def _numbers(sums: "Totals") -> dict[str, Any]:
    return {
        "calls": {"recorded": sums.calls, "what_if": sums.other_calls},
        "refused": {"recorded": sums.refused, "what_if": sums.other_refused},
        "spent_usd": {"recorded": _usd(sums.spent_nanousd), "what_if": _usd(sums.other_spent_nanousd)},
        "difference_usd": _usd(sums.difference_nanousd),
        "newly_refused": sums.newly_refused,
        "newly_allowed": sums.allowed,
        "newly_allowed_estimate_usd": _usd(sums.estimate_nanousd),
        "newly_allowed_at_most_usd": _usd(sums.at_most_nanousd),
        "waited": sums.waited,
        "still_waiting": sums.still_waiting,
        "cut_short": sums.cut_short,
        "not_repriced": sums.not_repriced,
    }


def _refusal(refusal: "Refusal") -> dict[str, Any]:
    return {
        "id": refusal.entry_id,
        "at": _moment(refusal.entry_id),
        "user_id": refusal.account.user_id,
        "period": refusal.account.period,
        "plan": refusal.account.plan,
        "call_id": refusal.call_id,
        "task_type": refusal.task_type,
        "budget": refusal.budget,
        "amount_usd": _usd(refusal.amount_nanousd),
        "settled_usd": _usd(refusal.settled_nanousd),
        "held_usd": _usd(refusal.held_nanousd),
        "cap_usd": _usd(refusal.cap_nanousd),
        "reason": refusal.reason,
    }


def _usd(nanousd: int) -> str:
    return f"{usd_from_nanousd(nanousd):f}"


def _moment(entry_id: str) -> str:
    return datetime.fromtimestamp(EntryId.parse(entry_id).ms / 1000, UTC).isoformat(timespec="milliseconds")


def _print(outcome: "Outcome", top: int, assumed: list[str]) -> None:
    from tollbook.views.tables import make_console

    console = make_console()
    if not outcome.accounts:
        typer.echo("no calls on the ledger for this")
        return
    console.print(_plans_table(outcome))
    if affected := outcome.by_user():
        console.print(_users_table(affected, top))
    if refusals := outcome.first_refusals():
        console.print(_refusals_table(refusals))
    for line in _notes(outcome):
        typer.echo(line)
    typer.echo(f"Assumes: {' '.join(assumed)}")


_SUMS = (
    "calls>",
    "what if>",
    "refused>",
    "what if>",
    "spent>",
    "what if>",
    "difference>",
    "allowed>",
    "about>",
    "at most>",
)


def _plans_table(outcome: "Outcome") -> "Table":
    from tollbook.views.tables import make_table

    table = make_table(("plan", "users>", *_SUMS), "By plan: recorded, and what if")
    plans = outcome.by_plan()
    for plan, (users, sums) in plans.items():
        table.add_row(plan, f"{users:,}", *_cells(sums))
    if len(plans) > 1:
        table.add_section()
        table.add_row("all", "", *_cells(outcome.total()))
    return table


def _users_table(affected: "dict[str, Totals]", top: int) -> "Table":
    from tollbook.views.tables import make_table

    shown = min(top, len(affected))
    table = make_table(("user", *_SUMS), f"Most affected: {shown:,} of {len(affected):,} users")
    for user_id, sums in list(affected.items())[:top]:
        table.add_row(user_id, *_cells(sums))
    return table


def _cells(sums: "Totals") -> list[str]:
    from tollbook.views.tables import dollars

    def money(nanousd: int) -> str:
        return dollars(usd_from_nanousd(nanousd), 4)

    counts = (sums.calls, sums.other_calls, sums.refused, sums.other_refused)
    estimates = (money(sums.estimate_nanousd), money(sums.at_most_nanousd)) if sums.allowed else ("-", "-")
    return [
        *(f"{count:,}" for count in counts),
        money(sums.spent_nanousd),
        money(sums.other_spent_nanousd),
        money(sums.difference_nanousd),
        f"{sums.allowed:,}",
        *estimates,
    ]


def _refusals_table(refusals: "list[Refusal]") -> "Table":
    from tollbook.views.tables import dollars, make_table

    columns = ("at (UTC)", "user", "plan", "call", "task", "asked for>", "settled>", "cap>", "budget")
    table = make_table(columns, "First calls that would have been refused")
    for refusal in refusals:
        amounts = (refusal.amount_nanousd, refusal.settled_nanousd, refusal.cap_nanousd)
        table.add_row(
            _moment(refusal.entry_id).removesuffix("+00:00").replace("T", " "),
            refusal.account.user_id,
            refusal.account.plan,
            refusal.call_id,
            refusal.task_type,
            *(dollars(usd_from_nanousd(amount), 4) for amount in amounts),
            refusal.budget,
        )
    return table


def _notes(outcome: "Outcome") -> list[str]:
    total = outcome.total()
    notes = (
        (total.waited, "calls would have waited for other calls' holds"),
        (total.still_waiting, "calls would still be waiting at the end of the ledger; they count as neither"),
        (total.cut_short, "calls would have ended before a retry or fallback that was made"),
        (
            total.not_repriced,
            "charges could not be priced anew, since their tokens are not known; they stay as recorded",
        ),
        (outcome.unexplained, "recorded decisions do not follow from the ledger's own numbers; see `tollbook verify`"),
    )
    return [f"{count:,} {text}" for count, text in notes if count]
