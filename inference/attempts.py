"""One HTTP request to a model: what is asked, and how it ended.

Invariant (G3): `charge` says what is known of the cost. "none" only where the provider provably charged nothing;
"known" where it reported a cost or the usage; "unknown" for the rest, which is charged at the upper bound until it is
corrected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tollbook.inference.bounds import Bound
from tollbook.schemas.events import Outcome
from tollbook.schemas.messages import Message
from tollbook.schemas.usage import Usage

ChargeStatus = Literal["none", "known", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A completion to be asked for.

    Units: `max_tokens` completion tokens, reasoning included. With a `price_limit`, OpenRouter uses no endpoint that
    is more expensive than the bound assumes: it refuses rather than charge more than the hold. Without a `temperature`
    none is sent. `params` are further fields of the request; none of them replaces one that is named here.
    """

    model: str
    messages: Sequence[Message]
    max_tokens: int
    temperature: float | None
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    user: str | None = None
    price_limit: Bound | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """How one HTTP request ended.

    `error` and `warning` are short texts of our own; nothing of the prompt, the completion or the key is in
    them, nor any free text of the provider, which may quote the prompt.
    `is_retryable`: the same model may answer after a pause. `may_fall_back`: another model might.
    """

    outcome: Outcome
    charge: ChargeStatus
    latency_ms: int
    content: str | None = None
    model_used: str | None = None
    finish_reason: str | None = None
    http_status: int | None = None
    usage: Usage | None = None
    reported_cost_nanousd: int | None = None
    generation_id: str | None = None
    error: str | None = None
    warning: str | None = None
    retry_after_s: float | None = None
    is_retryable: bool = False
    may_fall_back: bool = False

    @property
    def is_ok(self) -> bool:
        """Whether there is a completion."""
        return self.outcome == "ok"

    def __repr__(self) -> str:  # G10
        # The completion stays out of tracebacks and logs.
        return (
            f"Attempt(outcome={self.outcome!r}, charge={self.charge!r}, http_status={self.http_status}, "
            f"error={self.error!r}, usage={self.usage!r}, reported_cost_nanousd={self.reported_cost_nanousd}, "
            f"generation_id={self.generation_id!r}, latency_ms={self.latency_ms})"
        )
