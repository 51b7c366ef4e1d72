"""Which budgets a call is held against, and their caps: a function of the policy in force.

A call is always held against its user's billing period. It is held against each further budget of the policy too,
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
        # Converted once: a conversion takes longer than all else that a call needs of them.
        self._plan_caps_nanousd = policy.plan_caps_nanousd
        self._user_caps_nanousd = policy.user_caps_nanousd
        self._budgets = tuple(_Budget.of(rule, definitions.get(rule.name, 0)) for rule in policy.budgets)
        self._by_name = {budget.name: budget for budget in self._budgets}
        self._kinds: Final[tuple[WindowKind, ...]] = tuple({"month", *(budget.window for budget in self._budgets)})
        self._latest: tuple[Window, Mapping[WindowKind, Window]] = (Window("", 0, 0), {})

    def cap_of(self, user_id: str, plan: str) -> int:
        """Return the cap of a user's billing period: the user's own, else the plan's.

        A plan assigned on the ledger wins over it, in the gate. Errors: KeyError.
        """
        own = self._user_caps_nanousd.get(user_id)
        return self._plan_caps_nanousd[plan] if own is None else own

    def budgets_at(self, now_ms: int, attributes: Mapping[str, str]) -> tuple[Window, tuple[BudgetCap, ...]]:
        """Return the budgets of a call, the user's period first, and the window for which all of them are valid.

        `attributes` are the call's user and plan, and those that it has of campaign, task, model and its tags. The
        window bears the name of the billing period.
        """
        shared, windows = self._windows_at(now_ms)
        user, plan = attributes["user"], attributes["plan"]
        own = BudgetCap(budget_name(OWN_BUDGET, user, shared.name), self.cap_of(user, plan))
        return shared, (own, *self._further(windows, attributes))

    def further_at(self, now_ms: int, attributes: Mapping[str, str]) -> tuple[BudgetCap, ...]:
        """Return the budgets of a call beside the user's period; `attributes` as for `budgets_at`."""
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
        """Return budgets with the caps that they have now. One that is no longer part of the policy refuses nothing."""
        return tuple(BudgetCap(key, self._cap_of_key(key, plan)) for key in keys)

    def find_cap(self, key: str) -> int | None:
        """Return the cap of a further budget, without its credit; None where the policy has it no more."""
        name, value, _ = split_budget_name(key)
        budget = self._by_name.get(name)
        return None if budget is None else budget.cap_of(value)

    def prepaid_key(self, name: str, value: str | None) -> str:
        """Return the key of a balance that credit can be granted to.

        `value` as the budget keeps it: of several attributes, the values joined by commas. Errors: ValueError.
        """
        budget, parts = self._prepaid(name, value)
        return budget_name(budget.name, budget_value(parts), ALWAYS.name)

    def prepaid_user(self, name: str, value: str | None) -> str:
        """Return the user whose partition has such a balance; '' where it is not kept by user. Errors: ValueError."""
        budget, parts = self._prepaid(name, value)
        return parts[budget.by.index("user")] if "user" in budget.by else ""

    def _prepaid(self, name: str, value: str | None) -> tuple[_Budget, list[str]]:
        names = {rule.name: budget for rule, budget in zip(self.policy.budgets, self._budgets, strict=True)}
        budget = names.get(name)
        if budget is None:
            raise ValueError(unknown_name("budget", name, list(names)))
        if budget.window != "total":
            raise ValueError(f"budget {name} begins anew each {budget.window}; credit needs one with window 'total'")
        try:
            parts = read_values(value or ("" if budget.by else EVERYBODY), len(budget.by))
            if value is None and budget.by:
                raise ValueError("there is no value")  # noqa: TRY301 - told below, as any other mistake.
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
    """Return why budgets cannot have their names: `day` and `campaign` are those that the settings define."""
    defined = {"day": (("user",), "day"), "campaign": (("campaign",), "month")}
    return [
        f"budget {rule.name}: with this name it is kept by {defined[rule.name][0][0]} per {defined[rule.name][1]}, as "
        "the setting of that name defines it; give another budget another name"
        for rule in policy.budgets
        if defined.get(rule.name, (rule.by, rule.window)) != (rule.by, rule.window)
    ]


def window_problems(before: Policy, after: Policy, now_ms: int) -> list[str]:
    """Return why the windows of a policy cannot begin as it says from now on.

    A window that runs goes on and ends when the new policy says, so this moment must be in the window of the same name
    by both: else a window that is over would be spent from again.
    """
    windows = [rule.window for rule in (*before.budgets, *after.budgets)]
    kinds: tuple[WindowKind, ...] = ("day", "month", "week")
    old, new = calendar_of(before), calendar_of(after)
    return [
        f"by the new time zone or first day it is {kind} {new.window_at(kind, now_ms).name} now, by the present ones "
        f"{old.window_at(kind, now_ms).name}: apply it when both are in the same {kind}"
        for kind in kinds
        if (kind == "month" or kind in windows) and new.window_at(kind, now_ms).name != old.window_at(kind, now_ms).name
    ]


def calendar_of(policy: Policy) -> Calendar:
    """Return the calendar in which the policy's windows begin. Errors: ValueError for an unknown time zone."""
    return Calendar(policy.zone, policy.month_starts_on, policy.week_starts_on)
