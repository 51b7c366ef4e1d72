"""How audits are shown: as JSON documents, and as tables for people."""

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tollbook.audit.calls import CallLife
from tollbook.audit.explanations import Decision, Weighing
from tollbook.audit.reader import AuditReader
from tollbook.audit.statements import Line, Statement
from tollbook.cli.audit_text import (
    bound_text,
    budget_text,
    cap_text,
    event_text,
    hold_text,
    iso,
    moment,
    money,
    movement_text,
    places_of,
    plain,
    plan_text,
    room_text,
    verdict_text,
    ways_out,
)
from tollbook.cli.entries import Entry, print_entries
from tollbook.schemas.events import (
    BudgetDenied,
    BudgetReserved,
    CostAdjusted,
    Event,
    FallbackUsed,
    ModelCalled,
    payload_json,
)
from tollbook.schemas.money import usd_from_nanousd
from tollbook.views.tables import make_console, make_table

# From this width on, a timeline also says how long after the beginning something was.
_WIDE = 100
# Other calls' holds, the largest first; more than these are added up.
_SHOWN = 10


def as_read(reader: AuditReader) -> dict[str, Any]:
    """Return what was read: which ledger, and up to where."""
    return {
        "ledger_id": reader.source.ledger_id,
        "is_archive_alone": reader.source.redis is None,
        "partitions": [
            {
                "partition": number,
                "archived_seq": reader.archived[number],
                "seq": position.seq,
                "id": str(position.entry),
            }
            for number, position in sorted(reader.positions.items())
        ],
    }


def _print_read(console: Console, reader: AuditReader) -> None:
    for number, position in sorted(reader.positions.items()):
        where = f", partition {number}" if len(reader.source.keys) > 1 else ""
        archived = f"archive up to event {reader.archived[number]:,}"
        stream = "no stream" if reader.source.redis is None else f"stream up to event {position.seq:,}"
        text = Text(f"read: {archived}, {stream} (ledger {reader.source.ledger_id}{where})", "dim")
        console.print(Padding(text, (0, 0, 0, 1), expand=False))


def _usd(nanousd: int | None) -> str | None:
    return None if nanousd is None else f"{usd_from_nanousd(nanousd):f}"


def _event_document(event: Event) -> dict[str, Any]:
    headline, details = event_text(event)
    return {
        "seq": event.seq,
        "id": event.id,
        "at": iso(event),
        "type": event.type,
        "period": event.period,
        "attempt": event.attempt,
        "amount_usd": _usd(event.amount),
        "committed_usd": _usd(event.committed),
        "text": f"{headline}: {'; '.join(details)}",
        "payload": json.loads(payload_json(event.payload)),
    }


# --- The life of a call


def calls_document(reader: AuditReader, lives: Sequence[CallLife]) -> dict[str, Any]:
    """Return calls for programs."""
    return {"read": as_read(reader), "calls": [_call_document(life) for life in lives]}


def _call_document(life: CallLife) -> dict[str, Any]:
    order = life.orders[-1] if life.orders else None
    return {
        "call_id": life.call_id,
        "user_id": life.user_id,
        "periods": list(life.periods),
        "status": life.status,
        "task_type": order.task_type if order else None,
        "stream": order.stream if order else None,
        "campaign_id": order.campaign_id if order else None,
        "plan": (order.assigned_plan or order.plan) if order else None,
        "workers": list(life.workers),
        "holds": life.count(BudgetReserved),
        "attempts": life.count(ModelCalled),
        "fallbacks": life.count(FallbackUsed),
        "corrections": life.count(CostAdjusted),
        "cost_usd": _usd(life.cost_nanousd),
        "assumed_usd": _usd(life.assumed_nanousd),
        "held_usd": _usd(life.held_nanousd),
        "events": [_event_document(event) for event in life.events],
    }


def print_calls(reader: AuditReader, lives: Sequence[CallLife]) -> None:
    """Print calls as timelines."""
    console = make_console()
    for life in lives:
        _print_head(console, life)
        _print_timeline(console, life)
    _print_read(console, reader)


