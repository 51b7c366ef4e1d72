"""Reads the plans and credits that people gave to users from the ledger's events, with author and reason."""

from dataclasses import dataclass

from tollbook.audit.reader import AuditReader, Selection
from tollbook.schemas.events import CreditGranted, CreditRevoked, Event, PlanAssigned


@dataclass(slots=True)
class Grant:
    """A credit, and how much of it was not taken back, in nano-dollars. `event` is the `credit-granted` event."""

    event: Event
    left_nanousd: int


async def read_grants(reader: AuditReader, *, user_id: str | None = None, period: str | None = None) -> list[Grant]:
    """Return the credits, oldest first in each partition. Errors: as `AuditReader.tables`.

    A credit that was taken back without naming a grant counts against the newest grants of its user and period.
    """
    grants: dict[tuple[str, str], list[Grant]] = {}
    in_order: list[Grant] = []
    for event in await reader.events(Selection(user_id=user_id, types=("credit-granted", "credit-revoked"))):
        if not event.user_id or period not in (None, event.period):
            continue  # Without a user, it is a budget's.
        of_period = grants.setdefault((event.user_id, event.period), [])
        match event.payload:
            case CreditGranted():
                of_period.append(Grant(event, event.amount))
                in_order.append(of_period[-1])
            case CreditRevoked() as payload:
                _take_back(of_period, -event.amount, payload.grant)
            case _:
                pass
    return in_order


def _take_back(grants: list[Grant], amount_nanousd: int, named: str | None) -> None:
    newest_first = grants[::-1]
    for grant in sorted(newest_first, key=lambda each: each.event.id != named):
        taken = min(grant.left_nanousd, amount_nanousd)
        grant.left_nanousd -= taken
        amount_nanousd -= taken


async def read_plans(reader: AuditReader, *, user_id: str | None = None) -> list[Event]:
    """Return the `plan-assigned` event in force of each user who has one, by user. Errors: as `AuditReader.tables`."""
    latest: dict[str, Event] = {}
    for event in await reader.events(Selection(user_id=user_id, types=("plan-assigned", "plan-cleared"))):
        latest[event.user_id] = event
    return [event for _, event in sorted(latest.items()) if isinstance(event.payload, PlanAssigned)]
