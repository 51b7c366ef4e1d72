"""Ledger events: one envelope for all, one typed payload for each type.

An event is one entry of a ledger stream. The gate, inside Redis, adds what only it knows: the entry's id (the ledger's
clock), `seq`, `committed`, and in payloads the number of the hold, the cap in force and the further budgets. The rest
is written here. Prompts, completions and keys have no field, on purpose (G10).

The file is long because it is one list: whoever reads a ledger finds every type here, and their union at the end.
"""

from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from tollbook.schemas.failures import ErrorDetails
from tollbook.schemas.identifiers import EntryId, Period
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.usage import Usage

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

Amount = Annotated[int, Field(strict=True, ge=0, le=MAX_NANOUSD)]
SignedAmount = Annotated[int, Field(strict=True, ge=-MAX_NANOUSD, le=MAX_NANOUSD)]
Balance = Annotated[int, Field(strict=True)]
"""A sum of amounts, in nano-dollars; it may be larger than one amount can be."""
Count = Annotated[int, Field(strict=True, ge=0)]

Basis = Literal["reported", "priced", "assumed", "released"]
"""Where a cost comes from. `reported`: by the provider. `priced`: computed from the usage that the provider reported.
`assumed`: the upper bound, since the cost is unknown (a worker died, a connection broke). `released`: nothing was
spent."""

Outcome = Literal[
    "ok", "http_error", "provider_error", "invalid_response", "timeout", "connection_error", "not_sent", "abandoned"
]
"""How an attempt ended. `ok`: with a reply that is the call's outcome; if that has no answer, `reason` says why.
`not_sent`: there was no connection, so nothing was charged. `abandoned`: the worker stopped before the reply came."""

FailureReason = Literal["http_error", "provider_error", "invalid_response", "timeout", "connection_error", "not_sent"]

KeyAttribute = Literal["user", "campaign", "tags", "plan"]
"""What a client may say of its own call, if its key allows it."""
KEY_ATTRIBUTES: Final[tuple[KeyAttribute, ...]] = get_args(KeyAttribute)


class Payload(BaseModel):
    """Base of all payloads. Unknown fields are ignored, since a later version may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")


ContentHash = Annotated[
    str | None,
    Field(
        description="Digest of the content that the id of the call or command is bound to. "
        "Absent in events of version 1, and where the event does not begin a call."
    ),
]
PriceSource = Annotated[
    str | None,
    Field(
        description="Where the price comes from: the `policy`, the `provider` and when its list was fetched, or the "
        "`catalogue` and its version. Absent in events of earlier programs, and where nothing was priced."
    ),
]
ProviderName = Annotated[str | None, Field(description="Provider by its name in the policy; absent: the default one.")]
RecoveredId = Annotated[
    str | None, Field(description="Id of the lost event that this one enters again, by `tollbook recover`.")
]


class BudgetStamp(Payload):
    """What the gate adds for each budget of a hold beside the user's billing period."""

    budget: str = Field(description="The budget: `<name>:<value>:<window>`, for example `team-week:red:2026-W48`.")
    cap_nanousd: Amount | None = Field(
        default=None, description="Its cap, nano-dollars; only in events that hold money."
    )
    committed_nanousd: Balance = Field(description="Its settled spend and open holds after the event, nano-dollars.")


class BoundPrice(Payload):
    """How the upper bound of a hold was computed: the tokens, and the prices in nano-dollars per million tokens."""

    model: str = Field(description="The model that the hold is for.")
    prompt_tokens: Count = Field(description="Upper bound of the prompt tokens.")
    completion_tokens: Count = Field(description="Upper bound of the completion tokens.")
    prompt_nanousd_per_mtok: Count = Field(description="Highest price of prompt tokens, nano-dollars per million.")
    completion_nanousd_per_mtok: Count = Field(
        description="Highest price of completion tokens, nano-dollars per million."
    )
    request_nanousd: Count = Field(default=0, description="Price of the request itself, nano-dollars.")
    prompt_basis: Literal["text", "tokenizer", "context_length"] = Field(
        default="text",
        description="What bounds the prompt: the bytes of its `text`, the count of the model's `tokenizer`, or the "
        "model's `context_length` if that is less.",
    )
    source: PriceSource = None
    provider: ProviderName = None


