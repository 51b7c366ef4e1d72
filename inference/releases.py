"""Giving back assumed charges: a person decides that these requests were free.

Each charge of an attempt is given back by one event, with author and reason. The gate gives an attempt's charge back
only once, and only if its hold has not changed since it was read. So this may be repeated after a crash, or run twice
at once, and it never undoes a correction that was made meanwhile.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tollbook.ledger.errors import CallUnknown
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import ReleaseRequest
from tollbook.schemas.events import CostAdjusted, payload_json


@dataclass(frozen=True, slots=True, kw_only=True)
class AssumedCharge:
    """The assumed charge of one attempt of a settled hold, and the hold's cost and assumed part, in nano-dollars."""

    call_id: str
    user_id: str
    hold: int
    attempt: int
    outcome: str
    amount_nanousd: int
    hold_cost_nanousd: int
    hold_assumed_nanousd: int


@dataclass(slots=True)
class Releases:
    """The outcome: charges given back and their sum; charges not given back, since they changed or are too old."""

    released: int = 0
    released_nanousd: int = 0
    changed: int = 0
    too_old: int = 0


async def release_charges(ledger: Ledger, charges: Iterable[AssumedCharge], *, author: str, reason: str) -> Releases:
    """Give back charges, one after the other.

    Errors: LedgerUnavailable; LedgerRefused. A repeat does the rest.
    """
    outcome = Releases()
    payload = payload_json(CostAdjusted(basis="released", reason=reason, author=author))
    # How much of each hold was given back here, since the gate compares the hold's rest before the next charge.
    given_back: dict[tuple[str, int], int] = {}
    for charge in charges:
        hold = (charge.call_id, charge.hold)
        before = given_back.get(hold, 0)
        request = ReleaseRequest(
            call_id=charge.call_id,
            user_id=charge.user_id,
            hold=charge.hold,
            hold_cost_nanousd=charge.hold_cost_nanousd - before,
            hold_assumed_nanousd=charge.hold_assumed_nanousd - before,
            attempt=charge.attempt,
            amount_nanousd=charge.amount_nanousd,
            payload=payload,
            budgets=(),  # The gate knows them.
        )
        try:
            done = await ledger.release(request)
        except CallUnknown:
            outcome.too_old += 1
            continue
        if done == "released":
            outcome.released += 1
            outcome.released_nanousd += charge.amount_nanousd
            given_back[hold] = before + charge.amount_nanousd
        else:
            outcome.changed += 1
    return outcome
