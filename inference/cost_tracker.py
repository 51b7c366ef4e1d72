"""Budget checks and recorded spend, for calls that an application makes without Tollbook.

`InferenceClient` does not need this: it reserves and settles by itself. A check alone cannot enforce a cap, since
another call may be made between the check and the spending; only a hold can. Spend that has happened is recorded even
if it is above the cap.
"""

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from tollbook.inference.arguments import read_arguments
from tollbook.inference.current_policy import PolicyInForce
from tollbook.inference.current_runtime import using_runtime
from tollbook.inference.errors import PlanLimitReached, describe_shortage
from tollbook.inference.runtime import InferenceRuntime, now_ms
from tollbook.ledger.errors import IdempotencyConflict, LedgerRefused, LedgerWentBack
from tollbook.ledger.gate.requests import Balance, ChargeRequest
from tollbook.schemas.events import CostRecorded, payload_json
from tollbook.schemas.identifiers import usage_call_id
from tollbook.schemas.money import MoneyError, nanousd_from_usd, usd_from_nanousd
from tollbook.schemas.policy import check_plan
from tollbook.schemas.results import UsdString
from tollbook.schemas.tasks import InvalidTask


@dataclass(frozen=True, slots=True)
class UsageSummary:
    """A user's current billing period, in dollars. `remaining_usd` is the cap minus settled spend and open holds.

    In JSON, dollars are decimal strings with nine places.
    """

    user_id: str
    period: str
    plan: str
    cap_usd: UsdString
    spent_usd: UsdString
    reserved_usd: UsdString
    remaining_usd: UsdString


class UsageKept(LedgerRefused):
    """The ledger went back in time and takes no events: the spend is noted, and booked once the newer data is back."""

    def __init__(self, key: str, problem: LedgerWentBack) -> None:
        super().__init__(
            f"the spend is noted but not booked yet: if you record it again, use the idempotency key {key}. {problem}",
            {"idempotency_key": key},
        )
        self.key = key


class CostTracker:
    """Checks budgets and records spend.

    Errors of every method: InvalidTask for an argument; LedgerUnavailable; LedgerRefused.
    """

    def __init__(self, runtime: InferenceRuntime | None = None) -> None:
        self._runtime = runtime

    async def check_budget(
        self, user_id: str, plan: str | None = None, *, estimated_cost_usd: Decimal | str | int = 0
    ) -> UsageSummary:
        """Return the user's period if a call of this cost would fit now.

        Errors: PlanLimitReached, with the amounts in `data`; `is_temporary` if only open holds leave too little.
        """
        estimate = _money(estimated_cost_usd)
        summary, balance, budget = await self._read_balance(user_id, plan)
        settled_after = balance.settled_nanousd + max(estimate, 1)
        if settled_after + balance.held_nanousd > balance.cap_nanousd:
            raise PlanLimitReached(
                describe_shortage(
                    budget,
                    requested_nanousd=estimate,
                    settled_nanousd=balance.settled_nanousd,
                    held_nanousd=balance.held_nanousd,
                    cap_nanousd=balance.cap_nanousd,
                ),
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
        plan: str | None = None,
        model: str | None = None,
        campaign_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        reason: str = "recorded by the application",
        idempotency_key: str | None = None,
    ) -> bool:
        """Record spend that was not made through Tollbook; return False if this key is already recorded.

        `cost_usd` is a Decimal, string or integer, in dollars, rounded up to the nano-dollar; a float is refused.
        The spend counts in every budget whose attributes are given: user and plan, `model`, `campaign_id` and `tags`.
        A key is no task id: a task with the same id is another call. On the ledger the call is `usage <key>`.
        Errors: IdempotencyConflict for the same key with other content; UsageKept if the ledger cannot take it now.
        """
        cost = _money(cost_usd)
        given = read_arguments(
            user_id=user_id,
            campaign_id=campaign_id,
            idempotency_key=idempotency_key,
            tags=tags or {},
            model=model,
            reason=reason,
        )
        user_id, campaign_id, model, reason = given.user_id, given.campaign_id, given.model, given.reason
        key, tags = given.idempotency_key or str(uuid.uuid4()), given.tags
        async with using_runtime(self._runtime) as runtime:
            user_id = await runtime.user_ids.keep(user_id)  # G10
            content = f"{user_id}\n{cost}\n{model}\n{reason}"
            if campaign_id is not None or tags:
                content += f"\n{campaign_id}\n{json.dumps(tags, sort_keys=True)}"
            named = {"model": model, "campaign": campaign_id}

            async def charge(policy: PolicyInForce) -> bool:
                chosen = _plan(plan, policy)
                known = {name: value for name, value in named.items() if value is not None}
                attributes = {**tags, **known, "user": user_id, "plan": chosen}
                window, budgets = policy.budgets_at(now_ms(), attributes)
                payload = CostRecorded(
                    basis="reported",
                    outcome="recorded",
                    reason=reason,
                    model=model,
                    plan=chosen,
                    campaign_id=campaign_id,
                    tags=tags or None,
                )
                return await runtime.ledger.charge(
                    ChargeRequest(
                        call_id=usage_call_id(key),
                        user_id=user_id,
                        period=window.name,
                        content_hash=hashlib.sha256(content.encode()).hexdigest()[:32],
                        cost_nanousd=cost,
                        assumed_nanousd=0,
                        payload=payload_json(payload),
                        budgets=tuple(budget.name for budget in budgets),
                        policy_version=policy.version,
                        cap_nanousd=budgets[0].cap_nanousd,
                    )
                )

            try:
                return await runtime.policies.decide(user_id, charge)
            except IdempotencyConflict as exc:
                raise IdempotencyConflict(key, kind="idempotency key") from exc
            except LedgerWentBack as exc:
                raise UsageKept(key, exc) from exc

    async def get_usage_summary(self, user_id: str, plan: str | None = None) -> UsageSummary:
        """Return the user's billing period as the gate sees it now: exact, even if the projector lags behind."""
        summary, _, _ = await self._read_balance(user_id, plan)
        return summary

    async def _read_balance(self, user_id: str, plan: str | None) -> tuple[UsageSummary, Balance, str]:
        """Return the user's period, its balance, and the name of its budget."""
        user_id = read_arguments(user_id=user_id).user_id
        async with using_runtime(self._runtime) as runtime:
            stored_id = runtime.user_ids.on_ledger(user_id)

            async def read(policy: PolicyInForce) -> tuple[str, str, str, Balance]:
                chosen = _plan(plan, policy)
                window, budgets = policy.budgets_at(now_ms(), {"user": stored_id, "plan": chosen})
                balance, *_ = await runtime.ledger.balance(
                    user_id=stored_id, period=window.name, budgets=budgets[:1], policy_version=policy.version
                )
                return chosen, window.name, budgets[0].name, balance

            chosen, period, budget, balance = await runtime.policies.decide(stored_id, read)
        summary = UsageSummary(
            user_id=user_id,
            period=period,
            plan=chosen,
            cap_usd=usd_from_nanousd(balance.cap_nanousd),
            spent_usd=usd_from_nanousd(balance.settled_nanousd),
            reserved_usd=usd_from_nanousd(balance.held_nanousd),
            remaining_usd=usd_from_nanousd(balance.remaining_nanousd),
        )
        return summary, balance, budget


def _money(usd: Decimal | str | int) -> int:
    try:
        return nanousd_from_usd(usd)
    except MoneyError as exc:
        raise InvalidTask(str(exc)) from exc


def _plan(plan: str | None, policy: PolicyInForce) -> str:
    return policy.policy.default_plan if plan is None else check_plan(plan, policy.policy)