class BudgetReserved(Payload):
    """Money is held for a call before a request is sent, or an open hold is extended before a further attempt.

    `amount` is the hold, or what is added to it. `plan` is the plan that the task names; if the ledger has assigned
    another one, the gate adds it as `assigned_plan`, and that one is in force.
    """

    type: Literal["budget-reserved"] = "budget-reserved"
    kind: Literal["hold", "extension"] = Field(
        default="hold", description="`hold` opens one, `extension` adds to an open one before a further attempt."
    )
    hold: Count = Field(default=0, description="Number of the hold within its call, from 1.")
    cap_nanousd: Amount = Field(
        default=0, description="Cap of the user's billing period in force, credits included, nano-dollars."
    )
    budgets: tuple[BudgetStamp, ...] = Field(
        default=(), description="The other budgets that the money is held against."
    )
    task_type: str = Field(description="Type of the task.")
    stream: str | None = Field(default=None, description="Task stream; absent where an application called by itself.")
    plan: str = Field(description="Plan that the task names.")
    campaign_id: str | None = Field(default=None, description="Campaign of the task.")
    tags: dict[str, str] | None = Field(default=None, description="Tags of the task, by which budgets may be kept.")
    worker: str = Field(description="Worker, or run of an application, that holds the money.")
    deadline_ms: Count = Field(
        default=0,
        description="When others may settle the hold if its worker is gone, milliseconds since the epoch.",
    )
    assigned_plan: str | None = Field(default=None, description="Plan that the ledger has assigned to the user.")
    content_hash: ContentHash = None
    downgraded_from: str | None = Field(
        default=None,
        description="First model of the route, where its hold did not fit and the cheaper one counts.",
    )
    bound: BoundPrice = Field(description="How the amount was bounded.")


class ModelCalled(Payload):
    """One HTTP request has ended or was abandoned; written with the next step of its call.

    `amount` is zero: money moves when the hold is settled.
    """

    type: Literal["model-called"] = "model-called"
    hold: Count = Field(default=0, description="Number of the hold within its call.")
    model: str = Field(description="Model asked for.")
    provider: ProviderName = None
    model_used: str | None = Field(default=None, description="Model that answered, as the provider says.")
    outcome: Outcome = Field(description="How the attempt ended.")
    http_status: int | None = Field(default=None, description="HTTP status, if there was a reply.")
    error: str | None = Field(default=None, description="Code of the error; no text of the provider's.")
    latency_ms: Count = Field(description="Duration of the request, milliseconds.")
    usage: Usage | None = Field(default=None, description="Tokens as the provider reported them.")
    generation_id: str | None = Field(default=None, description="The provider's id of the generation.")
    charge_nanousd: Amount = Field(description="What the attempt is charged, nano-dollars.")
    charge_basis: Basis = Field(description="Where that cost comes from.")
    price_source: PriceSource = None
    finish_reason: str | None = Field(default=None, description="Why the model stopped.")
    reason: str | None = Field(
        default=None, description="Why there is no answer: one of the failures in `schemas/failures.py`."
    )
    error_details: ErrorDetails | None = Field(default=None, description="The provider's words for its error.")
    usage_doubt: str | None = Field(
        default=None,
        description="What disagreed in the reported usage; where it was priced, by the dearer reading.",
    )


class FallbackUsed(Payload):
    """A failed attempt is followed by one with another model; written with the next step. `amount` is zero."""

    type: Literal["fallback-used"] = "fallback-used"
    hold: Count = Field(default=0, description="Number of the hold within its call.")
    from_model: str = Field(description="Model whose attempt failed.")
    to_model: str = Field(description="Model that is tried next.")
    from_provider: ProviderName = None
    to_provider: ProviderName = None
    reason: FailureReason = Field(description="How the attempt failed.")
    http_status: int | None = Field(
        default=None, description="HTTP status of the failed attempt, if there was a reply."
    )


