"""The words of an audit: events, decisions and amounts as sentences for people, exact to the nano-dollar."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import assert_never

from ledger.audit_explanations import Decision, OtherHold, Weighing, bound_nanousd, most_completion_tokens
from schemas.events import (
    BoundPrice,
    BudgetDenied,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    CreditGranted,
    Event,
    FallbackUsed,
    ModelCalled,
    PlanAssigned,
    SegmentSealed,
)
from schemas.identifiers import split_budget_name
from schemas.money import usd_from_nanousd
from schemas.usage import Usage

_OUTCOMES = {
    "ok": "answered",
    "http_error": "refused by the provider",
    "provider_error": "failed at the provider",
    "invalid_response": "answered with what is no answer",
    "timeout": "timed out",
    "connection_error": "lost its connection",
    "not_sent": "was never sent",
    "abandoned": "abandoned by its worker",
}
_BASES = {
    "reported": "as the provider reported",
    "priced": "priced from its usage",
    "assumed": "assumed, since nobody knows",
    "released": "nothing was spent",
}
_ENDS = {
    "done": "settled",
    "failed": "failed and settled",
    "expired": "hold expired and was settled",
    "taken_over": "worker given up, its hold settled",
    "recorded": "spend recorded without a hold",
}


def plain(text: str) -> str:
    """Return a text that people wrote without what could steer a terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def places_of(amounts: Iterable[int | None]) -> int:
    """Return how many decimal places show all these amounts exactly; at least two."""
    places = 2
    for amount in amounts:
        while places < 9 and amount is not None and amount % 10 ** (9 - places):
            places += 1
    return places


def money(nanousd: int, places: int | None = None, *, is_signed: bool = False) -> str:
    """Write an amount exactly, with as many places as it needs, or with so many."""
    digits = f"{usd_from_nanousd(abs(nanousd)):,.{places_of([nanousd]) if places is None else places}f}"
    return f"{'-' if nanousd < 0 else '+' if is_signed and nanousd else ''}${digits}"


def moment(event: Event) -> datetime:
    """Return when an event was written."""
    return datetime.fromtimestamp(event.at_ms / 1000, UTC)


def iso(event: Event) -> str:
    """Return when an event was written, as ISO 8601 in UTC."""
    return f"{moment(event):%Y-%m-%dT%H:%M:%S}.{event.at_ms % 1000:03}Z"


def budget_text(name: str) -> str:
    """Return a budget in words."""
    kind, subject, window = split_budget_name(name)
    match kind:
        case "user":
            return f"{subject}'s period {window}"
        case "day":
            return f"{subject}'s day {window}"
        case _:
            return f"{kind} {subject} in {window}"


def bound_text(bound: BoundPrice) -> str:
    """Return how a bound was calculated."""
    parts = [
        f"{bound.prompt_tokens:,} prompt tokens x {money(bound.prompt_nanousd_per_mtok)}/M",
        f"{bound.completion_tokens:,} completion tokens x {money(bound.completion_nanousd_per_mtok)}/M",
    ]
    if bound.request_nanousd:
        parts.append(f"{money(bound.request_nanousd)} a request")
    return f"{' + '.join(parts)} = {money(bound_nanousd(bound))}"


def usage_text(usage: Usage) -> str:
    """Return tokens in words."""
    text = f"{usage.prompt_tokens:,} prompt + {usage.completion_tokens:,} completion tokens"
    parts = [
        f"{count:,} {name}"
        for name, count in (
            ("cached", usage.cached_tokens),
            ("written to the cache", usage.cache_write_tokens),
            ("reasoning", usage.reasoning_tokens),
        )
        if count
    ]
    return f"{text} ({', '.join(parts)})" if parts else text


