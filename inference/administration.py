"""Changes by people: plans, credits, corrections, releases and keys, each an event with author and reason.

Every command is idempotent by its key (a correction: by the cost that it states). Its amounts have the usual limits.
The gate applies it in the same step that appends its event, and statements show it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from redis.exceptions import RedisError

from tollbook.inference.address import find_redis_url
from tollbook.inference.current_policy import CurrentPolicy, PolicyInForce, policy_in_force
from tollbook.inference.heads_on_disk import heads_on_disk
from tollbook.inference.key_changes import KeyChanges
from tollbook.inference.opening_balances import ReadSpent
from tollbook.inference.policy_changes import Applied, apply_policy, read_stored, warn_of_difference
from tollbook.inference.prepaid import Prepaid
from tollbook.inference.process_name import process_name
from tollbook.inference.releases import AssumedCharge, Releases, release_charges
from tollbook.inference.settings import Settings, given_or_loaded
from tollbook.inference.user_ids import UserIds, open_user_key
from tollbook.ledger.clock import now_ms as clock_ms
from tollbook.ledger.errors import (
    CallsStopped,
    CallUnknown,
    IdempotencyConflict,
    LedgerError,
    LedgerUnavailable,
    NoPlanAssigned,
    PermissionsMissing,
)
from tollbook.ledger.gate.asking import AskedBaselines
from tollbook.ledger.gate.baselines import Baselines
from tollbook.ledger.gate.call_record import CallRecord
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.probe import check_takes_writes
from tollbook.ledger.gate.replies import FunctionsMissing
from tollbook.ledger.gate.requests import Account, AdjustRequest, AssignRequest, WithdrawRequest
from tollbook.ledger.gate.stops import read_stop
from tollbook.ledger.gate.unbooked import FOLDER as UNBOOKED_FOLDER
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.policy import check_policy
from tollbook.ledger.server.refusals import reason_of
from tollbook.ledger.signature import Signature, content_digest
from tollbook.schemas.events import (
    CostAdjusted,
    CreditGranted,
    CreditRevoked,
    PlanAssigned,
    PlanCleared,
    payload_json,
)
from tollbook.schemas.identifiers import (
    budget_name,
    check_id,
    normalise_id,
    usage_call_id,
)
from tollbook.schemas.policy import Policy, check_plan


class CallNotFound(CallUnknown):
    """The ledger has no call and no recorded spend with this id, or its record has expired."""

    def __init__(self, call_id: str) -> None:
        super().__init__(call_id, 0)
        self.args = (f"there is no call {call_id} on the ledger, or it is too old to be corrected",)


class CallStillOpen(LedgerError):
    """The call still has a hold; it can be corrected once it is settled."""

    def __init__(self, call_id: str) -> None:
        super().__init__(f"call {call_id} is still running: correct it once it is settled")
        self.call_id = call_id


class NothingToCorrect(LedgerError):
    """The call was refused, or has no cost that could be corrected."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A call's cost before and after a correction: the sum over all its holds, in nano-dollars."""

    user_id: str
    before_nanousd: int
    after_nanousd: int


