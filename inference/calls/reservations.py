"""Reserving money for a call before it is sent: its budgets, the amount, and the wait for other calls' holds.

Invariant (G9): a call is refused only if settled spend plus its own bound is above the cap. If only other calls' open
holds leave too little, the call waits for them, in the order of arrival and for a bounded time.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Final, Literal

import structlog

from tollbook.inference.bounds import Bound, bound, bound_embeddings
from tollbook.inference.calls.call import Call, exhausted
from tollbook.inference.calls.earlier_runs import EarlierRuns
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.lost_requests import AskCost, cost_unknown
from tollbook.inference.calls.retry import MODELS_OF_A_CALL
from tollbook.inference.calls.steps import CallObserver, Unobserved, cleanup_shielded
from tollbook.inference.current_policy import CurrentPolicy, PolicyInForce
from tollbook.inference.errors import ParameterUnsupported, PriceUnknown
from tollbook.inference.media import WORDS, kind_of
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.ledger.errors import IdempotencyConflict, PolicyChanged
from tollbook.ledger.gate.call_record import CallRecord
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import (
    Denied,
    FinishedCall,
    OpenCall,
    Reserved,
    ReserveReply,
    ReserveRequest,
    Waiting,
)
from tollbook.ledger.gate.wait_queue import BudgetWaitQueue
from tollbook.ledger.results import Results
from tollbook.schemas.events import BudgetReserved, payload_json
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.routes import Target

# Allows for clocks that differ, and for a process that is paused for a moment.
_LEASE_SLACK_S: Final = 30
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitLimits:
    """How long a call waits for money, and how often it is tried. Units: seconds.

    `max_attempts`: how many holds a call may have before it is given up. `max_parked`: how many calls of this process
    may wait for money at a time. None means no limit.
    """

    hold_wait_s: float
    first_pause_s: float = 0.2
    max_pause_s: float = 5.0
    max_attempts: int | None = None
    max_parked: int | None = None


@dataclass(frozen=True, slots=True)
class Acquired:
    """A hold, or the result of a finished call; neither if too many calls already wait.

    `call` is the call by the policy in force. `give_up` is the reason why the call must end without a request, or has
    been ended; None if the request is to be sent.
    """

    call: Call
    hold: Hold | None = None
    result: InferenceResult | None = None
    give_up: str | None = None


async def _never(_found: OpenCall) -> bool:
    return False


class Reservations:
    """Reserves money for calls. `max_call_s` is how long the attempts and pauses of a call with one fallback can take.

    Errors of every method: LedgerUnavailable; LedgerRefused.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        results: Results,
        policies: CurrentPolicy,
        queue: BudgetWaitQueue,
        max_call_s: float,
        now_ms: Callable[[], int],
        observer: CallObserver | None = None,
        ask_cost: AskCost = cost_unknown,
    ) -> None:
        self._observer: CallObserver = observer or Unobserved()
        self._ledger = ledger
        self._results = results
        self._policies = policies
        self._queue = queue
        self._max_call_s = max_call_s
        self._now_ms = now_ms
        self._earlier_runs = EarlierRuns(ledger, results, self._observer, now_ms, ask_cost)

    @property
    def waiting(self) -> int:
        """How many calls of this process wait for money now."""
        return self._queue.waiting

    async def acquire(
        self,
        call: Call,
        limits: WaitLimits,
        *,
        give_up: str | None = None,
        is_dead: Callable[[OpenCall], Awaitable[bool]] = _never,
        while_waiting: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
    ) -> Acquired:
        """Reserve money; wait while other calls' holds use up the budget; take over from a dead run of this call.

        With `give_up`, an unfinished call is to end with this problem and without a request; so is a call that has had
        `max_attempts` holds. A hold is taken even then: only the ledger can rule out that another run of the call
        begins, or answers late (G4). `is_dead` says whether the run that has an open hold is dead; the context
        `while_waiting` is entered during each wait.

        If LedgerUnavailable is raised, no request was sent, but the ledger may have a hold: a retry with the same
        `run_id` resumes it.
        If the ledger has a new policy, the call is made again by that policy (G11).
        Errors: IdempotencyConflict; CallUnknown; InvalidTask if the policy no longer has the task's type or plan.
        """
        until_ms = self._now_ms() + round(1000 * limits.hold_wait_s)
        pause_s = limits.first_pause_s
        budget: str | None = None
        while True:
            is_final = budget is not None and self._now_ms() >= until_ms
            call = call.under(self._policies.of(call.user_id))
            try:
                reply = await self.reserve(call, is_final=is_final)
            except PolicyChanged:  # G11
                await self._policies.refresh()
                continue
            if isinstance(reply, OpenCall) and await is_dead(reply):
                give_up = give_up or _exhausted(reply.hold + 1, limits)
                await self.take_over(call, reply, give_up=give_up)
                continue
            if isinstance(reply, Waiting) and limits.max_parked is not None and self.waiting >= limits.max_parked:
                return Acquired(call)
            match reply:
                case Waiting():  # G9
                    async with while_waiting():
                        await self._wait_for_turn(reply.budget, is_first=budget == reply.budget, until_ms=until_ms)
                    budget = reply.budget
                case OpenCall():
                    async with while_waiting():
                        await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, limits.max_pause_s)
                case Hold() | InferenceResult():
                    if budget is not None:
                        self._queue.next(budget)  # The budget may have enough for the next waiting call, too.
                    if isinstance(reply, InferenceResult):
                        return Acquired(call, result=reply, give_up=give_up)
                    return Acquired(call, hold=reply, give_up=give_up or _exhausted(reply.number, limits))

    async def reserve(self, call: Call, *, is_final: bool = False) -> Hold | InferenceResult | Waiting | OpenCall:
        """Ask the gate once; with `is_final`, the call is refused instead of waiting.

        Returns a hold; the result of a finished or refused call; Waiting if only other calls' holds leave too little;
        or OpenCall if another run of the call has a hold.
        Errors: IdempotencyConflict; PolicyChanged if the call was made by another policy than the ledger's.
        """
        policy = self._policies.of(call.user_id)
        if policy.version != call.policy_version:
            raise PolicyChanged(policy.version)
        if not await self._results.claim(call.call_id, call.user_id):  # G4
            raise IdempotencyConflict(call.call_id)
        try:
            call, first = bound_first(call, policy.prices, self._now_ms())
        except (PriceUnknown, ParameterUnsupported) as exc:  # G8
            if await self._policies.refresh():
                raise PolicyChanged(self._policies.of(call.user_id).version) from exc  # G11
            return await self._earlier_runs.unpriced(call, exc)
        try:
            with self._observer.reserving(first.amount_nanousd) as record_outcome:
                cheaper = self._cheaper(call, first, policy)
                reply = await self._ask_gate(call, policy, first, is_final=is_final, is_trial=cheaper is not None)
                if cheaper is not None and (isinstance(reply, Waiting) or _is_of_cheaper(call, reply, first)):
                    call, first = cheaper
                    reply = await self._ask_gate(call, policy, first, is_final=is_final)
                record_outcome(reply)
        except asyncio.CancelledError:  # G2
            await cleanup_shielded(call.call_id, self._earlier_runs.release_unsent(call))
            raise
        match reply:
            case Reserved():
                _warn_of_other_plan(call, reply)
                return Hold(
                    call_id=call.call_id,
                    user_id=call.user_id,
                    run=str(call.run_id),
                    number=reply.hold,
                    amount_nanousd=reply.amount_nanousd,
                    budgets=reply.budgets,
                    bound=first,
                    attempts=reply.attempt - 1,
                    downgraded_from=call.downgraded_from,
                    policy_version=policy.version,
                )
            case OpenCall(worker=run) if run == str(call.run_id):
                return _own_hold(call, reply, first, policy)
            case Denied():
                return await self._earlier_runs.denied(call, reply)
            case FinishedCall():
                return await self._earlier_runs.finished(call, reply)
            case Waiting() | OpenCall():
                return reply

    async def _ask_gate(
        self, call: Call, policy: PolicyInForce, first: Bound, *, is_final: bool, is_trial: bool = False
    ) -> ReserveReply:
        return await self._ledger.reserve(
            lambda now_ms: self._request(call, policy, first, now_ms, is_final=is_final, is_trial=is_trial),
            self._now_ms(),
        )

    def _cheaper(self, call: Call, first: Bound, policy: PolicyInForce) -> tuple[Call, Bound] | None:
        """Return the call with the route's cheaper model, and its bound; None if no model of the route needs less."""
        target = call.route.cheaper_target
        if target is None:
            return None
        try:
            cheaper = bound_attempt(call, target, policy.prices, self._now_ms())
        except (PriceUnknown, ParameterUnsupported):
            return None
        return (call.downgraded(), cheaper) if cheaper.amount_nanousd < first.amount_nanousd else None

    async def take_over(self, call: Call, found: OpenCall, *, give_up: str | None = None) -> None:
        """Settle the hold of a dead run; `give_up` ends the call with this problem. Errors: CallUnknown."""
        await self._earlier_runs.take_over(call, found, give_up=give_up)

    async def record_of(self, user_id: str, call_id: str) -> CallRecord | None:
        """Return the gate's record of a user's call. Errors: LedgerUnavailable."""
        return await self._ledger.gate_of(user_id).call_record(call_id)

    async def _wait_for_turn(self, budget: str, *, is_first: bool, until_ms: int) -> None:
        try:
            async with asyncio.timeout(max(0, until_ms - self._now_ms()) / 1000):
                await self._queue.wait(budget, is_first=is_first)
        except TimeoutError:
            pass  # The next attempt to reserve is final.

    def _lease_ms(self, call: Call) -> int:
        models = 1 + len(call.route.fallback)
        return round(1000 * (self._max_call_s * max(1.0, models / MODELS_OF_A_CALL) + _LEASE_SLACK_S))

    def _request(
        self, call: Call, policy: PolicyInForce, first: Bound, now_ms: int, *, is_final: bool, is_trial: bool
    ) -> ReserveRequest:
        window, budgets = policy.budgets_at(now_ms, call.attributes)
        return ReserveRequest(
            call_id=call.call_id,
            user_id=call.user_id,
            window=window,
            content_hash=call.content_hash,
            amount_nanousd=first.amount_nanousd,
            worker=str(call.run_id),
            lease_ms=self._lease_ms(call),
            payload=reserved_payload(call, first, "hold"),
            budgets=budgets,
            is_final=is_final,
            is_trial=is_trial,
            policy_version=policy.version,
        )


