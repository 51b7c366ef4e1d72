"""Handling what earlier runs of a call have left: a result, a refusal, or the hold of a run that died or was cut off.

Invariant (G3): the hold of a dead run is settled in full if a request may be in flight, else at the known cost.
Invariant (G4): the first answer to a call is never changed.
"""

from collections.abc import Callable
from typing import Literal

import structlog

from tollbook.inference.calls.call import Call, denied_result, failed_result, finished_result
from tollbook.inference.calls.lost_requests import AskCost, cost_unknown
from tollbook.inference.calls.steps import CallObserver, settle_observed
from tollbook.inference.errors import ParameterUnsupported, PriceUnknown
from tollbook.ledger.errors import IdempotencyConflict
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import Denied, FinishedCall, OpenCall, SettleRequest
from tollbook.ledger.results import Results
from tollbook.schemas.events import Basis, CostRecorded, payload_json
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.routes import DEFAULT_PROVIDER, named_provider

_log = structlog.get_logger(__name__)


def settle_dead_hold(
    *,
    call_id: str,
    user_id: str,
    found: OpenCall,
    outcome: Literal["expired", "taken_over"],
    reason: str,
    reported_nanousd: int | None = None,
    result: str = "",
) -> SettleRequest:
    """Return the settlement of a dead run's hold: in full if a request may be in flight, else the known cost (G3).

    `reported_nanousd` is the provider's cost of that request. If the provider does not say it yet, `reconcile` can ask
    later: the request's id is in the event. With a `result` the call is over; without one it may be run again.
    """
    cost = _cost_of(found, reported_nanousd)
    assumed = found.assumed_nanousd + (cost - found.spent_nanousd if reported_nanousd is None else 0)
    basis: Basis = "assumed" if assumed else "reported" if cost else "released"
    is_known = found.may_be_under_way and found.generation_id is not None
    payload = CostRecorded(
        basis=basis,
        assumed_nanousd=assumed,
        outcome=outcome,
        reason=reason,
        generation_id=found.generation_id if is_known else None,
        provider=named_provider(found.provider or DEFAULT_PROVIDER) if is_known else None,
    )
    return SettleRequest(
        call_id=call_id,
        user_id=user_id,
        hold=found.hold,
        cost_nanousd=cost,
        assumed_nanousd=assumed,
        attempt=found.attempts_begun,
        is_final=bool(result),
        payload=payload_json(payload),
        budgets=found.budgets,
        result=result,
    )


def _cost_of(found: OpenCall, reported_nanousd: int | None) -> int:
    if reported_nanousd is not None:
        return found.spent_nanousd + reported_nanousd
    return found.amount_nanousd if found.may_be_under_way else found.spent_nanousd  # G3


class EarlierRuns:
    """Settles the holds of other runs of a call, and repeats their answers.

    Errors of every method: LedgerUnavailable; LedgerRefused.
    """

    def __init__(
        self,
        ledger: Ledger,
        results: Results,
        observer: CallObserver,
        now_ms: Callable[[], int],
        ask_cost: AskCost = cost_unknown,
    ) -> None:
        self._ask_cost = ask_cost
        self._ledger = ledger
        self._results = results
        self._observer = observer
        self._now_ms = now_ms

    async def take_over(self, call: Call, found: OpenCall, *, give_up: str | None = None) -> None:
        """Settle the hold of a dead run, unless another process has; `give_up` ends the call with this problem.

        Errors: CallUnknown.
        """
        code = ErrorCode.ATTEMPTS_EXHAUSTED
        reported_nanousd = await self._ask_cost(call.user_id, found)
        cost = _cost_of(found, reported_nanousd)
        result = failed_result(call, code, give_up, self._now_ms(), cost_nanousd=cost) if give_up else None
        request = settle_dead_hold(
            call_id=call.call_id,
            user_id=call.user_id,
            found=found,
            outcome="taken_over",
            reason=give_up or f"worker {found.worker} gave no sign of life",
            reported_nanousd=reported_nanousd,
            result=result.model_dump_json() if result else "",
        )
        if await settle_observed(self._ledger, self._observer, request):
            cost_nanousd = request.cost_nanousd
            _log.warning("call.taken_over", call_id=call.call_id, worker=found.worker, cost_nanousd=cost_nanousd)

    async def release_unsent(self, call: Call) -> None:
        """Settle at zero the hold of this run, if its reservation was made and its reply not awaited."""
        record = await self._ledger.gate_of(call.user_id).call_record(call.call_id)
        if record is None or record.state != "open" or record.hold.worker != str(call.run_id):
            return
        payload = CostRecorded(basis="released", outcome="failed", reason="cancelled")
        request = SettleRequest(
            call_id=call.call_id,
            user_id=call.user_id,
            hold=record.hold.hold,
            cost_nanousd=0,
            assumed_nanousd=0,
            attempt=record.hold.attempts_recorded,
            is_final=False,
            payload=payload_json(payload),
            budgets=record.hold.budgets,
        )
        await settle_observed(self._ledger, self._observer, request)

    async def finished(self, call: Call, found: FinishedCall) -> InferenceResult:
        """Return the result of a finished call; if its stored result is gone, store a result that says so.

        A client that waits for the task's result would wait for ever if the result has expired or was lost.
        """
        result = finished_result(call, found, self._now_ms())
        if found.denial is None:
            if not found.result and not await self._results.put(result):
                stored = await self._results.get_of(result.task_id, result.user_id)
                return stored if stored is not None and _is_same_answer(stored, result) else result
            return result
        if result.status is not TaskStatus.DENIED:
            result = denied_result(call, found.denial, self._now_ms())
        return await self._store_denial(result)

    async def denied(self, call: Call, denial: Denied) -> InferenceResult:
        """Return the result of a call that the gate has refused."""
        return await self._store_denial(denied_result(call, denial, self._now_ms()))

    async def _store_denial(self, result: InferenceResult) -> InferenceResult:
        """Store a refusal and return it; if a refusal is already stored, return that one.

        Any other result under the task's id (of a ping or a malformed task) is not this task's, and is replaced.
        """
        if await self._results.put(result):  # G4
            return result
        stored = await self._results.get_of(result.task_id, result.user_id)
        if stored is not None and stored.status is TaskStatus.DENIED:
            return stored
        await self._results.put(result, replaces=True)
        return result

    async def unpriced(self, call: Call, problem: PriceUnknown | ParameterUnsupported) -> InferenceResult | OpenCall:
        """Answer a call whose cost cannot be bounded, or whose parameters the model does not support.

        The ledger knows the call only if an earlier run could be priced; then an open hold is returned.

        Errors: IdempotencyConflict.
        """
        record = await self._ledger.gate_of(call.user_id).call_record(call.call_id)
        if record is not None:
            if record.content_hash != call.content_hash:
                raise IdempotencyConflict(call.call_id)
            if record.state == "open":
                return record.hold
        result = failed_result(call, ErrorCode(problem.code), str(problem), self._now_ms())
        if isinstance(problem, ParameterUnsupported):
            result = result.model_copy(update={"status": TaskStatus.INVALID})
        if await self._results.put(result):
            return result
        stored = await self._results.get_of(result.task_id, result.user_id) or result
        if record is None and not _is_same_answer(stored, result):
            # The stored result is another task's, perhaps another user's, and must not be shown.
            raise IdempotencyConflict(call.call_id)  # G4
        return stored


def _is_same_answer(stored: InferenceResult, result: InferenceResult) -> bool:
    compared = {"status", "user_id", "task_type", "error_code"}
    return stored.model_dump(include=compared) == result.model_dump(include=compared)
