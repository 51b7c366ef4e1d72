"""Booking the charges that ended processes could not book, once the ledger is in order again (G3).

A noted charge is booked if the newest event that its process had seen is on the stream. Booking twice changes nothing.
If the ledger has lost events for good, a person must run `tollbook recover`.
"""

import json
from collections.abc import Awaitable, Callable

import structlog
from redis.exceptions import ResponseError

from tollbook.ledger.errors import CallUnknown, LedgerError, LedgerUnavailable
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import AdjustRequest, AlreadySettled
from tollbook.ledger.gate.unbooked import UnbookedCharge
from tollbook.schemas.events import CostAdjusted, payload_json

_log = structlog.get_logger(__name__)


class UnbookedBooker:
    """Books the noted charges of ended processes. `is_alive` says whether a process still works: it books its own."""

    def __init__(self, ledger: Ledger, is_alive: Callable[[str], Awaitable[bool]]) -> None:
        self._ledger = ledger
        self._is_alive = is_alive
        self._reported: set[tuple[str, int]] = set()

    async def book(self, gate: Gate) -> int:
        """Book the charges that can be booked in a partition now; return how many.

        Errors: LedgerUnavailable if Redis does not answer; OSError if the files cannot be read.
        """
        booked = 0
        for charge in await gate.unbooked():
            if charge.process and await self._is_alive(charge.process):
                continue
            try:
                problem = await self._try_to_book(gate, charge)
            except LedgerUnavailable:
                raise
            except (LedgerError, ResponseError, ValueError) as exc:  # ValueError: a note that no gate wrote.
                problem = str(exc)
            if problem is None:
                await gate.forget(charge)
                booked += 1
                _log.warning("unbooked.booked", call_id=charge.call_id, cost_nanousd=charge.cost_nanousd)
            elif (charge.call_id, charge.hold) not in self._reported:
                self._reported.add((charge.call_id, charge.hold))
                _log.error("unbooked.left", call_id=charge.call_id, cost_nanousd=charge.cost_nanousd, problem=problem)
        return booked

    async def _try_to_book(self, gate: Gate, charge: UnbookedCharge) -> str | None:
        """Book a charge; return None, or why it cannot be booked."""
        if not await gate.is_on_stream(charge.seen):
            return f"event {charge.seen} is not on the ledger's stream: restore the newer data, or `tollbook recover`"
        if not charge.hold:
            await self._ledger.charge_now(charge.charge_request)  # G3
            return None
        try:
            reply = await self._ledger.settle_now(charge.settle_request)  # G3
        except CallUnknown:
            return "its hold is not on the ledger: `tollbook recover`"
        if not isinstance(reply, AlreadySettled) or not reply.assumed_nanousd:
            return None  # A confirmed cost is kept.
        if not charge.knows_less(reply.assumed_nanousd):  # G1
            # The sweeper or another run settled first and did not know the cost.
            await self._ledger.adjust(_correction(charge, reply))
        return None


def _correction(charge: UnbookedCharge, settled: AlreadySettled) -> AdjustRequest:
    payload = CostAdjusted(
        basis=json.loads(charge.payload)["basis"], reason="booked late", author=charge.process or "tollbook"
    )
    return AdjustRequest(
        call_id=charge.call_id,
        user_id=charge.user_id,
        hold=charge.hold,
        cost_nanousd=charge.cost_nanousd,
        assumed_nanousd=charge.assumed_nanousd,
        attempt=charge.attempt,
        payload=payload_json(payload),
        budgets=charge.budgets,
        events=charge.events,
        seen=(settled.cost_nanousd, settled.assumed_nanousd),
    )
