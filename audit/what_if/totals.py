"""The sums of a what-if: what was recorded beside what would have been. Nano-dollars."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

from tollbook.schemas.identifiers import EntryId


@dataclass(slots=True)
class Totals:
    """Sums over some calls. `other_*` is what would have been; `allowed` calls were refused and would have fit.

    The cost of an allowed call is not known: `estimate` is the average cost of similar calls, `at_most` its bound.
    """

    calls: int = 0
    refused: int = 0
    spent_nanousd: int = 0
    other_calls: int = 0
    other_refused: int = 0
    other_spent_nanousd: int = 0
    allowed: int = 0
    estimate_nanousd: int = 0
    at_most_nanousd: int = 0
    newly_refused: int = 0
    cut_short: int = 0
    waited: int = 0
    still_waiting: int = 0
    not_repriced: int = 0

    @property
    def difference_nanousd(self) -> int:
        """How much more would have been spent, without estimates; below zero if less."""
        return self.other_spent_nanousd - self.spent_nanousd

    @property
    def is_changed(self) -> bool:
        """Whether anything would have been different."""
        return bool(
            self.difference_nanousd
            or self.newly_refused
            or self.allowed
            or self.cut_short
            or self.still_waiting
            or self.calls != self.other_calls
        )

    def add(self, other: "Totals") -> None:
        """Add the sums of other calls."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True, order=True)
class Account:
    """Calls counted together: those of a user, in one period, on one plan."""

    user_id: str
    period: str
    plan: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A call that was made and would have been refused."""

    entry_id: str
    account: Account
    call_id: str
    task_type: str
    budget: str
    settled_nanousd: int
    held_nanousd: int
    cap_nanousd: int
    amount_nanousd: int
    reason: str


@dataclass(slots=True)
class Outcome:
    """The result of a what-if."""

    accounts: dict[Account, Totals] = field(default_factory=dict[Account, Totals])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    """The first ones of every account."""
    kept_refusals: int = 10
    events: int = 0
    unexplained: int = 0
    """Recorded decisions that do not follow from the ledger's own numbers; they are kept as recorded."""

    def of(self, account: Account) -> Totals:
        """Return the sums of an account, which the caller may add to."""
        found = self.accounts.get(account)
        if found is None:
            found = self.accounts[account] = Totals()
        return found

    def move(self, sums: Totals, before: Account, after: Account) -> None:
        """Count sums of one account in another."""
        self.of(after).add(sums)
        totals = self.of(before)
        for each in fields(sums):
            setattr(totals, each.name, getattr(totals, each.name) - getattr(sums, each.name))

    def add_refusal(self, refusal: Refusal) -> None:
        """Count a call that would have been refused, and keep it if it is one of its account's first."""
        totals = self.of(refusal.account)
        if totals.newly_refused < self.kept_refusals:
            self.refusals.append(refusal)
        totals.newly_refused += 1
        totals.other_refused += 1

    def select(self, *, user_id: str | None = None, period: str | None = None) -> "Outcome":
        """Return the part of a user, a period, or both."""

        def is_wanted(account: Account) -> bool:
            return user_id in (None, account.user_id) and period in (None, account.period)

        return Outcome(
            {account: totals for account, totals in self.accounts.items() if is_wanted(account)},
            [refusal for refusal in self.refusals if is_wanted(refusal.account)],
            kept_refusals=self.kept_refusals,
            events=self.events,
            unexplained=self.unexplained,
        )

    def with_users(self, name: Callable[[str], str]) -> "Outcome":
        """Return the same result with users renamed."""

        def named(account: Account) -> Account:
            return replace(account, user_id=name(account.user_id))

        return replace(
            self,
            accounts={named(account): totals for account, totals in self.accounts.items()},
            refusals=[replace(each, account=named(each.account), budget=name(each.budget)) for each in self.refusals],
        )

    def by_plan(self) -> dict[str, tuple[int, Totals]]:
        """Return the number of users and the sums of every plan."""
        users: dict[str, set[str]] = {}
        for account in self.accounts:
            users.setdefault(account.plan, set()).add(account.user_id)
        sums = _grouped((account.plan, totals) for account, totals in self.accounts.items())
        return {plan: (len(users[plan]), sums[plan]) for plan in sorted(sums)}

    def by_user(self) -> dict[str, Totals]:
        """Return the sums of every user with a change, the most affected first."""
        sums = _grouped((account.user_id, totals) for account, totals in self.accounts.items())
        changed = [(user_id, totals) for user_id, totals in sums.items() if totals.is_changed]
        return dict(sorted(changed, key=lambda each: (*_weight(each[1]), each[0])))

    def first_refusals(self) -> list[Refusal]:
        """Return the first calls that would have been refused, as many as are kept, oldest first."""
        return sorted(self.refusals, key=lambda refusal: EntryId.parse(refusal.entry_id))[: self.kept_refusals]

    def total(self) -> Totals:
        """Return the sums over everything."""
        return _grouped(("", totals) for totals in self.accounts.values()).get("", Totals())


def _grouped(pairs: Iterable[tuple[str, Totals]]) -> dict[str, Totals]:
    sums: dict[str, Totals] = {}
    for name, totals in pairs:
        sums.setdefault(name, Totals()).add(totals)
    return sums


def _weight(totals: Totals) -> tuple[int, int]:
    return -abs(totals.difference_nanousd) - totals.estimate_nanousd, -totals.newly_refused - totals.allowed
