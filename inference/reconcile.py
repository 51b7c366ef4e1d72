"""Reconciling: ask the providers for the actual cost of uncertain charges, and correct the ledger.

A charge is uncertain if it was assumed at its bound, or priced from usage. Its provider can be asked if the attempt's
generation id is known. For an attempt that died with its worker, the id is known if the reply had begun. All other
uncertain charges are not changed (G3), but listed. A repeat changes nothing, since a correction states the whole cost.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from tollbook.inference.cost_lookup import CostLookup
from tollbook.ledger.errors import CallUnknown, HoldChanged
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import AdjustRequest
from tollbook.schemas.events import CostAdjusted, payload_json
from tollbook.schemas.money import nanousd_from_usd

Query = Callable[[str], Awaitable[list[dict[str, Any]]]]
_WHOLLY: Final = "reconciled"
_IN_PART: Final = "reconciled in part"
_log = structlog.get_logger(__name__)

# Every attempt of the settled holds that have an uncertain attempt and are not wholly reconciled. Each row has the
# attempt's corrections since its hold was booked, and the hold's cost now.
_UNCERTAIN: Final = f"""
WITH called AS (
    SELECT call_id, hold, user_id, attempt, basis, generation_id, payload->>'provider' AS provider, charge_usd
    FROM events WHERE type = 'model-called'
), died AS (
    -- An attempt that died with its worker is recorded only in the settlement, unless its answer came late: its charge
    -- is the assumed part there, minus that of the attempts recorded before.
    SELECT c.call_id, c.hold, c.user_id, c.attempt, 'assumed' AS basis, c.generation_id,
        c.payload->>'provider' AS provider,
        c.assumed_usd - coalesce((
            SELECT sum(m.charge_usd) FROM called m
            WHERE m.call_id = c.call_id AND m.hold = c.hold AND m.basis = 'assumed'
        ), 0) AS charge_usd
    FROM events c
    ANTI JOIN called a ON a.call_id = c.call_id AND a.hold = c.hold AND a.attempt = c.attempt
    WHERE c.type = 'cost-recorded' AND c.outcome IN ('expired', 'taken_over') AND c.generation_id IS NOT NULL
        AND c.basis = 'assumed'
), attempts AS (
    FROM called UNION ALL FROM died WHERE charge_usd > 0
), uncertain AS (
    SELECT call_id, hold FROM attempts WHERE basis IN ('assumed', 'priced') AND generation_id IS NOT NULL
), moves AS (
    SELECT call_id, hold, attempt, seq, amount_usd, assumed_usd, reason,
        max(CASE WHEN type = 'cost-recorded' OR reason NOT IN ('{_WHOLLY}', '{_IN_PART}') THEN seq END)
            OVER (PARTITION BY call_id, hold) AS booked_seq
    FROM events WHERE type IN ('cost-recorded', 'cost-adjusted')
), standing AS (
    SELECT call_id, hold, sum(amount_usd) AS cost_usd, sum(assumed_usd) AS cost_assumed_usd FROM moves GROUP BY ALL
), released AS (
    SELECT call_id, hold, attempt FROM events WHERE type = 'cost-adjusted' AND basis = 'released'
), corrected AS (
    SELECT call_id, hold, attempt, sum(amount_usd) AS corrected_usd, sum(assumed_usd) AS corrected_assumed_usd
    FROM moves WHERE seq > booked_seq GROUP BY ALL
), reconciled AS (
    SELECT call_id, hold FROM moves WHERE seq > booked_seq AND reason = '{_WHOLLY}'
)
SELECT e.call_id, e.hold, e.user_id, e.attempt, e.basis, e.generation_id, e.provider,
    -- A charge that was given back by hand is no longer booked.
    CASE WHEN r.attempt IS NULL THEN e.charge_usd ELSE 0 END AS charge_usd,
    coalesce(c.corrected_usd, 0) AS corrected_usd, coalesce(c.corrected_assumed_usd, 0) AS corrected_assumed_usd,
    n.cost_usd, n.cost_assumed_usd
FROM attempts e
SEMI JOIN uncertain USING (call_id, hold)
JOIN standing n USING (call_id, hold)
ANTI JOIN reconciled USING (call_id, hold)
LEFT JOIN corrected c ON c.call_id = e.call_id AND c.hold = e.hold AND c.attempt = e.attempt
LEFT JOIN released r ON r.call_id = e.call_id AND r.hold = e.hold AND r.attempt = e.attempt
ORDER BY e.call_id, e.hold, e.attempt
"""  # noqa: S608 - the text has no input.

_ASSUMED: Final = """
SELECT call_id, hold FROM events WHERE type IN ('cost-recorded', 'cost-adjusted')
GROUP BY call_id, hold HAVING sum(assumed_usd) > 0
"""


@dataclass(slots=True)
class Reconciliation:
    """The outcome. `difference_nanousd` is signed: below zero if less was charged than booked.

    `unknown`: ids of the calls whose cost is still uncertain.
    """

    asked: int = 0
    adjusted: int = 0
    difference_nanousd: int = 0
    unknown: list[str] = field(default_factory=list[str])


@dataclass(frozen=True, slots=True)
class _Change:
    """The correction of one attempt's cost, and of the assumed part of it."""

    attempt: int
    generation_id: str
    cost_nanousd: int
    assumed_nanousd: int


