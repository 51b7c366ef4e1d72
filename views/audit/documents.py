"""Audits as JSON documents. Dollars are text with nine decimal places."""

import json
from collections.abc import Sequence
from typing import Any

from tollbook.audit.calls import CallLife
from tollbook.audit.explanations import Decision, Weighing
from tollbook.audit.reader import AuditReader
from tollbook.audit.statements import Line, Statement
from tollbook.schemas.events import (
    BudgetDenied,
    BudgetReserved,
    CostAdjusted,
    Event,
    FallbackUsed,
    ModelCalled,
    payload_json,
)
from tollbook.schemas.money import usd_text
from tollbook.views.audit.decision_texts import cap_text, verdict_text, ways_out
from tollbook.views.audit.texts import event_text, iso, movement_text


def calls_document(reader: AuditReader, lives: Sequence[CallLife]) -> dict[str, Any]:
    """Return calls as a JSON document."""
    return {"read": _read_document(reader), "calls": [_call_document(life) for life in lives]}


def statement_document(reader: AuditReader, statement: Statement, lines: Sequence[Line]) -> dict[str, Any]:
    """Return a statement as a JSON document, with only these of its lines."""
    return {
        "read": _read_document(reader),
        "user_id": statement.user_id,
        "period": statement.period,
        "other_periods": list(statement.other_periods),
        "opening": {"settled_usd": _usd(0), "held_usd": _usd(0), "cap_usd": _usd(statement.opening_cap_nanousd)},
        "lines": [_line_document(line) for line in lines],
        "closing": {
            "settled_usd": _usd(statement.settled_nanousd),
            "held_usd": _usd(statement.held_nanousd),
            "cap_usd": _usd(statement.cap_nanousd),
        },
        "further_budgets": [
            {
                "budget": each.budget,
                "own_settled_usd": _usd(each.own_settled_nanousd),
                "own_held_usd": _usd(each.own_held_nanousd),
                "committed_usd": _usd(each.committed_nanousd),
                "cap_usd": _usd(each.cap_nanousd),
            }
            for each in statement.further
        ],
    }


def explanations_document(reader: AuditReader, found: Sequence[tuple[CallLife, Sequence[Decision]]]) -> dict[str, Any]:
    """Return explanations as a JSON document."""
    return {
        "read": _read_document(reader),
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


def _read_document(reader: AuditReader) -> dict[str, Any]:
    """Return which ledger was read, and up to which position."""
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


def _usd(nanousd: int | None) -> str | None:
    return None if nanousd is None else usd_text(nanousd)
