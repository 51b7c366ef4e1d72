"""Money movements by people: plans, credits and corrections, each an event with author and reason.

Every command is idempotent by its key (a correction by the cost that it states), bounded as
all amounts are, in force in the gate from the step that appends it, and visible in statements.
"""

import hashlib
import uuid
from dataclasses import dataclass

from tollbook.inference.runtime import InferenceRuntime, now_ms
from tollbook.ledger.errors import CallUnknown, IdempotencyConflict, LedgerError
from tollbook.ledger.gate.call_record import CallRecord
from tollbook.ledger.gate.requests import AdjustRequest, AssignRequest
from tollbook.schemas.events import CostAdjusted, CreditGranted, PlanAssigned, payload_json
from tollbook.schemas.identifiers import budget_name, month_at, usage_call_id
from tollbook.schemas.plans import Plan


class CallStillOpen(LedgerError):
    """A call is corrected once it is settled; this one still holds money."""

    def __init__(self, call_id: str) -> None:
        super().__init__(f"call {call_id} is not settled yet; correct it when it is")
        self.call_id = call_id


class NothingToCorrect(LedgerError):
    """The call was refused or never cost anything that could be corrected this way."""


@dataclass(frozen=True, slots=True)
class Signature:
    """Who changes something, and why. `key` makes a repeat harmless; without one, each command is a new one."""

    author: str
    reason: str
    key: str | None = None

    def command_id(self, kind: str) -> str:
        """Return the idempotency key of a command: with a space, which no task id has, so that no task can take it."""
        return f"{kind} {self.key or uuid.uuid4()}"


@dataclass(frozen=True, slots=True)
class Correction:
    """A call's cost before and after, in nano-dollars, over all its holds."""

    user_id: str
    before_nanousd: int
    after_nanousd: int


class Administration:
    """Changes by people. Errors of every method: IdempotencyConflict; LedgerUnavailable; LedgerRefused."""

    def __init__(self, runtime: InferenceRuntime) -> None:
        self._runtime = runtime

    async def set_plan(self, user_id: str, plan: Plan, signature: Signature, *, cap_nanousd: int | None = None) -> bool:
        """Put a user on a plan, with the plan's cap or another; return whether that is new.

        From here on the ledger's word stands, whatever plan a task names.
        """
        cap = self._runtime.policy.plan_caps_nanousd[plan] if cap_nanousd is None else cap_nanousd
        payload = PlanAssigned(plan=plan.value, cap_nanousd=cap, author=signature.author, reason=signature.reason)
        return await self._assign("plan-assigned", user_id, plan.value, cap, payload_json(payload), signature, None)

    async def grant_credit(
        self, user_id: str, amount_nanousd: int, signature: Signature, *, period: str | None = None
    ) -> bool:
        """Give a user room above the cap for one period, the present one by default; return whether that is new."""
        payload = payload_json(CreditGranted(author=signature.author, reason=signature.reason))
        return await self._assign("credit-granted", user_id, "", amount_nanousd, payload, signature, period)

    async def adjust_cost(self, call_id: str, cost_nanousd: int, signature: Signature) -> Correction:
        """Correct what a call cost in all to `cost_nanousd`; repeated, it changes nothing.

        `call_id` may also be the key of spend that an application recorded; a task of that name goes first.

        Errors: CallUnknown (also once the idempotency period is over); CallStillOpen; NothingToCorrect.
        """
        call_id, record = await self._find(call_id)
        if record.state == "open":
            raise CallStillOpen(call_id)
        if not record.settled:
            raise NothingToCorrect(f"call {call_id} was {record.state} and cost nothing")
        before = sum(hold.cost_nanousd for hold in record.settled.values())
        # The latest hold takes the difference; what is left over goes to the ones before it.
        left = cost_nanousd
        targets: dict[int, int] = {}
        for number in sorted(record.settled):
            targets[number] = min(record.settled[number].cost_nanousd, left)
            left -= targets[number]
        targets[max(targets)] += left
        for number, target in targets.items():
            if target != record.settled[number].cost_nanousd or record.settled[number].assumed_nanousd:
                await self._adjust_hold(call_id, record, number, target, signature)
        return Correction(record.user_id, before, cost_nanousd)

    async def _assign(
        self, kind: str, user_id: str, plan: str, amount: int, payload: str, signature: Signature, period: str | None
    ) -> bool:
        period = period or month_at(now_ms()).name
        content = "\n".join((kind, user_id, plan, str(amount), period, signature.author, signature.reason))
        request = AssignRequest(
            command_id=signature.command_id(kind),
            user_id=user_id,
            period=period,
            content_hash=hashlib.sha256(content.encode()).hexdigest()[:32],
            type="plan-assigned" if kind == "plan-assigned" else "credit-granted",
            plan=plan,
            amount_nanousd=amount,
            payload=payload,
            budget=budget_name("user", user_id, period),
        )
        try:
            return await self._runtime.ledger.assign(request)
        except IdempotencyConflict as exc:
            raise IdempotencyConflict(signature.key or request.command_id, kind="key") from exc

    async def _find(self, call_id: str) -> tuple[str, CallRecord]:
        for name in (call_id, usage_call_id(call_id)):
            for gate in self._runtime.ledger.gates:
                record = await gate.call_record(name)
                if record is not None:
                    return name, record
        raise CallUnknown(call_id)

    async def _adjust_hold(
        self, call_id: str, record: CallRecord, number: int, cost_nanousd: int, signature: Signature
    ) -> None:
        payload = CostAdjusted(basis="reported", reason=signature.reason, author=signature.author)
        request = AdjustRequest(
            call_id=call_id,
            user_id=record.user_id,
            hold=number,
            cost_nanousd=cost_nanousd,
            assumed_nanousd=0,
            attempt=record.hold.attempts_recorded,
            payload=payload_json(payload),
            budgets=record.settled[number].budgets,
        )
        await self._runtime.ledger.adjust(request)
