"""Reading a user's budgets from the gate at this moment, for display."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from tollbook.inference.current_policy import PolicyInForce
from tollbook.inference.runtime import InferenceRuntime
from tollbook.schemas.identifiers import describe_budget, split_budget_name
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.windows import end_of_window


@dataclass(frozen=True, slots=True)
class BudgetNow:
    """A budget as the gate sees it. `resets_ms`: milliseconds since the epoch; None if it never resets."""

    budget: str
    limit_usd: Decimal
    spent_usd: Decimal
    held_usd: Decimal
    remaining_usd: Decimal
    resets_ms: int | None


async def read_budgets(
    runtime: InferenceRuntime, user_id: str, attributes: Mapping[str, str | None], *, now_ms: int
) -> list[BudgetNow]:
    """Return the budgets of a user's calls with such attributes, the user's period first, as the gate sees them.

    Without a plan, the policy's default plan is used. Errors: as for a reservation.
    """
    user_id = runtime.user_ids.on_ledger(user_id)
    known = {name: value for name, value in attributes.items() if value is not None}

    async def look(policy: PolicyInForce) -> list[BudgetNow]:
        window, caps = policy.budgets_at(now_ms, {"plan": policy.policy.default_plan, **known, "user": user_id})
        balances = await runtime.ledger.balance(
            user_id=user_id, period=window.name, budgets=caps, policy_version=policy.version
        )
        return [
            BudgetNow(
                describe_budget(cap.name),
                usd_from_nanousd(balance.cap_nanousd),
                usd_from_nanousd(balance.settled_nanousd),
                usd_from_nanousd(balance.held_nanousd),
                usd_from_nanousd(balance.remaining_nanousd),
                end_of_window(split_budget_name(cap.name)[2], policy.budgets.calendar, now_ms),
            )
            for cap, balance in zip(caps, balances, strict=True)
        ]

    return await runtime.policies.decide(user_id, look)
