"""One capped, recorded call from Python.

    async with connect_runtime():
        result = await InferenceClient("generate_draft").call("Write ...", user_id="u42", plan="trial")

The caller's process sends the request to the provider; the ledger decides and records as for a worker.
"""

from collections.abc import Mapping
from typing import Any, Unpack, overload

from pydantic import BaseModel

from tollbook.inference.current_runtime import using_runtime
from tollbook.inference.direct_calls import make_call
from tollbook.inference.errors import error_of
from tollbook.inference.runtime import InferenceRuntime
from tollbook.inference.structured_output import M, ParsedResult, parse_output, with_response_format
from tollbook.schemas.entries import RequestFields
from tollbook.schemas.policy import check_task_type
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.tasks import task_from_fields


class InferenceClient:
    """Makes calls of one task type."""

    def __init__(self, task: str, runtime: InferenceRuntime | None = None) -> None:
        """Choose the task type; without a `runtime`, the runtime opened by `connect_runtime` is used.

        Errors: InvalidTask if the policy of the given runtime does not have the task type.
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

        With a pydantic model as `response_model`, the answer must match it, and an instance of the model is returned.
        With a pydantic model as `response_format`, a ParsedResult is returned, whose `parsed` is the instance.

        Without a `plan`, the policy's `default_plan` is used.
        Repeating a call with the same `task_id` and content returns the stored result and is free.
        If only other calls' holds leave too little, the call waits for them, up to TOLLBOOK_HOLD_WAIT_S.

        Errors: InvalidTask; SettingsError without a provider's key; PlanLimitReached; BudgetWaitTimeout;
            PriceUnknown; InferenceFailed; AttemptsExhausted; IdempotencyConflict; LedgerUnavailable; LedgerRefused;
            OutputInvalid, after the call, if the answer does not match the pydantic model.
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
            result = await make_call(task, runtime)
        if result.status is not TaskStatus.DONE:
            raise error_of(result)
        if response_model is not None:
            return parse_output(result, response_model)
        form = fields.get("response_format")
        if isinstance(form, type):
            return ParsedResult(**result.model_dump(), parsed=parse_output(result, form))
        return result
