"""Usage of users for an application's own pages and endpoints.

Usable as a FastAPI dependency: `usage: Annotated[UsageService, Depends(UsageService)]`.
"""

from tollbook.inference.bounds import bound
from tollbook.inference.cost_tracker import CostTracker, UsageSummary
from tollbook.inference.errors import AppError, CostUnbounded
from tollbook.inference.runtime import current_runtime, now_ms
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.plans import DEFAULT_PLAN
from tollbook.schemas.results import ErrorCode
from tollbook.schemas.tasks import Message, TaskType


class UsageService:
    """Answers what a user has spent and whether an action would fit. Takes no arguments, so that Depends can make it.

    Errors of every method: AppError (LEDGER_UNAVAILABLE, INVALID_TASK).
    """

    async def get_usage_for_user(self, user_id: str, plan: str = DEFAULT_PLAN) -> UsageSummary:
        """Return the user's billing period now."""
        return await CostTracker().get_usage_summary(user_id, plan)

    async def check_action_limit(
        self, user_id: str, action: str, plan: str = DEFAULT_PLAN, *, prompt: str = ""
    ) -> UsageSummary:
        """Return the user's period if a task of the type `action` with this prompt would fit now.

        Weighed is the call's upper bound, as the gate will weigh it; the gate decides anew for the call itself.
        Errors: AppError (PLAN_LIMIT_REACHED; PRICE_UNKNOWN; INVALID_TASK for an unknown action).
        """
        try:
            task_type = TaskType(action)
        except ValueError:
            raise AppError(ErrorCode.INVALID_TASK, f"unknown action {action!r}") from None
        runtime = current_runtime()
        if task_type is TaskType.PING:
            return await self.get_usage_for_user(user_id, plan)
        route = runtime.routes[task_type]
        try:
            price = runtime.prices.price(route.model, now_ms())
            cost = bound((Message(role="user", content=prompt),), route.max_tokens, price).amount_nanousd
        except CostUnbounded as exc:
            raise AppError(ErrorCode.PRICE_UNKNOWN, str(exc)) from exc
        return await CostTracker().check_budget(user_id, plan, estimated_cost_usd=usd_from_nanousd(cost))
