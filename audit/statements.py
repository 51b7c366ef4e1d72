"""A user's statement of one billing period, like a bank's: every movement with the balance after it."""

from dataclasses import dataclass

from tollbook.audit.balances import Balance, Cap, account_of, move_of
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


@dataclass(frozen=True, slots=True)
class Statement:
    """A user's period. It begins with nothing spent, since a cap is for one period."""

    user_id: str
    period: str
    other_periods: tuple[str, ...]
    opening_cap_nanousd: int | None
    lines: tuple[Line, ...]

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
    return Statement(user_id, period, others, opening_cap, tuple(_lines(events, cap, Balance())))


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
