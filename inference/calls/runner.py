"""The life of one call: reserve, attempt, fall back, settle.

Invariant (G3): once a request may have been sent, the hold is settled at what the
provider reported, else at what its usage costs, else at the attempt's full bound.
A hold always covers what its attempts may have cost plus the bound of the next.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import structlog

from tollbook.inference.attempts import Attempt, ChatRequest
from tollbook.inference.bounds import Bound, bound
from tollbook.inference.calls.budgets import BudgetPolicy
from tollbook.inference.calls.holds import Hold, charge_of, cost_of_dead_hold, settle_dead_hold
from tollbook.inference.calls.observer import CallObserver, Unobserved
from tollbook.inference.calls.outcomes import denied_result, done_result, exhausted, failed_result, finished_result
from tollbook.inference.calls.retry import FallBack, GiveUp, Retry, RetryPolicy
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.routing import resolve_model
from tollbook.ledger.errors import BaselineUnavailable, CallUnknown, IdempotencyConflict, LedgerError
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import (
    Adjusted,
    AdjustRequest,
    AlreadySettled,
    Denied,
    FinishedCall,
    OpenCall,
    Reserved,
    ReserveReply,
    ReserveRequest,
    Settled,
    SettleRequest,
    Waiting,
)
from tollbook.ledger.results import Results
from tollbook.schemas.events import BudgetReserved, CostRecorded, FallbackUsed, payload_json
from tollbook.schemas.money import format_usd
from tollbook.schemas.plans import Plan
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.routes import Route
from tollbook.schemas.tasks import Message, Task, TaskType

_log = structlog.get_logger(__name__)

# For clocks that differ and a process that is held up for a moment.
_LEASE_SLACK_S: Final = 30
_CORRECTION_PATIENCE_S: Final = 300.0
_CORRECTION_PAUSE_S: Final = 2.0


class CallTakenOver(LedgerError):
    """Another run of the call has taken over; its result will stand. What this run cost is on the ledger."""

    def __init__(self, call_id: str) -> None:
        super().__init__(f"call {call_id} was taken over by another worker")
        self.call_id = call_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is to be called for one task. `run_id` names this run of it, so that a resend is told from a rival."""

    call_id: str
    run_id: str
    user_id: str
    plan: Plan
    task_type: TaskType
    messages: tuple[Message, ...]
    route: Route
    content_hash: str
    campaign_id: str | None = None
    stream: str | None = None
    metadata: dict[str, Any] | None = None

    @classmethod
    def of_task(cls, task: Task, *, call_id: str, run_id: str, route: Route, stream: str | None = None) -> "Call":
        """Make a call of a task; what the task says of model and limits wins over the route."""
        changes = {
            "model": task.model and resolve_model(task.model),
            "max_tokens": task.max_tokens,
            "temperature": task.temperature,
        }
        return cls(
            call_id=call_id,
            run_id=run_id,
            user_id=task.user_id,
            plan=task.plan,
            task_type=task.task,
            messages=task.chat(),
            route=route.model_copy(update={name: value for name, value in changes.items() if value is not None}),
            content_hash=task.content_hash(),
            campaign_id=task.campaign_id,
            stream=stream,
            metadata=task.metadata,
        )


