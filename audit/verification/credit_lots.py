"""Verifies how much is left of each credit of a budget, and how much expiries took back (G1, G8).

Whenever a budget's credits change, the gate lets spend beyond the cap use them up before, the one that expires first
before the others; a correction gives back in the opposite order. Each change is stamped with the balance of that
moment, so the events alone give what is left.
"""

from bisect import insort_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from tollbook.schemas.identifiers import describe_budget
from tollbook.schemas.money import format_usd


class CreditChanged(NamedTuple):
    """A change of a budget's credit, with the budget's balance then. Units: nano-dollars; `expires_ms` 0: never."""

    budget: str
    type: str
    credit: str
    change: int
    expires_ms: int
    cap: int
    settled: int
    held: int


@dataclass(slots=True)
class _Lot:
    credit: str
    amount: int
    left: int
    expires_ms: int


@dataclass(slots=True)
class _Lots:
    """The credits of one budget, in the order in which they are used."""

    used: int = 0
    lots: list[_Lot] = field(default_factory=list[_Lot])

    def change(self, event: CreditChanged) -> int:
        """Apply an event; return the change that it should have made."""
        spend = max(0, event.settled - event.cap)
        self._use(spend)
        if event.type == "credit-granted":
            granted = _Lot(event.credit, event.change, event.change, event.expires_ms)
            insort_right(self.lots, granted, key=lambda lot: lot.expires_ms or inf)
            return event.change
        lot = next((lot for lot in self.lots if lot.credit == event.credit), None)
        if lot is None:
            return 0
        # The part of an expiring credit that open holds may need stays.
        needed = max(0, event.settled + event.held - event.cap) - spend
        expected = -max(0, lot.left - needed) if event.type == "credit-expired" else max(event.change, -lot.left)
        lot.left, lot.amount = lot.left + event.change, lot.amount + event.change
        self.lots = [each for each in self.lots if each is not lot or lot.left]
        return expected

    def as_text(self) -> str:
        """Return them as the gate keeps them."""
        lines = (f"{lot.credit} {lot.amount} {lot.left} {lot.expires_ms}" for lot in self.lots)
        return "\n".join([str(self.used), *lines])

    def _use(self, spend: int) -> None:
        rest = spend - self.used
        for lot in self.lots if rest > 0 else reversed(self.lots):
            if not rest:
                break
            part = min(rest, lot.left) if rest > 0 else max(rest, lot.left - lot.amount)
            lot.left, self.used, rest = lot.left - part, self.used + part, rest - part


def changed_lots(found: dict[str, str], changes: Iterable[CreditChanged]) -> list[str]:
    """Describe changes that took back a wrong amount, and differences between Redis and the events.

    `found`: by budget, what the gate keeps.
    """
    given: dict[str, _Lots] = {}
    problems: list[str] = []
    for event in changes:
        expected = given.setdefault(event.budget, _Lots()).change(event)
        if event.change != expected:  # audits G8
            problems.append(
                f"{describe_budget(event.budget)}: {event.type} of credit {event.credit} changes it by "
                f"{_usd(event.change)}, the events before give {_usd(expected)}"
            )
    for budget in sorted(found.keys() | given.keys()):
        value = given[budget].as_text() if budget in given else None
        if found.get(budget) != value:  # audits G1
            problems.append(
                f"{describe_budget(budget)}: what its credits have left is {_shown(found.get(budget))} in Redis, "
                f"{_shown(value)} by the events"
            )
    return problems


def _usd(nanousd: int) -> str:
    return format_usd(nanousd, places=None)


def _shown(text: str | None) -> str:
    return "nothing" if text is None else repr(text)
