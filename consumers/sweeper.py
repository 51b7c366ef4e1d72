"""The sweeper: settles holds past their deadline, so that no dead call keeps money held (G2, G3).

If a request may have been sent and its id is known, the provider is asked for its cost. If the cost is unknown, the
whole hold is charged, marked `assumed`; a late answer corrects it. The task itself, if still pending, is run again.
Before that, the sweeper books the charges that ended processes could not book.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog
from redis.exceptions import ResponseError

from tollbook.consumers.unbooked import UnbookedBooker
from tollbook.inference.calls.earlier_runs import settle_dead_hold
from tollbook.inference.calls.lost_requests import AskCost, cost_unknown
from tollbook.ledger.errors import BaselineUnavailable, CallUnknown, LedgerError, LedgerUnavailable, LedgerWentBack
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import Settled

_INTERVAL_S: Final = 5.0
_PAGE: Final = 10
_log = structlog.get_logger(__name__)


async def _never_alive(_process: str) -> bool:
    return False


class Sweeper:
    """Settles the overdue holds of all partitions, every few seconds. Any number may run."""

    def __init__(
        self,
        ledger: Ledger,
        gates: Sequence[Gate],
        *,
        is_alive: Callable[[str], Awaitable[bool]] = _never_alive,
        ask_cost: AskCost = cost_unknown,
    ) -> None:
        """`is_alive` says whether a process still works; `ask_cost` asks the provider what a lost request cost."""
        self._ask_cost = ask_cost
        self._ledger = ledger
        self._booker = UnbookedBooker(ledger, is_alive)
        self._gates = tuple(gates)

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.sweep()
            except (LedgerError, ResponseError, OSError) as exc:
                _log.warning("sweep.missed", problem=str(exc))

    async def sweep(self) -> int:
        """Settle the holds that are overdue now; return how many were settled."""
        settled = 0
        for gate in self._gates:
            await self._booker.book(gate)
            try:
                settled += await self._sweep_partition(gate)
            except LedgerWentBack as exc:
                # No hold of this partition can be settled until the partition is repaired; others can.
                _log.warning("sweep.missed", partition=gate.keys.partition, problem=str(exc))
        return settled

    async def _sweep_partition(self, gate: Gate) -> int:
        """Settle page by page; a hold that cannot be settled now is skipped and does not delay the others.

        The holds of a page are settled at the same time, since each may have to wait for its provider.
        """
        settled, left, now_ms = 0, 0, await gate.now_ms()
        while page := await gate.overdue(now_ms, skip=left, count=_PAGE):
            replies = await asyncio.gather(
                *(self._try_expire(gate, call_id, now_ms) for call_id in page), return_exceptions=True
            )
            for failure in replies:
                if isinstance(failure, BaseException):
                    raise failure
            expired = sum(reply is True for reply in replies)
            settled, left = settled + expired, left + len(page) - expired
        return settled

    async def _try_expire(self, gate: Gate, call_id: str, now_ms: int) -> bool:
        try:
            return await self._expire(gate, call_id, now_ms)
        except (LedgerError, ValueError) as exc:
            is_redis_away = isinstance(exc, LedgerUnavailable) and not isinstance(exc, BaselineUnavailable)
            if is_redis_away or isinstance(exc, LedgerWentBack):
                raise  # Every other hold would fail in the same way.
            _log.error("hold.not_expired", call_id=call_id, problem=str(exc))
            return False

    async def _expire(self, gate: Gate, call_id: str, now_ms: int) -> bool:
        record = await gate.call_record(call_id)
        if record is None or record.state != "open" or record.hold.deadline_ms >= now_ms:
            return False
        request = settle_dead_hold(
            call_id=call_id,
            user_id=record.user_id,
            found=record.hold,
            outcome="expired",
            reason="the hold's deadline has passed",
            reported_nanousd=await self._ask_cost(record.user_id, record.hold),
        )
        try:
            reply = await self._ledger.settle_now(request)  # G3
        except CallUnknown:
            return False  # Settled by its worker in the meantime.
        if isinstance(reply, Settled) and reply.entry_id:
            _log.warning("hold.expired", call_id=call_id, cost_nanousd=request.cost_nanousd)
            return True
        return False
