"""Ledger events: one envelope for all, one typed payload for each type.

An event is one entry of a ledger stream. The gate, inside Redis, adds what only it knows: the entry's id (the ledger's
clock), `seq`, `committed`, and in payloads the number of the hold, the cap in force and the further budgets. Programs
fill in the rest. Prompts, completions and keys have no field, on purpose (G10).

The payloads are defined in call_events.py, account_events.py and ledger_events.py.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from tollbook.schemas.account_events import (
    AlertRaised,
    CreditExpired,
    CreditGranted,
    CreditPayload,
    CreditRevoked,
    KeyCreated,
    KeyRevoked,
    PlanAssigned,
    PlanCleared,
)
from tollbook.schemas.call_events import (
    BoundPrice,
    BudgetDenied,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    FallbackUsed,
    ModelCalled,
)
from tollbook.schemas.event_fields import (
    KEY_ATTRIBUTES,
    Balance,
    Basis,
    Count,
    FailureReason,
    KeyAttribute,
    Outcome,
    Payload,
    SignedAmount,
)
from tollbook.schemas.identifiers import EntryId, Period
from tollbook.schemas.ledger_events import (
    BudgetOpened,
    LedgerRecovered,
    PolicyApplied,
    SegmentSealed,
)

# Payloads are importable from here, since readers of events need them too.
__all__ = [
    "ENVELOPE_FIELDS",
    "EVENT_VERSION",
    "KEY_ATTRIBUTES",
    "WITHOUT_CALL",
    "AlertRaised",
    "Basis",
    "BoundPrice",
    "BudgetDenied",
    "BudgetOpened",
    "BudgetReserved",
    "CostAdjusted",
    "CostRecorded",
    "CreditExpired",
    "CreditGranted",
    "CreditPayload",
    "CreditRevoked",
    "Event",
    "EventPayload",
    "FailureReason",
    "FallbackUsed",
    "KeyAttribute",
    "KeyCreated",
    "KeyRevoked",
    "LedgerRecovered",
    "ModelCalled",
    "Outcome",
    "Payload",
    "PlanAssigned",
    "PlanCleared",
    "PolicyApplied",
    "SegmentSealed",
    "payload_json",
]

EVENT_VERSION: Final = 2

# The order of an entry's fields. Redis stores repeated names once if the order is always the same.
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

WITHOUT_CALL: Final = frozenset(
    {
        "plan-assigned",
        "plan-cleared",
        "credit-granted",
        "credit-revoked",
        "credit-expired",
        "alert-raised",
        "segment-sealed",
        "ledger-recovered",
        "policy-applied",
        "budget-opened",
        "key-created",
        "key-revoked",
    }
)
"""Types of events that belong to no call."""

EventPayload = Annotated[
    BudgetReserved
    | ModelCalled
    | FallbackUsed
    | CostRecorded
    | BudgetDenied
    | CostAdjusted
    | PlanAssigned
    | PlanCleared
    | CreditGranted
    | CreditRevoked
    | CreditExpired
    | AlertRaised
    | SegmentSealed
    | LedgerRecovered
    | PolicyApplied
    | BudgetOpened
    | KeyCreated
    | KeyRevoked,
    Field(discriminator="type"),
]


class Event(BaseModel):
    """One ledger event.

    Units: `amount` and `committed` in nano-dollars. `committed` is the user's settled spend plus open holds in `period`
    after the event; None if no money moved and the gate did not read it.
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
    committed: Balance | None
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
    """Return a payload as the JSON of a ledger entry, without its type and its empty fields."""
    return payload.model_dump_json(exclude={"type"}, exclude_none=True, exclude_defaults=True)
