"""The usage of users, for an application's own pages and endpoints.

It can be a FastAPI dependency: `usage: Annotated[UsageService, Depends(UsageService)]`.
"""

from tollbook.inference.arguments import read_arguments
from tollbook.inference.bounds import bound, bound_embeddings
from tollbook.inference.cost_tracker import CostTracker, UsageSummary
from tollbook.inference.current_runtime import using_runtime
from tollbook.inference.runtime import now_ms
from tollbook.schemas.messages import Message
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.policy import known_name
from tollbook.schemas.routes import EMBEDDINGS
from tollbook.schemas.tasks import PING


class UsageService:
    """Reports what a user has spent, and whether an action would fit. Takes no arguments, so that Depends can make it.

    Errors of every method: InvalidTask for an argument; LedgerUnavailable; LedgerRefused.
    """

    async def get_usage_for_user(self, user_id: str, plan: str | None = None) -> UsageSummary:
        """Return the user's current billing period."""
        return await CostTracker().get_usage_summary(user_id, plan)

    async def check_action_limit(
        self, user_id: str, action: str, plan: str | None = None, *, prompt: str = ""
    ) -> UsageSummary:
        """Return the user's period if a task of the type `action` with this prompt would fit now.

        The call's upper bound is checked in the same way as by the gate; the gate decides again for the call itself.
        Errors: PlanLimitReached; PriceUnknown.
        """
        given = read_arguments(user_id=user_id, prompt=prompt)
        async with using_runtime() as runtime:
            policies, stored_id = runtime.policies, runtime.user_ids.on_ledger(given.user_id)
            await policies.read_by(stored_id, lambda policy: known_name("action", action, policy.policy.task_types))
            if action == PING:
                return await self.get_usage_for_user(user_id, plan)
            policy = policies.of(stored_id)
            route = policy.policy.tasks[action]
            prices = policy.prices.at(route.first.provider)
            price, count = prices.price(route.model, now_ms()), prices.models.counter(route.model)
            if route.kind == EMBEDDINGS:
                cost = bound_embeddings((given.prompt,), price, count=count).amount_nanousd
            else:
                messages = (Message(role="user", content=given.prompt),)
                cost = bound(messages, route.max_tokens, price, count=count).amount_nanousd
        if not cost:
            return await self.get_usage_for_user(user_id, plan)  # G9
        return await CostTracker().check_budget(user_id, plan, estimated_cost_usd=usd_from_nanousd(cost))
