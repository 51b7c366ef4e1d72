"""Events of calls: money held, attempts, costs, refusals, and corrections of costs."""

from typing import Literal

from pydantic import Field

from tollbook.schemas.event_fields import (
    Amount,
    Balance,
    Basis,
    BudgetStamp,
    ContentHash,
    Count,
    FailureReason,
    Outcome,
    Payload,
    PriceSource,
    ProviderName,
    RecoveredId,
    SignedAmount,
)
from tollbook.schemas.failures import ErrorDetails
from tollbook.schemas.usage import Usage


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
    stream: str | None = Field(default=None, description="Task stream; absent if an application called without a task.")
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
        description="First model of the route, if its hold did not fit and the cheaper model was used.",
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
        description="What was inconsistent in the reported usage. If it was priced, the more expensive reading counts.",
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
    stream: str | None = Field(default=None, description="Task stream; absent if an application called without a task.")
    plan: str = Field(description="Plan that the task names.")
    campaign_id: str | None = Field(default=None, description="Campaign of the task.")
    tags: dict[str, str] | None = Field(default=None, description="Tags of the task, by which budgets may be kept.")
    worker: str = Field(description="Worker, or run of an application, that asked.")
    assigned_plan: str | None = Field(default=None, description="Plan that the ledger has assigned to the user.")
    content_hash: ContentHash = None
    downgraded_from: str | None = Field(
        default=None,
        description="First model of the route, if its hold did not fit and the cheaper model was used.",
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