def _print_head(console: Console, life: CallLife) -> None:
    console.print()
    console.print(Text.assemble(" ", (f"Call {life.call_id}", "bold")))
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    rows = [("user", life.user_id), ("period", ", ".join(life.periods))]
    if life.orders:
        order = life.orders[-1]
        task = order.task_type + (f" on {order.stream}" if order.stream else "")
        rows += [("task", task + (f", campaign {order.campaign_id}" if order.campaign_id else ""))]
        rows += [("plan", plan_text(order).removeprefix("plan ")), ("workers", ", ".join(life.workers))]
    if life.status:
        rows.append(("status", _status_text(life)))
    for name, value in rows:
        facts.add_row(name, Text(plain(value)))
    console.print(Padding(facts, (0, 0, 0, 1), expand=False))


def _status_text(life: CallLife) -> str:
    parts = [life.status]
    if life.status != "denied" or life.cost_nanousd:
        parts.append(f"cost {money(life.cost_nanousd)}")
    if life.assumed_nanousd:
        whole = life.assumed_nanousd == life.cost_nanousd
        parts.append("assumed" if whole else f"{money(life.assumed_nanousd)} of it assumed")
    if life.held_nanousd:
        parts.append(f"{money(life.held_nanousd)} held")
    counts = (
        (BudgetReserved, "hold"),
        (ModelCalled, "attempt"),
        (FallbackUsed, "fallback"),
        (CostAdjusted, "correction"),
    )
    for kind, name in counts:
        if number := life.count(kind):
            parts.append(f"{number} {name}{'s' if number > 1 else ''}")
    return ", ".join(parts)


def _print_timeline(console: Console, life: CallLife) -> None:
    places = places_of(amount for event in life.events for amount in (event.amount, event.committed))
    is_wide = console.width >= _WIDE
    first, day = life.events[0].at_ms, ""
    entries: list[Entry] = []
    for event in life.events:
        headline, details = event_text(event)
        at = moment(event)
        if f"{at:%Y-%m-%d}" != day:
            day = f"{at:%Y-%m-%d}"
            entries.append(Entry([day, *[""] * (3 + is_wide)]))
        cells = [
            f"{at:%H:%M:%S}.{event.at_ms % 1000:03}",
            *([f"{(event.at_ms - first) / 1000:,.3f} s"] if is_wide else []),
            headline,
            money(event.amount, places) if event.amount and event.type != "budget-denied" else "",
            "" if event.committed is None else money(event.committed, places),
        ]
        entries.append(Entry(cells, details))
    console.print()
    columns = ("time (UTC)", *(["after>"] if is_wide else []), "what happened*", "amount>", "committed>")
    print_entries(console, columns, entries)
    console.print()


# --- Statements


def statement_document(reader: AuditReader, statement: Statement, *, has_holds: bool) -> dict[str, Any]:
    """Return a statement for programs."""
    return {
        "read": as_read(reader),
        "user_id": statement.user_id,
        "period": statement.period,
        "other_periods": list(statement.other_periods),
        "opening": {"settled_usd": _usd(0), "held_usd": _usd(0), "cap_usd": _usd(statement.opening_cap_nanousd)},
        "lines": [_line_document(line) for line in _shown(statement, has_holds=has_holds)],
        "closing": {
            "settled_usd": _usd(statement.settled_nanousd),
            "held_usd": _usd(statement.held_nanousd),
            "cap_usd": _usd(statement.cap_nanousd),
        },
    }


def _shown(statement: Statement, *, has_holds: bool) -> list[Line]:
    return [line for line in statement.lines if has_holds or line.event.type != "budget-reserved" or not line.is_agreed]


def _line_document(line: Line) -> dict[str, Any]:
    headline, details = movement_text(line.event)
    payload = line.event.payload
    return {
        "seq": line.event.seq,
        "id": line.event.id,
        "at": iso(line.event),
        "type": line.event.type,
        "call_id": line.event.call_id,
        "text": f"{headline}: {'; '.join(details)}",
        "author": getattr(payload, "author", None),
        "reason": getattr(payload, "reason", None),
        "charge_usd": _usd(line.settled_change_nanousd),
        "hold_usd": _usd(line.held_change_nanousd),
        "settled_usd": _usd(line.settled_nanousd),
        "held_usd": _usd(line.held_nanousd),
        "cap_usd": _usd(line.cap_nanousd),
        "stamped_usd": _usd(line.event.committed),
        "is_agreed": line.is_agreed,
    }


