"""The life of a call: all of its events, in order, and their sums."""

from dataclasses import dataclass

from tollbook.audit.reader import AuditReader, NotOnLedger, Selection
from tollbook.schemas.events import (
    BudgetDenied,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    Event,
    FallbackUsed,
    ModelCalled,
)


@dataclass(frozen=True, slots=True)
class CallLife:
    """A call of one user. Amounts in nano-dollars; `status` as in the view `calls`, '' for a person's command."""

    call_id: str
    user_id: str
    events: tuple[Event, ...]

    @property
    def status(self) -> str:
        """The call's status: open, done, failed, expired, closed (taken over, not run again yet) or denied."""
        status = ""
        for event in self.events:
            match event.payload:
                case BudgetReserved():
                    status = "open"
                case BudgetDenied():
                    status = "denied"
                case CostRecorded(outcome="taken_over"):
                    status = "closed"
                case CostRecorded(outcome="recorded"):
                    status = "done"
                case CostRecorded(outcome=outcome):
                    status = outcome
                case _:
                    pass
        return status

    @property
    def orders(self) -> tuple[BudgetReserved | BudgetDenied, ...]:
        """The decisions asked of the gate: holds, extensions and denials."""
        return tuple(each for event in self.events if isinstance(each := event.payload, BudgetReserved | BudgetDenied))

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers that claimed the call, in order."""
        return tuple(dict.fromkeys(order.worker for order in self.orders))

    @property
    def periods(self) -> tuple[str, ...]:
        """The billing periods that the call was charged to."""
        return tuple(dict.fromkeys(event.period for event in self.events))

    @property
    def cost_nanousd(self) -> int:
        """The cost, corrections included."""
        return sum(event.amount for event in self.events if isinstance(event.payload, CostRecorded | CostAdjusted))

    @property
    def assumed_nanousd(self) -> int:
        """The unconfirmed part of the cost."""
        payloads = [event.payload for event in self.events]
        return sum(each.assumed_nanousd for each in payloads if isinstance(each, CostRecorded | CostAdjusted))

    @property
    def held_nanousd(self) -> int:
        """The money that is still held for the call."""
        held = 0
        for event in self.events:
            match event.payload:
                case BudgetReserved():
                    held += event.amount
                case CostRecorded(hold_nanousd=freed):
                    held -= freed
                case _:
                    pass
        return held

    def count(self, kind: type[BudgetReserved | ModelCalled | FallbackUsed | CostAdjusted]) -> int:
        """Return how many events of a kind there are; of reservations, only those that open a hold."""
        return sum(
            isinstance(each := event.payload, kind) and not (isinstance(each, BudgetReserved) and each.kind != "hold")
            for event in self.events
        )


async def find_call(reader: AuditReader, call_id: str, *, user_id: str | None = None) -> list[CallLife]:
    """Return a call's life; more than one if users of several partitions used the same id, unless one is given.

    Errors: NotOnLedger; as `AuditReader.tables`.
    """
    by_user: dict[str, list[Event]] = {}
    for event in await reader.events(Selection(user_id=user_id, call_ids=frozenset({call_id}))):
        by_user.setdefault(event.user_id, []).append(event)
    if not call_id or not by_user:
        raise NotOnLedger(f"call {call_id} is not on the ledger: nothing was held, refused or charged for it")
    return [CallLife(call_id, user_id, tuple(events)) for user_id, events in by_user.items()]
