"""Pages about calls: recent calls, the life of one call with its decisions, and refusals.

For a visitor who may see one user only, the queries read only that user's events. In decisions on shared budgets, the
names of other users' calls are left out.
"""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from tollbook.audit.calls import CallLife, find_call
from tollbook.audit.explanations import Decision, Weighing, explain
from tollbook.audit.reader import AuditReader, NotOnLedger
from tollbook.schemas.events import BudgetDenied, BudgetReserved
from tollbook.schemas.identifiers import describe_budget
from tollbook.schemas.money import exact_places
from tollbook.views.audit.decision_texts import cap_text, hold_text, room_text, verdict_text, ways_out
from tollbook.views.audit.screens import life_facts
from tollbook.views.audit.texts import bound_text, event_text, iso
from tollbook.views.audit.texts import moment as moment_of
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
    Tone,
    call_cell,
    exactly,
    link,
    moment,
    money,
    rows_of,
    sentence,
)
from tollbook.views.web.queries import CallFilter, calls_query, found_query, refusals_query
from tollbook.views.web.visit import Visit
from tollbook.views.web.visitors import Refused

_PAGE = 50
# How many other calls' holds are listed, the largest first; the rest is summed up.
_SHOWN_HOLDS = 10
_STATUSES = ("done", "failed", "denied", "open", "expired", "closed")
_TONES: dict[str, Tone] = {"done": "good", "failed": "bad", "denied": "warn", "expired": "bad"}
_REASONS = {"cap": "the cap", "wait_timeout": "others' holds, for longer than the wait"}


async def calls_page(visit: Visit) -> Page:
    """Show the calls that match the filters, the newest first."""
    wanted = _filter(visit)
    answer, _ = await visit.sources.read(found_query(wanted, _PAGE + 1))
    found = answer.rows[0]
    answer, freshness = await visit.sources.read(calls_query(found[:_PAGE]))
    rows = answer.rows[0]
    named = await visit.sources.named(row["user_id"] for row in rows)
    sees_all = visit.visitor.is_admin
    cells = rows_of(
        [
            moment(row["last_at"]),
            call_cell(row["call_id"]),
            *([_user_cell(named(row["user_id"]))] if sees_all else []),
            Cell(row["status"] or "-", "state", tone=_TONES.get(row["status"] or "", "")),
            Cell(row["model_used"] or row["model"] or "-", details=[row["task_type"]] if row["task_type"] else []),
            money(row["cost_usd"], 6),
            Cell("-" if not row["latency_ms"] else f"{row['latency_ms']:,} ms", "number"),
        ]
        for row in rows
    )
    columns = ("Last event", "Call", *(["User"] if sees_all else []), "Status", "Model and task", "Cost>", "Took>")
    table = Table("Calls, the newest first", columns, cells, empty="No call matches.")
    parts: list[Part] = [_filter_form(visit, wanted), table]
    if len(found) > _PAGE:
        last = found[_PAGE - 1]
        ended = last["last_ms"], last["partition"], last["last_seq"]
        parts.append(older("/calls", "calls", ended, _asked(visit)))
    return Page("Calls", parts, here="/ui/calls", freshness=freshness)


def _user_cell(name: str) -> Cell:
    return Cell(name, "id", link("/user", id=name))


def _asked(visit: Visit) -> dict[str, str | None]:
    return {name: visit.asked(name) for name in ("user", "status", "model", "campaign", "since", "until")}


def _filter(visit: Visit) -> CallFilter:
    """Return the filter of the request, restricted to the visitor's own user. Errors: Refused."""
    own, user = visit.visitor.user_id, visit.asked("user")
    if own is None and user is not None:
        own = visit.sources.runtime.user_ids.on_ledger(user)
    status = visit.asked("status")
    if status not in (None, *_STATUSES):
        raise Refused(400, f"{status!r} is not a status of a call; it must be one of {', '.join(_STATUSES)}")
    return CallFilter(
        user_id=own,
        status=status,
        model=visit.asked("model"),
        campaign_id=visit.asked("campaign"),
        since=_day(visit.asked("since")),
        until=_day(visit.asked("until")),
        before=asked_place(visit),
    )