class Administration:
    """Changes by people.

    Errors of every method: ValueError for an invalid id; IdempotencyConflict; LedgerUnavailable; LedgerRefused.
    """

    def __init__(
        self, ledger: Ledger, policies: CurrentPolicy, user_ids: UserIds, *, now_ms: Callable[[], int] = clock_ms
    ) -> None:
        self.user_ids = user_ids
        self._ledger = ledger
        self._policies = policies
        self._now_ms = now_ms
        self.prepaid = Prepaid(ledger, policies, user_ids)
        self.keys = KeyChanges(ledger, policies, user_ids)

    @property
    def partitions(self) -> int:
        """The number of the ledger's partitions."""
        return len(self._ledger.gates)

    async def policy(self) -> PolicyInForce:
        """Return the newest policy of the ledger. Errors: PolicyUnreadable."""
        return policy_in_force(max(await read_stored(self._ledger.gates), key=lambda each: each.version))

    async def apply_policy(
        self,
        policy: Policy,
        signature: Signature,
        *,
        based_on: int,
        read_spent: ReadSpent | None = None,
        backfills: bool = False,
    ) -> Applied:
        """Replace version `based_on` of the policy; parameters and errors as for `policy_changes.apply_policy`."""
        applied = await apply_policy(
            self._ledger.gates, policy, signature, based_on=based_on, read_spent=read_spent, backfills=backfills
        )
        await self._policies.refresh()
        return applied

    @property
    def ledger_id(self) -> str:
        """The ledger's identity."""
        return self._ledger.gates[0].ledger_id

    def plan_cap_nanousd(self, plan: str) -> int:
        """Return the cap of a plan's billing period. Errors: InvalidTask for a plan that the policy does not have."""
        policy = self._policies.newest.policy
        return policy.plan_cap_nanousd(check_plan(plan, policy))

    @property
    def period(self) -> str:
        """The current billing period."""
        return self._policies.newest.budgets.calendar.month_at(self._now_ms()).name

    async def account(self, user_id: str, period: str | None = None) -> Account:
        """Return a user's assigned plan and cap, and the credit of a period (default: the current one)."""
        return await self._ledger.account(self.user_ids.on_ledger(check_id(user_id)), period or self.period)

    async def set_plan(self, user_id: str, plan: str, signature: Signature, *, cap_nanousd: int | None = None) -> bool:
        """Assign a plan to a user, with the plan's cap or another one; return False for a repeat.

        From then on the assigned plan is used, whatever plan a task names.
        """
        user_id = await self.user_ids.keep(user_id)  # G10
        plan_cap_nanousd = self.plan_cap_nanousd(plan)
        cap = plan_cap_nanousd if cap_nanousd is None else cap_nanousd
        payload = PlanAssigned(plan=plan, cap_nanousd=cap, author=signature.author, reason=signature.reason)
        return await self._assign("plan-assigned", user_id, plan, cap, payload_json(payload), signature, None)

    async def grant_credit(
        self, user_id: str, amount_nanousd: int, signature: Signature, *, period: str | None = None
    ) -> bool:
        """Give a user credit above the cap for one period (default: the current one); return False for a repeat."""
        user_id = await self.user_ids.keep(user_id)  # G10
        payload = payload_json(CreditGranted(author=signature.author, reason=signature.reason))
        return await self._assign("credit-granted", user_id, "", amount_nanousd, payload, signature, period)

    async def clear_plan(self, user_id: str, signature: Signature) -> bool:
        """Remove a user's assigned plan, so that the plans named by tasks are used; return False for a repeat.

        Errors: NoPlanAssigned.
        """
        plain_id = user_id
        user_id = self.user_ids.on_ledger(check_id(user_id))  # G10
        payload = payload_json(PlanCleared(author=signature.author, reason=signature.reason))
        period = self.period
        content = content_digest("plan-cleared", user_id, signature.author, signature.reason)
        request = WithdrawRequest(
            command_id=signature.command_id("plan-cleared"),
            user_id=user_id,
            period=period,
            content_hash=content,
            type="plan-cleared",
            amount_nanousd=0,
            payload=payload,
            budget=budget_name("user", user_id, period),
        )
        try:
            return await self._withdraw(request, signature)
        except NoPlanAssigned:
            raise NoPlanAssigned(plain_id) from None  # The message shows the id that the person gave.

    async def revoke_credit(
        self,
        user_id: str,
        amount_nanousd: int,
        signature: Signature,
        *,
        period: str | None = None,
        grant: str | None = None,
    ) -> bool:
        """Take back credit of a period (default: the current one); return False for a repeat.

        The cap may fall below what is spent: then calls are refused, and what was spent stays booked. `grant` is the id
        of the `credit-granted` event to take back; a grant is taken back only once, whoever does it.

        Errors: CreditTooLow if the period has less credit than that.
        """
        user_id = self.user_ids.on_ledger(check_id(user_id))  # G10
        period = period or self.period
        payload = CreditRevoked(grant=grant, author=signature.author, reason=signature.reason)
        # The revocation of a grant is the same command whatever its author and reason: a grant is revoked once.
        content = (grant,) if grant else (str(amount_nanousd), signature.author, signature.reason)
        request = WithdrawRequest(
            command_id=f"credit-revoked grant:{grant}" if grant else signature.command_id("credit-revoked"),
            user_id=user_id,
            period=period,
            content_hash=content_digest("credit-revoked", user_id, period, *content),
            type="credit-revoked",
            amount_nanousd=amount_nanousd,
            payload=payload_json(payload),
            budget=budget_name("user", user_id, period),
        )
        return await self._withdraw(request, signature)

    async def release(self, charges: Iterable[AssumedCharge], signature: Signature) -> Releases:
        """Give back assumed charges, each once. Errors: as `release_charges`."""
        return await release_charges(self._ledger, charges, author=signature.author, reason=signature.reason)

    async def find_cost(self, call_id: str) -> Correction:
        """Return a call's total cost as a correction that changes nothing. Errors: as `adjust_cost`."""
        _, record = await self._find_settled(call_id)
        cost = sum(hold.cost_nanousd for hold in record.settled.values())
        return Correction(record.user_id, cost, cost)

    async def adjust_cost(self, call_id: str, cost_nanousd: int, signature: Signature) -> Correction:
        """Correct a call's total cost to `cost_nanousd`; a repeat changes nothing.

        `call_id` may also be the key of spend that an application recorded; a task with that id takes precedence.

        Errors: CallNotFound (also after the idempotency period); CallStillOpen; NothingToCorrect; HoldChanged if
            somebody else has corrected the call meanwhile.
        """
        call_id, record = await self._find_settled(normalise_id(call_id))
        before = sum(hold.cost_nanousd for hold in record.settled.values())
        # The new cost fills the holds in order, each up to its old cost; the latest hold takes the rest.
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
        period = period or self.period
        request = AssignRequest(
            command_id=signature.command_id(kind),
            user_id=user_id,
            period=period,
            content_hash=content_digest(kind, user_id, plan, str(amount), period, signature.author, signature.reason),
            type="plan-assigned" if kind == "plan-assigned" else "credit-granted",
            plan=plan,
            amount_nanousd=amount,
            payload=payload,
            budget=budget_name("user", user_id, period),
        )
        try:
            return await self._ledger.assign(request)
        except IdempotencyConflict as exc:
            raise IdempotencyConflict(signature.key or request.command_id, kind="key") from exc

    async def _withdraw(self, request: WithdrawRequest, signature: Signature) -> bool:
        try:
            return await self._ledger.withdraw(request)
        except IdempotencyConflict as exc:
            raise IdempotencyConflict(signature.key or request.command_id, kind="key") from exc

    async def _find_settled(self, call_id: str) -> tuple[str, CallRecord]:
        call_id, record = await self._find(call_id)
        if record.state == "open":
            raise CallStillOpen(call_id)
        if not record.settled:
            raise NothingToCorrect(f"call {call_id} was {record.state} and cost nothing")
        return call_id, record

    async def _find(self, call_id: str) -> tuple[str, CallRecord]:
        for name in (call_id, usage_call_id(call_id)):
            for gate in self._ledger.gates:
                record = await gate.call_record(name)
                if record is not None:
                    return name, record
        raise CallNotFound(call_id)

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
            seen=(record.settled[number].cost_nanousd, record.settled[number].assumed_nanousd),
        )
        await self._ledger.adjust(request)


