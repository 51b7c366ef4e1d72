"""Results of calls, built from how the call ended."""

from typing import Any, Protocol

from tollbook.inference.attempts import Attempt
from tollbook.inference.calls.holds import Hold
from tollbook.inference.errors import describe_shortage
from tollbook.ledger.gate.requests import Denied, FinishedCall
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.tasks import TaskType


class Described(Protocol):
    """What a result repeats of its call."""

    @property
    def call_id(self) -> str:
        """The task's id."""
        ...

    @property
    def user_id(self) -> str:
        """Who is charged."""
        ...

    @property
    def task_type(self) -> TaskType:
        """What was to be done."""
        ...

    @property
    def metadata(self) -> dict[str, Any] | None:
        """The publisher's own data, handed back."""
        ...


def done_result(call: Described, hold: Hold, attempt: Attempt, now_ms: int) -> InferenceResult:
    """The completion and what the whole call cost, failed attempts included."""
    return InferenceResult(
        **_description(call, now_ms),
        status=TaskStatus.DONE,
        content=attempt.content,
        model_used=attempt.model_used,
        token_count=attempt.usage.total_tokens if attempt.usage else 0,
        cost_usd=usd_from_nanousd(hold.spent_nanousd),
    )


def failed_result(
    call: Described, code: ErrorCode, problem: str | None, now_ms: int, *, cost_nanousd: int = 0
) -> InferenceResult:
    """No completion; what the attempts may have cost is booked all the same."""
    return InferenceResult(
        **_description(call, now_ms),
        status=TaskStatus.FAILED,
        cost_usd=usd_from_nanousd(cost_nanousd),
        error_code=code,
        error=problem,
    )


def denied_result(call: Described, denial: Denied, now_ms: int) -> InferenceResult:
    """Refused by the cap, with the numbers that decided."""
    is_timeout = denial.reason == "wait_timeout"
    code = ErrorCode.BUDGET_WAIT_TIMEOUT if is_timeout else ErrorCode.PLAN_LIMIT_REACHED
    problem = describe_shortage(
        denial.budget,
        requested_nanousd=denial.amount_nanousd,
        settled_nanousd=denial.settled_nanousd,
        held_nanousd=denial.held_nanousd,
        cap_nanousd=denial.cap_nanousd,
    )
    return InferenceResult(**_description(call, now_ms), status=TaskStatus.DENIED, error_code=code, error=problem)


def finished_result(call: Described, found: FinishedCall, now_ms: int) -> InferenceResult:
    """The result of a call that was over before; its text may have expired, its settlement has not."""
    if found.result:
        return InferenceResult.model_validate_json(found.result)
    if found.denial is not None:
        return denied_result(call, found.denial, now_ms)
    return InferenceResult(
        **_description(call, now_ms),
        status=TaskStatus.DONE,
        error="the call was settled before, its stored result has expired",
    )


def exhausted(times: int) -> str:
    """The problem of a task that no worker has come to an end with."""
    return f"workers died over this task, or were stopped, {times} times; it is in the dead-letter stream"


def _description(call: Described, now_ms: int) -> dict[str, Any]:
    return {
        "task_id": call.call_id,
        "user_id": call.user_id,
        "task_type": call.task_type.value,
        "metadata": call.metadata,
        "finished_at_ms": now_ms,
    }
