"""What to do after a failed attempt: try again, fall back, or give up.

A pure decision. A model that may have charged for a request without an answer is not paid a second time while another
model can be asked. A reply that was paid for is no failed attempt, whatever it says (G4). The whole table stands in
docs/reference/outcomes.md.
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
"""Models that a call may try by its route: the first and one fallback, unless it has more."""
_REFUSALS: Final = (400, 422)


@dataclass(frozen=True, slots=True)
class Retry:
    """Ask the same model again after a pause in seconds, maybe without the reasoning of earlier turns."""

    delay_s: float
    is_without_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class FallBack:
    """Ask the fallback model, at once."""

    reason: FailureReason


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Nothing more is tried; `reason` is for people."""

    reason: str


Step = Retry | FallBack | GiveUp


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and how long to try. Randomness is a parameter: a number from 0 to 1."""

    retries: int = 2
    backoff_base_s: float = 0.5
    backoff_max_s: float = 8.0
    retry_after_max_s: float = 20.0
    random: Callable[[], float] = field(default=SystemRandom().random, repr=False)

    @classmethod
    def from_settings(cls, settings: "Settings") -> "RetryPolicy":
        """Make the policy that the settings describe."""
        return cls(
            retries=settings.retries,
            backoff_base_s=settings.backoff_base_s,
            backoff_max_s=settings.backoff_max_s,
            retry_after_max_s=settings.retry_after_max_s,
        )

    @property
    def max_requests(self) -> int:
        """Requests that a call with one fallback can take, one with a larger limit included."""
        return MODELS_OF_A_CALL * (self.retries + 1) + 1

    @property
    def max_pauses_s(self) -> float:
        """Seconds that the pauses of such a call can add up to."""
        return MODELS_OF_A_CALL * self.retries * max(self.backoff_max_s, self.retry_after_max_s)

    def max_call_s(self, attempt_timeout_s: float) -> float:
        """Return the seconds that such a call can take: every request at its time-out, every pause at its longest.

        A call with more models can take more in proportion.
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

        `attempts_of_model` counts the attempts of this model so far, this one included; `has_fallback` says whether
        another model is left to be asked, and `is_other_provider` whether that is another provider's. `has_reasoning`:
        the request brought back what a model thought in earlier turns, and can be made without it.
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
        """Double from the base up to the maximum; take up to half of it off at random, so that workers spread out."""
        longest = min(self.backoff_base_s * 2 ** (attempts_of_model - 1), self.backoff_max_s)
        return longest * (0.5 + self.random() / 2)


def _may_refuse_reasoning(attempt: Attempt) -> bool:
    """Whether a free refusal may be of the reasoning in the request, as an unknown field or another's signature.

    Strict servers (Groq, Mistral) refuse any message with it, others that of another model or endpoint (November 2026).
    """
    is_refusal = attempt.charge == "none" and attempt.http_status in _REFUSALS
    return is_refusal and attempt.reason in ("bad_request", "unsupported_parameter")