def print_statement(reader: AuditReader, statement: Statement, *, has_holds: bool) -> None:
    """Print a statement."""
    console = make_console()
    lines = _shown(statement, has_holds=has_holds)
    places = places_of(
        amount for line in lines for amount in (line.settled_change_nanousd, line.settled_nanousd, line.held_nanousd)
    )
    cap_places = places_of([statement.opening_cap_nanousd, *(line.cap_nanousd for line in lines)])

    def entry(time: str, text: str, amount: str, balance: tuple[int, int, int | None], details: Sequence[str]) -> Entry:
        settled, held, cap = balance
        shown = "-" if cap is None else money(cap, cap_places)
        is_bold = not time
        return Entry([time, text, amount, money(settled, places), money(held, places), shown], details, is_bold)

    closing = (statement.settled_nanousd, statement.held_nanousd, statement.cap_nanousd)
    entries = [entry("", "opening", "", (0, 0, statement.opening_cap_nanousd), ())]
    for line in lines:
        headline, details = movement_text(line.event)
        amount = money(line.settled_change_nanousd, places) if line.event.type.startswith("cost") else ""
        balance = (line.settled_nanousd, line.held_nanousd, line.cap_nanousd)
        entries.append(entry(f"{moment(line.event):%m-%d %H:%M:%S}", headline, amount, balance, details))
    entries.append(entry("", "closing", "", closing, ()))
    console.print()
    console.print(Text.assemble(" ", (f"Statement of {plain(statement.user_id)}, {statement.period}", "bold")))
    console.print()
    print_entries(console, ("time (UTC)", "movement*", "amount>", "settled>", "held>", "cap>"), entries)
    console.print()
    if statement.other_periods:
        console.print(Text(f" other periods: {', '.join(statement.other_periods)}", "dim"))
    _print_read(console, reader)
    for line in statement.disagreements:
        added, stamped = line.settled_nanousd + line.held_nanousd, line.event.committed or 0
        typer.echo(
            f"tollbook: event {line.event.seq}: the gate wrote {money(stamped)} committed, the events before it "
            f"add up to {money(added)}",
            err=True,
        )


# --- Explanations


def explanations_document(reader: AuditReader, found: Sequence[tuple[CallLife, Sequence[Decision]]]) -> dict[str, Any]:
    """Return explanations for programs."""
    return {
        "read": as_read(reader),
        "calls": [
            {
                "call_id": life.call_id,
                "user_id": life.user_id,
                "status": life.status,
                "is_refused": any(decision.is_refusal for decision in decisions),
                "decisions": [_decision_document(decision) for decision in decisions],
            }
            for life, decisions in found
        ],
    }


def _decision_document(decision: Decision) -> dict[str, Any]:
    payload = decision.event.payload
    return {
        **_event_document(decision.event),
        "is_refusal": decision.is_refusal,
        "reason": payload.reason if isinstance(payload, BudgetDenied) else None,
        "budgets": [_weighing_document(weighing, decision) for weighing in decision.weighings],
    }