def event_text(event: Event) -> tuple[str, list[str]]:
    """Return an event as a headline and its details."""
    match event.payload:
        case BudgetReserved() as payload:
            return _reserved(event, payload)
        case ModelCalled() as payload:
            return _model_called(event, payload)
        case FallbackUsed() as payload:
            status = f", HTTP {payload.http_status}" if payload.http_status else ""
            reason = payload.reason.replace("_", " ")
            return f"falls back to {plain(payload.to_model)}", [f"from {plain(payload.from_model)}: {reason}{status}"]
        case CostRecorded() as payload:
            return _recorded(payload)
        case BudgetDenied() as payload:
            return _denied(event, payload)
        case CostAdjusted() as payload:
            details = [f"by {plain(payload.author)}: {plain(payload.reason)}"]
            if payload.assumed_nanousd:
                details.append(f"assumed part {money(payload.assumed_nanousd, is_signed=True)}")
            if payload.generation_id:
                details.append(f"generation {plain(payload.generation_id)}")
            return f"corrected, {_BASES[payload.basis]}", details
        case PlanAssigned() as payload:
            headline = f"plan {plain(payload.plan)}, cap {money(payload.cap_nanousd)}"
            return headline, [f"by {plain(payload.author)}: {plain(payload.reason)}"]
        case CreditGranted() as payload:
            return f"credit of {money(event.amount)}", [f"by {plain(payload.author)}: {plain(payload.reason)}"]
        case SegmentSealed() as payload:
            return f"sealed {payload.segment}", [f"{payload.events:,} events, {payload.first_id} to {payload.last_id}"]
        case _:
            assert_never(event.payload)


def _reserved(event: Event, payload: BudgetReserved) -> tuple[str, list[str]]:
    verb = "held" if payload.kind == "hold" else "held in addition"
    worker = plain(payload.worker)
    details = [
        f"{plain(payload.bound.model)}: {bound_text(payload.bound)}",
        f"{'claimed by' if payload.kind == 'hold' else 'by'} {worker}, {plan_text(payload)}, "
        f"cap {money(payload.cap_nanousd)}",
    ]
    for stamp in payload.budgets:
        cap = "" if stamp.cap_nanousd is None else f" of {money(stamp.cap_nanousd)}"
        details.append(f"{budget_text(stamp.budget)}: {money(stamp.committed_nanousd)}{cap} committed")
    if payload.deadline_ms:
        due = datetime.fromtimestamp(payload.deadline_ms / 1000, UTC)
        details.append(f"hold {payload.hold} is due by {due:%H:%M:%S}")
    return f"{verb} for attempt {event.attempt}", details


def plan_text(payload: BudgetReserved | BudgetDenied) -> str:
    """Return the plan that counts, and the one that the task names where it is another."""
    if payload.assigned_plan in (None, payload.plan):
        return f"plan {plain(payload.plan)}"
    return f"plan {plain(payload.assigned_plan or '')} (the task says {plain(payload.plan)})"


def _model_called(event: Event, payload: ModelCalled) -> tuple[str, list[str]]:
    status = f" (HTTP {payload.http_status})" if payload.http_status and payload.outcome != "ok" else ""
    details = [f"{plain(payload.model)}, {payload.latency_ms:,} ms"]
    if payload.model_used and payload.model_used != payload.model:
        details[0] += f", answered by {plain(payload.model_used)}"
    if payload.error:
        details.append(plain(payload.error))
    if payload.usage is not None:
        details.append(usage_text(payload.usage))
    details.append(f"booked at {money(payload.charge_nanousd)}: {_BASES[payload.charge_basis]}")
    ending = [f"finish reason {plain(payload.finish_reason)}"] if payload.finish_reason else []
    if payload.generation_id:
        ending.append(f"generation {plain(payload.generation_id)}")
    return f"attempt {event.attempt} {_OUTCOMES[payload.outcome]}{status}", [
        *details,
        *([", ".join(ending)] * bool(ending)),
    ]


def _recorded(payload: CostRecorded) -> tuple[str, list[str]]:
    details = [_BASES[payload.basis]]
    if payload.reason:
        details.append(plain(payload.reason))
    if payload.hold_nanousd:
        details.append(f"hold of {money(payload.hold_nanousd)} freed")
    if payload.assumed_nanousd:
        details.append(f"{money(payload.assumed_nanousd)} of it assumed")
    if payload.overage_nanousd:
        details.append(f"{money(payload.overage_nanousd)} more than was held")
    if payload.outcome == "recorded":
        details += [plain(payload.model)] if payload.model else []
        details += [usage_text(payload.usage)] if payload.usage else []
    return _ENDS[payload.outcome], details


def _denied(event: Event, payload: BudgetDenied) -> tuple[str, list[str]]:
    headline = "refused" if payload.reason == "cap" else "refused after waiting for others' holds"
    return headline, [
        f"asked for {money(event.amount)}: {plain(payload.bound.model)}, {bound_text(payload.bound)}",
        f"{budget_text(payload.budget)}: {money(payload.settled_nanousd)} settled, {money(payload.held_nanousd)} held, "
        f"cap {money(payload.cap_nanousd)}",
        f"asked by {plain(payload.worker)}, {plan_text(payload)}",
    ]


