"""Errors of calls, prices, settings and the provider; `schemas.errors` draws the whole tree.

Only the Python interface raises what a call came to. Below it, a completion that fails is an `Attempt` whose outcome
says how it ended, since money may have been spent on it.
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
    """The settings cannot be used; one line for each problem, and none of them shows a secret."""

    code = "SETTINGS_INVALID"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems), {"problems": list(problems)})
        self.problems = tuple(problems)


class UnknownStream(SettingsError):
    """A worker is to serve a stream that the policy does not have."""


class PlanLimitReached(AppError):
    """The call does not fit the cap: settled spend plus the most that it could cost passes it."""

    code = ErrorCode.PLAN_LIMIT_REACHED

    @property
    def is_temporary(self) -> bool:
        """Whether only open holds are in the way: most of that money comes back, and a published task waits for it."""
        return bool(self.data.get("is_temporary"))


class BudgetWaitTimeout(AppError):
    """Only other calls' open holds stood in the way, for longer than TOLLBOOK_HOLD_WAIT_S."""

    code = ErrorCode.BUDGET_WAIT_TIMEOUT


class PriceUnknown(AppError):
    """No upper bound of the call's cost can be given, so no money can be held for it and no call is made (G8)."""

    code = ErrorCode.PRICE_UNKNOWN

    @classmethod
    def of_model(cls, model: str, why: str) -> Self:
        """Return the error for a model without a usable price."""
        return cls(f"no price is known for model {model}: {why}", {"model": model})


class ParameterUnsupported(InvalidTask):
    """The provider says that the model does not take what the task sets. No money was held, and no call is made."""

    def __init__(self, model: str, names: Sequence[str]) -> None:
        what = f"'{names[0]}'" if len(names) == 1 else ", ".join(f"'{name}'" for name in names)
        super().__init__(f"{model} does not support {what}", {"model": model, "unsupported": list(names)})


class InferenceFailed(AppError):
    """The model and its fallback failed, or the reply has no answer. `data` is the call's result."""

    code = ErrorCode.INFERENCE_FAILED


class OutputLimitReached(InferenceFailed):
    """The limit of completion tokens was used up before an answer. The same limit would be paid for again in vain."""

    code = ErrorCode.OUTPUT_LIMIT_REACHED


class ContentFiltered(InferenceFailed):
    """The provider's filter held back the prompt or the answer."""

    code = ErrorCode.CONTENT_FILTERED


class OutputInvalid(AppError):
    """The call is done and paid for, and its answer is not of the form that was asked for, or is a refusal.

    `result` is the call's result, with the answer as text and what it cost.
    """

    code = "OUTPUT_INVALID"

    def __init__(self, message: str, result: InferenceResult) -> None:
        super().__init__(message, result.model_dump())
        self.result = result


class AttemptsExhausted(AppError):
    """Workers ended over this task too often; it is in the dead-letter stream."""

    code = ErrorCode.ATTEMPTS_EXHAUSTED


class ResultTimeout(AppError, TimeoutError):
    """A task has no result yet. Nothing is lost: wait again, or look later, by `task_id`."""

    code = "RESULT_TIMEOUT"

    def __init__(self, task_id: str, timeout_s: float) -> None:
        super().__init__(f"no result for {task_id} after {timeout_s:g} s", {"task_id": task_id, "timeout_s": timeout_s})
        self.task_id = task_id
        self.timeout_s = timeout_s


class TaskUnconfirmed(LedgerUnavailable):
    """Redis did not say whether it has the task. Publishing it again under `task_id` is safe, whichever is true."""

    def __init__(self, task_id: str, problem: object) -> None:
        super().__init__(
            f"task {task_id} may or may not have been published ({problem}); publish it again with this task_id",
            {"task_id": task_id},
        )
        self.task_id = task_id


class ProviderError(AppError):
    """The provider did not answer a question that is not a completion."""

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
    """Say whose call does not fit which cap, and what stands in its way."""
    requested, settled, held = (
        format_usd(amount, places=6) for amount in (requested_nanousd, settled_nanousd, held_nanousd)
    )
    cap = format_usd(cap_nanousd, places=None)
    return (
        f"{describe_budget(budget)}: a call of up to {requested} does not fit the cap of {cap}, "
        f"of which {settled} are spent and {held} held by open calls"
    )


def error_of(result: InferenceResult) -> AppError:
    """Return the error that tells what a result without a completion came to; its fields are the error's `data`."""
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
