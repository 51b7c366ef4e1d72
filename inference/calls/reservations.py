"""Money for a call before it is sent: which budgets pay, how much is held, and the wait for other calls' holds.

Invariant (G9): a call is refused only when settled spend and its own bound pass the cap; where other calls' open holds
stand in the way it waits for them, in the order of arrival and for a bounded time.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Literal

import structlog

from tollbook.inference.bounds import Bound, bound
from tollbook.inference.calls.call import Call, exhausted
from tollbook.inference.calls.earlier_runs import EarlierRuns
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.steps import CallObserver, Unobserved, cleanup_shielded
from tollbook.inference.errors import ParameterUnsupported, PriceUnknown
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.ledger.errors import IdempotencyConflict
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import BudgetCap, Denied, FinishedCall, OpenCall, Reserved, ReserveRequest, Waiting
from tollbook.ledger.gate.wait_queue import BudgetWaitQueue
from tollbook.ledger.results import Results
from tollbook.schemas.events import BudgetReserved, payload_json
from tollbook.schemas.identifiers import Window, budget_name, day_at, month_at
from tollbook.schemas.plans import CAPS_NANOUSD, Plan
from tollbook.schemas.results import InferenceResult

# For clocks that differ and a process that is held up for a moment.
_LEASE_SLACK_S: Final = 30
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BudgetPolicy:
    """The caps in force, in nano-dollars.

    A call is always held against the user's billing period, whose cap is the user's own or the plan's. It is held
    against the user's day and the campaign's billing period too where a cap is set for them.
    """

    plan_caps_nanousd: Mapping[Plan, int] = field(default_factory=lambda: dict(CAPS_NANOUSD))
    user_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    day_cap_nanousd: int | None = None
    campaign_cap_nanousd: int | None = None

    def cap_of(self, user_id: str, plan: Plan) -> int:
        """Return the cap of a user's billing period. A plan assigned on the ledger wins over it, in the gate."""
        return self.user_caps_nanousd.get(user_id, self.plan_caps_nanousd[plan])

    def budgets_at(
        self, now_ms: int, *, user_id: str, plan: Plan, campaign_id: str | None
    ) -> tuple[Window, tuple[BudgetCap, ...]]:
        """Return the budgets of a call, the user's period first, and the window for which they are valid.

        The window bears the name of the billing period.
        """
        month = month_at(now_ms)
        budgets = [BudgetCap(budget_name("user", user_id, month.name), self.cap_of(user_id, plan))]
        window = month
        if self.day_cap_nanousd is not None:
            day = day_at(now_ms)
            budgets.append(BudgetCap(budget_name("day", user_id, day.name), self.day_cap_nanousd))
            window = Window(month.name, day.start_ms, day.end_ms)
        if self.campaign_cap_nanousd is not None and campaign_id is not None:
            budgets.append(BudgetCap(budget_name("campaign", campaign_id, month.name), self.campaign_cap_nanousd))
        return window, tuple(budgets)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitLimits:
    """How long a call asks for money, and how often. Units: seconds.

    `max_attempts`: holds that a call may have before it is given up. `max_parked`: calls of this process that may wait
    for money at a time. None: any number.
    """

    hold_wait_s: float
    first_pause_s: float = 0.2
    max_pause_s: float = 5.0
    max_attempts: int | None = None
    max_parked: int | None = None


@dataclass(frozen=True, slots=True)
class Acquired:
    """A hold, or the result of a call that is over; neither where too many calls wait already.

    `give_up` is why the call must end without a request, or has been ended; None where it need not.
    """

    hold: Hold | None = None
    result: InferenceResult | None = None
    give_up: str | None = None


async def _never(_found: OpenCall) -> bool:
    return False


