"""Deciding what to do after a failed attempt: retry, fall back, or give up.

The decision is a pure function. If a model may have charged for a request without an answer, and another model can be
asked, the first model is not asked again. A reply that was paid for is no failed attempt, whatever it says (G4).
docs/reference/outcomes.md has the whole table.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TYPE_CHECKING, Final, cast

from tollbook.inference.attempts import Attempt
from tollbook.schemas.events import FailureReason

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings


MODELS_OF_A_CALL: Final = 2
"""Models that a call may try by default: the route's first model and one fallback."""
_REFUSALS: Final = (400, 422)


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask the same model again after `delay_s` seconds, maybe without the reasoning of earlier turns."""

    delay_s: float
    is_without_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class FallBack:
    """Ask the fallback model at once."""

    reason: FailureReason


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Try nothing more; `reason` is for people."""

    reason: str


Step = Retry | FallBack | GiveUp


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often to retry, and how long to pause. `random` returns a number from 0 to 1."""

    retries: int = 2
    backoff_base_s: float = 0.5
    backoff_max_s: float = 8.0
    retry_after_max_s: float = 20.0
    random: Callable[[], float] = field(default=SystemRandom().random, repr=False)

    @classmethod
    def from_settings(cls, settings: "Settings") -> "RetryPolicy":
        """Make the retry policy of the settings."""
        return cls(
            retries=settings.retries,
            backoff_base_s=settings.backoff_base_s,
            backoff_max_s=settings.backoff_max_s,
            retry_after_max_s=settings.retry_after_max_s,
        )

    @property
    def max_requests(self) -> int:
        """The most requests that a call with one fallback can make, including one with a larger token limit."""
        return MODELS_OF_A_CALL * (self.retries + 1) + 1

    @property
    def max_pauses_s(self) -> float:
        """The longest sum of the pauses of such a call, in seconds."""
        return MODELS_OF_A_CALL * self.retries * max(self.backoff_max_s, self.retry_after_max_s)

    def max_call_s(self, attempt_timeout_s: float) -> float:
        """Return how long such a call can take, in seconds: every request at its timeout, every pause at its longest.

        A call with more models can take proportionally longer.
        """
        return self.max_requests * attempt_timeout_s + self.max_pauses_s

    def decide(
        self,
        attempt: Attempt,
        *,
        attempts_of_model: int,
        has_fallback: bool,
        is_other_provider: bool = False,
        has_reasoning: bool = False,
    ) -> Step:
        """Decide what follows a failed attempt.

        `attempts_of_model` counts the attempts with this model so far, including this one. `has_fallback` says whether
        another model can still be asked, and `is_other_provider` whether it is another provider's. `has_reasoning` says
        whether the request had the reasoning of earlier turns and can be repeated without it.
        """
        assert not attempt.is_ok, "a completion needs no further attempt"
        if has_reasoning and _may_refuse_reasoning(attempt) and attempts_of_model <= self.retries:
            return Retry(0.0, is_without_reasoning=True)
        can_fall_back = has_fallback and (attempt.may_fall_back or is_other_provider)
        asked_s = attempt.retry_after_s or 0.0
        can_retry = attempt.is_retryable and attempts_of_model <= self.retries and asked_s <= self.retry_after_max_s
        if can_retry and not (can_fall_back and attempt.charge == "unknown"):
            return Retry(max(asked_s, self._backoff_s(attempts_of_model)))
        if can_fall_back:
            return FallBack(cast(FailureReason, attempt.outcome))
        return GiveUp(attempt.error or attempt.outcome)

    def _backoff_s(self, attempts_of_model: int) -> float:
        """Double from the base up to the maximum, minus up to half at random, so that workers do not retry together."""
        longest = min(self.backoff_base_s * 2 ** (attempts_of_model - 1), self.backoff_max_s)
        return longest * (0.5 + self.random() / 2)


def _may_refuse_reasoning(attempt: Attempt) -> bool:
    """Whether the reasoning in the request may have caused a free refusal, as an unknown field or a wrong signature.

    Strict servers (Groq, Mistral) refuse any message with reasoning; others refuse the reasoning of another model or
    endpoint (November 2026).
    """
    is_refusal = attempt.charge == "none" and attempt.http_status in _REFUSALS
    return is_refusal and attempt.reason in ("bad_request", "unsupported_parameter")
