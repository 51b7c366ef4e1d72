"""The budgets of a call and their caps: a function of the policy in force.

A call is always held against its user's billing period. It is also held against each further budget of the policy,
unless it lacks one of the attributes that the budget is kept by.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tollbook.ledger.gate.requests import BudgetCap
from tollbook.schemas.identifiers import (
    EVERYBODY,
    Window,
    budget_name,
    budget_value,
    check_id,
    definition_name,
    read_values,
    split_budget_name,
)
from tollbook.schemas.money import MAX_NANOUSD, nanousd_from_usd
from tollbook.schemas.policy import OWN_BUDGET, BudgetRule, Policy
from tollbook.schemas.problems import unknown_name
from tollbook.schemas.windows import ALWAYS, Calendar, WindowKind, intersection

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
        # Converted once: the conversion would take most of the time that a call spends here.
        self._plan_caps_nanousd = policy.plan_caps_nanousd
        self._user_caps_nanousd = policy.user_caps_nanousd
        self._budgets = tuple(_Budget.of(rule, definitions.get(rule.name, 0)) for rule in policy.budgets)
        self._by_name = {budget.name: budget for budget in self._budgets}
        self._kinds: Final[tuple[WindowKind, ...]] = tuple({"month", *(budget.window for budget in self._budgets)})
        self._latest: tuple[Window, Mapping[WindowKind, Window]] = (Window("", 0, 0), {})

    def cap_of(self, user_id: str, plan: str) -> int:
        """Return the cap of a user's billing period by the policy: the user's own, else the plan's.

        In the gate, a plan assigned on the ledger takes precedence. Errors: KeyError for an unknown plan.
        """
        own = self._user_caps_nanousd.get(user_id)
        return self._plan_caps_nanousd[plan] if own is None else own

    def budgets_at(self, now_ms: int, attributes: Mapping[str, str]) -> tuple[Window, tuple[BudgetCap, ...]]:
        """Return the budgets of a call, the user's period first, and the window in which all of them are valid.

        `attributes` has the call's user and plan, and if known its campaign, task, model and tags. The window has the
        name of the billing period.
        """
        shared, windows = self._windows_at(now_ms)
        user, plan = attributes["user"], attributes["plan"]
        own = BudgetCap(budget_name(OWN_BUDGET, user, shared.name), self.cap_of(user, plan))
        return shared, (own, *self._further(windows, attributes))

    def further_at(self, now_ms: int, attributes: Mapping[str, str]) -> tuple[BudgetCap, ...]:
        """Return the budgets of a call without the user's period; `attributes` as for `budgets_at`."""
        return tuple(self._further(self._windows_at(now_ms)[1], attributes))

    def _windows_at(self, now_ms: int) -> tuple[Window, Mapping[WindowKind, Window]]:
        shared, _ = self._latest
        if not shared.start_ms <= now_ms < shared.end_ms:
            windows: Mapping[WindowKind, Window] = {kind: self.calendar.window_at(kind, now_ms) for kind in self._kinds}
            shared = intersection(windows["month"].name, list(windows.values()))
            self._latest = shared, windows
        return self._latest

    def _further(self, windows: Mapping[WindowKind, Window], attributes: Mapping[str, str]) -> Iterable[BudgetCap]:
        for budget in self._budgets:
            values = [attributes[name] for name in budget.by if name in attributes]
            if len(values) == len(budget.by):
                value = budget_value(values)
                key = budget_name(budget.name, value, windows[budget.window].name)
                yield BudgetCap(key, budget.cap_of(value))

    def caps_of(self, keys: Iterable[str], *, plan: str) -> tuple[BudgetCap, ...]:
        """Return budgets with their current caps. A budget that the policy no longer has refuses nothing."""
        return tuple(BudgetCap(key, self._cap_of_key(key, plan)) for key in keys)

    def find_cap(self, key: str) -> int | None:
        """Return the cap of a further budget, without its credit; None if the policy no longer has it."""
        name, value, _ = split_budget_name(key)
        budget = self._by_name.get(name)
        return None if budget is None else budget.cap_of(value)

    def prepaid_key(self, name: str, value: str | None) -> str:
        """Return the key of a balance that credit can be granted to.

        `value` has one value for each attribute of the budget, joined by commas. Errors: ValueError.
        """
        budget, parts = self._prepaid(name, value)
        return budget_name(budget.name, budget_value(parts), ALWAYS.name)

    def prepaid_user(self, name: str, value: str | None) -> str:
        """Return the user whose partition has such a balance; '' if it is not kept by user. Errors: ValueError."""
        budget, parts = self._prepaid(name, value)
        return parts[budget.by.index("user")] if "user" in budget.by else ""

    def _prepaid(self, name: str, value: str | None) -> tuple[_Budget, list[str]]:
        names = {rule.name: budget for rule, budget in zip(self.policy.budgets, self._budgets, strict=True)}
        budget = names.get(name)
        if budget is None:
            raise ValueError(unknown_name("budget", name, list(names)))
        if budget.window != "total":
            raise ValueError(f"budget {name} resets each {budget.window}; credit needs a budget with window 'total'")
        try:
            parts = read_values(value or ("" if budget.by else EVERYBODY), len(budget.by))
            if value is None and budget.by:
                raise ValueError("there is no value")  # noqa: TRY301 - reported below, as any other mistake.
        except ValueError:
            by = " and ".join(budget.by)
            needs = f"kept by {by}: give a value of each, joined by commas" if by else "of everybody: give no value"
            raise ValueError(f"budget {name} is {needs}") from None
        return budget, [check_id(part) for part in parts]

    def _cap_of_key(self, key: str, plan: str) -> int:
        name, value, _ = split_budget_name(key)
        if name == OWN_BUDGET:
            return self.cap_of(value, plan)
        budget = self._by_name.get(name)
        return MAX_NANOUSD if budget is None else budget.cap_of(value)


def name_problems(policy: Policy) -> list[str]:
    """Return the problems with budget names: `day` and `campaign` are reserved for the budgets of the settings."""
    defined = {"day": (("user",), "day"), "campaign": (("campaign",), "month")}
    return [
        f"budget {rule.name}: a setting defines the budget of this name, kept by {defined[rule.name][0][0]} per "
        f"{defined[rule.name][1]}; give this budget another name"
        for rule in policy.budgets
        if defined.get(rule.name, (rule.by, rule.window)) != (rule.by, rule.window)
    ]


def window_problems(before: Policy, after: Policy, now_ms: int) -> list[str]:
    """Return why the new policy's windows cannot be used from now on.

    The current window continues and ends when the new policy says. So this moment must be in a window of the same name
    by both policies: otherwise a window that is over could be spent from again.
    """
    windows = [rule.window for rule in (*before.budgets, *after.budgets)]
    kinds: tuple[WindowKind, ...] = ("day", "month", "week")
    old, new = calendar_of(before), calendar_of(after)
    return [
        f"the current {kind} is {new.window_at(kind, now_ms).name} by the new time zone or first day, but "
        f"{old.window_at(kind, now_ms).name} by the old ones: apply the policy when both are in the same {kind}"
        for kind in kinds
        if (kind == "month" or kind in windows) and new.window_at(kind, now_ms).name != old.window_at(kind, now_ms).name
    ]


def calendar_of(policy: Policy) -> Calendar:
    """Return the calendar in which the policy's windows begin. Errors: ValueError for an unknown time zone."""
    return Calendar(policy.zone, policy.month_starts_on, policy.week_starts_on)
