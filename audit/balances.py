"""Balances and caps added up from the events one by one, independently of the gate and the projection."""

from dataclasses import dataclass, field

from tollbook.schemas.events import (
    BudgetDenied,
    BudgetOpened,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    CreditGranted,
    CreditRevoked,
    Event,
    PlanAssigned,
    PlanCleared,
)
from tollbook.schemas.identifiers import budget_name
from tollbook.schemas.money import MAX_NANOUSD


@dataclass(frozen=True, slots=True)
class Move:
    """What an event does to one budget, in nano-dollars; `stamped` is the committed sum that the gate wrote."""

    budget: str
    settled_nanousd: int
    held_nanousd: int
    stamped_nanousd: int | None
    cap_nanousd: int | None = None


@dataclass(slots=True)
class Balance:
    """A budget's settled spend and open holds, in nano-dollars."""

    settled_nanousd: int = 0
    held_nanousd: int = 0

    @property
    def committed_nanousd(self) -> int:
        """Settled spend and open holds together."""
        return self.settled_nanousd + self.held_nanousd

    def add(self, move: Move) -> None:
        """Add what an event moved."""
        self.settled_nanousd += move.settled_nanousd
        self.held_nanousd += move.held_nanousd


def account_of(event: Event) -> str:
    """Return the budget of an event's user and period; '' if it has no user."""
    return budget_name("user", event.user_id, event.period) if event.user_id and event.period else ""


def moves_of(event: Event) -> list[Move]:
    """Return what an event moves, the user's own budget first."""
    match event.payload:
        case BudgetReserved() as payload:
            settled, held, cap = 0, event.amount, payload.cap_nanousd
        case CostRecorded() as payload:
            settled, held, cap = event.amount, -payload.hold_nanousd, None
        case CostAdjusted() as payload:
            settled, held, cap = event.amount, 0, None
        case BudgetOpened() as payload:
            return [
                Move(stamp.budget, event.amount, payload.hold_nanousd, stamp.committed_nanousd, stamp.cap_nanousd)
                for stamp in payload.budgets
            ]
        case _:
            return []
    own = Move(account_of(event), settled, held, event.committed, cap)
    further = [
        Move(stamp.budget, settled, held, stamp.committed_nanousd, stamp.cap_nanousd) for stamp in payload.budgets
    ]
    return [own, *further]


def move_of(event: Event, budget: str) -> Move | None:
    """Return what an event does to one budget."""
    return next((move for move in moves_of(event) if move.budget == budget), None)


@dataclass(slots=True)
class Cap:
    """A user's cap in one period as it changes: the assigned cap or the plan's, and credit on top.

    `base_nanousd` is None while no event has stated it.
    """

    period: str
    base_nanousd: int | None = None
    credit_nanousd: int = 0
    assigned: Event | None = None
    credits: list[Event] = field(default_factory=list[Event])

    @property
    def nanousd(self) -> int | None:
        """The cap in force."""
        return None if self.base_nanousd is None else min(self.base_nanousd + self.credit_nanousd, MAX_NANOUSD)

    def note(self, event: Event) -> None:
        """Take an event of the user, of any period: an assigned plan stays in force in later periods."""
        match event.payload:
            case PlanAssigned() as payload:
                self.assigned, self.base_nanousd = event, payload.cap_nanousd
            case PlanCleared():
                # What tasks name is in force again; until the next event states that cap, the last one is shown.
                self.assigned = None
            case CreditGranted() | CreditRevoked() if event.period == self.period:
                self.credits.append(event)
                self.credit_nanousd += event.amount
            case BudgetReserved() as payload if event.period == self.period:
                self._take(payload.cap_nanousd)
            case BudgetDenied() as payload if payload.budget == account_of(event) and event.period == self.period:
                self._take(payload.cap_nanousd)
            case _:
                pass

    def _take(self, stamped_nanousd: int) -> None:
        # The gate's stamp includes credit, and is limited to the highest possible cap.
        if stamped_nanousd != self.nanousd:
            self.base_nanousd = stamped_nanousd - self.credit_nanousd
