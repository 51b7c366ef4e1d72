"""Refusals: every way in which a request ends without an answer, with its status, code and headers.

Clients decide on a retry by the status and by `x-should-retry`. Both tell them not to repeat a request that cannot
succeed, or that was paid for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tollbook.ledger.errors import IdempotencyConflict, LedgerError
from tollbook.schemas.errors import AppError
from tollbook.schemas.results import ErrorCode, InferenceResult
from tollbook.schemas.tasks import InvalidTask

_RETRY_AFTER_LEDGER_S: Final = 2
_RETRY_AFTER_HOLDS_S: Final = 5
_RETRY_AFTER_PROVIDER_S: Final = 5
_OTHER_CONTENT: Final = "this `Idempotency-Key` was already used with other content; use a new one"
# The provider's statuses for a request that a retry cannot fix.
_BAD_REQUEST: Final = frozenset({400, 404, 413, 415, 422})
_TIMED_OUT: Final = frozenset({408, 504, 524})


@dataclass(eq=False)
class Problem(Exception):
    """A refusal. `message` is for people; `code` and `kind` are for programs; `metadata` has the numbers.

    `should_retry`: None lets the client decide.
    """

    status: int
    code: str
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    should_retry: bool | None = None
    retry_after_s: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def headers(self) -> dict[str, str]:
        """The headers by which clients decide whether to retry."""
        headers: dict[str, str] = {}
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        return headers


def invalid(message: str, *, param: str | None = None) -> Problem:
    """Return the problem of an invalid request."""
    return Problem(400, "invalid_task", message, param=param, should_retry=False)


def unwritable_answer(result: InferenceResult) -> Problem:
    """Return the problem of a paid answer that could not be written; a retry would be paid again."""
    message = "the answer could not be written; the gateway's log says why"
    return Problem(
        500,
        "internal_error",
        message,
        kind="server_error",
        should_retry=False,
        metadata={"call_id": result.task_id},
    )


def problem_of_error(error: Exception) -> Problem:
    """Return the problem that a client gets for an error. Errors that are not an AppError are bugs; no details leak."""
    match error:
        case Problem():
            return error
        case InvalidTask():
            return invalid(error.message)
        case IdempotencyConflict():
            return Problem(409, "idempotency_conflict", _OTHER_CONTENT, should_retry=False)
        case LedgerError():
            return Problem(
                503,
                "ledger_unavailable",
                f"no call can be made now: {error.message}",
                kind="server_error",
                retry_after_s=_RETRY_AFTER_LEDGER_S,
            )
        case TimeoutError():
            message = "the call took longer than TOLLBOOK_GATEWAY_TIMEOUT_S allows, and was cancelled"
            return Problem(504, "call_timeout", message, kind="server_error", should_retry=False)
        case AppError():  # For example a provider that is not configured.
            return Problem(500, "gateway_misconfigured", error.message, kind="server_error", should_retry=False)
        case _:
            return Problem(500, "internal_error", "the gateway failed; its log says why", kind="server_error")


def problem_of_result(result: InferenceResult, *, resets_at: str | None = None) -> Problem:
    """Return the problem that a client gets for a result without an answer. `resets_at`: when the budget resets."""
    message = result.error or f"the call is {result.status}"
    metadata: dict[str, Any] = {"call_id": result.task_id}
    if result.denial is not None:
        numbers = result.denial
        metadata |= {
            "budget": numbers.budget,
            "limit": f"{numbers.limit_usd:f}",
            "spent": f"{numbers.spent_usd:f}",
            "held": f"{numbers.held_usd:f}",
            "bound": f"{numbers.bound_usd:f}",
            "resets_at": resets_at,
        }
    match result.error_code:
        case ErrorCode.PLAN_LIMIT_REACHED:
            return Problem(
                402,
                "plan_limit_reached",
                message,
                kind="insufficient_quota",
                should_retry=False,
                metadata=metadata,
            )
        case ErrorCode.BUDGET_WAIT_TIMEOUT:
            return Problem(
                429,
                "budget_wait_timeout",
                message,
                kind="rate_limit_error",
                retry_after_s=_RETRY_AFTER_HOLDS_S,
                metadata=metadata,
            )
        case ErrorCode.PRICE_UNKNOWN | ErrorCode.INVALID_TASK:
            return Problem(400, str(result.error_code).lower(), message, should_retry=False, metadata=metadata)
        case ErrorCode.IDEMPOTENCY_CONFLICT:
            return Problem(409, "idempotency_conflict", _OTHER_CONTENT, should_retry=False, metadata=metadata)
        case ErrorCode.LEDGER_UNAVAILABLE:
            return Problem(
                503,
                "ledger_unavailable",
                message,
                kind="server_error",
                retry_after_s=_RETRY_AFTER_LEDGER_S,
                metadata=metadata,
            )
        case ErrorCode.CONTENT_FILTERED:
            return Problem(400, "content_filtered", message, should_retry=False, metadata=metadata)
        case _:
            return _problem_of_failure(result, message, metadata)


def _problem_of_failure(result: InferenceResult, message: str, metadata: Mapping[str, Any]) -> Problem:
    """Return the problem of a failed call. If it has cost money, the client must not retry it (G4)."""
    paid = False if result.cost_usd else None
    code = str(result.error_code or ErrorCode.INFERENCE_FAILED).lower()
    status = result.provider_status
    if status in _BAD_REQUEST:
        return Problem(400, code, message, should_retry=False, metadata=metadata)
    if status == 429:
        return Problem(
            429,
            code,
            message,
            kind="rate_limit_error",
            should_retry=paid,
            retry_after_s=_RETRY_AFTER_PROVIDER_S,
            metadata=metadata,
        )
    http_status = 504 if status in _TIMED_OUT else 502
    return Problem(http_status, code, message, kind="server_error", should_retry=paid, metadata=metadata)
