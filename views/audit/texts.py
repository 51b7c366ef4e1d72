"""Describes events in sentences, with amounts exact to the nano-dollar."""

from datetime import datetime
from decimal import Decimal
from typing import assert_never

from tollbook.audit.explanations import bound_nanousd
from tollbook.schemas.events import (
    AlertRaised,
    BoundPrice,
    BudgetDenied,
    BudgetOpened,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    CreditExpired,
    CreditGranted,
    CreditPayload,
    CreditRevoked,
    Event,
    FallbackUsed,
    KeyCreated,
    KeyRevoked,
    LedgerRecovered,
    ModelCalled,
    PlanAssigned,
    PlanCleared,
    PolicyApplied,
    SegmentSealed,
)
from tollbook.schemas.failures import ErrorDetails
from tollbook.schemas.identifiers import describe_budget
from tollbook.schemas.money import format_usd
from tollbook.schemas.routes import DEFAULT_PROVIDER, Target
from tollbook.schemas.usage import Usage
from tollbook.views.tables import printable, utc

_OUTCOMES = {
    "ok": "answered",
    "http_error": "refused by the provider",
    "provider_error": "failed at the provider",
    "invalid_response": "answered with something that is not an answer",
    "timeout": "timed out",
    "connection_error": "lost its connection",
    "not_sent": "was never sent",
    "abandoned": "abandoned by its worker",
}
_BASES = {
    "reported": "as the provider reported",
    "priced": "priced from its usage",
    "assumed": "assumed, the cost is unknown",
    "released": "nothing was spent",
}
_PROMPT_BASES = {
    "text": "",
    "tokenizer": " (counted by its tokenizer)",
    "context_length": " (all that the model can read)",
}
_ENDS = {
    "done": "settled",
    "failed": "failed and settled",
    "expired": "hold expired and was settled",
    "taken_over": "taken over, the hold settled",
    "recorded": "spend recorded without a hold",
}
_CHARGES = {"failed": "failed", "expired": "hold expired", "taken_over": "taken over", "recorded": "without a hold"}


def exact_usd(nanousd: int) -> str:
    """Format an amount with as many places as it needs."""
    return format_usd(nanousd, places=None)


def _signed(nanousd: int) -> str:
    return f"{'+' if nanousd > 0 else ''}{exact_usd(nanousd)}"


def signature_text(
    payload: CostAdjusted
    | PlanAssigned
    | PlanCleared
    | CreditGranted
    | CreditRevoked
    | LedgerRecovered
    | PolicyApplied
    | KeyCreated
    | KeyRevoked,
) -> str:
    """Return who changed something, and why."""
    return f"by {printable(payload.author)}: {printable(payload.reason)}"


def moment(event: Event) -> datetime:
    """Return when an event was written."""
    return utc(event.at_ms)


def iso(event: Event) -> str:
    """Return when an event was written, as ISO 8601 in UTC."""
    return f"{moment(event):%Y-%m-%dT%H:%M:%S}.{event.at_ms % 1000:03}Z"


def bound_text(bound: BoundPrice) -> str:
    """Return how a bound was calculated."""
    basis = _PROMPT_BASES[bound.prompt_basis]
    parts = [
        f"{bound.prompt_tokens:,} prompt tokens{basis} x {exact_usd(bound.prompt_nanousd_per_mtok)}/M",
        f"{bound.completion_tokens:,} completion tokens x {exact_usd(bound.completion_nanousd_per_mtok)}/M",
    ]
    if bound.request_nanousd:
        parts.append(f"{exact_usd(bound.request_nanousd)} a request")
    source = f", priced by {source_text(bound.source)}" if bound.source else ""
    return f"{' + '.join(parts)} = {exact_usd(bound_nanousd(bound))}{source}"


def model_text(model: str, provider: str | None) -> str:
    """Return a model, with its provider if that is not the default one."""
    return printable(str(Target(model, provider or DEFAULT_PROVIDER)))


