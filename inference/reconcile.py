"""Reconciling: ask the provider what uncertain charges really were, and correct the ledger.

Uncertain is a charge assumed at its bound, or priced from usage. It can be asked about
where the attempt's generation id is known; what the provider does not know stays as it is
and is listed. Repeating changes nothing, since a correction names the true cost.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from inference.provider import ProviderClient
from ledger.errors import CallUnknown
from ledger.ledger import Ledger
from ledger.requests import AdjustRequest
from schemas.events import Basis, CostAdjusted, payload_json
from schemas.money import nanousd_from_usd

Query = Callable[[str], Awaitable[list[dict[str, Any]]]]
_REASON: Final = "reconciled"
_log = structlog.get_logger(__name__)

# Every attempt of the settled holds that have an uncertain one and are not reconciled yet.
_UNCERTAIN: Final = f"""
WITH uncertain AS (
    SELECT call_id, hold FROM events
    WHERE type = 'model-called' AND basis IN ('assumed', 'priced') AND generation_id IS NOT NULL
), settled AS (
    SELECT call_id, hold, attempt FROM events WHERE type = 'cost-recorded'
), reconciled AS (
    SELECT call_id, hold FROM events WHERE type = 'cost-adjusted' AND reason = '{_REASON}'
)
SELECT e.call_id, e.hold, e.user_id, e.attempt, e.charge_usd, e.basis, e.generation_id
FROM events e
SEMI JOIN uncertain USING (call_id, hold)
SEMI JOIN settled USING (call_id, hold)
ANTI JOIN reconciled USING (call_id, hold)
WHERE e.type = 'model-called'
ORDER BY e.call_id, e.hold, e.attempt
"""  # noqa: S608 - the text has no input.

_UNKNOWABLE: Final = """
SELECT call_id, user_id, hold, amount_usd, assumed_usd, reason FROM events
WHERE type = 'cost-recorded' AND assumed_usd > 0 ORDER BY partition, seq
"""


@dataclass(slots=True)
class Reconciliation:
    """What came of it. `difference_nanousd` is signed: below zero where less was charged than booked."""

    asked: int = 0
    adjusted: int = 0
    difference_nanousd: int = 0
    unknown: list[str] = field(default_factory=list[str])


async def reconcile(query: Query, ledger: Ledger, provider: ProviderClient, *, author: str) -> Reconciliation:
    """Correct every uncertain charge that the provider can tell about.

    Errors: ProviderUnavailable; ProviderRefused; LedgerUnavailable. What was corrected before stays corrected.
    """
    rows = await query(_UNCERTAIN)
    holds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        holds.setdefault((row["call_id"], row["hold"]), []).append(row)
    outcome = Reconciliation()
    for attempts in holds.values():
        await _reconcile_hold(attempts, ledger, provider, author, outcome)
    return outcome


async def _reconcile_hold(
    attempts: Sequence[dict[str, Any]], ledger: Ledger, provider: ProviderClient, author: str, outcome: Reconciliation
) -> None:
    cost = assumed = 0
    basis: Basis = "reported"
    for attempt in attempts:
        charge, is_assumed = nanousd_from_usd(attempt["charge_usd"]), attempt["basis"] == "assumed"
        if attempt["generation_id"] is not None and attempt["basis"] in ("assumed", "priced"):
            outcome.asked += 1
            known = await provider.generation(attempt["generation_id"])
            if known is not None:
                charge, is_assumed = known, False
            else:
                outcome.unknown.append(attempt["call_id"])
        cost += charge
        if is_assumed:
            assumed, basis = assumed + charge, "assumed"
    first = attempts[0]
    record = await ledger.gate_of(first["user_id"]).call_record(first["call_id"])
    if record is None or record.state == "open":
        return  # Its idempotency period is over, or another run holds money; the next time will do.
    payload = CostAdjusted(basis=basis, reason=_REASON, author=author, generation_id=attempts[-1]["generation_id"])
    request = AdjustRequest(
        call_id=first["call_id"],
        user_id=first["user_id"],
        hold=first["hold"],
        cost_nanousd=cost,
        assumed_nanousd=assumed,
        attempt=attempts[-1]["attempt"],
        payload=payload_json(payload),
        budgets=record.hold.budgets,
    )
    try:
        adjusted = await ledger.adjust(request)
    except CallUnknown:
        outcome.unknown.append(first["call_id"])
        return
    outcome.adjusted += adjusted.difference_nanousd != 0
    outcome.difference_nanousd += adjusted.difference_nanousd
    _log.info("cost.reconciled", call_id=first["call_id"], difference_nanousd=adjusted.difference_nanousd)
