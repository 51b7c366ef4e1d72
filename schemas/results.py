"""What a task came to: the record a publisher reads back."""

from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer

from tollbook.schemas.money import usd_from_nanousd


class TaskStatus(StrEnum):
    """How a task ended."""

    DONE = "done"
    DENIED = "denied"
    FAILED = "failed"
    INVALID = "invalid"


class ErrorCode(StrEnum):
    """Every reason for which a task can end without a completion; the list is exhaustive."""

    PLAN_LIMIT_REACHED = "PLAN_LIMIT_REACHED"
    """The settled spend plus the call's own bound passes the cap."""
    BUDGET_WAIT_TIMEOUT = "BUDGET_WAIT_TIMEOUT"
    """Only other calls' open holds stood in the way, for longer than the setting allows."""
    INFERENCE_FAILED = "INFERENCE_FAILED"
    """The model and its fallback failed, or a fallback could not be paid for."""
    PRICE_UNKNOWN = "PRICE_UNKNOWN"
    """No price is known for the model, so its cost cannot be bounded."""
    INVALID_TASK = "INVALID_TASK"
    """The message is malformed: a missing field, an unknown type or plan, a number out of bounds."""
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    """The task id was used before, with other content."""
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"
    """Workers died over this task, or were stopped, too often; it is in the dead-letter stream."""
    LEDGER_UNAVAILABLE = "LEDGER_UNAVAILABLE"
    """Redis or DuckDB could not be asked, so no call was made."""


def _plain_decimal(value: Decimal) -> str:
    return f"{value:f}"


UsdString = Annotated[Decimal, PlainSerializer(_plain_decimal, return_type=str, when_used="json")]


class InferenceResult(BaseModel):
    """The result of one task; stored as JSON under the task's result key.

    `cost_usd` is a decimal string in JSON (dollars, nine places), exact to the nano-dollar.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    task_id: str
    """The task's id."""
    status: TaskStatus
    """How the task ended: `done`, `denied`, `failed` or `invalid`."""
    content: str | None = None
    """The model's answer, for a task that is `done`."""
    model_used: str | None = None
    """The model that answered, as the provider named it."""
    token_count: int = 0
    """Prompt and completion tokens of the attempt that answered."""
    cost_usd: UsdString = usd_from_nanousd(0)
    """The cost of all attempts in dollars: a decimal string with nine places."""
    error_code: ErrorCode | None = None
    """Why there is no answer: one of the error codes."""
    error: str | None = None
    """The same in words."""
    user_id: str | None = None
    """Who was charged."""
    task_type: str | None = None
    """The task type, as in the task."""
    finished_at_ms: int | None = None
    """When the task ended, milliseconds since the epoch."""
    metadata: dict[str, Any] | None = None
    """The task's `metadata`, unchanged."""