class CostRecorded(Payload):
    """A hold is settled, once (G2): when its call ends, or when its worker is gone. Or an application records spend.

    `amount` is the cost.
    """

    type: Literal["cost-recorded"] = "cost-recorded"
    hold: Count = Field(default=0, description="Number of the hold within its call; 0 for spend without a hold.")
    hold_nanousd: Amount = Field(default=0, description="What was held and is now released, nano-dollars.")
    budgets: tuple[BudgetStamp, ...] = Field(default=(), description="The other budgets that are charged.")
    basis: Basis = Field(description="Where the cost comes from; of several attempts, the least certain one.")
    assumed_nanousd: Amount = Field(default=0, description="Part of the amount that is assumed, nano-dollars.")
    overage_nanousd: Amount = Field(default=0, description="Part of the amount that exceeds the hold, nano-dollars.")
    outcome: Literal["done", "failed", "expired", "taken_over", "recorded"] = Field(
        description="The call is `done` or `failed`; its hold `expired` or was `taken_over` by another worker; "
        "or an application `recorded` its own spend."
    )
    reason: str | None = Field(default=None, description="Why the call failed, or what was recorded.")
    model: str | None = Field(default=None, description="Model that answered last.")
    usage: Usage | None = Field(default=None, description="Tokens of the last attempt.")
    generation_id: str | None = Field(default=None, description="The provider's id of the last generation.")
    provider: ProviderName = None
    plan: str | None = Field(default=None, description="Plan that an application named for spend that it recorded.")
    assigned_plan: str | None = Field(
        default=None, description="Plan that the ledger has assigned to the user, where the application named one."
    )
    campaign_id: str | None = Field(default=None, description="Campaign of spend that an application recorded.")
    tags: dict[str, str] | None = Field(default=None, description="Tags of spend that an application recorded.")
    content_hash: ContentHash = None
    is_final: bool = Field(default=True, description="Whether the call is over; if not, it may be run again.")
    recovered_id: RecoveredId = None


class BudgetDenied(Payload):
    """A hold was refused and no request was sent. `amount` is what was to be held."""

    type: Literal["budget-denied"] = "budget-denied"
    budget: str = Field(description="The budget that refused.")
    cap_nanousd: Amount = Field(description="Its cap in force, nano-dollars.")
    settled_nanousd: Balance = Field(description="Its settled spend, nano-dollars.")
    held_nanousd: Balance = Field(description="Its open holds, nano-dollars.")
    reason: Literal["cap", "wait_timeout"] = Field(
        description="`cap`: settled spend plus the amount exceeds the cap. "
        "`wait_timeout`: other calls held the money for too long."
    )
    task_type: str = Field(description="Type of the task.")
    stream: str | None = Field(default=None, description="Task stream; absent where an application called by itself.")
    plan: str = Field(description="Plan that the task names.")
    campaign_id: str | None = Field(default=None, description="Campaign of the task.")
    tags: dict[str, str] | None = Field(default=None, description="Tags of the task, by which budgets may be kept.")
    worker: str = Field(description="Worker, or run of an application, that asked.")
    assigned_plan: str | None = Field(default=None, description="Plan that the ledger has assigned to the user.")
    content_hash: ContentHash = None
    downgraded_from: str | None = Field(
        default=None,
        description="First model of the route, where its hold did not fit and the cheaper one counts.",
    )
    bound: BoundPrice = Field(description="How the amount was bounded.")


class CostAdjusted(Payload):
    """A settled cost is corrected: `tollbook reconcile`, `cost adjust`, `cost release`, or a reply that came late.

    `amount` is the signed difference.
    """

    type: Literal["cost-adjusted"] = "cost-adjusted"
    hold: Count = Field(default=0, description="Number of the corrected hold within its call.")
    budgets: tuple[BudgetStamp, ...] = Field(default=(), description="The other budgets that are corrected.")
    basis: Basis = Field(description="Where the corrected cost comes from.")
    reason: str = Field(description="Why it was corrected.")
    author: str = Field(description="Person, application or run that corrected it.")
    generation_id: str | None = Field(
        default=None, description="The provider's id of the generation that was asked about."
    )
    assumed_nanousd: SignedAmount = Field(default=0, description="Change of the assumed part, nano-dollars, signed.")
    is_final: bool = Field(
        default=False,
        description="Whether it ended a call that had no result: by a late reply, or as a lost event had done.",
    )
    recovered_id: RecoveredId = None


