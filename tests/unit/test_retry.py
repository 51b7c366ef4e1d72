"""After a failed attempt: a table of attempts and what follows."""

from typing import Any

import pytest

from tollbook.inference.attempts import Attempt
from tollbook.inference.calls.retry import FallBack, GiveUp, Retry, RetryPolicy, Step

POLICY = RetryPolicy(retries=2, backoff_base_s=0.5, backoff_max_s=8.0, retry_after_max_s=20.0, random=lambda: 1.0)


def failed(outcome: str = "http_error", charge: str = "none", **fields: object) -> Attempt:
    return Attempt(outcome=outcome, charge=charge, latency_ms=1, error="HTTP 503", **fields)  # pyright: ignore[reportArgumentType]


BUSY = failed(is_retryable=True, may_fall_back=True)
LOST = failed("timeout", "unknown", is_retryable=True, may_fall_back=True)
NO_MODEL = failed(may_fall_back=True)
NO_KEY = failed()
UNREACHABLE = failed("not_sent", is_retryable=True)


@pytest.mark.parametrize(
    ("attempt", "attempts_of_model", "has_fallback", "expected"),
    [
        # A busy model is asked again, then another one.
        (BUSY, 1, True, Retry(0.5)),
        (BUSY, 2, True, Retry(1.0)),
        (BUSY, 3, True, FallBack("http_error")),
        (BUSY, 3, False, GiveUp("HTTP 503")),
        # What may have been charged is not paid twice while another model can be asked.
        (LOST, 1, True, FallBack("timeout")),
        (LOST, 1, False, Retry(0.5)),
        (LOST, 3, False, GiveUp("HTTP 503")),
        # A model that will never answer is not asked again.
        (NO_MODEL, 1, True, FallBack("http_error")),
        (NO_MODEL, 1, False, GiveUp("HTTP 503")),
        # A wrong key is wrong for every model.
        (NO_KEY, 1, True, GiveUp("HTTP 503")),
        # Another model is behind the same door.
        (UNREACHABLE, 2, True, Retry(1.0)),
        (UNREACHABLE, 3, True, GiveUp("HTTP 503")),
        # The provider's own pause is kept, up to the longest that may be asked for.
        (failed(is_retryable=True, may_fall_back=True, retry_after_s=7.0), 1, True, Retry(7.0)),
        (failed(is_retryable=True, may_fall_back=True, retry_after_s=0.1), 1, True, Retry(0.5)),
        (failed(is_retryable=True, may_fall_back=True, retry_after_s=20.0), 1, True, Retry(20.0)),
        (failed(is_retryable=True, may_fall_back=True, retry_after_s=20.1), 1, True, FallBack("http_error")),
        (failed(is_retryable=True, retry_after_s=20.1), 1, False, GiveUp("HTTP 503")),
    ],
)
def test_the_next_step_after_a_failed_attempt_is_that_of_the_table(
    attempt: Attempt, attempts_of_model: int, has_fallback: bool, expected: Step
) -> None:
    assert POLICY.decide(attempt, attempts_of_model=attempts_of_model, has_fallback=has_fallback) == expected


@pytest.mark.parametrize(("random", "pause"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_jitter_takes_up_to_half_of_the_pause_off(random: float, pause: float) -> None:
    policy = RetryPolicy(retries=9, backoff_base_s=0.5, backoff_max_s=8.0, random=lambda: random)
    assert policy.decide(BUSY, attempts_of_model=2, has_fallback=False) == Retry(pause)


def test_pause_has_a_ceiling() -> None:
    policy = RetryPolicy(retries=100, backoff_base_s=0.5, backoff_max_s=8.0, random=lambda: 1.0)
    assert policy.decide(BUSY, attempts_of_model=100, has_fallback=False) == Retry(8.0)


def test_without_retries_the_fallback_is_next() -> None:
    policy = RetryPolicy(retries=0)
    assert policy.decide(BUSY, attempts_of_model=1, has_fallback=True) == FallBack("http_error")
    # The third is one with a larger limit.
    assert policy.max_requests == 3


def test_promised_limits_hold_on_the_longest_way() -> None:
    attempts, pauses = 0, 0.0
    slow = failed(is_retryable=True, may_fall_back=True, retry_after_s=20.0)
    for has_fallback in (True, False):
        of_model = 0
        step: Step = Retry(0)
        while isinstance(step, Retry):
            of_model += 1
            attempts += 1
            step = POLICY.decide(slow, attempts_of_model=of_model, has_fallback=has_fallback)
            pauses += step.delay_s if isinstance(step, Retry) else 0
    # One more has a larger limit.
    assert attempts + 1 == POLICY.max_requests
    assert pauses <= POLICY.max_pauses_s


@pytest.mark.parametrize(
    ("refusal", "attempts_of_model", "has_reasoning", "is_asked_again"),
    [
        ({"http_status": 400, "reason": "bad_request"}, 1, True, True),
        ({"http_status": 422, "reason": "unsupported_parameter"}, 2, True, True),
        ({"http_status": 422, "reason": "unsupported_parameter"}, 3, True, False),
        ({"http_status": 400, "reason": "bad_request"}, 1, False, False),
        ({"http_status": 400, "reason": "context_too_long"}, 1, True, False),
        ({"http_status": 400, "reason": "content_filtered"}, 1, True, False),
        ({"http_status": 404, "reason": "unsupported_parameter"}, 1, True, False),
    ],
)
def test_a_refusal_that_may_be_of_reasoning_is_asked_again_without_it(
    refusal: dict[str, Any], attempts_of_model: int, has_reasoning: bool, is_asked_again: bool
) -> None:
    step = POLICY.decide(
        failed(may_fall_back=True, **refusal),
        attempts_of_model=attempts_of_model,
        has_fallback=True,
        has_reasoning=has_reasoning,
    )
    assert step == (Retry(0.0, is_without_reasoning=True) if is_asked_again else FallBack("http_error"))


def test_a_failure_that_may_have_been_charged_is_not_a_refusal() -> None:
    charged = failed(charge="known", may_fall_back=True, http_status=400, reason="bad_request")
    step = POLICY.decide(charged, attempts_of_model=1, has_fallback=True, has_reasoning=True)
    assert step == FallBack("http_error")