class CallRunner:
    """Runs calls against the ledger and the provider. Clock and sleep are parameters; `observer` follows the steps."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        results: Results,
        provider: ProviderClient,
        prices: PriceCatalogue,
        policy: BudgetPolicy,
        retry: RetryPolicy,
        attempt_timeout_s: float,
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        observer: CallObserver | None = None,
    ) -> None:
        self._observer: CallObserver = observer or Unobserved()
        self.ledger = ledger
        self.results = results
        self.policy = policy
        self._provider = provider
        self.prices = prices
        self._retry = retry
        self._now_ms = now_ms
        self._sleep = sleep
        # Every attempt at its time-out and every pause at its longest.
        self._lease_ms = round(
            1000 * (retry.most_attempts * attempt_timeout_s + retry.longest_pauses_s + _LEASE_SLACK_S)
        )

    async def run(
        self,
        call: Call,
        *,
        is_final: bool = False,
        on_reserved: Callable[[], None] = lambda: None,
        give_up: str | None = None,
        most_holds: int | None = None,
    ) -> InferenceResult | Waiting | OpenCall:
        """Run a call to its result; `on_reserved` is called once its money is held.

        With `give_up`, a call that is not over ends with this problem and no request, as one does that has had
        `most_holds` before. That too goes by a hold, since only the ledger can rule out that another run of the
        call begins, or answers late (G4).

        Where LedgerUnavailable is raised before `on_reserved` was called, no request was sent. The ledger may hold
        money all the same: a repeat with the same `run_id` goes on with that hold.

        Returns Waiting where only open holds stand in the way (try again when the budget is freed), and
        OpenCall where another run of the same call holds money.
        Errors: IdempotencyConflict; CallTakenOver; LedgerUnavailable; LedgerRefused.
        """
        if not await self.results.claim(call.call_id, call.user_id):
            raise IdempotencyConflict(call.call_id)
        try:
            first = self._bound_of(call, call.route.model)
        except PriceUnknown as exc:
            return await self._unpriced(call, str(exc))
        try:
            with self._observer.reserving(first.amount_nanousd) as told:
                request, reply = await self._reserve(call, first, is_final=is_final)
                told(reply)
        except asyncio.CancelledError:
            await _before_the_end(call, self._release_unsent(call))
            raise
        match reply:
            case Reserved():
                on_reserved()
                _note_plan(call, reply)
                give_up = give_up or _exhausted(reply.hold, most_holds)
                return await self._execute(call, Hold.opened(request, reply), first, give_up)
            case OpenCall(worker=worker) if worker == call.run_id:
                on_reserved()
                give_up = give_up or _exhausted(reply.hold, most_holds)
                return await self._execute(call, Hold.found(request, reply), first, give_up)
            case Denied():
                return await self._denied(denied_result(call, reply, self._now_ms()))
            case FinishedCall():
                return await self._finished(call, reply)
            case Waiting() | OpenCall():
                return reply

    async def take_over(self, call: Call, found: OpenCall, *, give_up: str | None = None) -> InferenceResult | None:
        """Settle the hold of a run that has died; with `give_up`, end the call and return its result.

        Returns None too where somebody else has settled the hold before; the call may then not be over.

        Errors: CallUnknown; LedgerUnavailable; LedgerRefused.
        """
        code, cost = ErrorCode.ATTEMPTS_EXHAUSTED, cost_of_dead_hold(found)
        result = failed_result(call, code, give_up, self._now_ms(), cost_nanousd=cost) if give_up else None
        request = settle_dead_hold(
            call_id=call.call_id,
            user_id=call.user_id,
            found=found,
            outcome="taken_over",
            reason=give_up or f"worker {found.worker} gave no sign of life",
            result=result.model_dump_json() if result else "",
        )
        if _was_settled_before(await self._book(request)):
            return None
        _log.warning("call.taken_over", call_id=call.call_id, worker=found.worker, cost_nanousd=request.cost_nanousd)
        return result

    async def _reserve(self, call: Call, first: Bound, *, is_final: bool) -> tuple[ReserveRequest, ReserveReply]:
        made: list[ReserveRequest] = []
        payload = self._reserved_payload(call, first, "hold")

        def make_request(now_ms: int) -> ReserveRequest:
            window, budgets = self.policy.budgets_at(
                now_ms, user_id=call.user_id, plan=call.plan, campaign_id=call.campaign_id
            )
            request = ReserveRequest(
                call_id=call.call_id,
                user_id=call.user_id,
                window=window,
                content_hash=call.content_hash,
                amount_nanousd=first.amount_nanousd,
                worker=call.run_id,
                lease_ms=self._lease_ms,
                payload=payload,
                budgets=budgets,
                is_final=is_final,
            )
            made.append(request)
            return request

        reply = await self.ledger.reserve(make_request, self._now_ms())
        return made[-1], reply

    def _reserved_payload(self, call: Call, attempt_bound: Bound, kind: Any) -> str:
        return payload_json(
            BudgetReserved(
                kind=kind,
                task_type=call.task_type.value,
                stream=call.stream,
                plan=call.plan.value,
                campaign_id=call.campaign_id,
                worker=call.run_id,
                bound=attempt_bound.as_price(),
            )
        )

    async def _execute(self, call: Call, hold: Hold, attempt_bound: Bound, give_up: str | None) -> InferenceResult:
        model, failure = call.route.model, give_up
        code = ErrorCode.ATTEMPTS_EXHAUSTED if give_up else ErrorCode.INFERENCE_FAILED
        try:
            while failure is None:
                attempt = await self._attempt(call, hold, model, attempt_bound)
                if attempt.outcome == "ok":
                    result = done_result(call, hold, attempt, self._now_ms())
                    break
                step = self._retry.decide(
                    attempt, attempts_of_model=hold.attempts_of(model), has_fallback=self._has_fallback(call, model)
                )
                if isinstance(step, GiveUp):
                    failure = step.reason
                    continue
                next_model = _fallback_of(call) if isinstance(step, FallBack) else model
                attempt_bound = self._bound_of(call, next_model)
                with self._observer.preparing(
                    "fallback" if isinstance(step, FallBack) else "retry",
                    from_model=model,
                    to_model=next_model,
                    reason=attempt.outcome,
                ) as told:
                    failure = await self._prepare_next(call, hold, attempt_bound, next_model, step, attempt)
                    told(failure)
                if isinstance(step, Retry) and failure is None:
                    await self._sleep(step.delay_s)
                model = next_model
            else:
                result = failed_result(call, code, failure, self._now_ms(), cost_nanousd=hold.spent_nanousd)
        except LedgerError:
            raise
        except (asyncio.CancelledError, Exception):
            # A request may be under way. Neither who cancels nor a fault of ours must leave a phantom hold behind.
            await _before_the_end(call, self._abandon(hold, attempt_bound))
            raise
        return await _to_its_end(self._settle(hold, result, reason=failure))

    async def _attempt(self, call: Call, hold: Hold, model: str, attempt_bound: Bound) -> Attempt:
        hold.begin(model)
        request = ChatRequest(
            model=model,
            messages=call.messages,
            max_tokens=call.route.max_tokens,
            temperature=call.route.temperature,
            user=call.user_id,
            price_limit=attempt_bound,
        )
        with self._observer.attempting(model, hold.attempts) as told:
            attempt = await self._provider.complete(request)
            charge = charge_of(attempt, model, attempt_bound, self.prices, self._now_ms())
            told(attempt, charge)
        hold.finish(attempt, model, charge)
        return attempt

    async def _prepare_next(
        self, call: Call, hold: Hold, attempt_bound: Bound, model: str, step: Retry | FallBack, failed: Attempt
    ) -> str | None:
        """Tell the ledger of the failed attempt and make the hold cover the next; return why it cannot, or None."""
        extension = hold.shortage_for(attempt_bound)
        payload = self._reserved_payload(call, attempt_bound, "extension")
        try:
            reply = await self.ledger.record(hold.record_request(extension_nanousd=extension, payload=payload))
        except CallUnknown:
            # The hold was settled meanwhile, and without one no further request may be sent.
            await self._correct(hold, result="")
            raise CallTakenOver(call.call_id) from None
        except BaselineUnavailable as exc:
            # Without the projection no more money can be held (G8); what was spent is settled all the same (G3).
            return f"{failed.error}; {model} is not tried: {exc}"
        hold.told()
        if isinstance(reply, Denied | Waiting):
            return f"{failed.error}; {model} is not tried: {format_usd(extension, places=6)} more do not fit the cap"
        hold.amount_nanousd = reply
        if isinstance(step, FallBack):
            hold.note_fallback(
                FallbackUsed(
                    from_model=call.route.model, to_model=model, reason=step.reason, http_status=failed.http_status
                )
            )
            _log.info("call.fell_back", call_id=call.call_id, to_model=model, reason=step.reason)
        return None

    async def _settle(self, hold: Hold, result: InferenceResult, *, reason: str | None) -> InferenceResult:
        text = result.model_dump_json()
        outcome = "failed" if reason else "done"
        request = hold.settle_request(outcome=outcome, reason=reason, result=text, is_final=True)
        reply = await self._book(request, hold)
        if not _was_settled_before(reply):
            return result
        if not await self._correct(hold, result=text):
            raise CallTakenOver(hold.call_id)
        # Where another run has ended the call meanwhile, its result is the task's, and not this one (G4).
        return await self.results.get_of(hold.call_id, hold.user_id) or result

    async def _book(self, request: SettleRequest, hold: Hold | None = None) -> Settled | AlreadySettled:
        with self._observer.settling(request, hold) as told:
            reply = await self.ledger.settle(request)
            told(reply)
            return reply

    async def _correct(self, hold: Hold, *, result: str) -> bool:
        """Book what a hold that somebody else has settled really cost; return whether the call is over."""
        adjusted = await self._adjust(hold.adjust_request(reason="late_answer", result=result))
        _log.warning("call.answered_late", call_id=hold.call_id, difference_nanousd=adjusted.difference_nanousd)
        return adjusted.is_call_over

    async def _adjust(self, request: AdjustRequest) -> Adjusted:
        """Book a correction; it waits for the projection, since nobody else knows what the provider has charged."""
        waited_s = 0.0
        while True:
            try:
                return await self.ledger.adjust(request)
            except BaselineUnavailable as exc:
                if waited_s >= _CORRECTION_PATIENCE_S:
                    raise
                _log.warning("correction.held_back", call_id=request.call_id, problem=str(exc))
                await self._sleep(_CORRECTION_PAUSE_S)
                waited_s += _CORRECTION_PAUSE_S

    async def _abandon(self, hold: Hold, attempt_bound: Bound) -> None:
        hold.abandon(attempt_bound)
        request = hold.settle_request(outcome="failed", reason="cancelled", result="", is_final=False)
        if _was_settled_before(await self._book(request, hold)):
            await self._correct(hold, result="")
        _log.warning("call.abandoned", call_id=hold.call_id, cost_nanousd=request.cost_nanousd)

    async def _release_unsent(self, call: Call) -> None:
        """Settle at nothing what a reservation may have held whose reply nobody waited for."""
        record = await self.ledger.gate_of(call.user_id).call_record(call.call_id)
        if record is None or record.state != "open" or record.hold.worker != call.run_id:
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
        await self._book(request)

    async def _finished(self, call: Call, reply: FinishedCall) -> InferenceResult:
        result = finished_result(call, reply, self._now_ms())
        if reply.denial is None:
            return result
        if result.status is not TaskStatus.DENIED:
            result = denied_result(call, reply.denial, self._now_ms())
        return await self._denied(result)

    async def _denied(self, result: InferenceResult) -> InferenceResult:
        """Store what the ledger has decided; the first telling of it stands, and is returned.

        What else may stand under the task's id (a ping's answer, a malformed task's) is not this task's result.
        """
        if await self.results.put(result):
            return result
        stored = await self.results.get_of(result.task_id, result.user_id)
        if stored is not None and stored.status is TaskStatus.DENIED:
            return stored
        await self.results.put(result, replaces=True)
        return result

    async def _unpriced(self, call: Call, problem: str) -> InferenceResult | OpenCall:
        """Answer a call whose cost cannot be bounded. The ledger knows nothing of it, unless it once had a price."""
        record = await self.ledger.gate_of(call.user_id).call_record(call.call_id)
        if record is not None:
            if record.content_hash != call.content_hash:
                raise IdempotencyConflict(call.call_id)
            if record.state == "open":
                return record.hold
        result = failed_result(call, ErrorCode.PRICE_UNKNOWN, problem, self._now_ms())
        if await self.results.put(result):
            return result
        stored = await self.results.get_of(result.task_id, result.user_id) or result
        if record is None and not _is_same_answer(stored, result):
            # Another task's, perhaps another user's: nobody is handed the answer to what he did not ask (G4).
            raise IdempotencyConflict(call.call_id)
        return stored

    def _bound_of(self, call: Call, model: str) -> Bound:
        return bound(call.messages, call.route.max_tokens, self.prices.price(model, self._now_ms()))

    def _has_fallback(self, call: Call, model: str) -> bool:
        fallback = call.route.fallback
        return fallback is not None and fallback != model and self.prices.knows(fallback, self._now_ms())


async def _to_its_end(settling: Coroutine[Any, Any, InferenceResult]) -> InferenceResult:
    """Let who cancels wait: an answer that is paid for and not stored would be paid for again."""
    task = asyncio.ensure_future(settling)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


async def _before_the_end(call: Call, tidying: Coroutine[Any, Any, None]) -> None:
    """Tidy up whatever comes; where the ledger does not answer, the hold is left to those who come after."""
    try:
        await asyncio.shield(tidying)
    except LedgerError as exc:
        # Raised, it would take the place of the cancellation, and the task that was to end would go on.
        _log.warning("call.hold_left", call_id=call.call_id, problem=str(exc))


def _exhausted(hold: int, most_holds: int | None) -> str | None:
    return exhausted(hold - 1) if most_holds is not None and hold > most_holds else None


def _is_same_answer(stored: InferenceResult, result: InferenceResult) -> bool:
    told = {"status", "user_id", "task_type", "error_code"}
    return stored.model_dump(include=told) == result.model_dump(include=told)


def _note_plan(call: Call, reply: Reserved) -> None:
    """A task may name an old plan; the ledger's word stands, and the publisher ought to know."""
    if reply.assigned_plan not in (None, call.plan.value):
        _log.warning(
            "plan.mismatched",
            call_id=call.call_id,
            user_id=call.user_id,
            task_plan=call.plan.value,
            assigned_plan=reply.assigned_plan,
        )


def _fallback_of(call: Call) -> str:
    assert call.route.fallback is not None, "the policy falls back only where there is a fallback"
    return call.route.fallback


def _was_settled_before(reply: Settled | AlreadySettled) -> bool:
    """Whether somebody else may have settled the hold, even at the same cost: events and result are then untold."""
    return isinstance(reply, AlreadySettled) or not reply.entry_id
