"""Budget questions and book-keeping for calls that an application makes by itself.

`InferenceClient` needs none of this: it checks and records every call in one step each.
A check alone cannot keep a cap, since another call may pass between check and spending;
only a hold does. What was spent outside is recorded all the same, whatever the cap says.
"""

import hashlib
import uuid
from dataclasses import dataclass
from decimal import Decimal

from tollbook.inference.errors import AppError
from tollbook.inference.runtime import InferenceRuntime, current_runtime, now_ms
from tollbook.ledger.errors import IdempotencyConflict, LedgerError
from tollbook.ledger.gate.requests import Balance, ChargeRequest
from tollbook.schemas.events import CostRecorded, payload_json
from tollbook.schemas.identifiers import check_id, usage_call_id
from tollbook.schemas.money import MoneyError, format_usd, nanousd_from_usd, usd_from_nanousd
from tollbook.schemas.plans import DEFAULT_PLAN, Plan
from tollbook.schemas.problems import unknown_name
from tollbook.schemas.results import ErrorCode, UsdString


@dataclass(frozen=True, slots=True)
class UsageSummary:
    """A user's billing period now, in dollars. `remaining_usd` is what settled spend and open holds leave.

    In JSON, dollars are decimal strings with nine places.
    """

    user_id: str
    period: str
    plan: Plan
    cap_usd: UsdString
    spent_usd: UsdString
    reserved_usd: UsdString
    remaining_usd: UsdString


class CostTracker:
    """Asks for budgets and records spend. Errors of every method: AppError (LEDGER_UNAVAILABLE, INVALID_TASK)."""

    def __init__(self, runtime: InferenceRuntime | None = None) -> None:
        self._runtime = runtime

    async def check_budget(
        self, user_id: str, plan: str = DEFAULT_PLAN, *, estimated_cost_usd: Decimal | str | int = 0
    ) -> UsageSummary:
        """Return the user's period if a call of this cost would fit now.

        Errors: AppError (PLAN_LIMIT_REACHED), with the numbers in `data`; its `is_temporary` is true where only
            open holds stand in the way: most of that money comes back, and a task that is published waits for it.
        """
        summary, balance = await self._look(user_id, plan)
        estimate = _money(estimated_cost_usd)
        settled_after = balance.settled_nanousd + max(estimate, 1)
        if settled_after + balance.held_nanousd > balance.cap_nanousd:
            raise AppError(
                ErrorCode.PLAN_LIMIT_REACHED,
                f"{user_id}: {format_usd(balance.settled_nanousd, places=6)} are spent and "
                f"{format_usd(balance.held_nanousd, places=6)} held of {format_usd(balance.cap_nanousd)}",
                {
                    "cap_usd": summary.cap_usd,
                    "spent_usd": summary.spent_usd,
                    "reserved_usd": summary.reserved_usd,
                    "estimated_cost_usd": usd_from_nanousd(estimate),
                    "is_temporary": settled_after <= balance.cap_nanousd,
                },
            )
        return summary

    async def record_usage(
        self,
        user_id: str,
        cost_usd: Decimal | str | int,
        *,
        plan: str = DEFAULT_PLAN,
        model: str | None = None,
        reason: str = "recorded by the application",
        idempotency_key: str | None = None,
    ) -> bool:
        """Record spend that was not made through Tollbook; return False where this key is recorded already.

        Dollars come as Decimal, string or integer; a float is refused. Rounded up to the nano-dollar.
        Keys are no task ids: a task of the same name is another call. On the ledger the call is `usage <key>`.
        It used to be the key itself; what was recorded so stays recorded, for as long as task ids are remembered.
        Errors: AppError (IDEMPOTENCY_CONFLICT) for the same key with other content.
        """
        runtime, cost = self._runtime or current_runtime(), _money(cost_usd)
        chosen = _plan(plan)
        key = str(uuid.uuid4()) if idempotency_key is None else _id(idempotency_key, "idempotency_key")
        user_id = _id(user_id, "user_id")
        window, budgets = runtime.policy.budgets_at(now_ms(), user_id=user_id, plan=chosen, campaign_id=None)
        content = f"{user_id}\n{cost}\n{model}\n{reason}"
        request = ChargeRequest(
            call_id=usage_call_id(key),
            user_id=user_id,
            period=window.name,
            content_hash=hashlib.sha256(content.encode()).hexdigest()[:32],
            cost_nanousd=cost,
            assumed_nanousd=0,
            payload=payload_json(CostRecorded(basis="reported", outcome="recorded", reason=reason, model=model)),
            budgets=tuple(budget.name for budget in budgets),
        )
        try:
            if idempotency_key is not None and await _was_recorded_as_task(runtime, key, request):
                return False
            return await runtime.ledger.charge(request)
        except IdempotencyConflict as exc:
            raise AppError(ErrorCode.IDEMPOTENCY_CONFLICT, str(exc)) from exc
        except LedgerError as exc:
            raise AppError(ErrorCode.LEDGER_UNAVAILABLE, str(exc)) from exc

    async def get_usage_summary(self, user_id: str, plan: str = DEFAULT_PLAN) -> UsageSummary:
        """Return the user's billing period as the gate sees it now: exact, however far the projector is behind."""
        summary, _ = await self._look(user_id, plan)
        return summary

    async def _look(self, user_id: str, plan: str) -> tuple[UsageSummary, Balance]:
        runtime, chosen = self._runtime or current_runtime(), _plan(plan)
        window, budgets = runtime.policy.budgets_at(
            now_ms(), user_id=_id(user_id, "user_id"), plan=chosen, campaign_id=None
        )
        try:
            balance, *_ = await runtime.ledger.balance(user_id=user_id, period=window.name, budgets=budgets[:1])
        except LedgerError as exc:
            raise AppError(ErrorCode.LEDGER_UNAVAILABLE, str(exc)) from exc
        summary = UsageSummary(
            user_id=user_id,
            period=window.name,
            plan=chosen,
            cap_usd=usd_from_nanousd(balance.cap_nanousd),
            spent_usd=usd_from_nanousd(balance.settled_nanousd),
            reserved_usd=usd_from_nanousd(balance.held_nanousd),
            remaining_usd=usd_from_nanousd(balance.remaining_nanousd),
        )
        return summary, balance


async def _was_recorded_as_task(runtime: InferenceRuntime, key: str, request: ChargeRequest) -> bool:
    """Whether the key was recorded when keys were task ids; none is any more, so that nothing can come between.

    Errors: IdempotencyConflict; LedgerUnavailable.
    """
    record = await runtime.ledger.gate_of(request.user_id).call_record(key)
    # What has no hold was charged without one; a task has.
    if record is None or record.state != "settled" or record.hold.hold != 0:
        return False
    if record.content_hash != request.content_hash:
        raise IdempotencyConflict(key)
    return True


def _money(usd: Decimal | str | int) -> int:
    try:
        return nanousd_from_usd(usd)
    except MoneyError as exc:
        raise AppError(ErrorCode.INVALID_TASK, str(exc)) from exc


def _plan(plan: str) -> Plan:
    try:
        return Plan(plan)
    except ValueError:
        raise AppError(ErrorCode.INVALID_TASK, unknown_name("plan", plan, list(Plan))) from None


def _id(value: str, name: str) -> str:
    try:
        return check_id(value)
    except ValueError as exc:
        raise AppError(ErrorCode.INVALID_TASK, f"'{name}' {exc}") from None
