"""Results of tasks: the record that a publisher reads."""

from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.usage import MediaUsage, Usage


class TaskStatus(StrEnum):
    """How a task ended."""

    DONE = "done"
    DENIED = "denied"
    FAILED = "failed"
    INVALID = "invalid"


class ErrorCode(StrEnum):
    """Every reason for which a task ends without a completion; the list is complete."""

    PLAN_LIMIT_REACHED = "PLAN_LIMIT_REACHED"
    """Settled spend plus the upper bound of the call's cost exceeds the cap."""
    BUDGET_WAIT_TIMEOUT = "BUDGET_WAIT_TIMEOUT"
    """Other calls held the money that was left, for longer than TOLLBOOK_HOLD_WAIT_S."""
    INFERENCE_FAILED = "INFERENCE_FAILED"
    """The model and its fallback failed, there was no money for the fallback, or the reply has no answer."""
    OUTPUT_LIMIT_REACHED = "OUTPUT_LIMIT_REACHED"
    """The limit of completion tokens was used up before an answer, by reasoning for example. Raise `max_tokens`."""
    CONTENT_FILTERED = "CONTENT_FILTERED"
    """The provider's filter blocked the prompt or the answer."""
    PRICE_UNKNOWN = "PRICE_UNKNOWN"
    """No price is known for the model, so the call's cost has no upper bound."""
    INVALID_TASK = "INVALID_TASK"
    """The message is not a valid task: a field is missing, unknown or has a wrong value."""
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    """The task id was used before with other content."""
    ATTEMPTS_EXHAUSTED = "ATTEMPTS_EXHAUSTED"
    """The worker of the task's last allowed attempt ended early; the task is in the dead-letter stream."""
    LEDGER_UNAVAILABLE = "LEDGER_UNAVAILABLE"
    """Redis or DuckDB did not answer, so no call was made."""


UsdString = Annotated[Decimal, PlainSerializer("{:f}".format, return_type=str, when_used="json")]


class Denial(BaseModel):
    """The numbers by which a budget refused a call, in dollars as decimal strings."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    budget: str
    """The budget in words, with its value and window."""
    window: str
    """The window's name, such as `2026-11`, `2026-W48`, `2026-11-29` or `total`."""
    limit_usd: UsdString
    """Its cap."""
    spent_usd: UsdString
    """Its settled spend."""
    held_usd: UsdString
    """What open calls held."""
    bound_usd: UsdString
    """The most that the call could have cost."""


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
    """The model's answer, if the task is `done`; also a part of an answer that was cut off."""
    tool_calls: list[dict[str, Any]] | None = None
    """The tools that the model calls, in OpenAI's form: `id`, `type`, `function` with `name` and `arguments` (text)."""
    embeddings: list[list[float]] | list[str] | None = None
    """The vectors of a task for embeddings, one for each text of `input`, in its order: lists of numbers, or base64 of
    32-bit floats where `encoding_format` is `base64`."""
    images: list[str] | None = None
    """Images that the model made: `data:` URLs or addresses."""
    refusal: str | None = None
    """The model's words if it declines to answer. The task is `done`."""
    reasoning: str | None = None
    """The model's reasoning, if the provider returns it."""
    reasoning_details: list[dict[str, Any]] | None = Field(default=None, repr=False)  # G10
    """Reasoning that the provider must get back with the next turn, in OpenRouter's form: objects with a `type`, and
    `text` with a `signature` or encrypted `data`. Send them back unchanged; absent if above 4 MB as JSON."""
    logprobs: dict[str, Any] | None = None
    """Log probabilities as the provider sent them, if the task sets `logprobs`; absent if above 4 MB as JSON."""
    finish_reason: str | None = None
    """Why the model stopped: `stop`, `length` (at the limit), `content_filter`, `tool_calls`, or a word of its own."""
    model_used: str | None = None
    """The model that answered, as the provider named it."""
    downgraded_from: str | None = None
    """The first model of the route, if its hold did not fit a budget and the cheaper model was called."""
    token_count: int = 0
    """Prompt and completion tokens of the attempt that answered."""
    usage: Usage | MediaUsage | None = None
    """These tokens by kind: `prompt_tokens` (with `cached_tokens` and `cache_write_tokens` among them) and
    `completion_tokens` (with `reasoning_tokens` among them). If the provider reports them, also tokens of
    images, sound and videos: `prompt_image_tokens`, `prompt_audio_tokens`, `prompt_video_tokens`,
    `completion_image_tokens`, `completion_audio_tokens`."""
    cost_usd: UsdString = usd_from_nanousd(0)
    """The cost of all attempts in dollars: a decimal string with nine places."""
    error_code: ErrorCode | None = None
    """Why there is no answer: one of the error codes."""
    error: str | None = None
    """Why there is no answer, in words, with the provider's error if there was one."""
    denial: Denial | None = None
    """If a budget refused the call: the numbers that decided."""
    provider_status: int | None = None
    """HTTP status of the provider's last reply, if there is no answer."""
    provider_error: str | None = None
    """The provider's error text. It may quote the prompt, and is stored nowhere else."""
    user_id: str | None = None
    """Who was charged."""
    task_type: str | None = None
    """The task type, as in the task."""
    finished_at_ms: int | None = None
    """When the task ended, milliseconds since the epoch."""
    metadata: dict[str, Any] | None = None
    """The task's `metadata`, unchanged."""
