"""One capped, recorded call from Python.

    async with connect_runtime():
        result = await InferenceClient("generate_draft").call("Write ...", user_id="u42", plan="trial")

The caller's process asks the provider itself; the ledger decides and records as it does for a worker.
"""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any, Unpack, overload

from pydantic import BaseModel

from tollbook.inference.calls.call import Call, RunId
from tollbook.inference.calls.reservations import WaitLimits
from tollbook.inference.calls.runner import CallTakenOver
from tollbook.inference.current_runtime import using_runtime
from tollbook.inference.errors import error_of
from tollbook.inference.provider_access import check_providers
from tollbook.inference.runtime import InferenceRuntime
from tollbook.inference.structured_output import M, ParsedResult, parse_output, with_response_format
from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable
from tollbook.schemas.entries import RequestFields
from tollbook.schemas.policy import check_task, check_task_type
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.tasks import PING, Task, task_from_fields

# Nothing announces the end of another run of the same call, so it is looked for this often.
_LOOK_AGAIN_S = 0.5
_MAX_REMEMBERED = 10_000


class InferenceClient:
    """Makes calls of one task type."""

    def __init__(self, task: str, runtime: InferenceRuntime | None = None) -> None:
        """Choose the task type; without a `runtime`, the one opened by `connect_runtime` is used.

        Errors: InvalidTask for a task type that the policy of a given runtime does not have.
        """
        self.task = task if runtime is None else check_task_type(task, runtime.rules)
        self._runtime = runtime

    @overload
    async def call(
        self,
        prompt: str | None = None,
        user_id: str | int = "",
        plan: str | None = None,
        campaign_id: str | int | None = None,
        *,
        response_model: type[M],
        task_id: str | int | None = None,
        metadata: Mapping[str, Any] | None = None,
        **fields: Unpack[RequestFields],
    ) -> M: ...

    @overload
    async def call(
        self,
        prompt: str | None = None,
        user_id: str | int = "",
        plan: str | None = None,
        campaign_id: str | int | None = None,
        *,
        response_model: None = None,
        task_id: str | int | None = None,
        metadata: Mapping[str, Any] | None = None,
        **fields: Unpack[RequestFields],
    ) -> InferenceResult: ...

    async def call(
        self,
        prompt: str | None = None,
        user_id: str | int = "",
        plan: str | None = None,
        campaign_id: str | int | None = None,
        *,
        response_model: type[BaseModel] | None = None,
        task_id: str | int | None = None,
        metadata: Mapping[str, Any] | None = None,
        **fields: Unpack[RequestFields],
    ) -> InferenceResult | BaseModel:
        """Make one call and return its result with `content`, `model_used`, `token_count` and `cost_usd`.

        With a pydantic model as `response_model`, the answer must have its form, and an instance of it is returned.
        With one as `response_format`, the result is a ParsedResult, whose `parsed` is the instance.

        Without a `plan`, it is on the policy's `default_plan`.
        Repeating a call with the same `task_id` and content returns the stored result and costs nothing.
        Where only other calls' holds stand in the way it waits for them, up to TOLLBOOK_HOLD_WAIT_S.

        Errors: InvalidTask; SettingsError without a provider's key; PlanLimitReached; BudgetWaitTimeout;
            PriceUnknown; InferenceFailed; AttemptsExhausted; IdempotencyConflict; LedgerUnavailable; LedgerRefused;
            OutputInvalid, after the call, where the answer has not the form of the pydantic model.
        """
        asked = with_response_format(dict(fields), response_model)
        given = {
            "user_id": user_id, "plan": plan, "campaign_id": campaign_id, "task_id": task_id, "prompt": prompt,
            "metadata": metadata,
        }  # fmt: skip
        task = task_from_fields(
            {name: value for name, value in {**asked, **given, "task": self.task}.items() if value is not None}
        )
        async with using_runtime(self._runtime) as runtime:
            result = await self._run(task, runtime)
        if result.status is not TaskStatus.DONE:
            raise error_of(result)
        if response_model is not None:
            return parse_output(result, response_model)
        form = fields.get("response_format")
        if isinstance(form, type):
            return ParsedResult(**result.model_dump(), parsed=parse_output(result, form))
        return result

    async def _run(self, task: Task, runtime: InferenceRuntime) -> InferenceResult:
        task = await runtime.user_ids.task(task)  # G10
        await runtime.policies.read_by(task.user_id, lambda policy: check_task(task, policy.policy))
        if task.task == PING:
            return InferenceResult(
                task_id=task.task_id or str(uuid.uuid4()), status=TaskStatus.DONE, content="pong", user_id=task.user_id
            )
        call = await self._call(task, runtime)
        # Before money is held: a key that is missing here is for whoever runs this process.
        check_providers(runtime.rules, runtime.settings, (target.provider for target in call.route.targets))
        clock = asyncio.get_running_loop().time
        until = clock() + runtime.settings.hold_wait_s
        while True:
            # From the first try on: one that was taken over does not begin the wait anew.
            limits = WaitLimits(
                hold_wait_s=max(0.0, until - clock()), first_pause_s=_LOOK_AGAIN_S, max_pause_s=_LOOK_AGAIN_S
            )
            try:
                acquired = await runtime.reservations.acquire(call, limits)
            except (LedgerUnavailable, LedgerRefused):
                # The reply to a hold may have been lost before the refusal: a repeat goes on with that hold.
                _remember(runtime.unanswered, call)
                raise
            if acquired.hold is None:
                assert acquired.result is not None, "a program's calls may all wait"
                return acquired.result
            try:
                return await runtime.runner.run(acquired.call, acquired.hold)
            except CallTakenOver:
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def _call(self, task: Task, runtime: InferenceRuntime) -> Call:
        call_id = task.task_id or str(uuid.uuid4())
        run_id = runtime.unanswered.pop(call_id, None) or RunId(runtime.name, uuid.uuid4().hex[:12])
        return await runtime.policies.read_by(
            task.user_id, lambda policy: Call.of_task(task, call_id=call_id, run_id=run_id, policy=policy)
        )


def _remember(unanswered: dict[str, RunId], call: Call) -> None:
    if len(unanswered) >= _MAX_REMEMBERED:
        del unanswered[next(iter(unanswered))]
    unanswered[call.call_id] = call.run_id