@dataclass(frozen=True, slots=True)
class _ActualCost:
    """A hold's cost, as far as the provider knows it, and the corrections of its attempts."""

    cost_nanousd: int
    assumed_nanousd: int
    changes: tuple[_Change, ...]
    is_known: bool
    is_complete: bool


async def reconcile(query: Query, ledger: Ledger, costs: CostLookup, *, author: str) -> Reconciliation:
    """Correct every uncertain charge whose provider knows the cost.

    Errors: ProviderUnavailable; ProviderRefused; SettingsError; LedgerUnavailable. Earlier corrections are kept.
    """
    holds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in await query(_UNCERTAIN):
        holds.setdefault((row["call_id"], row["hold"]), []).append(row)
    uncertain = {(row["call_id"], row["hold"]) for row in await query(_ASSUMED)}
    outcome = Reconciliation()
    for hold, attempts in holds.items():
        actual = await _ask(attempts, costs, outcome)
        is_certain = actual.is_complete and not actual.assumed_nanousd
        if actual.is_known:
            is_certain = await _correct(attempts, actual, ledger, author, outcome) and is_certain
        (uncertain.discard if is_certain else uncertain.add)(hold)
    costs.raise_failure()
    outcome.unknown = sorted({call_id for call_id, _ in uncertain})
    return outcome


async def _ask(attempts: Sequence[dict[str, Any]], costs: CostLookup, outcome: Reconciliation) -> _ActualCost:
    found, missed, changes = 0, 0, list[_Change]()
    for attempt in attempts:
        if attempt["generation_id"] is None or attempt["basis"] not in ("assumed", "priced"):
            continue
        outcome.asked += 1
        known = await costs.cost(attempt["provider"], attempt["generation_id"])
        if known is None:
            missed += 1
            continue
        found += 1
        charge, corrected, corrected_assumed = (
            int(attempt[name].scaleb(9)) for name in ("charge_usd", "corrected_usd", "corrected_assumed_usd")
        )
        cost = known - charge - corrected
        assumed = (-charge if attempt["basis"] == "assumed" else 0) - corrected_assumed
        if cost or assumed:
            changes.append(_Change(attempt["attempt"], attempt["generation_id"], cost, assumed))
    standing, standing_assumed = (nanousd_from_usd(attempts[0][name]) for name in ("cost_usd", "cost_assumed_usd"))
    return _ActualCost(
        standing + sum(change.cost_nanousd for change in changes),
        standing_assumed + sum(change.assumed_nanousd for change in changes),
        tuple(changes),
        is_known=found > 0,
        is_complete=missed == 0,
    )


async def _correct(
    attempts: Sequence[dict[str, Any]], actual: _ActualCost, ledger: Ledger, author: str, outcome: Reconciliation
) -> bool:
    """Book the actual cost; return False if it cannot be booked now."""
    first = attempts[0]
    record = await ledger.gate_of(first["user_id"]).call_record(first["call_id"])
    standing = record.settled.get(first["hold"]) if record else None
    if record is None or record.state == "open" or standing is None:
        return False  # Its idempotency period is over, or another run has a hold: then a later run may succeed.
    cost, assumed = standing.cost_nanousd, standing.assumed_nanousd
    if (cost, assumed) == (actual.cost_nanousd, actual.assumed_nanousd):
        return True
    if (cost, assumed) != tuple(nanousd_from_usd(first[name]) for name in ("cost_usd", "cost_assumed_usd")):
        # The hold was corrected since DuckDB was read, perhaps by the call's late answer, which knows more.
        return False
    before = outcome.difference_nanousd
    # One correction per attempt, so that each model gets its own cost. The last correction says whether all costs are
    # known; after a crash in between, the next run does the rest.
    for change in actual.changes:
        seen = cost, assumed
        cost, assumed = cost + change.cost_nanousd, assumed + change.assumed_nanousd
        is_last = change is actual.changes[-1]
        payload = CostAdjusted(
            basis="assumed" if assumed else "reported",
            reason=_WHOLLY if is_last and actual.is_complete else _IN_PART,
            author=author,
            generation_id=change.generation_id,
        )
        request = AdjustRequest(
            call_id=first["call_id"],
            user_id=first["user_id"],
            hold=first["hold"],
            cost_nanousd=cost,
            assumed_nanousd=assumed,
            attempt=change.attempt,
            payload=payload_json(payload),
            budgets=record.hold.budgets,
            seen=seen,
        )
        try:
            outcome.difference_nanousd += (await ledger.adjust(request)).difference_nanousd
        except (CallUnknown, HoldChanged):
            return False
    difference = outcome.difference_nanousd - before
    outcome.adjusted += difference != 0
    _log.info("cost.reconciled", call_id=first["call_id"], difference_nanousd=difference)
    return True