def movement_text(event: Event) -> tuple[str, list[str]]:
    """Return an event as a line of a statement."""
    match event.payload:
        case BudgetReserved(kind=kind):
            return ("hold" if kind == "hold" else "hold extended"), [event.call_id]
        case CostRecorded(outcome=outcome, reason=reason, assumed_nanousd=assumed, overage_nanousd=overage):
            notes = [plain(reason)] if reason else []
            notes += [f"{money(assumed)} assumed"] if assumed else []
            notes += [f"{money(overage)} over its hold"] if overage else []
            ends = {"done": "charge", "recorded": "charge without a hold", "taken_over": "charge, taken over"}
            return ends.get(outcome, f"charge, {outcome}"), [event.call_id, *notes]
        case BudgetDenied() as payload:
            why = f"{money(event.amount)} asked, {budget_text(payload.budget)}"
            return ("refused" if payload.reason == "cap" else "refused after a wait"), [event.call_id, why]
        case CostAdjusted() as payload:
            return "correction", [event.call_id, f"{plain(payload.author)}: {plain(payload.reason)}"]
        case _:
            headline, details = event_text(event)
            return headline, details


def cap_text(weighing: Weighing, decision: Decision) -> str:
    """Return what a cap is made of."""
    payload, cap = decision.event.payload, weighing.cap
    if cap is None or not isinstance(payload, BudgetReserved | BudgetDenied):
        return "set by configuration"
    if cap.assigned is not None and isinstance(assigned := cap.assigned.payload, PlanAssigned):
        text = f"plan {plain(assigned.plan)}, {money(assigned.cap_nanousd)}, by {plain(assigned.author)}"
        text += f" on {moment(cap.assigned):%Y-%m-%d} ({plain(assigned.reason)})"
    else:
        text = f"plan {plain(payload.plan)}, as the task names it"
    for credit in cap.credits:
        assert isinstance(credit.payload, CreditGranted)
        text += f"; credit {money(credit.amount)} by {plain(credit.payload.author)} ({plain(credit.payload.reason)})"
    return text


def hold_text(hold: OtherHold) -> str:
    """Return what became of another call's hold."""
    if hold.settled_by is None:
        return "still open"
    return f"settled at {money(hold.settled_by.amount)}"


def ways_out(weighing: Weighing, decision: Decision) -> list[str]:
    """Return what would have let a refused call pass."""
    payload = decision.event.payload
    assert isinstance(payload, BudgetDenied)
    ways: list[str] = []
    raise_by = "a cap or credit higher by" if split_budget_name(weighing.budget)[0] == "user" else "a cap higher by"
    if weighing.over_nanousd > 0:
        text = f"{raise_by} {money(weighing.over_nanousd)}"
        if weighing.held_nanousd:
            text += f", once the open holds are settled; by {money(weighing.over_with_holds_nanousd)} at once"
        ways.append(text)
    else:
        ways.append(
            f"{money(weighing.over_with_holds_nanousd)} of the {money(weighing.held_nanousd)} held by other calls "
            "coming back before its wait was over"
        )
        ways.append(f"{raise_by} {money(weighing.over_with_holds_nanousd)}")
    ways.append(_smaller(weighing, payload.bound))
    if weighing.room is None:
        ways.append("no later time: there has been no room for it up to where the ledger was read")
    else:
        seconds = (weighing.room.at_ms - decision.event.at_ms) / 1000
        ways.append(
            f"a later time: there was room {seconds:,.1f} s later, after event {weighing.room.seq} "
            f"({event_text(weighing.room)[0]}, {plain(weighing.room.call_id)})"
        )
    return ways


def _smaller(weighing: Weighing, bound: BoundPrice) -> str:
    room = weighing.amount_nanousd - max(
        weighing.over_nanousd, 0 if weighing.over_nanousd > 0 else weighing.over_with_holds_nanousd
    )
    tokens = most_completion_tokens(bound, room) if room >= 0 else None
    if not tokens:
        return f"no smaller answer: its prompt alone leaves no room for one within {money(max(room, 0))}"
    return f"max_tokens of at most {tokens:,} instead of {bound.completion_tokens:,} (within {money(room)})"