def _weighing_document(weighing: Weighing, decision: Decision) -> dict[str, Any]:
    room = weighing.room
    return {
        "budget": weighing.budget,
        "cap_usd": _usd(weighing.cap_nanousd),
        "settled_usd": _usd(weighing.settled_nanousd),
        "held_usd": _usd(weighing.held_nanousd),
        "own_held_usd": _usd(weighing.own_held_nanousd),
        "amount_usd": _usd(weighing.amount_nanousd),
        "over_usd": _usd(weighing.over_nanousd),
        "over_with_holds_usd": _usd(weighing.over_with_holds_nanousd),
        "is_agreed": weighing.is_agreed,
        "cap_text": cap_text(weighing, decision).replace("\n", "; "),
        "verdict": verdict_text(weighing, decision),
        "ways_out": ways_out(weighing, decision) if decision.is_refusal else [],
        "room": None if room is None else {"seq": room.seq, "id": room.id, "at": iso(room)},
        "other_holds": [
            {
                "call_id": hold.call_id,
                "user_id": hold.user_id,
                "worker": hold.worker,
                "since": iso(hold.since),
                "amount_usd": _usd(hold.amount_nanousd),
                "settled_at": None if hold.settled_by is None else iso(hold.settled_by),
                "cost_usd": None if hold.settled_by is None else _usd(hold.settled_by.amount),
            }
            for hold in weighing.others
        ],
    }


def print_explanations(reader: AuditReader, found: Sequence[tuple[CallLife, Sequence[Decision]]]) -> None:
    """Print explanations."""
    console = make_console()
    for life, decisions in found:
        console.print()
        console.print(Text.assemble(" ", (f"Call {plain(life.call_id)} of {plain(life.user_id)}", "bold")))
        if not decisions:
            console.print(Text(" was not weighed: no money was held for it"))
        elif not any(decision.is_refusal for decision in decisions):
            console.print(Text(f" was not refused; {_status_text(life)}"))
        for decision in decisions:
            _print_decision(console, decision)
    console.print()
    _print_read(console, reader)
    for _, decisions in found:
        for decision in decisions:
            _tell_disagreements(decision)


def _print_decision(console: Console, decision: Decision) -> None:
    payload = decision.event.payload
    assert isinstance(payload, BudgetDenied | BudgetReserved)
    headline, _ = event_text(decision.event)
    console.print()
    console.print(Text(f" {iso(decision.event)}, event {decision.event.seq:,}: {headline}"))
    console.print(Text(f" {plain(payload.bound.model)}: {bound_text(payload.bound)}", "dim"))
    for weighing in decision.weighings:
        _print_weighing(console, weighing, decision)


def _print_weighing(console: Console, weighing: Weighing, decision: Decision) -> None:
    rows = [("settled", weighing.settled_nanousd, "")]
    if weighing.own_held_nanousd:
        rows.append(("held by itself", weighing.own_held_nanousd, "for attempts before"))
    rows += [
        (f"held by {plain(hold.call_id)}", hold.amount_nanousd, hold_text(hold)) for hold in weighing.others[:_SHOWN]
    ]
    if rest := weighing.others[_SHOWN:]:
        rows.append((f"held by {len(rest):,} others", sum(hold.amount_nanousd for hold in rest), "--json lists them"))
    rows.append(("this call", weighing.amount_nanousd, ""))
    total = sum(amount for _, amount, _ in rows)
    places = places_of([*(amount for _, amount, _ in rows), total, weighing.cap_nanousd])
    table = make_table((budget_text(weighing.budget), "amount>", ""))
    for column in (table.columns[0], table.columns[2]):
        column.no_wrap, column.overflow = False, "fold"
    for name, amount, note in rows:
        table.add_row(Text(name), money(amount, places), Text(note, "dim"))
    table.add_section()
    table.add_row("together", money(total, places), Text(verdict_text(weighing, decision), "bold"))
    table.add_row("cap", money(weighing.cap_nanousd, places), Text(cap_text(weighing, decision), "dim"))
    console.print(table)
    if decision.is_refusal:
        console.print(Text(" Any of these would have let it pass:"))
        for way in ways_out(weighing, decision):
            console.print(Padding(Text(f"- {way}"), (0, 0, 0, 3), expand=False))
        console.print(Text(f" {room_text(weighing, decision)}"))


def _tell_disagreements(decision: Decision) -> None:
    for weighing in decision.weighings:
        if not weighing.is_agreed:
            added = weighing.settled_nanousd + weighing.held_nanousd
            stamped = money(weighing.stamped_nanousd or 0)
            typer.echo(
                f"tollbook: event {decision.event.seq}: before it the gate had {stamped} committed to "
                f"{weighing.budget}, the events before it add up to {money(added)}",
                err=True,
            )