def _own_hold(call: Call, found: OpenCall, first: Bound, policy: PolicyInForce) -> Hold:
    """Return the hold that this run has opened by a reservation whose reply was lost; no request was sent under it.

    The hold may count in the budgets of an earlier policy.
    """
    return Hold(
        call_id=call.call_id,
        user_id=call.user_id,
        run=found.worker,
        number=found.hold,
        amount_nanousd=found.amount_nanousd,
        budgets=policy.caps_of(found.budgets, plan=call.plan),
        bound=first,
        attempts=found.attempts_begun - 1,
        downgraded_from=call.downgraded_from,
        spent_nanousd=found.spent_nanousd,
        assumed_nanousd=found.assumed_nanousd,
        policy_version=policy.version,
    )


def _is_of_cheaper(call: Call, reply: ReserveReply, first: Bound) -> bool:
    """Whether this run has a hold for the cheaper model, by a reservation whose reply was lost."""
    return (
        isinstance(reply, OpenCall) and reply.worker == str(call.run_id) and reply.amount_nanousd < first.amount_nanousd
    )


def bound_attempt(call: Call, target: Target, prices: PriceCatalogue, now_ms: int) -> Bound:
    """Bound the cost of one attempt of a call, at the prices of the target's provider.

    Errors: PriceUnknown; ParameterUnsupported if the provider says that the model does not support the task's
        parameters.
    """
    made = _bound_at(call, target.model, prices.at(target.provider), now_ms)
    return made if target.provider == made.provider else replace(made, provider=target.provider)