class PlanAssigned(Payload):
    """A person or an application sets a user's plan or cap, whatever plan tasks name. `amount` is zero."""

    type: Literal["plan-assigned"] = "plan-assigned"
    plan: str = Field(description="The plan.")
    cap_nanousd: Amount = Field(description="The user's cap from here on, nano-dollars.")
    author: str = Field(description="Person or application that set it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class PlanCleared(Payload):
    """The plan and cap that were set for a user no longer count: from here on, those of tasks do. `amount` is zero."""

    type: Literal["plan-cleared"] = "plan-cleared"
    author: str = Field(description="Person or application that cleared it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class CreditPayload(Payload):
    """Credit of a user's billing period; or, if it names a budget, of a balance that never begins anew."""

    budget: str | None = Field(
        default=None, description="The budget that has the credit; absent for a user's billing period."
    )
    credit: str | None = Field(default=None, description="Id of the credit, where it is a budget's.")
    expires_ms: Count | None = Field(
        default=None, description="When the credit expires, milliseconds since the epoch; absent: never."
    )
    cap_nanousd: Amount | None = Field(
        default=None, description="The budget's cap without credit at this event, nano-dollars."
    )
    settled_nanousd: Balance | None = Field(
        default=None, description="The budget's settled spend at this event, nano-dollars."
    )
    held_nanousd: Balance | None = Field(
        default=None, description="The budget's open holds at this event, nano-dollars."
    )


class CreditGranted(CreditPayload):
    """A user may spend more than the cap in one billing period, or a budget has more. `amount` is the credit."""

    type: Literal["credit-granted"] = "credit-granted"
    author: str = Field(description="Person or application that granted it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class CreditRevoked(CreditPayload):
    """Credit of one billing period or of a budget is taken back. `amount` is the credit, below zero."""

    type: Literal["credit-revoked"] = "credit-revoked"
    grant: str | None = Field(
        default=None, description="Id of the `credit-granted` event that is taken back; absent for any credit."
    )
    author: str = Field(description="Person or application that took it back.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class CreditExpired(CreditPayload):
    """A budget's credit has expired. `amount` is what was left of it, below zero; zero where nothing was.

    Spend uses up the credit that expires first. What open holds may need of it is left to them.
    """

    type: Literal["credit-expired"] = "credit-expired"
    content_hash: ContentHash = None


class AlertRaised(Payload):
    """Settled spend has reached a fraction of a budget's cap; for the whole cap, also the first refusal does.

    Appended in the step that moved the money, once for each fraction of a budget, whose window is part of its name.
    `amount` is zero.
    """

    type: Literal["alert-raised"] = "alert-raised"
    kind: Literal["budget"] = Field(description="What the alert is about.")
    budget: str = Field(description="The budget: `<name>:<value>:<window>`.")
    window: str = Field(description="The budget's window, for example `2026-W48`.")
    fraction: str = Field(description="The fraction of the cap, for example `0.8`.")
    cap_nanousd: Amount = Field(description="The budget's cap then, credits included, nano-dollars.")
    settled_nanousd: Balance = Field(description="The budget's settled spend then, nano-dollars.")
    cause: str = Field(description="The call whose cost or refusal raised it.")


class SegmentSealed(Payload):
    """A part of the ledger was archived; `chain_after` covers every event up to `last_id`. `amount` is zero."""

    type: Literal["segment-sealed"] = "segment-sealed"
    segment: str = Field(description="Name of the segment in the archive.")
    first_id: str = Field(description="Id of its first event.")
    last_id: str = Field(description="Id of its last event.")
    events: Count = Field(description="Number of its events.")
    chain_before: str = Field(description="Head of the hash chain before it, SHA-256 in hexadecimal.")
    chain_after: str = Field(description="Head of the hash chain after it.")


class LedgerRecovered(Payload):
    """The ledger had lost events, and a person had `tollbook recover` mend it. `amount` is zero.

    Lost events either stand on the ledger again as they were, or what they charged is entered again by new events.
    """

    type: Literal["ledger-recovered"] = "ledger-recovered"
    first_id: str = Field(description="Id of the first event that was lost.")
    last_id: str = Field(description="Id of the last known event that was lost.")
    after_id: str | None = Field(
        default=None,
        description="Id of the event before them, the last one that was not lost; `0-0` where none was left.",
    )
    events: Count = Field(description="Number of known events that were lost.")
    restored: Count = Field(default=0, description="How many of them stand on the ledger again as they were.")
    entered: Count = Field(default=0, description="How many new events enter them again, by their `recovered_id`.")
    entered_nanousd: Balance = Field(default=0, description="Cost that these events enter again, nano-dollars.")
    lost_holds: Count = Field(default=0, description="Number of open holds that are lost for good.")
    lost_held_nanousd: Balance = Field(default=0, description="What they held, nano-dollars.")
    author: str = Field(description="Person who recovered the ledger.")
    reason: str = Field(description="Why.")


class PolicyApplied(Payload):
    """A policy is in force from here on, in this partition; every partition has the same versions. `amount` is zero.

    A ledger without such an event is at version 0: the default policy.
    """

    type: Literal["policy-applied"] = "policy-applied"
    version: Annotated[int, Field(strict=True, ge=1)] = Field(description="Number of the policy, from 1.")
    digest: str = Field(description="SHA-256 of the content, in hexadecimal; equal policies have equal digests.")
    content: dict[str, Any] = Field(
        description="The policy, in the shape of the policy file; amounts in dollars, as text."
    )
    definitions: dict[str, Count] = Field(
        default={},
        description="Budgets whose definition began with a later version than 1, with that version: their balances "
        "began at zero there.",
    )
    backfilled: tuple[str, ...] = Field(
        default=(),
        description="Budgets that begin with what was spent before in their window: `budget-opened` events follow in "
        "the same step.",
    )
    takes_holds: bool = Field(
        default=False,
        description="Whether holds that are open at this moment stand against the budgets in `backfilled` too, from "
        "here on. Absent in events of earlier programs.",
    )
    author: str = Field(description="Person or process that applied it.")
    reason: str = Field(description="Why.")
    recovered_id: RecoveredId = None


class OpenedHold(Payload):
    """A hold that was open when a policy opened a budget, and stands against that budget too from then on."""

    call_id: str = Field(description="Its call.")
    hold: Count = Field(description="Number of the hold within the call.")
    amount_nanousd: Amount = Field(description="What it held then, its extensions included, nano-dollars.")


class BudgetOpened(Payload):
    """A budget that a policy adds or changes begins with what was spent before, in the step that applies the policy.

    `amount` is what was settled in the budget's window until then. It is no new spend: it counts in this budget alone.
    Holds that are open stand against the budget from here on.
    """

    type: Literal["budget-opened"] = "budget-opened"
    policy_version: Annotated[int, Field(strict=True, ge=1)] = Field(description="The policy that defines the budget.")
    hold_nanousd: Balance = Field(
        default=0,
        ge=0,
        description="What `holds` held together, nano-dollars. Absent: nothing, as in earlier events.",
    )
    holds: tuple[OpenedHold, ...] = Field(
        default=(), description="Holds that were open: they are extended, settled and corrected in this budget too."
    )
    budgets: tuple[BudgetStamp, ...] = Field(description="The budget, with its cap by the policy.")


class KeyCreated(Payload):
    """A key for the HTTP gateway exists from here on; it stands in partition 0, whoever its user is. `amount` is zero.

    The key itself was told to the person who created it, and is nowhere else.
    """

    type: Literal["key-created"] = "key-created"
    key_id: str = Field(description="Public name of the key: `key-` and 12 hexadecimal digits.")
    hash: str = Field(description="SHA-256 of the key, in hexadecimal.")
    name: str | None = Field(default=None, description="What people call it.")
    user_id: str | None = Field(default=None, description="User whose budgets its calls count in.")
    plan: str | None = Field(default=None, description="Plan that its calls name.")
    campaign_id: str | None = Field(default=None, description="Campaign of its calls.")
    tags: dict[str, str] | None = Field(default=None, description="Tags of its calls.")
    models: tuple[str, ...] = Field(
        default=(), description="Models and task types that it may call; absent: whatever the gateway offers."
    )
    streams: tuple[str, ...] = Field(
        default=(), description="Task streams that its calls may be counted under; the first is used by default."
    )
    allows: tuple[KeyAttribute, ...] = Field(
        default=(), description="Attributes of a call that the client may give in place of the key's."
    )
    is_admin: bool = Field(
        default=False, description="Whether it may see everything, and change keys, credit and plans."
    )
    expires_ms: Count | None = Field(
        default=None, description="When it expires, milliseconds since the epoch; absent: never."
    )
    replaces: str | None = Field(default=None, description="Id of the key that it was created to replace.")
    author: str = Field(description="Person or application that created it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class KeyRevoked(Payload):
    """A key is not accepted any more, from `at_ms` on. `amount` is zero.

    A later event of the same key can only set an earlier moment.
    """

    type: Literal["key-revoked"] = "key-revoked"
    key_id: str = Field(description="Public name of the key.")
    at_ms: Count = Field(
        default=0, description="From when, milliseconds since the epoch, by the clock of Redis; the gate says it."
    )
    author: str = Field(description="Person or application that revoked it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


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
    after the event; None where no money moved and the gate did not read it.
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
