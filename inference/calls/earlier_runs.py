"""What earlier runs of a call have left: a result, a refusal, the hold of a run that died or was cut off.

Invariant (G3): a hold whose run is dead is settled in full where a request may be in flight, else at what is known.
Invariant (G4): the first answer to a call stands.
"""

from collections.abc import Callable
from typing import Literal

import structlog

from tollbook.inference.calls.call import Call, denied_result, failed_result, finished_result
from tollbook.inference.calls.lost_requests import AskCost, ask_nobody
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
    told_nanousd: int | None = None,
    result: str = "",
) -> SettleRequest:
    """Settle the hold of a dead run: all of it where a request may be in flight, else what is known (G3).

    `told_nanousd` is what the provider says that request has cost. What it does not say yet, `reconcile` can ask for:
    the request's id is in the event. With a `result` the call is over; without one it may be run again.
    """
    cost = _cost_of(found, told_nanousd)
    assumed = found.assumed_nanousd + (cost - found.spent_nanousd if told_nanousd is None else 0)
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


def _cost_of(found: OpenCall, told_nanousd: int | None) -> int:
    if told_nanousd is not None:
        return found.spent_nanousd + told_nanousd
    return found.amount_nanousd if found.may_be_under_way else found.spent_nanousd  # G3


class EarlierRuns:
    """Ends what other runs of a call have begun, and repeats what they have answered.

    Errors of every method: LedgerUnavailable; LedgerRefused.
    """

    def __init__(
        self,
        ledger: Ledger,
        results: Results,
        observer: CallObserver,
        now_ms: Callable[[], int],
        ask_cost: AskCost = ask_nobody,
    ) -> None:
        self._ask_cost = ask_cost
        self._ledger = ledger
        self._results = results
        self._observer = observer
        self._now_ms = now_ms

    async def take_over(self, call: Call, found: OpenCall, *, give_up: str | None = None) -> None:
        """Settle the hold of a run that has died, unless somebody else has; `give_up` ends the call with this problem.

        Errors: CallUnknown.
        """
        code = ErrorCode.ATTEMPTS_EXHAUSTED
        told = await self._ask_cost(call.user_id, found)
        cost = _cost_of(found, told)
        result = failed_result(call, code, give_up, self._now_ms(), cost_nanousd=cost) if give_up else None
        request = settle_dead_hold(
            call_id=call.call_id,
            user_id=call.user_id,
            found=found,
            outcome="taken_over",
            reason=give_up or f"worker {found.worker} gave no sign of life",
            told_nanousd=told,
            result=result.model_dump_json() if result else "",
        )
        if await settle_observed(self._ledger, self._observer, request):
            cost_nanousd = request.cost_nanousd
            _log.warning("call.taken_over", call_id=call.call_id, worker=found.worker, cost_nanousd=cost_nanousd)

    async def release_unsent(self, call: Call) -> None:
        """Settle at zero what a reservation of this run may have held whose reply nobody waited for."""
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
        """Return the result of a call that is over, and store what says that its own is gone.

        Who waits looks under the task's id, and would wait for ever where a result has expired or was lost.
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
        """Store what the ledger has decided; where that was done before, the stored one stands, and is returned.

        What else may stand under the task's id (a ping's answer, a malformed task's) is not this task's result.
        """
        if await self._results.put(result):  # G4
            return result
        stored = await self._results.get_of(result.task_id, result.user_id)
        if stored is not None and stored.status is TaskStatus.DENIED:
            return stored
        await self._results.put(result, replaces=True)
        return result

    async def unpriced(self, call: Call, problem: PriceUnknown | ParameterUnsupported) -> InferenceResult | OpenCall:
        """Answer a call whose cost cannot be bounded, or that its model does not take.

        The ledger has it only if its model once had a price.

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
            # Another task's, perhaps another user's: nobody is given the answer to what they did not ask.
            raise IdempotencyConflict(call.call_id)  # G4
        return stored


def _is_same_answer(stored: InferenceResult, result: InferenceResult) -> bool:
    compared = {"status", "user_id", "task_type", "error_code"}
    return stored.model_dump(include=compared) == result.model_dump(include=compared)
