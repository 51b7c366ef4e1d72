"""Budgets, caps and holds of a what-if, each as recorded and as it would have been. Nano-dollars."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tollbook.audit.what_if.alternatives import Alternatives, BoundTokens, RecordedCaps
from tollbook.audit.what_if.totals import Account
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.routes import Target

Verdict = Literal["fits", "wait", "denied"]


@dataclass(slots=True)
class Balance:
    """A budget as it would be, and as it was recorded."""

    settled: int = 0
    held: int = 0
    recorded_settled: int = 0
    recorded_held: int = 0

    @property
    def is_as_recorded(self) -> bool:
        """Whether nothing is different so far."""
        return self.settled == self.recorded_settled and self.held == self.recorded_held


@dataclass(frozen=True, slots=True)
class Choice:
    """A model that a call could try first: its price if that is not the recorded one, and the hold it needs."""

    price: ModelPrice | None
    amount: int


@dataclass(slots=True)
class Hold:
    """A hold, or a request for one. Amounts as recorded, and as they would be (`other_`)."""

    entry_id: str
    ms: int
    account: Account
    call_id: str
    number: int
    task_type: str
    model: str
    tokens: BoundTokens
    budgets: tuple[tuple[str, int], ...]
    """Names and recorded caps. The user's own is the first; its cap is without credit."""
    amount: int
    other_amount: int
    is_made: bool
    """Whether the call was made; it was refused otherwise."""
    first_price: ModelPrice | None = None
    """The price of its first model instead of the recorded one."""
    choices: tuple[Choice, ...] = ()
    """What would be tried in turn where its route has a cheaper model: the first model, then that one."""
    is_moved: bool = False
    """Whether it would have been held against other budgets, or others' caps, than it was."""
    targets: list[Target] = field(default_factory=list[Target])
    """The models of its attempts as recorded, in their order, each at its provider."""
    charged: int = 0
    other_charged: int = 0
    booked: int = 0
    other_booked: int = 0
    cut_from: int | None = None
    """The first attempt that would not have been made."""
    is_waiting: bool = False
    is_ended: bool = False
    """Whether it was settled as recorded."""

    @property
    def is_changed(self) -> bool:
        """Whether it would have held or cost another amount."""
        return self.other_amount != self.amount or self.other_charged != self.charged or self.cut_from is not None

    @property
    def names(self) -> list[str]:
        """Its budgets."""
        return [name for name, _ in self.budgets]

    def place_of(self, target: Target) -> int:
        """Return the place of a model at its provider among those that the call tried, from 0."""
        if target not in self.targets:
            self.targets.append(target)
        return self.targets.index(target)

    def take(self, choice: Choice) -> None:
        """Use this choice instead of the recorded model."""
        self.first_price, self.other_amount = choice.price, choice.amount

    def is_cut(self, attempt: int) -> bool:
        """Whether an attempt would not have been made."""
        return self.cut_from is not None and attempt >= self.cut_from

    def next_bound(self, extension: int) -> int:
        """Return the recorded bound of an attempt for which the hold was extended by this amount."""
        return self.amount + extension - self.charged

    def other_cost(self) -> int:
        """Return its cost: its attempts, and what was booked beyond them, scaled by the ratio of the holds."""
        if not self.is_changed:
            return self.booked
        beyond = self.booked - self.charged
        if self.cut_from is not None:
            beyond = min(0, beyond)
        elif self.amount and self.other_amount != self.amount:
            beyond = -(-beyond * self.other_amount // self.amount)
        return max(0, self.other_charged + beyond)


@dataclass(slots=True)
class Means:
    """The average cost of calls of a task type and plan, so far."""

    sums: dict[tuple[str, str], list[int]] = field(default_factory=dict[tuple[str, str], list[int]])

    def add(self, hold: Hold, nanousd: int) -> None:
        """Count the cost of a call."""
        for plan in (hold.account.plan, ""):
            total = self.sums.setdefault((hold.task_type, plan), [0, 0])
            total[0] += nanousd
            total[1] += 1

    def estimate(self, hold: Hold) -> int:
        """Return the mean of similar calls: of its plan, otherwise of any plan; without any, its bound."""
        for plan in (hold.account.plan, ""):
            if found := self.sums.get((hold.task_type, plan)):
                return min(-(-found[0] // found[1]), hold.other_amount)
        return hold.other_amount


@dataclass(slots=True)
class Caps:
    """Users' caps on the ledger so far, and the caps that are in force instead."""

    alternatives: Alternatives
    settings: RecordedCaps
    further: dict[str, int] = field(default_factory=dict[str, int])
    """The last recorded caps of budgets other than the users' own."""
    further_credits: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """Their credit, by name in the policy and value."""
    _assigned: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    _credits: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])
    _last: dict[tuple[str, str], int] = field(default_factory=dict[tuple[str, str], int])

    def assign(self, user_id: str, plan: str, cap: int) -> None:
        """Note an assigned plan or cap."""
        self._assigned[user_id] = (plan, cap)

    def clear(self, user_id: str) -> None:
        """Forget an assigned plan and cap."""
        self._assigned.pop(user_id, None)

    def grant(self, user_id: str, period: str, credit: int) -> None:
        """Note a credit; a negative one is taken back."""
        self._credits[user_id, period] = self._credits.get((user_id, period), 0) + credit

    def without_credit(self, account: Account, recorded_cap: int) -> int:
        """Return a recorded cap less the credit so far, and remember it."""
        key = (account.user_id, account.period)
        self._last[key] = left = recorded_cap - self._credits.get(key, 0)
        return left

    def recorded(self, account: Account) -> int:
        """Return the cap, without credit, of a user's period if an event does not state it."""
        known = self._last.get((account.user_id, account.period))
        if known is not None:
            return known
        if account.user_id in self._assigned:
            return self._assigned[account.user_id][1]
        return self.settings.users.get(account.user_id, self.settings.plans.get(account.plan, 0))

    def is_changed(self, account: Account, recorded_cap: int) -> bool:
        """Whether another cap is in force than the recorded one, which is given without credit."""
        return self._base(account, recorded_cap) != recorded_cap

    def in_force(self, account: Account, recorded_cap: int) -> int:
        """Return the cap in force, credit included, instead of a recorded one without credit."""
        credit = self._credits.get((account.user_id, account.period), 0)
        return min(self._base(account, recorded_cap) + credit, MAX_NANOUSD)

    def _base(self, account: Account, recorded_cap: int) -> int:
        changed = self.alternatives
        if account.user_id in changed.user_caps_nanousd:
            return changed.user_caps_nanousd[account.user_id]
        if account.plan in changed.plan_caps_nanousd and not self._is_own(account.user_id):
            return changed.plan_caps_nanousd[account.plan]
        return recorded_cap

    def _is_own(self, user_id: str) -> bool:
        """Whether the user has a cap of their own; a plan's changed cap does not change it."""
        if user_id in self._assigned:
            return not self.settings.is_of_plan(*self._assigned[user_id])
        return user_id in self.settings.users


@dataclass(slots=True)
class Budgets:
    """The balances of one partition, and the gate's rules on them."""

    caps: Caps
    _balances: dict[str, Balance] = field(default_factory=dict[str, Balance])

    def __getitem__(self, name: str) -> Balance:
        """Return a budget's balance, which the caller may change."""
        found = self._balances.get(name)
        if found is None:
            found = self._balances[name] = Balance()
        return found

    def move(self, names: Sequence[str], *, settled: int = 0, held: int = 0) -> None:
        """Change the balances that would have been."""
        for name in names:
            balance = self[name]
            balance.settled += settled
            balance.held += held

    def move_recorded(self, names: Sequence[str], *, settled: int = 0, held: int = 0) -> None:
        """Change the recorded balances."""
        for name in names:
            balance = self[name]
            balance.recorded_settled += settled
            balance.recorded_held += held

    def weigh(self, hold: Hold, amount: int) -> tuple[Verdict, str, int]:
        """Return the gate's answer, and the budget that decides it, with its cap."""
        if not amount:
            return "fits", *hold.budgets[0]  # G9
        waiting: tuple[str, int] | None = None
        for index, (name, recorded_cap) in enumerate(hold.budgets):
            cap = recorded_cap if index else self.caps.in_force(hold.account, recorded_cap)
            balance = self[name]
            if balance.settled + amount > cap:
                return "denied", name, cap
            if waiting is None and balance.settled + balance.held + amount > cap:
                waiting = (name, cap)
        return ("wait", *waiting) if waiting else ("fits", *hold.budgets[0])

    def are_as_recorded(self, hold: Hold) -> bool:
        """Whether the balances and caps on which the gate decided are as recorded."""
        if hold.is_moved or self.caps.is_changed(hold.account, hold.budgets[0][1]):
            return False
        return all(self[name].is_as_recorded for name, _ in hold.budgets)
