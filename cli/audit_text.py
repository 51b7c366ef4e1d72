"""The words of an audit: events, decisions and amounts as sentences for people, exact to the nano-dollar."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import assert_never

from tollbook.audit.explanations import Decision, OtherHold, Weighing, bound_nanousd, max_completion_tokens
from tollbook.schemas.events import (
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
from tollbook.schemas.identifiers import split_budget_name
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.usage import Usage

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
    "taken_over": "taken over, the hold settled",
    "recorded": "spend recorded without a hold",
}
_CHARGES = {"failed": "failed", "expired": "hold expired", "taken_over": "taken over", "recorded": "without a hold"}


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
            return _recorded(event, payload)
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


def _recorded(event: Event, payload: CostRecorded) -> tuple[str, list[str]]:
    details = [_basis_text(event.amount, payload)]
    if payload.reason:
        details.append(plain(payload.reason))
    if payload.hold_nanousd:
        details.append(f"hold of {money(payload.hold_nanousd)} freed")
    if payload.overage_nanousd:
        details.append(f"{money(payload.overage_nanousd)} more than was held")
    if payload.outcome == "recorded":
        details += [plain(payload.model)] if payload.model else []
        details += [usage_text(payload.usage)] if payload.usage else []
    return _ENDS[payload.outcome], details


def _basis_text(amount_nanousd: int, payload: CostRecorded) -> str:
    """Return where a cost comes from; of several attempts only a part may be assumed."""
    if 0 < payload.assumed_nanousd < amount_nanousd:
        return f"{money(payload.assumed_nanousd)} of it assumed, since nobody knows"
    return _BASES[payload.basis]


def _denied(event: Event, payload: BudgetDenied) -> tuple[str, list[str]]:
    headline = "refused" if payload.reason == "cap" else "refused after waiting for others' holds"
    return headline, [
        f"asked for {money(event.amount)}: {plain(payload.bound.model)}, {bound_text(payload.bound)}",
        f"{budget_text(payload.budget)}: {money(payload.settled_nanousd)} settled, {money(payload.held_nanousd)} held, "
        f"cap {money(payload.cap_nanousd)}",
        f"asked by {plain(payload.worker)}, {plan_text(payload)}",
    ]


def movement_text(event: Event) -> tuple[str, list[str]]:
    """Return an event as a line of a statement: its kind in a word or two, and what it is about."""
    call = plain(event.call_id)
    match event.payload:
        case BudgetReserved() as payload:
            what = "hold" if payload.kind == "hold" else "more held"
            return what, [f"{call}: {money(event.amount)}, {plain(payload.bound.model)}"]
        case CostRecorded() as payload:
            return "charge", [_noted(call, _charge_notes(event, payload))]
        case BudgetDenied() as payload:
            waited = "" if payload.reason == "cap" else " after a wait"
            return "refused", [f"{call}: {money(event.amount)} did not fit {budget_text(payload.budget)}{waited}"]
        case CostAdjusted() as payload:
            return "correction", [f"{call}: by {plain(payload.author)}: {plain(payload.reason)}"]
        case PlanAssigned() as payload:
            return "plan", [f"{plain(payload.plan)}, by {plain(payload.author)}: {plain(payload.reason)}"]
        case CreditGranted() as payload:
            return "credit", [f"{money(event.amount)}, by {plain(payload.author)}: {plain(payload.reason)}"]
        case _:
            return event.type, [event_text(event)[0]]


def _noted(call: str, notes: list[str]) -> str:
    return f"{call}: {', '.join(notes)}" if notes else call


def _charge_notes(event: Event, payload: CostRecorded) -> list[str]:
    notes = [_CHARGES[payload.outcome]] if payload.outcome in _CHARGES else []
    notes += [plain(payload.model)] if payload.model else []
    notes += [plain(payload.reason)] if payload.reason else []
    if payload.assumed_nanousd:
        whole = payload.assumed_nanousd == event.amount
        notes.append("assumed" if whole else f"{money(payload.assumed_nanousd)} of it assumed")
    notes += [f"{money(payload.overage_nanousd)} more than was held"] if payload.overage_nanousd else []
    return notes


def cap_text(weighing: Weighing, decision: Decision) -> str:
    """Return what a cap is made of."""
    payload, cap = decision.event.payload, weighing.cap
    if cap is None or not isinstance(payload, BudgetReserved | BudgetDenied):
        return "set by configuration"
    if cap.assigned is not None and isinstance(assigned := cap.assigned.payload, PlanAssigned):
        text = f"{money(assigned.cap_nanousd)} of plan {plain(assigned.plan)}, by {plain(assigned.author)}"
        text += f" on {moment(cap.assigned):%Y-%m-%d}: {plain(assigned.reason)}"
    else:
        text = f"{money(weighing.cap_nanousd - cap.credit_nanousd)} of plan {plain(payload.plan)}, as the task says"
    for credit in cap.credits:
        if isinstance(credit.payload, CreditGranted):
            text += (
                f"\n{money(credit.amount)} credit, by {plain(credit.payload.author)}: {plain(credit.payload.reason)}"
            )
    return text


def hold_text(hold: OtherHold) -> str:
    """Return since when another call held money, and what became of it."""
    held = f"since {moment(hold.since):%m-%d %H:%M:%S} by {plain(hold.worker)}"
    if hold.settled_by is None:
        return f"{held}, still open"
    return f"{held}; settled {moment(hold.settled_by):%m-%d %H:%M:%S} at {money(hold.settled_by.amount)}"


def verdict_text(weighing: Weighing, decision: Decision) -> str:
    """Return what the sum came to."""
    over, over_with_holds = weighing.over_nanousd, weighing.over_with_holds_nanousd
    if not decision.is_refusal:
        return f"fits: {money(-over_with_holds)} of the cap left"
    if over > 0:
        return f"refused: settled and this call alone are {money(over)} over the cap"
    return f"refused when its wait was over: with others' holds it is {money(over_with_holds)} over the cap"


def ways_out(weighing: Weighing, decision: Decision) -> list[str]:
    """Return what would have let a refused call pass."""
    payload = decision.event.payload
    assert isinstance(payload, BudgetDenied)
    over, over_with_holds = weighing.over_nanousd, weighing.over_with_holds_nanousd
    raised = "a cap or credit" if split_budget_name(weighing.budget)[0] == "user" else "a cap"
    ways: list[str] = []
    if over <= 0:
        ways.append(f"{money(over_with_holds)} less held by others, of {money(weighing.held_nanousd)}")
        ways.append(f"{raised} higher by {money(over_with_holds)}")
    elif weighing.held_nanousd:
        ways.append(
            f"{raised} higher by {money(over)} once others' holds are settled, by {money(over_with_holds)} at once"
        )
    else:
        ways.append(f"{raised} higher by {money(over)}")
    ways.append(_smaller(payload.bound, weighing.amount_nanousd - (over if over > 0 else over_with_holds)))
    return ways


def room_text(weighing: Weighing, decision: Decision) -> str:
    """Return when there was room for what was refused."""
    room = weighing.room
    if room is None:
        return "There has been no room for it since."
    seconds = (room.at_ms - decision.event.at_ms) / 1000
    return f"There was room for it {seconds:,.3f} s later, after event {room.seq:,}: {_said(room)}."


def _said(event: Event) -> str:
    headline, details = movement_text(event)
    return f"{headline}, {details[0]}"


def _smaller(bound: BoundPrice, room_nanousd: int) -> str:
    tokens = max_completion_tokens(bound, room_nanousd) if room_nanousd > 0 else None
    if not tokens:
        return "no shorter answer: its prompt alone does not fit"
    return f"an answer of at most {tokens:,} tokens instead of {bound.completion_tokens:,} (max_tokens)"
