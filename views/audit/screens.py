"""Prints audits: lives of calls, statements, explanations and found events, as tables and sentences."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tollbook.audit.calls import CallLife
from tollbook.audit.explanations import Decision, Weighing
from tollbook.audit.reader import AuditReader
from tollbook.audit.statements import Line, Statement
from tollbook.schemas.events import BudgetDenied, BudgetReserved, CostAdjusted, FallbackUsed, ModelCalled
from tollbook.schemas.identifiers import describe_budget
from tollbook.schemas.money import exact_places, format_usd, nanousd_from_decimal
from tollbook.views.audit.decision_texts import cap_text, hold_text, room_text, verdict_text, ways_out
from tollbook.views.audit.texts import (
    bound_text,
    event_text,
    iso,
    moment,
    movement_text,
    plan_text,
)
from tollbook.views.tables import Printer, Row, printable

# From this width on, a timeline also shows the time since the first event.
_WIDE = 100
# How many other calls' holds are listed, the largest first; the rest is summed up.
_SHOWN = 10


def print_calls(reader: AuditReader, lives: Sequence[CallLife]) -> None:
    """Print calls as timelines."""
    printer = Printer()
    for life in lives:
        printer.line()
        printer.text(f"Call {printable(life.call_id)}", "bold")
        printer.facts(life_facts(life))
        _print_timeline(printer, life)
    printer.line()
    _print_read(printer, reader)


def life_facts(life: CallLife) -> list[tuple[str, str]]:
    """Return the facts about a call as names and values, the user first."""
    facts = [("user", life.user_id), ("period", ", ".join(life.periods))]
    if life.orders:
        order = life.orders[-1]
        task = order.task_type + (f" on {order.stream}" if order.stream else "")
        facts += [("task", task + (f", campaign {order.campaign_id}" if order.campaign_id else ""))]
        facts += [("plan", plan_text(order).removeprefix("plan ")), ("workers", ", ".join(life.workers))]
    if life.status:
        facts.append(("status", _status_text(life)))
    return [(name, printable(value)) for name, value in facts]


def _status_text(life: CallLife) -> str:
    parts = [life.status]
    if life.status != "denied" or life.cost_nanousd:
        parts.append(f"cost {format_usd(life.cost_nanousd, places=None)}")
    if life.assumed_nanousd:
        is_whole = life.assumed_nanousd == life.cost_nanousd
        parts.append("assumed" if is_whole else f"{format_usd(life.assumed_nanousd, places=None)} of it assumed")
    if life.held_nanousd:
        parts.append(f"{format_usd(life.held_nanousd, places=None)} held")
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


def _print_timeline(printer: Printer, life: CallLife) -> None:
    places = exact_places(amount for event in life.events for amount in (event.amount, event.committed))
    is_wide = printer.width >= _WIDE
    first, day = life.events[0].at_ms, ""
    rows: list[Row] = []
    for event in life.events:
        headline, details = event_text(event)
        at = moment(event)
        if f"{at:%Y-%m-%d}" != day:
            day = f"{at:%Y-%m-%d}"
            rows.append(Row([day, *[""] * (3 + is_wide)]))
        cells = [
            f"{at:%H:%M:%S}.{event.at_ms % 1000:03}",
            *([f"{(event.at_ms - first) / 1000:,.3f} s"] if is_wide else []),
            headline,
            format_usd(event.amount, places=places) if event.amount and event.type != "budget-denied" else "",
            "" if event.committed is None else format_usd(event.committed, places=places),
        ]
        rows.append(Row(cells, details))
    columns = ("time (UTC)", *(["after>"] if is_wide else []), "what happened*", "amount>", "committed>")
    printer.table(columns, rows)


def _print_read(printer: Printer, reader: AuditReader) -> None:
    for number, position in sorted(reader.positions.items()):
        where = f", partition {number}" if len(reader.source.keys) > 1 else ""
        archived = f"archive up to event {reader.archived[number]:,}"
        stream = "no stream" if reader.source.redis is None else f"stream up to event {position.seq:,}"
        printer.text(f"read: {archived}, {stream} (ledger {reader.source.ledger_id}{where})", "dim")


def print_statement(reader: AuditReader, statement: Statement, lines: Sequence[Line], *, left_out: int = 0) -> None:
    """Print a statement with these lines; the first row sums up the `left_out` lines before them."""
    printer = Printer()
    opening = None
    if left_out:
        opening = next(line for line in reversed(statement.lines) if line.event.seq < lines[0].event.seq)
    amounts = (
        amount
        for line in (*lines, *([opening] if opening else []))
        for amount in (line.settled_change_nanousd, line.settled_nanousd, line.held_nanousd)
    )
    places = exact_places(amounts)
    cap_places = exact_places([statement.opening_cap_nanousd, *(line.cap_nanousd for line in lines)])

    def row(time: str, text: str, amount: str, balance: Line | Statement | None, details: Sequence[str] = ()) -> Row:
        settled, held = (balance.settled_nanousd, balance.held_nanousd) if balance else (0, 0)
        cap = balance.cap_nanousd if balance else statement.opening_cap_nanousd
        cells = [
            *(time, text, amount, format_usd(settled, places=places), format_usd(held, places=places)),
            "-" if cap is None else format_usd(cap, places=cap_places),
        ]
        return Row(cells, details, "" if time else "bold")

    rows = [row("", "brought forward" if opening else "opening", "", opening)]
    for line in lines:
        headline, details = movement_text(line.event)
        is_cost = line.event.type.startswith("cost")
        amount = format_usd(line.settled_change_nanousd, places=places) if is_cost else ""
        rows.append(row(f"{moment(line.event):%m-%d %H:%M:%S}", headline, amount, line, details))
    rows.append(row("", "closing", "", statement))
    columns = ("time (UTC)", "movement*", "amount>", "settled>", "held>", "cap>")
    printer.table(columns, rows, f"Statement of {printable(statement.user_id)}, {statement.period}")
    _print_further(printer, statement)
    printer.line()
    if left_out:
        printer.text(f"{left_out:,} earlier movements are left out; --last {left_out + len(lines)} shows all", "dim")
    if statement.other_periods:
        printer.text(f"other periods: {', '.join(statement.other_periods)}", "dim")
    _print_read(printer, reader)


def _print_further(printer: Printer, statement: Statement) -> None:
    """Print the user's spend in further budgets in the period, next to everybody's."""

    def usd(nanousd: int | None) -> str:
        return "-" if nanousd is None else format_usd(nanousd, places=None)

    if statement.further:
        rows = [
            [
                printable(describe_budget(each.budget)),
                usd(each.own_settled_nanousd),
                usd(each.own_held_nanousd),
                usd(each.committed_nanousd),
                usd(each.cap_nanousd),
            ]
            for each in statement.further
        ]
        columns = ("budget*", "own spend>", "own holds>", "of everybody>", "cap>")
        printer.table(columns, rows, "Further budgets that these movements count in")


def statement_problems(statement: Statement) -> list[str]:
    """Return the events at which the gate's balance differs from the sum of the events."""
    return [
        f"event {line.event.seq}: the gate wrote {format_usd(line.event.committed or 0, places=None)} committed, "
        f"the events before it add up to {format_usd(line.settled_nanousd + line.held_nanousd, places=None)}"
        for line in statement.disagreements
    ]