@asynccontextmanager
async def connect_administration(
    settings: Settings | None = None, *, warns: bool = True
) -> AsyncGenerator[Administration]:
    """Connect to a system's ledger. No provider is needed, and the projector only if the gate asks for a baseline.

    With `warns`, log a warning if the settings or the policy file here differ from the ledger's policy.

    Errors: SettingsError; LedgerUnavailable, also if there is no ledger yet; CallsStopped; ServerUnsafe; UserKeyLost.
    """
    settings = given_or_loaded(settings)
    async with AsyncExitStack() as stack:
        redis_url = find_redis_url(settings)
        redis = connect(redis_url)
        stack.push_async_callback(redis.aclose)
        pipeline = CommandPipeline(redis, replication=settings.replication)
        stack.push_async_callback(pipeline.aclose)
        try:
            found: list[bytes | None] = await pipeline.execute(
                "HMGET", Keys(settings.namespace).meta, "ledger_id", "partitions"
            )
        except (RedisError, LedgerUnavailable) as exc:
            raise LedgerUnavailable(f"Redis at {hide_password(redis_url)}: {reason_of(exc)}") from None
        ledger_id, partitions = found
        if ledger_id is None or partitions is None:
            raise LedgerUnavailable(
                f"there is no ledger {settings.namespace!r} in this Redis yet: `tollbook up` or `tollbook projector` "
                "makes it"
            )
        await check_policy(redis, allow_unsynced=settings.allow_unsynced)
        # A worker would retry for a while; a person gets the error at once if the server takes no writes. The command
        # itself loads missing functions, and its error names a missing permission.
        with suppress(FunctionsMissing, PermissionsMissing):
            await check_takes_writes(pipeline, Keys(settings.namespace))
        seen = await asyncio.to_thread(heads_on_disk, settings, ledger_id.decode(), int(partitions))
        gates = [
            Gate(
                pipeline,
                Keys(settings.namespace, number),
                ledger_id.decode(),
                idempotency_ttl_s=settings.idempotency_ttl_s,
                result_ttl_s=settings.result_ttl_s,
                seen=seen[number],
                unbooked_folder=settings.data_dir / UNBOOKED_FOLDER,
            )
            for number in range(int(partitions))
        ]
        reason = await read_stop(pipeline, [gate.keys for gate in gates])
        if reason is not None:
            raise CallsStopped(reason)  # Nothing may be appended to a ledger that went back in time.

        # The projector is asked only if the gate's tail does not reach back far enough.
        asked = AskedBaselines(
            redis, pipeline, [gate.keys for gate in gates], ledger_id=gates[0].ledger_id, process=process_name()
        )
        stack.push_async_callback(asked.aclose)
        baselines = [
            Baselines(asked.reader(number), number, monotonic=time.monotonic, max_age_s=0.0)
            for number in range(len(gates))
        ]
        policies = await CurrentPolicy.of_ledger(pipeline, [gate.keys for gate in gates])
        key = await open_user_key(
            pipeline, gates[0].keys, policies, data_dir=settings.data_dir, ledger_id=gates[0].ledger_id
        )
        if warns:
            warn_of_difference(settings, await gates[0].policy())
        yield Administration(Ledger(redis, gates, baselines), policies, UserIds(policies, pipeline, gates[0].keys, key))
