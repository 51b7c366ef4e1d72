"""Errors of calls, prices, settings and the provider; `schemas.errors` draws the whole tree.

Only the Python interface raises an error for a call without an answer. Below it, a failed completion is an `Attempt`
with an outcome, since money may have been spent on it.
"""

from collections.abc import Sequence
from typing import Self, assert_never

from tollbook.ledger.errors import IdempotencyConflict, LedgerUnavailable
from tollbook.schemas.errors import AppError
from tollbook.schemas.identifiers import describe_budget
from tollbook.schemas.money import format_usd
from tollbook.schemas.results import ErrorCode, InferenceResult
from tollbook.schemas.tasks import InvalidTask


class SettingsError(AppError):
    """The settings cannot be used. The message has one line for each problem and shows no secret."""

    code = "SETTINGS_INVALID"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems), {"problems": list(problems)})
        self.problems = tuple(problems)


class UnknownStream(SettingsError):
    """A worker was started for a stream that the policy does not have."""


class PlanLimitReached(AppError):
    """The call does not fit the cap: settled spend plus the call's bound is above the cap."""

    code = ErrorCode.PLAN_LIMIT_REACHED

    @property
    def is_temporary(self) -> bool:
        """Whether only open holds leave too little: most of that money comes back; a published task waits for it."""
        return bool(self.data.get("is_temporary"))


class BudgetWaitTimeout(AppError):
    """Only other calls' open holds left too little, for longer than TOLLBOOK_HOLD_WAIT_S."""

    code = ErrorCode.BUDGET_WAIT_TIMEOUT


class PriceUnknown(AppError):
    """The call's cost has no known upper bound, so no money can be reserved and no request is sent (G8)."""

    code = ErrorCode.PRICE_UNKNOWN

    @classmethod
    def of_model(cls, model: str, why: str) -> Self:
        """Return the error for a model without a usable price."""
        return cls(f"no price is known for model {model}: {why}", {"model": model})


class ParameterUnsupported(InvalidTask):
    """The provider says that the model does not support a parameter of the task. No request is sent."""

    def __init__(self, model: str, names: Sequence[str]) -> None:
        what = f"'{names[0]}'" if len(names) == 1 else ", ".join(f"'{name}'" for name in names)
        super().__init__(f"{model} does not support {what}", {"model": model, "unsupported": list(names)})


class InferenceFailed(AppError):
    """The model and its fallback failed, or the reply has no answer. `data` is the call's result."""

    code = ErrorCode.INFERENCE_FAILED


class OutputLimitReached(InferenceFailed):
    """The limit of completion tokens was used up before an answer. A retry with the same limit would fail again."""

    code = ErrorCode.OUTPUT_LIMIT_REACHED


class ContentFiltered(InferenceFailed):
    """The provider's filter held back the prompt or the answer."""

    code = ErrorCode.CONTENT_FILTERED


class OutputInvalid(AppError):
    """The call is done and paid for, but its answer does not have the requested form, or is a refusal.

    `result` is the call's result, with the answer as text and its cost.
    """

    code = "OUTPUT_INVALID"

    def __init__(self, message: str, result: InferenceResult) -> None:
        super().__init__(message, result.model_dump())
        self.result = result


class AttemptsExhausted(AppError):
    """Too many workers ended while running this task; it is in the dead-letter stream."""

    code = ErrorCode.ATTEMPTS_EXHAUSTED


class ResultTimeout(AppError, TimeoutError):
    """A task has no result yet. Nothing is lost: wait again, or look up the result later by `task_id`."""

    code = "RESULT_TIMEOUT"

    def __init__(self, task_id: str, timeout_s: float) -> None:
        super().__init__(f"no result for {task_id} after {timeout_s:g} s", {"task_id": task_id, "timeout_s": timeout_s})
        self.task_id = task_id
        self.timeout_s = timeout_s


class TaskUnconfirmed(LedgerUnavailable):
    """Redis did not confirm that it has the task. Publishing it again with the same `task_id` is safe in any case."""

    def __init__(self, task_id: str, problem: object) -> None:
        super().__init__(
            f"task {task_id} may or may not have been published ({problem}); publish it again with this task_id",
            {"task_id": task_id},
        )
        self.task_id = task_id


class ProviderError(AppError):
    """A request to the provider failed that is not a completion, such as listing models."""

    code = "PROVIDER_ERROR"


class ProviderUnavailable(ProviderError):
    """The provider could not be reached or failed; nothing was charged, a retry is safe."""

    code = "PROVIDER_UNAVAILABLE"


class ProviderNotConfigured(ProviderError):
    """A provider cannot be called from this process: the policy does not have it, or its key is not set."""

    code = "PROVIDER_NOT_CONFIGURED"


class ProviderRefused(ProviderError):
    """The provider refused the key or the request."""

    code = "PROVIDER_REFUSED"

    def __init__(self, message: str, *, http_status: int) -> None:
        super().__init__(message, {"http_status": http_status})
        self.http_status = http_status


def describe_shortage(
    budget: str, *, requested_nanousd: int, settled_nanousd: int, held_nanousd: int, cap_nanousd: int
) -> str:
    """Return the text that says which budget a call does not fit, with the amounts."""
    requested, settled, held = (
        format_usd(amount, places=6) for amount in (requested_nanousd, settled_nanousd, held_nanousd)
    )
    cap = format_usd(cap_nanousd, places=None)
    return (
        f"{describe_budget(budget)}: a call of up to {requested} does not fit the cap of {cap}, "
        f"of which {settled} are spent and {held} held by open calls"
    )


def error_of(result: InferenceResult) -> AppError:
    """Return the error for a result without a completion; the result's fields are the error's `data`."""
    message, data = result.error or f"the task is {result.status}", result.model_dump()
    match result.error_code:
        case ErrorCode.PLAN_LIMIT_REACHED:
            return PlanLimitReached(message, data)
        case ErrorCode.BUDGET_WAIT_TIMEOUT:
            return BudgetWaitTimeout(message, data)
        case ErrorCode.PRICE_UNKNOWN:
            return PriceUnknown(message, data)
        case ErrorCode.INVALID_TASK:
            return InvalidTask(message, data)
        case ErrorCode.IDEMPOTENCY_CONFLICT:
            return IdempotencyConflict(result.task_id)
        case ErrorCode.ATTEMPTS_EXHAUSTED:
            return AttemptsExhausted(message, data)
        case ErrorCode.LEDGER_UNAVAILABLE:
            return LedgerUnavailable(message, data)
        case ErrorCode.OUTPUT_LIMIT_REACHED:
            return OutputLimitReached(message, data)
        case ErrorCode.CONTENT_FILTERED:
            return ContentFiltered(message, data)
        case ErrorCode.INFERENCE_FAILED | None:
            return InferenceFailed(message, data)
        case _:
            assert_never(result.error_code)