def print_explanations(reader: AuditReader, found: Sequence[tuple[CallLife, Sequence[Decision]]]) -> None:
    """Print the decisions on calls, with the numbers that decided them."""
    printer = Printer()
    for life, decisions in found:
        printer.line()
        printer.text(f"Call {printable(life.call_id)} of {printable(life.user_id)}", "bold")
        if not decisions:
            printer.text("no decision: no money was asked for")
        elif not any(decision.is_refusal for decision in decisions):
            printer.text(f"was not refused; {_status_text(life)}")
        for decision in decisions:
            _print_decision(printer, decision)
    printer.line()
    _print_read(printer, reader)


def explanation_problems(found: Sequence[tuple[CallLife, Sequence[Decision]]]) -> list[str]:
    """Return the decisions at which the gate's balance differs from the sum of the events."""
    return [
        f"event {decision.event.seq}: before it the gate had {format_usd(each.stamped_nanousd or 0, places=None)} "
        f"committed to {describe_budget(each.budget)}, the events before it add up to "
        f"{format_usd(each.settled_nanousd + each.held_nanousd, places=None)}"
        for _, decisions in found
        for decision in decisions
        for each in decision.weighings
        if not each.is_agreed
    ]


def _print_decision(printer: Printer, decision: Decision) -> None:
    payload = decision.event.payload
    assert isinstance(payload, BudgetDenied | BudgetReserved)
    headline, _ = event_text(decision.event)
    printer.line()
    printer.text(f"{iso(decision.event)}, event {decision.event.seq:,}: {headline}")
    printer.text(f"{printable(payload.bound.model)}: {bound_text(payload.bound)}", "dim", hang=2)
    for weighing in decision.weighings:
        _print_weighing(printer, weighing, decision)