def source_text(source: str) -> str:
    """Return where a price comes from, in words."""
    kind, _, detail = source.partition(" ")
    match kind:
        case "policy":
            return "the policy"
        case "provider":
            return f"the provider's list of {printable(detail)}"
        case "catalogue":
            return f"the catalogue {printable(detail)}"
        case _:
            return printable(source)


def usage_text(usage: Usage) -> str:
    """Return tokens in words."""
    text = f"{usage.prompt_tokens:,} prompt + {usage.completion_tokens:,} completion tokens"
    parts = [
        f"{count:,} {name}"
        for name, count in (
            ("cached", usage.cached_tokens),
            ("written to the cache", usage.cache_write_tokens),
            ("of them for an hour", usage.cache_write_1h_tokens),
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
            return f"falls back to {model_text(payload.to_model, payload.to_provider)}", [
                f"from {model_text(payload.from_model, payload.from_provider)}: {reason}{status}"
            ]
        case CostRecorded() as payload:
            return _recorded(event, payload)
        case BudgetDenied() as payload:
            return _denied(event, payload)
        case CostAdjusted() as payload:
            details = [signature_text(payload)]
            if payload.assumed_nanousd:
                details.append(f"assumed part {_signed(payload.assumed_nanousd)}")
            if payload.generation_id:
                details.append(f"generation {printable(payload.generation_id)}")
            return f"corrected, {_BASES[payload.basis]}", details
        case PlanAssigned() as payload:
            headline = f"plan {printable(payload.plan)}, cap {exact_usd(payload.cap_nanousd)}"
            return headline, [signature_text(payload)]
        case PlanCleared() as payload:
            return "plan cleared: the plan that tasks name applies", [signature_text(payload)]
        case CreditGranted() as payload:
            return f"credit of {exact_usd(event.amount)}{_of_budget(payload)}", [signature_text(payload)]
        case CreditRevoked() as payload:
            return f"credit of {exact_usd(-event.amount)}{_of_budget(payload)} taken back", [signature_text(payload)]
        case CreditExpired() as payload:
            return f"credit{_of_budget(payload)} expired", [f"{exact_usd(-event.amount)} was left of it"]
        case AlertRaised() as payload:
            percent = f"{Decimal(payload.fraction) * 100:f}".rstrip("0").rstrip(".")
            return f"alert: {percent} % of {describe_budget(payload.budget)}", [
                f"{exact_usd(payload.settled_nanousd)} settled of {exact_usd(payload.cap_nanousd)}, "
                f"raised by call {printable(payload.cause)}"
            ]
        case SegmentSealed() as payload:
            return f"sealed {payload.segment}", [f"{payload.events:,} events, {payload.first_id} to {payload.last_id}"]
        case LedgerRecovered() as payload:
            return f"ledger recovered, {payload.events:,} events were lost", [
                f"{payload.first_id} to {payload.last_id}: {payload.restored:,} restored, "
                f"{payload.entered:,} entered again by new events ({exact_usd(payload.entered_nanousd)})",
                signature_text(payload),
            ]
        case PolicyApplied() as payload:
            return f"policy {payload.version} in force", [f"digest {payload.digest}", signature_text(payload)]
        case BudgetOpened() as payload:
            (stamp,) = payload.budgets
            details = [f"{exact_usd(event.amount)} was spent in it before"]
            if payload.holds:
                details.append(f"{exact_usd(payload.hold_nanousd)} is held by open calls: {len(payload.holds):,}")
            return f"opened by policy {payload.policy_version}: {describe_budget(stamp.budget)}", details
        case KeyCreated() as payload:
            return f"key {printable(payload.key_id)} created", [*_bounds_of_key(payload), signature_text(payload)]
        case KeyRevoked() as payload:
            when = "" if payload.at_ms <= event.at_ms else f" from {utc(payload.at_ms):%Y-%m-%d %H:%M:%S} on"
            return f"key {printable(payload.key_id)} revoked{when}", [signature_text(payload)]
        case _:
            assert_never(event.payload)


def _bounds_of_key(payload: KeyCreated) -> list[str]:
    """Return a key's rights and attributes, without its hash."""
    facts = {
        "called": payload.name,
        "for user": payload.user_id,
        "plan": payload.plan,
        "campaign": payload.campaign_id,
        "tags": ", ".join(f"{name}={value}" for name, value in (payload.tags or {}).items()),
        "for": ", ".join(payload.models),
        "on": ", ".join(payload.streams),
        "clients may give": ", ".join(payload.allows),
        "expires": payload.expires_ms and f"{utc(payload.expires_ms):%Y-%m-%d %H:%M:%S}",
        "replaces": payload.replaces,
    }
    texts = [f"{name} {printable(str(value))}" for name, value in facts.items() if value]
    return [*(["an admin's key"] * payload.is_admin), *([", ".join(texts)] * bool(texts))]


def _of_budget(payload: CreditPayload) -> str:
    """Return the credit and its budget; '' for a user's period, which the event already names."""
    if payload.budget is None:
        return ""
    return f" {printable(payload.credit or '')} of {describe_budget(payload.budget)}"


def _reserved(event: Event, payload: BudgetReserved) -> tuple[str, list[str]]:
    verb = "held" if payload.kind == "hold" else "held in addition"
    worker = printable(payload.worker)
    details = [
        f"{model_text(payload.bound.model, payload.bound.provider)}: {bound_text(payload.bound)}",
        f"{'claimed by' if payload.kind == 'hold' else 'by'} {worker}, {plan_text(payload)}, "
        f"cap {exact_usd(payload.cap_nanousd)}",
    ]
    for stamp in payload.budgets:
        cap = "" if stamp.cap_nanousd is None else f" of {exact_usd(stamp.cap_nanousd)}"
        details.append(f"{describe_budget(stamp.budget)}: {exact_usd(stamp.committed_nanousd)}{cap} committed")
    if payload.deadline_ms:
        due = utc(payload.deadline_ms)
        details.append(f"hold {payload.hold} is due by {due:%H:%M:%S}")
    return f"{verb} for attempt {event.attempt}", details


def plan_text(payload: BudgetReserved | BudgetDenied) -> str:
    """Return the plan that applies, and the task's plan if it differs."""
    if payload.assigned_plan in (None, payload.plan):
        return f"plan {printable(payload.plan)}"
    return f"plan {printable(payload.assigned_plan or '')} (the task says {printable(payload.plan)})"


def _model_called(event: Event, payload: ModelCalled) -> tuple[str, list[str]]:
    status = f" (HTTP {payload.http_status})" if payload.http_status and payload.outcome != "ok" else ""
    details = [f"{model_text(payload.model, payload.provider)}, {payload.latency_ms:,} ms"]
    if payload.model_used and payload.model_used != payload.model:
        details[0] += f", answered by {printable(payload.model_used)}"
    if payload.error:
        details.append(printable(payload.error))
    if payload.error_details is not None:
        details.append(_details_text(payload.error_details))
    if payload.usage is not None:
        details.append(usage_text(payload.usage))
    source = f" by {source_text(payload.price_source)}" if payload.price_source else ""
    details.append(f"charged at {exact_usd(payload.charge_nanousd)}: {_BASES[payload.charge_basis]}{source}")
    if payload.usage_doubt:
        taken = ", so the more expensive reading is charged" if payload.charge_basis == "priced" else ""
        details.append(f"the usage is doubtful{taken}: {printable(payload.usage_doubt)}")
    ending = [f"finish reason {printable(payload.finish_reason)}"] if payload.finish_reason else []
    if payload.reason:
        ending.append(f"reason {printable(payload.reason)}")
    if payload.generation_id:
        ending.append(f"generation {printable(payload.generation_id)}")
    ended = (
        "was paid for, but has no answer" if payload.outcome == "ok" and payload.reason else _OUTCOMES[payload.outcome]
    )
    return f"attempt {event.attempt} {ended}{status}", [
        *details,
        *([", ".join(ending)] * bool(ending)),
    ]


def _details_text(details: ErrorDetails) -> str:
    """Return the provider's words for its error."""
    named = details.model_dump(exclude_none=True)
    return ", ".join(f"{name.replace('_', ' ')} {printable(word)}" for name, word in named.items())


def _recorded(event: Event, payload: CostRecorded) -> tuple[str, list[str]]:
    details = [_basis_text(event.amount, payload)]
    if payload.reason:
        details.append(printable(payload.reason))
    if payload.hold_nanousd:
        details.append(f"hold of {exact_usd(payload.hold_nanousd)} freed")
    if payload.overage_nanousd:
        details.append(f"{exact_usd(payload.overage_nanousd)} more than was held")
    if payload.outcome == "recorded":
        details += [printable(payload.model)] if payload.model else []
        details += [usage_text(payload.usage)] if payload.usage else []
    return _ENDS[payload.outcome], details


def _basis_text(amount_nanousd: int, payload: CostRecorded) -> str:
    """Return the basis of a cost. With several attempts, only a part may be assumed."""
    if 0 < payload.assumed_nanousd < amount_nanousd:
        return f"{exact_usd(payload.assumed_nanousd)} of it assumed, the cost is unknown"
    return _BASES[payload.basis]


def _denied(event: Event, payload: BudgetDenied) -> tuple[str, list[str]]:
    headline = "refused" if payload.reason == "cap" else "refused after waiting for others' holds"
    return headline, [
        f"asked for {exact_usd(event.amount)}: {printable(payload.bound.model)}, {bound_text(payload.bound)}",
        f"{describe_budget(payload.budget)}: {exact_usd(payload.settled_nanousd)} settled, "
        f"{exact_usd(payload.held_nanousd)} held, cap {exact_usd(payload.cap_nanousd)}",
        f"asked by {printable(payload.worker)}, {plan_text(payload)}",
    ]


def movement_text(event: Event) -> tuple[str, list[str]]:
    """Return an event as a line of a statement: a short kind, and details."""
    call = printable(event.call_id)
    match event.payload:
        case BudgetReserved() as payload:
            what = "hold" if payload.kind == "hold" else "more held"
            return what, [f"{call}: {exact_usd(event.amount)}, {printable(payload.bound.model)}"]
        case CostRecorded() as payload:
            return "charge", [_noted(call, _charge_notes(event, payload))]
        case BudgetDenied() as payload:
            waited = "" if payload.reason == "cap" else " after a wait"
            refused = f"{exact_usd(event.amount)} did not fit {describe_budget(payload.budget)}{waited}"
            return "refused", [f"{call}: {refused}"]
        case CostAdjusted() as payload:
            return "correction", [f"{call}: {signature_text(payload)}"]
        case PlanAssigned() as payload:
            return "plan", [f"{printable(payload.plan)}, {signature_text(payload)}"]
        case PlanCleared() as payload:
            return "plan cleared", [signature_text(payload)]
        case CreditGranted() | CreditRevoked() as payload:
            return "credit", [f"{exact_usd(event.amount)}, {signature_text(payload)}"]
        case _:
            return event.type, [event_text(event)[0]]


def _noted(call: str, notes: list[str]) -> str:
    return f"{call}: {', '.join(notes)}" if notes else call


def _charge_notes(event: Event, payload: CostRecorded) -> list[str]:
    notes = [_CHARGES[payload.outcome]] if payload.outcome in _CHARGES else []
    notes += [printable(payload.model)] if payload.model else []
    notes += [printable(payload.reason)] if payload.reason else []
    if payload.assumed_nanousd:
        whole = payload.assumed_nanousd == event.amount
        notes.append("assumed" if whole else f"{exact_usd(payload.assumed_nanousd)} of it assumed")
    notes += [f"{exact_usd(payload.overage_nanousd)} more than was held"] if payload.overage_nanousd else []
    return notes
