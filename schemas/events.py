"""Ledger events: one envelope for all, one typed payload for each type.

An event is one entry of a ledger stream. The gate, inside Redis, stamps what only it
knows: the entry's id (the ledger's clock), `seq`, `committed`, and in payloads the
number of the hold, the cap in force and the further budgets. The rest is written here.
Prompts, completions and keys have no field here, on purpose (G10).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from schemas.identifiers import EntryId, Period
from schemas.money import MAX_NANOUSD
from schemas.usage import Usage

EVENT_VERSION: Final = 1

# The order of an entry's fields. Redis stores repeated names once when the order never changes.
ENVELOPE_FIELDS: Final = (
    "type",
    "v",
    "seq",
    "user_id",
    "period",
    "call_id",
    "attempt",
    "amount",
    "committed",
    "payload",
)

Amount = Annotated[int, Field(strict=True, ge=0, le=MAX_NANOUSD)]
SignedAmount = Annotated[int, Field(strict=True, ge=-MAX_NANOUSD, le=MAX_NANOUSD)]
Count = Annotated[int, Field(strict=True, ge=0)]

Basis = Literal["reported", "priced", "assumed", "released"]
"""Where a cost comes from: the provider said it; priced from its usage; assumed at the bound
because nobody knows (a worker died, a connection broke); released since nothing was spent."""

Outcome = Literal[
    "ok", "http_error", "provider_error", "invalid_response", "timeout", "connection_error", "not_sent", "abandoned"
]
"""How an attempt ended. `not_sent`: the connection was never made, so nothing can have been charged.
`abandoned`: the worker stopped before the reply came."""

FailureReason = Literal["http_error", "provider_error", "invalid_response", "timeout", "connection_error", "not_sent"]


class Payload(BaseModel):
    """Base of all payloads; unknown fields of a later minor change are ignored, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class BudgetStamp(Payload):
    """What the gate stamps for each budget of a hold beyond the user's period."""

    budget: str
    cap_nanousd: Amount | None = None
    committed_nanousd: int


class BoundPrice(Payload):
    """The prices by which a hold was bounded, in nano-dollars per million tokens, and the tokens it allows."""

    model: str
    prompt_tokens: Count
    completion_tokens: Count
    prompt_nanousd_per_mtok: Count
    completion_nanousd_per_mtok: Count
    request_nanousd: Count = 0


class BudgetReserved(Payload):
    """Money held for a call. `amount` is the hold, or the extension of an open hold.

    `plan` is what the task names; `assigned_plan`, stamped by the gate, what the ledger says, and that one counts.
    """

    type: Literal["budget-reserved"] = "budget-reserved"
    kind: Literal["hold", "extension"] = "hold"
    hold: Count = 0
    cap_nanousd: Amount = 0
    budgets: tuple[BudgetStamp, ...] = ()
    task_type: str
    stream: str | None = None
    plan: str
    campaign_id: str | None = None
    worker: str
    deadline_ms: Count = 0
    assigned_plan: str | None = None
    bound: BoundPrice


class ModelCalled(Payload):
    """One HTTP request and what is known of it. `amount` is zero: money moves when the hold is settled.

    `charge_nanousd` is what this attempt is booked at, by `charge_basis`.
    """

    type: Literal["model-called"] = "model-called"
    hold: Count = 0
    model: str
    model_used: str | None = None
    outcome: Outcome
    http_status: int | None = None
    error: str | None = None
    latency_ms: Count
    usage: Usage | None = None
    generation_id: str | None = None
    charge_nanousd: Amount
    charge_basis: Basis
    finish_reason: str | None = None


class FallbackUsed(Payload):
    """A failed attempt is followed by one with another model."""

    type: Literal["fallback-used"] = "fallback-used"
    hold: Count = 0
    from_model: str
    to_model: str
    reason: FailureReason
    http_status: int | None = None


class CostRecorded(Payload):
    """A hold settled: `amount` is the real cost, `hold_nanousd` what is freed."""

    type: Literal["cost-recorded"] = "cost-recorded"
    hold: Count = 0
    hold_nanousd: Amount = 0
    budgets: tuple[BudgetStamp, ...] = ()
    basis: Basis
    assumed_nanousd: Amount = 0
    overage_nanousd: Amount = 0
    outcome: Literal["done", "failed", "expired", "taken_over", "recorded"]
    reason: str | None = None
    model: str | None = None
    usage: Usage | None = None
    generation_id: str | None = None


class BudgetDenied(Payload):
    """A hold refused; `amount` is what was asked for."""

    type: Literal["budget-denied"] = "budget-denied"
    budget: str
    cap_nanousd: Amount
    settled_nanousd: int
    held_nanousd: int
    reason: Literal["cap", "wait_timeout"]
    task_type: str
    stream: str | None = None
    plan: str
    campaign_id: str | None = None
    worker: str
    assigned_plan: str | None = None
    bound: BoundPrice


class CostAdjusted(Payload):
    """A settled cost corrected: `amount` is the signed difference."""

    type: Literal["cost-adjusted"] = "cost-adjusted"
    hold: Count = 0
    budgets: tuple[BudgetStamp, ...] = ()
    basis: Basis
    reason: str
    author: str
    generation_id: str | None = None
    assumed_nanousd: SignedAmount = 0


class PlanAssigned(Payload):
    """A user's plan or cap set by a person or an application. `amount` is zero."""

    type: Literal["plan-assigned"] = "plan-assigned"
    plan: str
    cap_nanousd: Amount
    author: str
    reason: str


class CreditGranted(Payload):
    """Room above the cap for one period; `amount` is the credit."""

    type: Literal["credit-granted"] = "credit-granted"
    author: str
    reason: str


class SegmentSealed(Payload):
    """A part of the ledger was archived; the chain head binds everything up to `last_id`."""

    type: Literal["segment-sealed"] = "segment-sealed"
    segment: str
    first_id: str
    last_id: str
    events: Count
    chain_before: str
    chain_after: str


EventPayload = Annotated[
    BudgetReserved
    | ModelCalled
    | FallbackUsed
    | CostRecorded
    | BudgetDenied
    | CostAdjusted
    | PlanAssigned
    | CreditGranted
    | SegmentSealed,
    Field(discriminator="type"),
]

_PAYLOAD: TypeAdapter[EventPayload] = TypeAdapter(EventPayload)


class Event(BaseModel):
    """One ledger event.

    Units: `amount` and `committed` in nano-dollars; `committed` is the user's settled spend and open
    holds in `period` after the event, None where the gate does not know it (no hold open, nothing moved).
    """

    model_config = ConfigDict(frozen=True)

    id: str
    v: int
    seq: Count
    user_id: str
    period: Period | Literal[""]
    call_id: str
    attempt: Count
    amount: SignedAmount
    committed: int | None
    payload: EventPayload

    @property
    def type(self) -> str:
        """The event's type, for example `budget-reserved`."""
        return self.payload.type

    @property
    def at_ms(self) -> int:
        """When it was appended, by the Redis clock, in milliseconds since the epoch."""
        return EntryId.parse(self.id).ms


def payload_json(payload: EventPayload) -> str:
    """Return the payload as the JSON object that stands in a ledger entry, without its type and empty fields."""
    return payload.model_dump_json(exclude={"type"}, exclude_none=True, exclude_defaults=True)


def parse_payload(event_type: str, document: Mapping[str, Any]) -> EventPayload:
    """Validate a payload of the current version. Errors: pydantic.ValidationError."""
    return _PAYLOAD.validate_python({**document, "type": event_type})
