"""Pages about spend against budgets: of all users, of one user, of the visitor; and about raised alerts."""

import secrets
import time
from decimal import Decimal
from typing import Any

from tollbook.inference.budgets_now import read_budgets
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.schemas.identifiers import EntryId, describe_budget
from tollbook.views.queries import alerts_sql, budgets_sql, spend_sql
from tollbook.views.web.paging import asked_place, older
from tollbook.views.web.parts import (
    Cell,
    Fact,
    Field,
    Form,
    Notice,
    Page,
    Part,
    Row,
    Table,
    call_cell,
    count,
    link,
    moment,
    money,
    rows_of,
    sentence,
    used,
)
from tollbook.views.web.projection import Query
from tollbook.views.web.visit import Visit
from tollbook.views.web.visitors import Refused

_TOP = 100
_ALERTS = 100
_DONE = {
    "credit": "The credit was granted.",
    "plan": "The plan was set.",
    "repeated": "This was already done; nothing changed.",
}
_SPEND_COLUMNS = ("Plan", "Spent>", "Held>", "Cap>", "Used>", "Refused>", "Calls>", "Fallbacks>")


async def spend_page(visit: Visit) -> Page:
    """Show spend against caps, per user of a billing period, and of the policy's further budgets."""
    period = _period(visit.asked("period"))
    answer, freshness = await visit.sources.read(
        Query(spend_sql(None, period, _TOP), {}),
        Query(budgets_sql(_TOP), {}),
        Query("SELECT DISTINCT period FROM spend ORDER BY period DESC LIMIT 24", {}),
    )
    users, budgets, periods = answer.rows
    named = await visit.sources.named(row["user_id"] for row in users)
    shown = period or (users[0]["period"] if users else "")
    rows = [
        Row([Cell(name, "id", link("/user", id=name)), *_spend_cells(row)])
        for row in users
        for name in [named(row["user_id"])]
    ]
    note = f"The first {_TOP} users, the highest spend first." if len(rows) == _TOP else ""
    choices = [(each["period"], each["period"]) for each in periods]
    filters = Form(
        "Choose a period",
        link("/spend"),
        [Field("period", "Billing period", shown, kind="select", choices=choices)],
        "Show",
        method="get",
    )
    find = Form("Find a user", link("/user"), [Field("id", "User id", is_needed=True)], "Open", method="get")
    parts: list[Part] = [
        find,
        *([filters] if len(choices) > 1 else []),
        Table(f"Spend in {shown}" if shown else "Spend", ("User", *_SPEND_COLUMNS), rows, note=note),
        _budgets_table(budgets),
    ]
    return Page("Spend", parts, here="/ui/spend", freshness=freshness)


def _spend_cells(row: dict[str, Any]) -> list[Cell]:
    cap: Decimal | None = row["cap_usd"]
    return [
        Cell(row["plan"] or "-"),
        money(row["spent_usd"]),
        money(row["reserved_usd"]),
        money(cap, None),
        used(row["spent_usd"], cap),
        *(count(row[name]) for name in ("denied", "calls", "fallbacks")),
    ]


def _budgets_table(rows: list[dict[str, Any]]) -> Table:
    cells = rows_of(
        [
            Cell(row["name"], "id"),
            Cell(row["value"], "id"),
            Cell(row["window"]),
            money(row["spent_usd"]),
            money(row["reserved_usd"]),
            money(row["cap_usd"], None),
            used(row["spent_usd"], row["cap_usd"]),
            money(row["credit_usd"], None) if row["credit_usd"] else Cell("-", "number"),
        ]
        for row in rows
    )
    columns = ("Budget", "Value", "Window", "Spent>", "Held>", "Cap>", "Used>", "Credit>")
    empty = "The policy has no further budgets, or nothing was spent in one."
    return Table("Further budgets, in their latest windows", columns, cells, empty=empty)


async def user_page(visit: Visit) -> Page:
    """Show a user to an admin: budgets now, periods, and what can be changed."""
    name = visit.asked("id")
    if name is None:
        raise Refused(400, "say which user: this address lacks an id")
    user_id = visit.sources.runtime.user_ids.on_ledger(name)
    account = await visit.sources.administration.account(user_id)
    parts, freshness = await _usage(visit, user_id, plan=account.plan)
    policy = visit.sources.runtime.rules
    plan = f"{account.plan}, set by an admin" if account.plan else f"as tasks name it, by default {policy.default_plan}"
    facts = [Fact("Plan", Cell(plan)), Fact("Calls", Cell("All calls of this user", href=link("/calls", user=name)))]
    done = visit.asked("done")
    notices = [Notice(_DONE[done], "good")] if done in _DONE else []
    forms = [_credit_form(name), _plan_form(name, [*policy.plans], account.plan or policy.default_plan)]
    title = f"User {name}"
    return Page(title, [facts, *parts, *forms], here="/ui/spend", notices=notices, freshness=freshness)


