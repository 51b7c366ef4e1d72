"""Running a call from its hold to its settlement: attempts, retries, the fallback, late answers.

Invariant (G3): once a request may have been sent, the hold is settled at the cost that the provider reported, else at
the price of its usage, else at the attempt's full bound. A hold always covers what its attempts may have cost plus the
bound of the next attempt.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import structlog

from tollbook.inference.attempts import Attempt, ChatRequest, EmbeddingsRequest
from tollbook.inference.calls.abandoned_requests import ask_abandoned_cost
from tollbook.inference.calls.call import Call, failed_result, reply_result, with_larger_limit
from tollbook.inference.calls.holds import Hold, charge_of, with_costliest_usage
from tollbook.inference.calls.notes import Notes
from tollbook.inference.calls.reservations import bound_attempt, can_attempt, reserved_payload
from tollbook.inference.calls.retry import FallBack, GiveUp, Retry, RetryPolicy
from tollbook.inference.calls.steps import (
    CallObserver,
    Unobserved,
    cleanup_shielded,
    complete_shielded,
    settle_observed,
)
from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.deltas import DeltaRelay, OnDelta, ReaderFailed
from tollbook.inference.errors import PriceUnknown, ProviderNotConfigured, SettingsError
from tollbook.inference.models import ModelCatalogue
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.clients import ProviderClients
from tollbook.ledger.errors import (
    BaselineUnavailable,
    CallsStopped,
    CallUnknown,
    HoldChanged,
    LedgerError,
    LedgerWentBack,
    PolicyChanged,
)
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.replies import BudgetsMismatch
from tollbook.ledger.gate.requests import Adjusted, AdjustRequest, Denied, Waiting
from tollbook.ledger.results import Results
from tollbook.schemas.events import FallbackUsed
from tollbook.schemas.money import format_usd
from tollbook.schemas.results import ErrorCode, InferenceResult
from tollbook.schemas.routes import Target, named_provider
from tollbook.schemas.tasks import InvalidTask

_CORRECTION_PATIENCE_S: Final = 300.0
_CORRECTION_PAUSE_S: Final = 2.0
_log = structlog.get_logger(__name__)


class CallTakenOver(LedgerError):
    """Another run of the call has taken over; its result will be the task's. This run's cost is on the ledger."""

    def __init__(self, call_id: str) -> None:
        super().__init__(f"call {call_id} was taken over by another worker")
        self.call_id = call_id


@dataclass(slots=True)
class _Run:
    """The state of a run: the call as last sent, its hold, and a reply or the reason why there is none."""

    call: Call
    hold: Hold
    relay: DeltaRelay | None
    reply: Attempt | None = None
    failure: str | None = None

    @property
    def has_passed(self) -> bool:
        """Whether a part of the answer was passed on to a reader."""
        return self.relay is not None and self.relay.has_passed


class CallRunner:
    """Makes calls that have a hold. Clock and sleep are parameters; `observer` follows the steps.

    `provider_user` returns the user name to send to the provider; by default, none is sent.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        results: Results,
        providers: ProviderClients,
        policies: CurrentPolicy,
        retry: RetryPolicy,
        now_ms: Callable[[], int],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        observer: CallObserver | None = None,
        provider_user: Callable[[str], str | None] = lambda user_id: None,  # noqa: ARG005 - no user is named (G10).
    ) -> None:
        self._provider_user = provider_user
        self._observer: CallObserver = observer or Unobserved()
        self._ledger = ledger
        self._results = results
        self._providers = providers
        self._policies = policies
        self._retry = retry
        self._now_ms = now_ms
        self._sleep = sleep
        self._notes = Notes(ledger)

    @property
    def notes_lost(self) -> int:
        """How many request ids could not be noted with their holds."""
        return self._notes.lost

    def can_be_cut_off(self, call: Call, hold: Hold) -> bool:
        """Whether the provider can still be asked for the cost of the request in flight if it is cut off (G3)."""
        client = self._client_of(call, hold) if hold.id_in_flight is not None else None
        return client is not None and client.can_be_asked

    async def run(
        self, call: Call, hold: Hold, *, give_up: str | None = None, on_delta: OnDelta | None = None
    ) -> InferenceResult:
        """Make a call and settle its hold; with `give_up`, end the call with this problem and without a request.

        With `on_delta`, the answer is passed on while it comes. After the first delta, no other attempt is made: a
        failure then ends the call. On cancellation, the request is cut off and the hold is settled.
        Errors: CallTakenOver; LedgerUnavailable; LedgerRefused; whatever `on_delta` raises.
        """
        run = _Run(call, hold, DeltaRelay(on_delta) if on_delta is not None else None, failure=give_up)
        try:
            await self._make_attempts(run)
            result = self._result(run, is_given_up=give_up is not None)
            if run.reply is not None and run.relay is not None:
                await run.relay.finish(run.reply)
        except LedgerError:
            raise
        except (asyncio.CancelledError, Exception) as exc:  # G2 G3
            # A request may be in flight. Neither a cancellation nor our own fault may leave a phantom hold behind.
            await cleanup_shielded(call.call_id, self._settle_cancelled(run))
            if isinstance(exc, ReaderFailed):
                raise exc.reason from None
            raise
        # A cancellation waits for this: an answer that is paid for but not stored would be paid for again.
        reason = run.reply.error if run.reply is not None else run.failure
        return await complete_shielded(self._settle(hold, result, reason=reason))  # G3 G4

    async def _make_attempts(self, run: "_Run") -> None:
        """Make attempts until there is a reply, or nothing more to try."""
        hold = run.hold
        if run.failure is None and hold.shortage_nanousd:  # G1
            run.failure = f"the price of {hold.bound.model} rose after the money was held; send the task again"
        while run.failure is None:
            attempt = await self._attempt(run)
            if not attempt.is_ok:
                if run.has_passed:
                    # The failure is this attempt's: the reader already has a part of its answer.
                    run.reply, run.failure = None, attempt.error or attempt.outcome
                    break
                if run.reply is not None:
                    break  # If the attempt with a larger limit fails, the first reply is the outcome.
                run.failure = await self._after_failure(run, attempt)
                continue
            run.reply = attempt  # G4
            larger = None if run.has_passed else with_larger_limit(run.call, attempt)
            if larger is None or not await self._prepare_larger(larger, hold):
                break
            run.call = larger

    def _result(self, run: "_Run", *, is_given_up: bool) -> InferenceResult:
        """Make the result from the reply, if there is one, else from the attempt that failed last."""
        call, hold, reply = run.call, run.hold, run.reply
        if reply is not None:
            return reply_result(
                call,
                reply,
                self._now_ms(),
                cost_nanousd=hold.spent_nanousd,
                downgraded_from=hold.downgraded_from,
            )
        last = hold.last
        code = (last and last.error_code) or ErrorCode.INFERENCE_FAILED
        if is_given_up:
            last, code = None, ErrorCode.ATTEMPTS_EXHAUSTED
        return failed_result(call, code, run.failure, self._now_ms(), cost_nanousd=hold.spent_nanousd, last=last)

    async def _attempt(self, run: "_Run") -> Attempt:
        call, hold = run.call, run.hold
        hold.begin_attempt()
        if run.relay is not None:
            run.relay.begin_attempt()
        prices = self._prices_of(call).at(hold.bound.provider)
        with self._observer.attempting(hold.bound.target, hold.attempts) as record_outcome:
            try:
                attempt = await self._send(call, hold, prices.models, run.relay.take if run.relay is not None else None)
            finally:
                self._notes.drop(hold.call_id)
            attempt = with_costliest_usage(attempt, hold.bound, prices, self._now_ms())
            charge = charge_of(attempt, hold.bound, prices, self._now_ms())
            record_outcome(attempt, charge)
        hold.finish_attempt(attempt, charge)
        return attempt

    async def _send(self, call: Call, hold: Hold, models: ModelCatalogue, on_delta: OnDelta | None) -> Attempt:
        model, provider = hold.bound.model, hold.bound.provider
        try:
            client = self._providers.at(provider, self._policies.of(call.user_id).policy)
        except (ProviderNotConfigured, SettingsError) as exc:
            # The policy has changed since this process started; it cannot ask that provider, but others may.
            _log.error("provider.not_configured", provider=provider, problem=str(exc))
            return Attempt(outcome="not_sent", charge="none", error=str(exc), reason="bad_key", latency_ms=0)
        parameters, user = call.parameters_for(model, models), self._provider_user(call.user_id)
        if call.inputs:
            return await client.embed(
                EmbeddingsRequest(
                    model=model, inputs=call.inputs, parameters=parameters, user=user, price_limit=hold.bound
                )
            )
        assert call.route.max_tokens is not None, "a call without a limit has no bound, and so no hold"
        return await client.complete(
            ChatRequest(
                model=model,
                messages=call.messages,
                max_tokens=call.route.max_tokens,
                parameters=parameters,
                limit_name=models.limit_name(model),
                user=user,
                price_limit=hold.bound,
            ),
            partial(self._note_id, hold),
            on_delta,
        )

    def _note_id(self, hold: Hold, generation_id: str) -> None:
        """Note the provider's id of the request in flight, so that any process can ask what the request cost (G3)."""
        hold.generation_id = generation_id
        self._notes.start(hold.note_request(generation_id))

    async def _after_failure(self, run: "_Run", failed: Attempt) -> str | None:
        """Decide on the next attempt and prepare it; return None, or why no attempt follows."""
        call, hold = run.call, run.hold
        without_reasoning = call.without_reasoning()
        target = hold.bound.target
        fallback = self._fallback_after(call, target, failed)
        step = self._retry.decide(
            failed,
            attempts_of_model=hold.attempts_of(target),
            has_fallback=fallback is not None,
            is_other_provider=fallback is not None and fallback.provider != target.provider,
            has_reasoning=without_reasoning is not None,
        )
        if isinstance(step, GiveUp):
            return step.reason
        if isinstance(step, Retry) and step.is_without_reasoning and without_reasoning is not None:
            run.call = call = without_reasoning
        next_target = target
        if isinstance(step, FallBack):
            assert fallback is not None, "the policy falls back only if there is a fallback"
            next_target = fallback
        try:
            self._bound_next(call, hold, next_target)
        except (PriceUnknown, InvalidTask) as exc:
            return _untried(failed, next_target, exc)  # The policy or the provider's list changed since the call began.
        with self._observer.preparing(
            "fallback" if isinstance(step, FallBack) else "retry",
            from_model=target.model,
            to_model=next_target.model,
            reason=failed.outcome,
        ) as record_outcome:
            failure = await self._prepare_next(call, hold, step, failed, tried=target)
            record_outcome(failure)
        if isinstance(step, Retry) and failure is None:
            await self._sleep(step.delay_s)
        return failure

    async def _prepare_larger(self, call: Call, hold: Hold) -> bool:
        """Extend the hold for an attempt with a larger token limit; return whether that was possible.

        Raises nothing: the reply that was paid for must still be settled (G4).
        """
        model = hold.bound.model
        with self._observer.preparing("retry", from_model=model, to_model=model, reason="output_limit") as record:
            try:
                hold.bound = bound_attempt(call, hold.bound.target, self._prices_of(call), self._now_ms())
                reply = await self._record(call, hold)
            except (LedgerError, PriceUnknown, InvalidTask) as exc:
                record(str(exc))
                _log.warning("call.larger_limit_not_tried", call_id=call.call_id, problem=str(exc))
                return False
            hold.mark_recorded()
            if isinstance(reply, Denied | Waiting):
                record("the larger limit does not fit the cap")
                return False
            hold.amount_nanousd = reply
            if hold.shortage_nanousd:  # G1
                record("the hold does not cover the larger limit")
                return False
            record(None)
        return True

    async def _prepare_next(
        self, call: Call, hold: Hold, step: Retry | FallBack, failed: Attempt, *, tried: Target
    ) -> str | None:
        """Record the failed attempt and extend the hold for the next; return None, or why it cannot be extended."""
        target = hold.bound.target
        try:
            reply = await self._record(call, hold)
        except CallUnknown:
            # The hold was settled meanwhile, and without a hold no further request may be sent.
            await self._correct(hold, result="")
            raise CallTakenOver(call.call_id) from None  # G3
        except (BaselineUnavailable, CallsStopped, LedgerWentBack) as exc:
            # No more money can be reserved (G8). The cost so far is still settled, or noted until it can be (G3).
            return _untried(failed, target, exc)
        except (PriceUnknown, InvalidTask) as exc:
            return _untried(failed, target, exc)  # The policy changed since the call began.
        hold.mark_recorded()
        if not isinstance(reply, Denied | Waiting):
            hold.amount_nanousd = reply
        if hold.shortage_nanousd:  # G1
            more = format_usd(hold.shortage_nanousd, places=6)
            return f"{failed.error}; {target} is not tried: {more} more do not fit the cap"
        if isinstance(step, FallBack):
            hold.note_fallback(
                FallbackUsed(
                    from_model=tried.model,
                    to_model=target.model,
                    from_provider=named_provider(tried.provider),
                    to_provider=named_provider(target.provider),
                    reason=step.reason,
                    http_status=failed.http_status,
                )
            )
            _log.info(
                "call.fell_back",
                call_id=call.call_id,
                to_model=target.model,
                to_provider=target.provider,
                reason=step.reason,
            )
        return None

    async def _record(self, call: Call, hold: Hold) -> int | Denied | Waiting:
        """Record the attempts and extend the hold, by the policy in force.

        Errors: CallUnknown; PriceUnknown and InvalidTask if the policy no longer has a price or plan for the call.
        """
        while True:
            payload = reserved_payload(call, hold.bound, "extension")
            try:
                return await self._ledger.record(hold.record_request(extension_payload=payload))
            except PolicyChanged:  # G11
                await self._follow_policy(call, hold, [budget.name for budget in hold.budgets])
            except BudgetsMismatch as exc:  # G1
                await self._follow_policy(call, hold, exc.budgets)

    async def _follow_policy(self, call: Call, hold: Hold, budgets: Sequence[str]) -> None:
        """Continue by the policy in force. `budgets` are the budgets of the hold, as on the ledger."""
        await self._policies.refresh()
        policy = self._policies.of(call.user_id)
        hold.budgets = policy.caps_of(budgets, plan=call.plan)
        hold.policy_version = policy.version
        self._bound_next(call, hold, hold.bound.target)

    def _bound_next(self, call: Call, hold: Hold, target: Target) -> None:
        hold.bound = bound_attempt(call, target, self._policies.of(call.user_id).prices, self._now_ms())

    async def _settle(self, hold: Hold, result: InferenceResult, *, reason: str | None) -> InferenceResult:
        text = result.model_dump_json()
        outcome = "failed" if reason else "done"
        request = hold.settle_request(outcome=outcome, reason=reason, result=text, is_final=True)
        if await settle_observed(self._ledger, self._observer, request, hold):
            return result
        if not await self._correct(hold, result=text):
            raise CallTakenOver(hold.call_id)
        # If another run has ended the call meanwhile, that run's result is the task's.
        return await self._results.get_of(hold.call_id, hold.user_id) or result  # G4

    async def _settle_cancelled(self, run: "_Run") -> None:
        """Settle the hold of a cancelled or failed run.

        A request in flight is charged at what its provider says, else in full. A reply that was paid for is the outcome
        (G4); without a reply there is no result, and the call may be run again.
        """
        hold = run.hold
        hold.abandon_attempt(await self._ask_cost_in_flight(run))
        if run.reply is not None:
            result = self._result(run, is_given_up=False)
            await self._settle(hold, result, reason=run.reply.error)
            return
        request = hold.settle_request(outcome="failed", reason="cancelled", result="", is_final=False)
        if not await settle_observed(self._ledger, self._observer, request, hold):
            await self._correct(hold, result="")
        _log.warning("call.abandoned", call_id=hold.call_id, cost_nanousd=request.cost_nanousd)

    async def _ask_cost_in_flight(self, run: "_Run") -> int | None:
        """Return what the request in flight cost, in nano-dollars; None without such a request, or if unknown."""
        generation_id = run.hold.id_in_flight
        client = self._client_of(run.call, run.hold)
        if generation_id is None or client is None:
            return None
        return await ask_abandoned_cost(client, generation_id, sleep=self._sleep)

    def _client_of(self, call: Call, hold: Hold) -> ProviderClient | None:
        """Return the client of the attempt's provider; None if the policy no longer has the provider."""
        try:
            return self._providers.at(hold.bound.provider, self._policies.of(call.user_id).policy)
        except (ProviderNotConfigured, SettingsError):
            return None

    async def _correct(self, hold: Hold, *, result: str) -> bool:
        """Correct the cost of a hold that another process has settled; return whether the call is over."""
        request = hold.adjust_request(reason="late_answer", result=result)
        while True:
            try:
                if hold.is_last_assumed:
                    adjusted = await self._adjust(await self._keep_known_cost(request))
                else:
                    adjusted = await self._adjust(request)
            except HoldChanged:
                continue
            _log.warning("call.answered_late", call_id=hold.call_id, difference_nanousd=adjusted.difference_nanousd)
            return adjusted.is_call_over

    async def _keep_known_cost(self, request: AdjustRequest) -> AdjustRequest:
        """Keep the settled cost if another process knew more of it than this run, which only assumes it.

        The money that was freed may be spent by now. Then the attempt is not recorded either, as if its worker had
        died: `reconcile` takes the recorded costs of attempts as booked.
        """
        standing = await self._ledger.settled_hold(request.user_id, request.call_id, request.hold)
        if standing is None:
            return request
        seen = standing.cost_nanousd, standing.assumed_nanousd
        if request.assumed_nanousd <= standing.assumed_nanousd:
            return replace(request, seen=seen)
        return replace(request, cost_nanousd=seen[0], assumed_nanousd=seen[1], events=(), seen=seen)  # G1

    async def _adjust(self, request: AdjustRequest) -> Adjusted:
        """Book a correction; wait for the projection if needed, since only this run knows the provider's charge."""
        waited_s = 0.0
        while True:
            try:
                return await self._ledger.adjust(request)
            except BaselineUnavailable as exc:
                if waited_s >= _CORRECTION_PATIENCE_S:
                    raise
                _log.warning("correction.held_back", call_id=request.call_id, problem=str(exc))
                await self._sleep(_CORRECTION_PAUSE_S)
                waited_s += _CORRECTION_PAUSE_S

    def _fallback_after(self, call: Call, target: Target, failed: Attempt) -> Target | None:
        """Return the next fallback that can be attempted and may answer, or None.

        A failure of the provider itself (its address, its key, its account) leaves only models of other providers.
        """
        prices, now_ms = self._prices_of(call), self._now_ms()
        needs_context = failed.reason == "context_too_long"
        for each in call.route.after(target):
            if (
                (failed.may_fall_back or each.provider != target.provider)
                and can_attempt(call, each, prices, now_ms)
                and (not needs_context or prices.has_larger_context(each, target))
            ):
                return each
        return None

    def _prices_of(self, call: Call) -> PriceCatalogue:
        return self._policies.of(call.user_id).prices


def _untried(failed: Attempt, target: Target, reason: Exception) -> str:
    return f"{failed.error}; {target} is not tried: {reason}"