def _day(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise Refused(400, f"{text!r} is not a day, such as 2026-11-24") from None


def _filter_form(visit: Visit, wanted: CallFilter) -> Form:
    asked = {name: value or "" for name, value in _asked(visit).items()}
    statuses = [("", "any"), *((status, status) for status in _STATUSES)]
    fields = [
        *([Field("user", "User", asked["user"])] if visit.visitor.is_admin else []),
        Field("status", "Status", wanted.status or "", kind="select", choices=statuses),
        Field("model", "Model", asked["model"]),
        Field("campaign", "Campaign", asked["campaign"]),
        Field("since", "From day", asked["since"], kind="date"),
        Field("until", "To day", asked["until"], kind="date"),
    ]
    reset = link("/calls") if any(asked.values()) else ""
    return Form("Filter", link("/calls"), fields, "Filter", method="get", reset=reset)


async def refusals_page(visit: Visit) -> Page:
    """Show refusals, the newest first; each links to its explanation."""
    own, user = visit.visitor.user_id, visit.asked("user")
    if own is None and user is not None:
        own = visit.sources.runtime.user_ids.on_ledger(user)
    answer, freshness = await visit.sources.read(refusals_query(own, _PAGE + 1, asked_place(visit)))
    rows = answer.rows[0][:_PAGE]
    named = await visit.sources.named(row["user_id"] for row in rows)
    sees_all = visit.visitor.is_admin
    cells = rows_of(
        [
            moment(row["recorded_at"]),
            replace(call_cell(row["call_id"]), details=_stopped_by(row)),
            *([_user_cell(named(row["user_id"]))] if sees_all else []),
            *(money(row[name], 6) for name in ("asked_usd", "settled_usd", "held_usd")),
            money(row["cap_usd"], None),
            money(row["short_usd"], 6),
        ]
        for row in rows
    )
    columns = ("At", "Call, and what stopped it", *(["User"] if sees_all else []))
    amounts = ("Asked for>", "Spent>", "Held>", "Cap>", "Over>")
    lead = "A call is refused if spent money, held money and its highest possible cost together pass a cap."
    table = Table("Refusals, the newest first", (*columns, *amounts), cells, empty="No call was refused.")
    fields = [Field("user", "User", user or "")]
    reset = link("/refusals") if user else ""
    filters = Form("Filter", link("/refusals"), fields, "Filter", method="get", reset=reset)
    parts: list[Part] = [filters, table] if sees_all else [table]
    if len(answer.rows[0]) > _PAGE:
        last = rows[-1]
        parts.append(older("/refusals", "refusals", (last["at_ms"], last["partition"], last["seq"]), {"user": user}))
    return Page("Refusals", parts, here="/ui/refusals", lead=lead, freshness=freshness)


def _stopped_by(row: dict[str, Any]) -> list[str]:
    return [describe_budget(row["budget"]), f"stopped by {_REASONS[row['reason']]}"]


async def call_page(visit: Visit) -> Page:
    """Show the life of a call, and the numbers that decided about it."""
    call_id, own = visit.asked("id"), visit.visitor.user_id
    if call_id is None:
        raise Refused(400, "say which call: this address lacks an id")

    async def read(reader: AuditReader) -> list[tuple[CallLife, list[Decision]]]:
        return [(life, await explain(reader, life)) for life in await find_call(reader, call_id, user_id=own)]

    try:
        found = await visit.sources.audit(read)
    except NotOnLedger as exc:
        raise Refused(404, exc.message) from None
    named = await visit.sources.named(life.user_id for life, _ in found)
    parts: list[Part] = []
    for life, decisions in found:
        parts += _life(life, named(life.user_id), visit)
        for number, decision in enumerate(decisions, 1):
            parts += _decision(decision, number, len(decisions), own)
    return Page(f"Call {call_id}", parts, here="/ui/calls", freshness="Read from the ledger just now.")


def _life(life: CallLife, name: str, visit: Visit) -> list[Part]:
    facts = [
        Fact(text.capitalize(), Cell(value, "id" if text == "user" else "text")) for text, value in life_facts(life)
    ]
    user = Cell(name, "id", link("/user", id=name) if visit.visitor.is_admin else "")
    facts[0] = Fact("User", user)
    parts: list[Part] = [facts]
    if not life.orders:
        parts.append(Notice("No money was asked for: this is not a call of a model."))
    places = exact_places(amount for event in life.events for amount in (event.amount, event.committed))
    first_ms = life.events[0].at_ms
    rows: list[Row] = []
    for event in life.events:
        headline, details = event_text(event)
        has_amount = bool(event.amount) and event.type != "budget-denied"
        cells = [
            Cell(f"{moment_of(event):%Y-%m-%d %H:%M:%S}.{event.at_ms % 1000:03}", "time"),
            Cell(f"{(event.at_ms - first_ms) / 1000:,.3f} s", "number"),
            Cell(headline, tone="strong", details=details),
            exactly(event.amount, places) if has_amount else Cell(""),
            Cell("") if event.committed is None else exactly(event.committed, places),
        ]
        rows.append(Row(cells))
    columns = ("Time", "After>", "What happened", "Amount>", "Committed>")
    parts.append(Table("Its life", columns, rows))
    return parts


def _decision(decision: Decision, number: int, total: int, own: str | None) -> list[Part]:
    payload = decision.event.payload
    assert isinstance(payload, BudgetDenied | BudgetReserved), "only these are decisions"
    title = "Why it was refused" if decision.is_refusal else "Why it was let through"
    count_text = f" ({number} of {total} decisions)" if total > 1 else ""
    parts: list[Part] = [
        f"{title}{count_text}",
        Notice(
            f"{iso(decision.event)}: {event_text(decision.event)[0]}",
            "warn" if decision.is_refusal else "",
            [f"{payload.bound.model}: {bound_text(payload.bound)}"],
        ),
    ]
    for weighing in decision.weighings:
        parts.append(_weighing(weighing, decision, own))
        if decision.is_refusal:
            parts.append(Notice("Any of these would have let it pass:", details=ways_out(weighing, decision)))
            parts.append(Notice(room_text(weighing, decision) if own is None else _own_room(weighing, own, decision)))
        if not weighing.is_agreed:
            parts.append(
                Notice("The gate's balance differs from the sum of the events before it: `tollbook verify`.", "bad")
            )
    return parts


def _own_room(weighing: Weighing, own: str, decision: Decision) -> str:
    """Return when there was room, without naming another user's call that made the room."""
    if weighing.room is None or weighing.room.user_id == own:
        return room_text(weighing, decision)
    seconds = (weighing.room.at_ms - decision.event.at_ms) / 1000
    return f"There was room for it {seconds:,.3f} s later."


def _weighing(weighing: Weighing, decision: Decision, own: str | None) -> Table:
    shown = [hold for hold in weighing.others if own in (None, hold.user_id)][:_SHOWN_HOLDS]
    names = {id(hold) for hold in shown}
    rest = [hold for hold in weighing.others if id(hold) not in names]
    parts: list[tuple[Cell, int, str]] = [(Cell("Settled"), weighing.settled_nanousd, "")]
    if weighing.own_held_nanousd:
        parts.append((Cell("Held by this call"), weighing.own_held_nanousd, "for earlier attempts"))
    parts += [(Cell(f"Held by {hold.call_id}"), hold.amount_nanousd, hold_text(hold)) for hold in shown]
    if rest:
        parts.append((Cell(f"Held by {len(rest):,} other calls"), sum(hold.amount_nanousd for hold in rest), ""))
    parts.append((Cell("This call"), weighing.amount_nanousd, ""))
    total = sum(amount for _, amount, _ in parts)
    places = exact_places([*(amount for _, amount, _ in parts), total, weighing.cap_nanousd])
    rows = [Row([name, exactly(amount, places), Cell(note)]) for name, amount, note in parts]
    verdict = Cell(verdict_text(weighing, decision))
    rows.append(Row([Cell("Together"), exactly(total, places), verdict], is_sum=True))
    cap, *credits_ = cap_text(weighing, decision).split("\n")
    rows.append(Row([Cell("Cap"), exactly(weighing.cap_nanousd, places), Cell(cap, details=credits_)]))
    return Table(sentence(describe_budget(weighing.budget)), ("Part", "Amount>", "Note"), rows)