def _bound_at(call: Call, model: str, prices: PriceCatalogue, now_ms: int) -> Bound:
    models = prices.models
    unsupported = models.unsupported(model, call.parameters)
    if unsupported:
        raise ParameterUnsupported(model, unsupported)
    facts = models.of(model)
    if call.inputs:
        if facts.makes_embeddings is False or not models.has_embeddings:  # G8
            raise PriceUnknown.of_model(model, "it makes no embeddings")
        return bound_embeddings(call.inputs, prices.price(model, now_ms), facts=facts, count=models.counter(model))
    if facts.makes_text is False:
        raise PriceUnknown.of_model(model, "it makes no text")
    inputs = facts.input_modalities
    if inputs is not None and not {"image", "audio", "file", "video"} <= inputs:
        kinds = {kind_of(part) for message in call.messages for part in message.media_parts} - inputs
        if "file" in kinds and prices.reads_files(model, now_ms):
            kinds.remove("file")
        if kinds:
            raise ParameterUnsupported(model, sorted(WORDS[kind] for kind in kinds))
    price = prices.price(model, now_ms)
    return bound(
        call.messages,
        call.route.max_tokens,
        price,
        parameters=call.parameters_for(model, models),
        facts=facts,
        limits=prices.limits(model),
        count=models.counter(model),
    )


