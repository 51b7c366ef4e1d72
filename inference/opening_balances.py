"""Opening balances: earlier spend in the current windows of budgets that a policy adds or redefines.

Invariant: an opening balance is what the budget would have settled and held, if it had existed since its window began.
A cost counts by the attributes of its hold, in the window in which the hold was made. A hold that is open when the
policy comes into force counts in the same way, and is held against the budget from then on.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Final, NamedTuple

from tollbook.inference.budgets import BudgetPolicy
from tollbook.ledger.gate.policies import Opening, OpeningHold
from tollbook.ledger.gate.requests import Position
from tollbook.schemas.identifiers import definition_name, split_budget_name
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.policy import Policy

EVENT_TYPES: Final = ("budget-reserved", "cost-recorded", "cost-adjusted")
"""The types of events that a tally counts; it ignores others."""


class SpentRow(NamedTuple):
    """The fields of an event that a tally needs. Amounts are nano-dollars; `payload` is JSON."""

    ms: int
    type: str
    user_id: str
    call_id: str
    amount: int
    payload: str


class OpeningTally:
    """Sums up a partition's events, in order, for the budgets of a policy that comes into force now.

    `names` are the budgets to open, as in the policy; `definitions` and `takes_holds` are as in the policy's event.
    """

    def __init__(
        self,
        policy: Policy,
        definitions: Mapping[str, int],
        names: Collection[str],
        now_ms: int,
        *,
        takes_holds: bool,
    ) -> None:
        self._takes_holds = takes_holds
        self._budgets = BudgetPolicy(policy, definitions)
        rules = [rule for rule in policy.budgets if rule.name in names]
        windows = {rule.window: self._budgets.calendar.window_at(rule.window, now_ms) for rule in rules}
        self._labels = {
            definition_name(rule.name, definitions.get(rule.name, 1)): windows[rule.window].name for rule in rules
        }
        self.since_ms: Final = min((window.start_ms for window in windows.values()), default=now_ms)
        """The start of the earliest window; earlier events are not needed."""
        self.until_ms: Final = min((window.end_ms for window in windows.values()), default=now_ms)
        """The end of the window that ends first."""
        self._budgets_of_hold: dict[tuple[str, int], tuple[str, ...]] = {}
        self._spent: Counter[str] = Counter()
        self._held: dict[tuple[str, int], int] = {}

    def add(self, rows: Iterable[SpentRow]) -> None:
        """Count the next events."""
        for row in rows:
            if row.type not in EVENT_TYPES or row.ms < self.since_ms:
                continue
            payload = json.loads(row.payload)
            key = (row.call_id, payload.get("hold", 0))
            if row.type == "budget-reserved":
                if payload.get("kind", "hold") == "hold":
                    self._assign_budgets(key, row, payload)
                    self._held[key] = 0
                if key in self._held:
                    self._held[key] += row.amount
                continue
            if row.type == "cost-recorded":
                self._held.pop(key, None)
                if not key[1]:
                    self._assign_budgets(key, row, payload)
            for budget in self._budgets_of_hold.get(key, ()):
                self._spent[budget] += row.amount

    def openings(self) -> tuple[Opening, ...]:
        """Return the opening balance of each budget; budgets without spend and holds are left out."""
        holds = self._open_holds()
        return tuple(
            Opening(budget, min(spent, MAX_NANOUSD), self._budgets.find_cap(budget) or 0, tuple(holds[budget]))
            for budget in sorted(self._spent.keys() | holds.keys())
            if (spent := self._spent[budget]) > 0 or holds[budget]
        )

    def _open_holds(self) -> defaultdict[str, list[OpeningHold]]:
        """Return the open holds, by the budgets that they count in from now on."""
        holds = defaultdict[str, list[OpeningHold]](list)
        for key, amount in self._held.items() if self._takes_holds else ():
            for budget in self._budgets_of_hold.get(key, ()):
                holds[budget].append(OpeningHold(*key, amount))
        return holds

    def _assign_budgets(self, key: tuple[str, int], row: SpentRow, payload: Mapping[str, Any]) -> None:
        attributes = attributes_of(row.user_id, payload)
        places = tuple(
            budget.name
            for budget in self._budgets.further_at(row.ms, attributes)
            if self._labels.get(split_budget_name(budget.name)[0]) == split_budget_name(budget.name)[2]
        )
        if places:
            self._budgets_of_hold[key] = places


def attributes_of(user_id: str, payload: Mapping[str, Any]) -> dict[str, str]:
    """Return the budget attributes of a recorded hold, refusal or spend of an application."""
    bound: Mapping[str, Any] = payload.get("bound") or {}
    known = {
        "user": user_id,
        "plan": payload.get("plan"),
        "campaign": payload.get("campaign_id"),
        "task": payload.get("task_type"),
        "model": bound.get("model") or payload.get("model"),
    }
    tags: Mapping[str, str] = payload.get("tags") or {}
    return {**tags, **{name: value for name, value in known.items() if value}}


ReadSpent = Callable[[int, OpeningTally, Position | None], Awaitable[Position]]
"""Adds a partition's events after a position (None: all events) to a tally, and returns the position reached.

Errors: EventsMissing if some are neither in the archive nor on the stream; ArchiveDamaged; LedgerUnavailable.
"""
