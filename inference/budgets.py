"""Which budgets a call is held against, and their caps: a function of the policy in force.

A call is always held against its user's billing period. It is held against each further budget of the policy too,
unless it lacks one of the attributes that the budget is kept by.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tollbook.ledger.gate.requests import BudgetCap
from tollbook.schemas.identifiers import Window, budget_name, budget_value, definition_name, split_budget_name
from tollbook.schemas.money import MAX_NANOUSD, nanousd_from_usd
from tollbook.schemas.policy import OWN_BUDGET, BudgetRule, Policy
from tollbook.schemas.windows import Calendar, WindowKind, intersection

_NO_DEFINITIONS: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class _Budget:
    """A budget of the policy, with its name in keys and its caps in nano-dollars."""

    name: str
    by: tuple[str, ...]
    window: WindowKind
    cap_nanousd: int
    caps_nanousd: Mapping[str, int]

    @classmethod
    def of(cls, rule: BudgetRule, since_version: int) -> "_Budget":
        caps = {value: nanousd_from_usd(cap) for value, cap in rule.caps.items()}
        return cls(
            definition_name(rule.name, since_version), rule.by, rule.window, nanousd_from_usd(rule.cap_usd), caps
        )

    def cap_of(self, value: str) -> int:
        return self.caps_nanousd.get(value, self.cap_nanousd)


class BudgetPolicy:
    """The budgets of one policy. `definitions`: by a budget's name, the version in which its definition began."""

    def __init__(self, policy: Policy, definitions: Mapping[str, int] = _NO_DEFINITIONS) -> None:
        self.policy = policy
        self.calendar: Final = calendar_of(policy)
        self._budgets = tuple(_Budget.of(rule, definitions.get(rule.name, 0)) for rule in policy.budgets)
        self._by_name = {budget.name: budget for budget in self._budgets}
        self._kinds: Final[tuple[WindowKind, ...]] = tuple({"month", *(budget.window for budget in self._budgets)})
        self._latest = (Window("", 0, 0), dict[WindowKind, Window]())

    def cap_of(self, user_id: str, plan: str) -> int:
        """Return the cap of a user's billing period. A plan assigned on the ledger wins over it, in the gate."""
        return self.policy.user_cap_nanousd(user_id, plan)

    def budgets_at(self, now_ms: int, attributes: Mapping[str, str]) -> tuple[Window, tuple[BudgetCap, ...]]:
        """Return the budgets of a call, the user's period first, and the window for which all of them are valid.

        `attributes` are the call's user and plan, and those that it has of campaign, task, model and its tags. The
        window bears the name of the billing period.
        """
        shared, windows = self._latest
        if not shared.start_ms <= now_ms < shared.end_ms:
            windows = {kind: self.calendar.window_at(kind, now_ms) for kind in self._kinds}
            shared = intersection(windows["month"].name, list(windows.values()))
            self._latest = shared, windows
        user, plan = attributes["user"], attributes["plan"]
        budgets = [BudgetCap(budget_name(OWN_BUDGET, user, shared.name), self.cap_of(user, plan))]
        for budget in self._budgets:
            values = [attributes[name] for name in budget.by if name in attributes]
            if len(values) == len(budget.by):
                value = budget_value(values)
                key = budget_name(budget.name, value, windows[budget.window].name)
                budgets.append(BudgetCap(key, budget.cap_of(value)))
        return shared, tuple(budgets)

    def caps_of(self, keys: Iterable[str], *, plan: str) -> tuple[BudgetCap, ...]:
        """Return budgets with the caps that they have now. One that is no longer part of the policy refuses nothing."""
        return tuple(BudgetCap(key, self._cap_of_key(key, plan)) for key in keys)

    def _cap_of_key(self, key: str, plan: str) -> int:
        name, value, _ = split_budget_name(key)
        if name == OWN_BUDGET:
            return self.cap_of(value, plan)
        budget = self._by_name.get(name)
        return MAX_NANOUSD if budget is None else budget.cap_of(value)


def calendar_of(policy: Policy) -> Calendar:
    """Return the calendar in which the policy's windows begin. Errors: ValueError for an unknown time zone."""
    return Calendar(policy.zone, policy.month_starts_on, policy.week_starts_on)