def bound_first(call: Call, prices: PriceCatalogue, now_ms: int) -> tuple[Call, Bound]:
    """Bound the first attempt of a call, with its first model or the first fallback that supports its parameters.

    Returns the call with that model, and the bound. Errors: PriceUnknown; ParameterUnsupported, for the first model,
        if no model supports them.
    """
    first = call.route.first
    try:
        return call, bound_attempt(call, first, prices, now_ms)
    except ParameterUnsupported:
        for target in call.route.after(first):
            if can_attempt(call, target, prices, now_ms):
                return call.with_fallback(target), bound_attempt(call, target, prices, now_ms)
        raise


def can_attempt(call: Call, target: Target, prices: PriceCatalogue, now_ms: int) -> bool:
    """Whether a model can be asked for this call: its cost has a bound, and it supports the task's parameters."""
    try:
        bound_attempt(call, target, prices, now_ms)
    except (PriceUnknown, ParameterUnsupported):
        return False
    return True


def reserved_payload(call: Call, attempt_bound: Bound, kind: Literal["hold", "extension"]) -> str:
    """Return the payload of the event for a hold or its extension."""
    return payload_json(
        BudgetReserved(
            kind=kind,
            task_type=call.task_type,
            stream=call.stream,
            plan=call.plan,
            campaign_id=call.campaign_id,
            tags=dict(call.tags) or None,
            worker=str(call.run_id),
            downgraded_from=call.downgraded_from,
            bound=attempt_bound.as_price(),
        )
    )


def _exhausted(hold: int, limits: WaitLimits) -> str | None:
    """Return why a call is given up at the hold of this number, or None."""
    return exhausted(hold - 1) if limits.max_attempts is not None and hold > limits.max_attempts else None


def _warn_of_other_plan(call: Call, reply: Reserved) -> None:
    """Warn that a task names another plan than the assigned one; the assigned plan is used."""
    if reply.assigned_plan not in (None, call.plan):
        _log.warning(
            "plan.mismatched",
            call_id=call.call_id,
            user_id=call.user_id,
            task_plan=call.plan,
            assigned_plan=reply.assigned_plan,
        )
