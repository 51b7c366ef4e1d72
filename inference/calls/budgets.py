"""Which budgets a call is held against, and their caps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tollbook.ledger.gate.requests import BudgetCap
from tollbook.schemas.identifiers import Window, budget_name, day_at, month_at
from tollbook.schemas.plans import CAPS_NANOUSD, Plan


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """Caps in nano-dollars: per plan and period, per user where overridden, and optional further ones.

    The user's period always; the user's day and the campaign's period where a cap is configured.
    """

    plan_caps_nanousd: Mapping[Plan, int] = field(default_factory=lambda: dict(CAPS_NANOUSD))
    user_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    day_cap_nanousd: int | None = None
    campaign_cap_nanousd: int | None = None

    def cap_of(self, user_id: str, plan: Plan) -> int:
        """Return the cap of a user's period; the ledger's own assignment, if any, wins over it in the gate."""
        return self.user_caps_nanousd.get(user_id, self.plan_caps_nanousd[plan])

    def budgets_at(
        self, now_ms: int, *, user_id: str, plan: Plan, campaign_id: str | None
    ) -> tuple[Window, tuple[BudgetCap, ...]]:
        """Return the window in which these budgets are valid, named after the period, and the budgets, user's first."""
        month = month_at(now_ms)
        budgets = [BudgetCap(budget_name("user", user_id, month.name), self.cap_of(user_id, plan))]
        window = month
        if self.day_cap_nanousd is not None:
            day = day_at(now_ms)
            budgets.append(BudgetCap(budget_name("day", user_id, day.name), self.day_cap_nanousd))
            window = Window(month.name, day.start_ms, day.end_ms)
        if self.campaign_cap_nanousd is not None and campaign_id is not None:
            budgets.append(BudgetCap(budget_name("campaign", campaign_id, month.name), self.campaign_cap_nanousd))
        return window, tuple(budgets)
