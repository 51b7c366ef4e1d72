"""A user's statement of one billing period, like a bank's: every movement with the balance after it."""

from dataclasses import dataclass

from tollbook.audit.balances import Balance, Cap, account_of, move_of, moves_of
from tollbook.audit.reader import AuditReader, NotOnLedger, Selection
from tollbook.schemas.events import Event

# Requests and fallbacks move no money; that happens when their hold is settled.
_NO_LINES = ("model-called", "fallback-used")


@dataclass(frozen=True, slots=True)
class Line:
    """One movement and the balance after it, in nano-dollars."""

    event: Event
    settled_change_nanousd: int
    held_change_nanousd: int
    settled_nanousd: int
    held_nanousd: int
    cap_nanousd: int | None

    @property
    def is_agreed(self) -> bool:
        """Whether the gate stamped the same sum as the one added up here."""
        stamped = self.event.committed
        return stamped is None or stamped == self.settled_nanousd + self.held_nanousd  # audits G6


@dataclass(slots=True)
class FurtherBudget:
    """A budget beside the billing period, as the user's events of the period left it. Nano-dollars.

    `own_*` is the user's part in this period; `committed_nanousd` is what everybody had settled and held there after
    the last of these events, and `cap_nanousd` its cap at the last hold (None: no hold has stated it).
    """

    budget: str
    own_settled_nanousd: int = 0
    own_held_nanousd: int = 0
    committed_nanousd: int | None = None
    cap_nanousd: int | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """A user's period. It begins with nothing spent, since a cap is for one period."""

    user_id: str
    period: str
    other_periods: tuple[str, ...]
    opening_cap_nanousd: int | None
    lines: tuple[Line, ...]
    further: tuple[FurtherBudget, ...] = ()

    @property
    def settled_nanousd(self) -> int:
        """Settled spend at the end."""
        return self.lines[-1].settled_nanousd

    @property
    def held_nanousd(self) -> int:
        """Open holds at the end."""
        return self.lines[-1].held_nanousd

    @property
    def cap_nanousd(self) -> int | None:
        """The cap at the end; None if no event has stated it."""
        return self.lines[-1].cap_nanousd

    @property
    def disagreements(self) -> tuple[Line, ...]:
        """Lines for which the gate stamped another sum."""
        return tuple(line for line in self.lines if not line.is_agreed)


async def make_statement(reader: AuditReader, user_id: str, period: str | None = None) -> Statement:
    """Return a user's statement of a period, the latest by default.

    Errors: NotOnLedger; as `AuditReader.tables`.
    """
    events = [event for event in await reader.events(Selection(user_id=user_id)) if event.period]
    periods = sorted({event.period for event in events})
    if not periods:
        raise NotOnLedger(f"user {user_id} is not on the ledger")
    period = period or periods[-1]
    if period not in periods:
        raise NotOnLedger(f"user {user_id} has nothing in {period}; there is {', '.join(periods)}")
    others = tuple(other for other in periods if other != period)
    first_seq = next(event.seq for event in events if event.period == period)
    cap = Cap(period)
    for event in events:
        if event.seq >= first_seq:
            break
        cap.note(event)
    opening_cap = cap.nanousd
    lines, further = tuple(_lines(events, cap, Balance())), _further(events, period)
    return Statement(user_id, period, others, opening_cap, lines, further)


def _further(events: list[Event], period: str) -> tuple[FurtherBudget, ...]:
    found: dict[str, FurtherBudget] = {}
    for event in events:
        own = account_of(event)
        for move in moves_of(event) if event.period == period else ():
            if move.budget == own:
                continue
            budget = found.setdefault(move.budget, FurtherBudget(move.budget))
            budget.own_settled_nanousd += move.settled_nanousd
            budget.own_held_nanousd += move.held_nanousd
            budget.committed_nanousd = move.stamped_nanousd
            if move.cap_nanousd is not None:
                budget.cap_nanousd = move.cap_nanousd
    return tuple(budget for _, budget in sorted(found.items()))


def _lines(events: list[Event], cap: Cap, balance: Balance) -> list[Line]:
    lines: list[Line] = []
    for event in events:
        if event.period != cap.period:
            continue
        cap.note(event)
        move = move_of(event, account_of(event))
        if move is not None:
            balance.add(move)
        if event.type in _NO_LINES and event.committed in (None, balance.committed_nanousd):
            continue
        lines.append(
            Line(
                event,
                settled_change_nanousd=move.settled_nanousd if move else 0,
                held_change_nanousd=move.held_nanousd if move else 0,
                settled_nanousd=balance.settled_nanousd,
                held_nanousd=balance.held_nanousd,
                cap_nanousd=cap.nanousd,
            )
        )
    return lines
