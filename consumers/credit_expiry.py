"""Expiry of credits: an event takes back the unspent rest of each credit that is due.

The projection shows which credits are due. The gate decides by its own clock whether a credit has expired, and how
much of it is left. A repeat, or a second projector, changes nothing.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog

from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.prepaid import expiry_request
from tollbook.ledger.errors import (
    BaselineUnavailable,
    CreditNotDue,
    IdempotencyConflict,
    LedgerUnavailable,
    PolicyChanged,
)
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.replies import Stale
from tollbook.ledger.gate.requests import Baseline
from tollbook.ledger.projection.store import Store

_EVERY_S: Final = 5.0
_DUE: Final = """
SELECT budget, credit, epoch_ms(expires_at) AS expires_ms, cap_usd, partition
FROM credits
WHERE expired_at IS NULL AND epoch_ms(expires_at) <= ?
ORDER BY expires_at, first_seq
LIMIT 1000
"""
_log = structlog.get_logger(__name__)


class CreditExpiry:
    """Expires the credits of one ledger. `store` returns the projection that is open now."""

    def __init__(self, gates: Sequence[Gate], policies: CurrentPolicy, store: Callable[[], Store]) -> None:
        self._gates = gates
        self._policies = policies
        self._store = store
        self._reported = set[str]()

    async def run(self) -> None:
        """Look for due credits until cancelled."""
        while True:
            try:
                await self.expire_due()
            except (LedgerUnavailable, Stale, PolicyChanged) as exc:
                _log.debug("credits.not_expired", problem=str(exc))  # The next look may succeed.
            await asyncio.sleep(_EVERY_S)

    async def expire_due(self) -> int:
        """Expire the due credits, earliest first; return how many. Errors: LedgerUnavailable; Stale; PolicyChanged."""
        now_ms = await self._gates[0].now_ms()
        due = await asyncio.to_thread(self._store().query, _DUE, [now_ms])
        if due and await self._policies.refresh():
            _log.debug("policy.changed")
        expired = 0
        for row in due:
            expired += await self._expire(row)
        return expired

    async def _expire(self, row: dict[str, Any]) -> bool:
        partition: int = row["partition"]
        budget: str = row["budget"]
        policy = self._policies.by_partition[partition]
        request = expiry_request(
            budget=budget,
            credit_id=row["credit"],
            expires_ms=row["expires_ms"],
            stamped_cap_nanousd=int(row["cap_usd"].scaleb(9)),
            policy=policy.budgets,
            version=policy.version,
        )
        page = await asyncio.to_thread(self._store().baselines, [budget])
        if partition not in page.positions:
            raise BaselineUnavailable("the projection has not begun")
        baseline = Baseline(*page.balances.get(budget, (0, 0)), page.positions[partition])
        try:
            change = await self._gates[partition].change_credit(request, (baseline,))
        except CreditNotDue:
            return False
        except IdempotencyConflict as exc:
            # The id of this expiry was used for another command. The other credits still expire.
            if request.command_id not in self._reported:
                self._reported.add(request.command_id)
                _log.error("credit.not_expired", credit=row["credit"], problem=str(exc))
            return False
        if change.is_new:
            _log.info("credit.expired", credit=row["credit"], left_nanousd=-change.change_nanousd)
        return change.is_new
