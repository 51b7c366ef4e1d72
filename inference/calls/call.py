"""One call: its user, model, messages and run, and the results that it can have."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from tollbook.inference.attempts import Attempt
from tollbook.inference.current_policy import PolicyInForce
from tollbook.inference.errors import describe_shortage
from tollbook.inference.models import ModelCatalogue
from tollbook.ledger.gate.requests import Denied, FinishedCall
from tollbook.schemas.identifiers import describe_budget, split_budget_name
from tollbook.schemas.messages import Message
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.policy import check_task
from tollbook.schemas.results import Denial, ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.routes import DEFAULT_PROVIDER, Route, Target, resolve_model
from tollbook.schemas.tasks import Task

_MAX_BYTES: Final = 4_000_000
"""The limit for log probabilities and for details of reasoning: Redis keeps results in memory."""
_JsonT = TypeVar("_JsonT", dict[str, Any], list[dict[str, Any]])


@dataclass(frozen=True, slots=True)
class RunId:
    """Identifies one run of a call and its process, so that a retry of this run differs from another run.

    The ledger records it as text with each hold.
    """

    process: str
    run: str

    def __str__(self) -> str:
        return f"{self.process}.{self.run}"

    @classmethod
    def parse(cls, text: str) -> "RunId":
        """Parse the text of a run id; the process name may contain dots."""
        process, _, run = text.rpartition(".")
        return cls(process, run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The call of one task, by the policy of `policy_version`."""

    call_id: str
    run_id: RunId
    user_id: str
    plan: str
    task_type: str
    messages: tuple[Message, ...]
    route: Route
    content_hash: str
    task: Task
    policy_version: int
    downgraded_from: str | None = None
    campaign_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    stream: str | None = None
    metadata: dict[str, Any] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)  # G10
    """The task's own parameters of the completion, without `max_tokens`."""
    inputs: tuple[str, ...] = field(default=(), repr=False)  # G10
    """The texts to embed; then there are no messages."""

    @property
    def attributes(self) -> dict[str, str]:
        """The attributes that budgets may be kept by. A tag never replaces an attribute that Tollbook sets."""
        known = {"user": self.user_id, "plan": self.plan, "task": self.task_type, "model": self.route.model}
        if self.campaign_id is not None:
            known["campaign"] = self.campaign_id
        return {**self.tags, **known} if self.tags else known

    @classmethod
    def of_task(
        cls, task: Task, *, call_id: str, run_id: RunId, policy: PolicyInForce, stream: str | None = None
    ) -> "Call":
        """Make a call from a task by a policy; the task's own model and limits override the route's.

        A task that names its model is never downgraded. Errors: InvalidTask for names that the policy does not have.
        """
        rules = policy.policy
        route = rules.route_of(check_task(task, rules).task, task.model)
        assert route is not None, "only ping has no route, and it is no call"
        has_own_route = task.task in rules.tasks
        changes = {
            "model": task.model and _model_of(task.model, route) if has_own_route else None,
            "cheaper": None if task.model else route.cheaper,
            "max_tokens": task.max_tokens,
        }
        temperature = {} if task.temperature is None else {"temperature": task.temperature}
        return cls(
            call_id=call_id,
            run_id=run_id,
            user_id=task.user_id,
            plan=task.plan or rules.default_plan,
            task_type=task.task,
            messages=() if task.input is not None else task.chat(),
            route=route.model_copy(
                update={name: value for name, value in changes.items() if value is not None or name == "cheaper"}
            ),
            content_hash=task.content_hash(),
            task=task,
            policy_version=policy.version,
            campaign_id=task.campaign_id,
            tags=task.tags or {},
            stream=stream,
            metadata=task.metadata,
            parameters={**temperature, **task.parameters()},
            inputs=task.input or (),
        )

    def parameters_for(self, model: str, models: ModelCatalogue) -> dict[str, Any]:
        """Return the parameters for a model: the task's own, and those of the route that the model supports."""
        defaults = dict(self.route.params)
        if self.route.temperature is not None:
            defaults["temperature"] = self.route.temperature
        return {**models.without_unsupported(model, defaults), **self.parameters}

    def downgraded(self) -> "Call":
        """Return this call with its route's cheaper model; there must be one."""
        return replace(self, route=self.route.downgraded(), downgraded_from=self.route.model)

    def with_fallback(self, target: Target) -> "Call":
        """Return this call with one of its route's fallbacks; the later fallbacks remain."""
        return replace(self, route=self.route.from_fallback(target))

    def without_reasoning(self) -> "Call | None":
        """Return this call without the reasoning of earlier turns; None if there is no reasoning to leave out."""
        messages = tuple(message.without_reasoning() for message in self.messages)
        left = tuple(message for message in messages if not message.is_empty)
        if not left or not any(message.has_reasoning for message in self.messages):
            return None
        return replace(self, messages=left)

    def under(self, policy: PolicyInForce) -> "Call":
        """Return this call by another policy, so that route, bound and budgets follow from one policy (G11).

        Errors: InvalidTask.
        """
        if policy.version == self.policy_version:
            return self
        return Call.of_task(self.task, call_id=self.call_id, run_id=self.run_id, policy=policy, stream=self.stream)