def _print_weighing(printer: Printer, weighing: Weighing, decision: Decision) -> None:
    parts = [("settled", weighing.settled_nanousd, "")]
    if weighing.own_held_nanousd:
        parts.append(("held by this call", weighing.own_held_nanousd, "for earlier attempts"))
    parts += [
        (f"held by {printable(hold.call_id)}", hold.amount_nanousd, hold_text(hold))
        for hold in weighing.others[:_SHOWN]
    ]
    if rest := weighing.others[_SHOWN:]:
        parts.append((f"held by {len(rest):,} others", sum(hold.amount_nanousd for hold in rest), "--json lists them"))
    parts.append(("this call", weighing.amount_nanousd, ""))
    total = sum(amount for _, amount, _ in parts)
    places = exact_places([*(amount for _, amount, _ in parts), total, weighing.cap_nanousd])
    rows = [Row([name, format_usd(amount, places=places), note]) for name, amount, note in parts]
    verdict, cap = verdict_text(weighing, decision), cap_text(weighing, decision)
    rows.append(Row(["together", format_usd(total, places=places), verdict], style="bold", has_rule=True))
    rows.append(Row(["cap", format_usd(weighing.cap_nanousd, places=places), cap]))
    printer.table((describe_budget(weighing.budget), "amount>", "note*"), rows)
    if decision.is_refusal:
        printer.line()
        printer.text("Any of these would have let it pass:")
        for way in ways_out(weighing, decision):
            printer.text(f"- {way}", indent=3, hang=2)
        printer.text(room_text(weighing, decision))


def print_found(rows: Sequence[dict[str, Any]], *, has_partitions: bool) -> None:
    """Print found events; each is a row of the table `events`."""
    places = exact_places(_nanousd(row[name]) for row in rows for name in ("amount_usd", "committed_usd"))
    shown: list[Row] = []
    for row in rows:
        at: datetime = row["recorded_at"]
        amounts = [_nanousd(row[name]) for name in ("amount_usd", "committed_usd")]
        cells = [
            *([str(row["partition"])] if has_partitions else []),
            *(f"{row['seq']:,}", f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}", row["type"]),
            *("" if amount is None else format_usd(amount, places=places) for amount in amounts),
        ]
        shown.append(Row(cells, [_what(row)]))
    columns = ("event>", "time (UTC)", "type", "amount>", "committed>?")
    Printer().table((*(["partition>"] if has_partitions else []), *columns), shown)


def _what(row: dict[str, Any]) -> str:
    whose = " ".join(printable(row[name]) for name in ("user_id", "call_id") if row[name])
    if row["type"] in ("key-created", "key-revoked"):
        whose = f"{printable(str(json.loads(row['payload']).get('key_id')))} {whose}"
    names = ("model", "outcome", "basis", "plan", "author", "reason", "error")
    parts = dict.fromkeys(printable(str(row[name])) for name in names if row[name])
    return f"{whose}: {', '.join(parts)}" if parts else whose


def _nanousd(usd: Any) -> int | None:
    return None if usd is None else nanousd_from_decimal(usd)
