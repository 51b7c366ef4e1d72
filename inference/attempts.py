"""One HTTP request to a model: its content and its outcome.

Invariant (G3): `charge` says what is known of the cost. It is "none" only if the provider provably charged nothing, and
"known" if the provider reported the cost or the usage. Otherwise it is "unknown": the attempt is charged at the upper
bound until it is corrected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tollbook.inference.bounds import Bound
from tollbook.inference.models import LIMIT
from tollbook.schemas.events import Outcome
from tollbook.schemas.failures import ErrorDetails
from tollbook.schemas.messages import Message
from tollbook.schemas.results import ErrorCode
from tollbook.schemas.usage import Usage

ChargeStatus = Literal["none", "known", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A request for a completion. `parameters` are sent unchanged.

    Units: `max_tokens` counts completion tokens, including reasoning; `limit_name` is the provider's name for it. With
    a `price_limit`, OpenRouter uses no endpoint that is more expensive than the bound assumes. It refuses the request
    instead of charging more than the hold.
    """

    model: str
    messages: Sequence[Message] = field(repr=False)
    max_tokens: int
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)  # G10
    limit_name: str = LIMIT
    user: str | None = None
    price_limit: Bound | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsRequest:
    """A request for one vector for each of `inputs`. `price_limit` is as in a ChatRequest."""

    model: str
    inputs: Sequence[str] = field(repr=False)  # G10
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    user: str | None = None
    price_limit: Bound | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The outcome of one HTTP request.

    The outcome is `ok` if the reply decides the call (G4). A reply can decide the call without an answer; then
    `error_code` says why. `reason` is one of `schemas.failures.FAILURES`.
    `error` and `usage_doubt` are short texts by Tollbook. They contain nothing of the prompt, the completion or the
    key, and no free text of the provider, which may quote the prompt. `provider_error` has the provider's text: it is
    shown in the result only (G10).
    `usage` is the usual reading of the reported tokens; `other_readings` has the other meanings that the report can
    have. `fee_nanousd` was charged in addition to the tokens.
    `service_tier` is the tier of the request unless it is the usual one, for example `flex` or `priority`.
    `is_retryable`: the same model may answer after a pause. `may_fall_back`: another model of the same provider may
    answer; a model of another provider may answer in any case.
    """

    outcome: Outcome
    charge: ChargeStatus
    latency_ms: int
    content: str | None = None
    embeddings: tuple[Any, ...] = ()
    images: tuple[str, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_details: tuple[dict[str, Any], ...] = ()
    logprobs: dict[str, Any] | None = None
    model_used: str | None = None
    finish_reason: str | None = None
    http_status: int | None = None
    usage: Usage | None = None
    other_readings: tuple[Usage, ...] = ()
    usage_doubt: str | None = None
    reported_cost_nanousd: int | None = None
    fee_nanousd: int = 0
    service_tier: str = ""
    generation_id: str | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    reason: str | None = None
    error_details: ErrorDetails | None = None
    provider_error: str | None = None
    retry_after_s: float | None = None
    is_retryable: bool = False
    may_fall_back: bool = False

    @property
    def is_ok(self) -> bool:
        """Whether the reply decides the call, with or without an answer."""
        return self.outcome == "ok"

    @property
    def is_cut(self) -> bool:
        """Whether the reply was cut off at the limit of completion tokens."""
        return self.is_ok and (self.finish_reason == "length" or self.error_code is ErrorCode.OUTPUT_LIMIT_REACHED)

    def __repr__(self) -> str:  # G10
        # Keeps the completion out of tracebacks and logs.
        return (
            f"Attempt(outcome={self.outcome!r}, charge={self.charge!r}, http_status={self.http_status}, "
            f"error={self.error!r}, usage={self.usage!r}, reported_cost_nanousd={self.reported_cost_nanousd}, "
            f"generation_id={self.generation_id!r}, latency_ms={self.latency_ms})"
        )