def _model_of(name: str, route: Route) -> str:
    """Return the id of the model that a task names, at the route's provider."""
    return resolve_model(name) if route.first.provider == DEFAULT_PROVIDER else name


def with_larger_limit(call: Call, reply: Attempt) -> Call | None:
    """Return the call with its route's larger token limit if the reply was cut off; None if it was not, or has none."""
    larger = call.route.retry_max_tokens
    if not reply.is_cut or larger is None or larger <= (call.route.max_tokens or 0):
        return None
    return replace(call, route=call.route.model_copy(update={"max_tokens": larger}))


def reply_result(
    call: Call, reply: Attempt, now_ms: int, *, cost_nanousd: int, downgraded_from: str | None = None
) -> InferenceResult:
    """Return the result that a reply gives: an answer, or the reason why there is none (G4).

    The cost is the whole call's, including failed attempts.
    """
    return InferenceResult(
        **_description(call, now_ms),
        **_output(call, reply),
        downgraded_from=downgraded_from,
        status=TaskStatus.FAILED if reply.error_code else TaskStatus.DONE,
        cost_usd=usd_from_nanousd(cost_nanousd),
        error_code=reply.error_code,
        error=reply.error,
    )


def failed_result(
    call: Call,
    code: ErrorCode,
    problem: str | None,
    now_ms: int,
    *,
    cost_nanousd: int = 0,
    last: Attempt | None = None,
) -> InferenceResult:
    """Return the result of a call without an answer; the cost is what the attempts are charged at.

    `last` is the attempt that failed last: its partial text and the provider's error message are passed on.
    """
    words = last.provider_error if last else None
    return InferenceResult(
        **_description(call, now_ms),
        **(_output(call, last) if last else {}),
        status=TaskStatus.FAILED,
        cost_usd=usd_from_nanousd(cost_nanousd),
        error_code=code,
        error=f"{problem}; the provider says: {words}" if words else problem,
        provider_error=words,
        provider_status=last.http_status if last else None,
    )


def denied_result(call: Call, denial: Denied, now_ms: int) -> InferenceResult:
    """Return the result of a call that a cap refused, with the numbers that decided."""
    is_timeout = denial.reason == "wait_timeout"
    code = ErrorCode.BUDGET_WAIT_TIMEOUT if is_timeout else ErrorCode.PLAN_LIMIT_REACHED
    problem = describe_shortage(
        denial.budget,
        requested_nanousd=denial.amount_nanousd,
        settled_nanousd=denial.settled_nanousd,
        held_nanousd=denial.held_nanousd,
        cap_nanousd=denial.cap_nanousd,
    )
    numbers = Denial(
        budget=describe_budget(denial.budget),
        window=split_budget_name(denial.budget)[2],
        limit_usd=usd_from_nanousd(denial.cap_nanousd),
        spent_usd=usd_from_nanousd(denial.settled_nanousd),
        held_usd=usd_from_nanousd(denial.held_nanousd),
        bound_usd=usd_from_nanousd(denial.amount_nanousd),
    )
    return InferenceResult(
        **_description(call, now_ms), status=TaskStatus.DENIED, error_code=code, error=problem, denial=numbers
    )


def finished_result(call: Call, found: FinishedCall, now_ms: int) -> InferenceResult:
    """Return the result of a finished call, also if its text has expired: the settlement is still known."""
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
    """Return the reason for giving up a task that no worker has finished."""
    return f"workers died over this task, or were stopped, {times} times; it is in the dead-letter stream"


def _output(call: Call, attempt: Attempt) -> dict[str, Any]:
    """Return the fields of a result that come from an attempt."""
    return {
        "content": attempt.content,
        "embeddings": list(attempt.embeddings) or None,
        "images": list(attempt.images) or None,
        "tool_calls": list(attempt.tool_calls) or None,
        "refusal": attempt.refusal,
        "reasoning": attempt.reasoning,
        "reasoning_details": _within_limit(list(attempt.reasoning_details) or None),
        "logprobs": _logprobs(call, attempt),
        "finish_reason": attempt.finish_reason,
        "model_used": attempt.model_used,
        "token_count": attempt.usage.total_tokens if attempt.usage else 0,
        "usage": attempt.usage,
    }


def _logprobs(call: Call, attempt: Attempt) -> dict[str, Any] | None:
    """Return log probabilities if they were asked for and are not too large for a result."""
    is_asked = call.parameters.get("logprobs", call.route.params.get("logprobs"))
    return _within_limit(attempt.logprobs) if is_asked else None


def _within_limit(value: _JsonT | None) -> _JsonT | None:
    """Return the value, or None if it is too large for a result: a part of it would be of no use."""
    return value if value is None or len(json.dumps(value)) <= _MAX_BYTES else None


def _description(call: Call, now_ms: int) -> dict[str, Any]:
    return {
        "task_id": call.call_id,
        "user_id": call.user_id,
        "task_type": call.task_type,
        "metadata": call.metadata,
        "finished_at_ms": now_ms,
    }