class Reservations:
    """Holds money for calls. `max_call_s` is how long the attempts and pauses of one call can take.

    Errors of every method: LedgerUnavailable; LedgerRefused.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        results: Results,
        prices: PriceCatalogue,
        policy: BudgetPolicy,
        queue: BudgetWaitQueue,
        max_call_s: float,
        now_ms: Callable[[], int],
        observer: CallObserver | None = None,
    ) -> None:
        self._observer: CallObserver = observer or Unobserved()
        self._ledger = ledger
        self._results = results
        self._prices = prices
        self._policy = policy
        self._queue = queue
        self._lease_ms = round(1000 * (max_call_s + _LEASE_SLACK_S))
        self._now_ms = now_ms
        self._earlier_runs = EarlierRuns(ledger, results, self._observer, now_ms)

    @property
    def waiting(self) -> int:
        """Calls of this process that wait for money now."""
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
        """Reserve; wait for the budget where other calls hold it; take over from a run of this call that has died.

        With `give_up`, a call that is not over ends with this problem and no request, as one does that has had
        `max_attempts` holds. That too goes by a hold: only the ledger can rule out that another run of the call begins,
        or answers late (G4). `is_dead` decides about the run that holds money; `while_waiting` is open during each
        wait.

        Where LedgerUnavailable is raised no request was sent, though the ledger may hold money: a repeat with the same
        `run_id` goes on with that hold.
        Errors: IdempotencyConflict; CallUnknown.
        """
        until_ms = self._now_ms() + round(1000 * limits.hold_wait_s)
        pause_s = limits.first_pause_s
        budget: str | None = None
        while True:
            is_final = budget is not None and self._now_ms() >= until_ms
            reply = await self.reserve(call, is_final=is_final)
            if isinstance(reply, OpenCall) and await is_dead(reply):
                give_up = give_up or _exhausted(reply.hold + 1, limits)
                await self.take_over(call, reply, give_up=give_up)
                continue
            if isinstance(reply, Waiting) and limits.max_parked is not None and self.waiting >= limits.max_parked:
                return Acquired()
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
                        self._queue.next(budget)  # There may be room for one more.
                    if isinstance(reply, InferenceResult):
                        return Acquired(result=reply, give_up=give_up)
                    return Acquired(hold=reply, give_up=give_up or _exhausted(reply.number, limits))

    async def reserve(self, call: Call, *, is_final: bool = False) -> Hold | InferenceResult | Waiting | OpenCall:
        """Ask the gate once; `is_final` is refused where it would have to wait.

        Returns the result of a call that is over; Waiting where only other calls' holds stand in the way; OpenCall
        where another run of the call holds money.
        Errors: IdempotencyConflict.
        """
        if not await self._results.claim(call.call_id, call.user_id):  # G4
            raise IdempotencyConflict(call.call_id)
        try:
            first = bound_attempt(call, call.route.model, self._prices, self._now_ms())
        except (PriceUnknown, ParameterUnsupported) as exc:  # G8
            return await self._earlier_runs.unpriced(call, exc)
        try:
            with self._observer.reserving(first.amount_nanousd) as record_outcome:
                reply = await self._ledger.reserve(
                    lambda now_ms: self._request(call, first, now_ms, is_final=is_final), self._now_ms()
                )
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
                )
            case OpenCall(worker=run) if run == str(call.run_id):
                return self._own_hold(call, reply, first)
            case Denied():
                return await self._earlier_runs.denied(call, reply)
            case FinishedCall():
                return await self._earlier_runs.finished(call, reply)
            case Waiting() | OpenCall():
                return reply

    async def take_over(self, call: Call, found: OpenCall, *, give_up: str | None = None) -> None:
        """Settle the hold of a run that has died; `give_up` ends the call. Errors: CallUnknown."""
        await self._earlier_runs.take_over(call, found, give_up=give_up)

    async def _wait_for_turn(self, budget: str, *, is_first: bool, until_ms: int) -> None:
        try:
            async with asyncio.timeout(max(0, until_ms - self._now_ms()) / 1000):
                await self._queue.wait(budget, is_first=is_first)
        except TimeoutError:
            pass  # The next try is the final one.

    def _request(self, call: Call, first: Bound, now_ms: int, *, is_final: bool) -> ReserveRequest:
        window, budgets = self._budgets_at(call, now_ms)
        return ReserveRequest(
            call_id=call.call_id,
            user_id=call.user_id,
            window=window,
            content_hash=call.content_hash,
            amount_nanousd=first.amount_nanousd,
            worker=str(call.run_id),
            lease_ms=self._lease_ms,
            payload=reserved_payload(call, first, "hold"),
            budgets=budgets,
            is_final=is_final,
        )

    def _budgets_at(self, call: Call, now_ms: int) -> tuple[Window, tuple[BudgetCap, ...]]:
        return self._policy.budgets_at(now_ms, user_id=call.user_id, plan=call.plan, campaign_id=call.campaign_id)

    def _own_hold(self, call: Call, found: OpenCall, first: Bound) -> Hold:
        """Return the hold that this run has opened by a request whose reply was lost; nothing was sent under it yet."""
        _, budgets = self._budgets_at(call, self._now_ms())
        caps = [budget.cap_nanousd for budget in budgets]
        return Hold(
            call_id=call.call_id,
            user_id=call.user_id,
            run=found.worker,
            number=found.hold,
            amount_nanousd=found.amount_nanousd,
            budgets=tuple(BudgetCap(name, cap) for name, cap in zip(found.budgets, caps, strict=True)),
            bound=first,
            attempts=found.attempts_begun - 1,
            spent_nanousd=found.spent_nanousd,
            assumed_nanousd=found.assumed_nanousd,
        )


def bound_attempt(call: Call, model: str, prices: PriceCatalogue, now_ms: int) -> Bound:
    """Bound what one attempt of a call can cost.

    Errors: PriceUnknown; ParameterUnsupported where the provider says that the model does not take what the task sets.
    """
    models = prices.models
    unsupported = models.unsupported(model, call.parameters)
    if unsupported:
        raise ParameterUnsupported(model, unsupported)
    inputs = models.of(model).input_modalities
    if inputs is not None and "image" not in inputs and any(message.image_parts for message in call.messages):
        raise ParameterUnsupported(model, ["images"])
    parameters = call.parameters_for(model, models)
    price = prices.price(model, now_ms)
    return bound(call.messages, call.route.max_tokens, price, parameters=parameters, facts=models.of(model))


def can_attempt(call: Call, model: str, prices: PriceCatalogue, now_ms: int) -> bool:
    """Whether a model can be asked for this call: its cost has a bound, and it takes what the task sets."""
    try:
        bound_attempt(call, model, prices, now_ms)
    except (PriceUnknown, ParameterUnsupported):
        return False
    return True


def reserved_payload(call: Call, attempt_bound: Bound, kind: Literal["hold", "extension"]) -> str:
    """Describe a hold or its extension for the ledger."""
    return payload_json(
        BudgetReserved(
            kind=kind,
            task_type=call.task_type.value,
            stream=call.stream,
            plan=call.plan.value,
            campaign_id=call.campaign_id,
            worker=str(call.run_id),
            bound=attempt_bound.as_price(),
        )
    )


def _exhausted(hold: int, limits: WaitLimits) -> str | None:
    """Return why a call ends that would begin with this hold."""
    return exhausted(hold - 1) if limits.max_attempts is not None and hold > limits.max_attempts else None


def _warn_of_other_plan(call: Call, reply: Reserved) -> None:
    """A task may name an old plan; the ledger's stands, and the publisher ought to know."""
    if reply.assigned_plan not in (None, call.plan.value):
        _log.warning(
            "plan.mismatched",
            call_id=call.call_id,
            user_id=call.user_id,
            task_plan=call.plan.value,
            assigned_plan=reply.assigned_plan,
        )
