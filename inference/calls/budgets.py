"""The budgets that a call is held against, and their caps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tollbook.ledger.gate.requests import BudgetCap
from tollbook.schemas.identifiers import Window, budget_name, day_at, month_at
from tollbook.schemas.plans import CAPS_NANOUSD, Plan


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """The caps in force, in nano-dollars.

    A call is always held against the user's billing period, whose cap is the user's own or the plan's. It is held
    against the user's day and the campaign's billing period too where a cap is set for them.
    """

    plan_caps_nanousd: Mapping[Plan, int] = field(default_factory=lambda: dict(CAPS_NANOUSD))
    user_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    day_cap_nanousd: int | None = None
    campaign_cap_nanousd: int | None = None

    def cap_of(self, user_id: str, plan: Plan) -> int:
        """Return the cap of a user's billing period. A plan assigned on the ledger wins over it, in the gate."""
        return self.user_caps_nanousd.get(user_id, self.plan_caps_nanousd[plan])

    def budgets_at(
        self, now_ms: int, *, user_id: str, plan: Plan, campaign_id: str | None
    ) -> tuple[Window, tuple[BudgetCap, ...]]:
        """Return the budgets of a call, the user's period first, and the window for which they are valid.

        The window bears the name of the billing period.
        """
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
