"""Changes by people: plans, credits, corrections, releases and keys, each an event with author and reason.

Every command is idempotent by its key (a correction by the cost that it states), bounded as
all amounts are, in force in the gate from the step that appends it, and visible in statements.
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
from tollbook.inference.settings import Settings, load_settings
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
    """No call and no recorded spend of this name is on the ledger, or its record has expired."""

    def __init__(self, call_id: str) -> None:
        super().__init__(call_id, 0)
        self.args = (f"there is no call {call_id} on the ledger, or it is too old to be corrected",)


class CallStillOpen(LedgerError):
    """The call still holds money; it can be corrected when it is settled."""

    def __init__(self, call_id: str) -> None:
        super().__init__(f"call {call_id} still runs: correct it when it is settled")
        self.call_id = call_id


class NothingToCorrect(LedgerError):
    """The call was refused or never cost anything that could be corrected this way."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A call's cost before and after, in nano-dollars, over all its holds."""

    user_id: str
    before_nanousd: int
    after_nanousd: int


class Administration:
    """Changes by people.

    Errors of every method: ValueError for an id that none can have; IdempotencyConflict; LedgerUnavailable;
        LedgerRefused.
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
        """Put a policy in force in place of version `based_on`; the rest is as for `policy_changes.apply_policy`."""
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
        """The present billing period."""
        return self._policies.newest.budgets.calendar.month_at(self._now_ms()).name

    async def account(self, user_id: str, period: str | None = None) -> Account:
        """Return what the ledger has assigned to a user, with the credit of a period, the present one by default."""
        return await self._ledger.account(self.user_ids.on_ledger(check_id(user_id)), period or self.period)

    async def set_plan(self, user_id: str, plan: str, signature: Signature, *, cap_nanousd: int | None = None) -> bool:
        """Put a user on a plan, with the plan's cap or another; return whether that is new.

        From then on it counts, whatever plan a task names.
        """
        user_id = await self.user_ids.keep(user_id)  # G10
        plan_cap_nanousd = self.plan_cap_nanousd(plan)
        cap = plan_cap_nanousd if cap_nanousd is None else cap_nanousd
        payload = PlanAssigned(plan=plan, cap_nanousd=cap, author=signature.author, reason=signature.reason)
        return await self._assign("plan-assigned", user_id, plan, cap, payload_json(payload), signature, None)

    async def grant_credit(
        self, user_id: str, amount_nanousd: int, signature: Signature, *, period: str | None = None
    ) -> bool:
        """Give a user credit above the cap for one period, the present one by default; return whether that is new."""
        user_id = await self.user_ids.keep(user_id)  # G10
        payload = payload_json(CreditGranted(author=signature.author, reason=signature.reason))
        return await self._assign("credit-granted", user_id, "", amount_nanousd, payload, signature, period)

    async def clear_plan(self, user_id: str, signature: Signature) -> bool:
        """Let the plans that tasks name count again; return whether that is new. Errors: NoPlanAssigned."""
        given = user_id
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
            raise NoPlanAssigned(given) from None  # As the person named the user.

    async def revoke_credit(
        self,
        user_id: str,
        amount_nanousd: int,
        signature: Signature,
        *,
        period: str | None = None,
        grant: str | None = None,
    ) -> bool:
        """Take back credit of a period, the present one by default; return whether that is new.

        It may leave the cap below what is spent: then calls are refused, and what was spent stays as it is. `grant` is
        the id of the `credit-granted` event that is taken back; that is done once, whoever does it.

        Errors: CreditTooLow where the period has less credit than that.
        """
        user_id = self.user_ids.on_ledger(check_id(user_id))  # G10
        period = period or self.period
        payload = CreditRevoked(grant=grant, author=signature.author, reason=signature.reason)
        # A command of its own has the key or is new; that of a grant is the grant's, whatever its author and reason.
        words = (grant,) if grant else (str(amount_nanousd), signature.author, signature.reason)
        request = WithdrawRequest(
            command_id=f"credit-revoked grant:{grant}" if grant else signature.command_id("credit-revoked"),
            user_id=user_id,
            period=period,
            content_hash=content_digest("credit-revoked", user_id, period, *words),
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
        """Return what a call cost in all, before and after nothing is done. Errors: as `adjust_cost`."""
        _, record = await self._find_settled(call_id)
        cost = sum(hold.cost_nanousd for hold in record.settled.values())
        return Correction(record.user_id, cost, cost)

    async def adjust_cost(self, call_id: str, cost_nanousd: int, signature: Signature) -> Correction:
        """Correct what a call cost in all to `cost_nanousd`; repeated, it changes nothing.

        `call_id` may also be the key of spend that an application recorded; a task of that name goes first.

        Errors: CallNotFound (also once the idempotency period is over); CallStillOpen; NothingToCorrect; HoldChanged
            where somebody else has corrected it meanwhile.
        """
        call_id, record = await self._find_settled(normalise_id(call_id))
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
    """Connect to a system's ledger; it needs no provider, and the projector only where the gate asks for a baseline.

    `warns` of another policy here than the ledger's, which counts.

    Errors: SettingsError; LedgerUnavailable, also where there is no ledger yet; CallsStopped; ServerUnsafe;
        UserKeyLost.
    """
    settings = settings or load_settings()
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
        # A person is told at once that the server takes no write, where a worker would try again for a while. Functions
        # that are missing are loaded by the command, and a permission that it lacks is named by it.
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

        # The projector is asked only where the gate's tail does not reach back.
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