async def own_page(visit: Visit) -> Page:
    """Show a key's user that user's own spend."""
    key = visit.visitor.key
    assert key is not None, "only a key is bound to a user"
    assert key.user_id is not None, "who has no user is not let in"
    parts, freshness = await _usage(visit, key.user_id, plan=key.plan, campaign_id=key.campaign_id, tags=dict(key.tags))
    name = (await visit.sources.named([key.user_id]))(key.user_id)
    facts = [
        Fact("User", Cell(name, "id")),
        Fact("Key", Cell(f"{key.name} ({key.key_id})" if key.name else key.key_id)),
        Fact("It may call", Cell(", ".join(key.models) or "every model and task type")),
        Fact("It expires", Cell("never") if key.expires_ms is None else moment(key.expires_ms)),
    ]
    return Page("Usage", [facts, *parts], here="/ui", freshness=freshness)


async def _usage(
    visit: Visit, user_id: str, *, plan: str | None, campaign_id: str | None = None, tags: dict[str, str] | None = None
) -> tuple[list[Part], str]:
    """Return a user's budgets now, from the gate, and spend by period, from the projection."""
    budgets = await read_budgets(
        visit.sources.runtime,
        user_id,
        {"plan": plan, "campaign": campaign_id, **(tags or {})},
        now_ms=round(1000 * time.time()),
    )
    now = rows_of(
        [
            Cell(sentence(each.budget)),
            money(each.spent_usd),
            money(each.held_usd),
            money(each.limit_usd, None),
            money(each.remaining_usd),
            used(each.spent_usd, each.limit_usd),
            moment(each.resets_ms),
        ]
        for each in budgets
    )
    table = Table("Budgets now", ("Budget", "Spent>", "Held>", "Cap>", "Left>", "Used>", "Resets"), now)
    try:
        answer, freshness = await visit.sources.read(Query(spend_sql(user_id, None, _TOP), {}))
    except LedgerUnavailable as exc:  # The gate's answer can still be shown.
        return [table, Notice(sentence(exc.message), "warn")], ""
    periods = sorted(answer.rows[0], key=lambda row: row["period"], reverse=True)
    rows = [Row([Cell(row["period"]), *_spend_cells(row)]) for row in periods]
    return [table, Table("Spend by billing period", ("Period", *_SPEND_COLUMNS), rows)], freshness


def _credit_form(user_id: str) -> Form:
    return Form(
        "Grant credit",
        link("/user/credit", id=user_id),
        [
            Field(
                "amount", "Dollars", hint="For this billing period, above the cap.", is_needed=True, inputmode="decimal"
            ),
            reason_field(),
            sure_field(),
        ],
        "Grant credit",
        hidden={"command": secrets.token_hex(8)},
    )


def _plan_form(user_id: str, plans: list[str], current: str) -> Form:
    return Form(
        "Set the plan",
        link("/user/plan", id=user_id),
        [
            Field("plan", "Plan", current, kind="select", choices=[(each, each) for each in plans]),
            Field("cap", "Cap in dollars", hint="Per billing period; if empty, the plan's.", inputmode="decimal"),
            reason_field(),
            sure_field(),
        ],
        "Set the plan",
        hidden={"command": secrets.token_hex(8)},
        text="From now on it applies, whatever plan a task names.",
    )


def reason_field() -> Field:
    """Return the field for the reason of a change."""
    return Field("reason", "Reason", hint="Recorded on the ledger.", is_needed=True)


def sure_field() -> Field:
    """Return the box to tick for large amounts."""
    return Field("sure", "Confirm a large amount", kind="check", hint="Required above TOLLBOOK_CONFIRM_USD.")


async def alerts_page(visit: Visit) -> Page:
    """Show the alerts that were raised, the newest first."""
    answer, freshness = await visit.sources.read(Query(alerts_sql(None, _ALERTS + 1, asked_place(visit)), {}))
    shown = answer.rows[0][:_ALERTS]
    rows = rows_of(
        [
            Cell(row["raised_at"].replace("T", " ").removesuffix("Z"), "time"),
            Cell(describe_budget(row["budget"])),
            Cell(f"{100 * float(row['fraction']):.4g} %", "number"),
            money(row["settled_usd"]),
            money(row["cap_usd"], None),
            call_cell(row["call_id"]),
        ]
        for row in shown
    )
    columns = ("At", "Budget", "Reached>", "Spent>", "Cap>", "By call")
    parts: list[Part] = [Table("Alerts that were raised", columns, rows, empty="No alerts were raised.")]
    if len(answer.rows[0]) > _ALERTS:
        last = shown[-1]
        ended = EntryId.parse(last["id"]).ms, last["partition"], last["seq"]
        parts.append(older("/alerts", "alerts", ended, {}))
    return Page("Alerts", parts, here="/ui/alerts", freshness=freshness)


def _period(text: str | None) -> str | None:
    if text is None:
        return None
    year, dash, month = text.partition("-")
    if dash and len(text) == 7 and year.isascii() and year.isdecimal() and month.isascii() and month.isdecimal():
        return text
    raise Refused(400, f"{text!r} is not a billing period, such as 2026-11")
