"""The ledger as callers use it: reserve, record, settle, adjust, charge, assign.

Joins a user's partition, its baselines and its gate, so that stale baselines, lost
connections and the change of the billing period are handled in one place. Repeats are
safe because every function of the gate is idempotent on the call id.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.ledger.errors import (
    BaselineUnavailable,
    CallsStopped,
    LedgerReplaced,
    LedgerUnavailable,
    LedgerWentBack,
)
from tollbook.ledger.gate.baselines import Baselines
from tollbook.ledger.gate.call_record import SettledHold
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.policies import PolicyRequest
from tollbook.ledger.gate.replies import BudgetsMismatch, FunctionsMissing, Stale, WindowClosed
from tollbook.ledger.gate.requests import (
    EMPTY_BASELINE,
    Account,
    Adjusted,
    AdjustRequest,
    AlreadySettled,
    AssignRequest,
    Balance,
    Baseline,
    BudgetCap,
    ChargeRequest,
    CreateKeyRequest,
    CreditChange,
    CreditRequest,
    Denied,
    KeyCreation,
    KeyRevocation,
    NoteRequest,
    RecordRequest,
    Released,
    ReleaseRequest,
    ReserveReply,
    ReserveRequest,
    RevokeKeyRequest,
    Settled,
    SettleRequest,
    Waiting,
    WithdrawRequest,
)
from tollbook.ledger.logs import LazyLogger
from tollbook.schemas.identifiers import partition_of

T = TypeVar("T")
HoldChange = TypeVar("HoldChange", SettleRequest, AdjustRequest, ReleaseRequest)
_log = LazyLogger(__name__)
_STALE_TRIES = 3


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a step is repeated while Redis does not answer, and the pauses in between."""

    reserve_s: float = 5.0
    settle_s: float = 300.0
    first_pause_s: float = 0.05
    max_pause_s: float = 2.0


class Ledger:
    """All partitions of one ledger.

    Errors of every method: LedgerUnavailable once the time of `Patience` is over; BaselineUnavailable; LedgerRefused.
    """

    def __init__(
        self,
        redis: Redis,
        gates: Sequence[Gate],
        baselines: Sequence[Baselines],
        *,
        patience: Patience | None = None,
        check_server: Callable[[], None] = lambda: None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._redis = redis
        self._gates = tuple(gates)
        self._baselines = tuple(baselines)
        self._patience = patience or Patience()
        self._check_server = check_server
        self._sleep = sleep
        self._jitter = jitter

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates, one per partition."""
        return self._gates

    @property
    def baselines(self) -> tuple[Baselines, ...]:
        """The kept baselines, by partition."""
        return self._baselines

    def gate_of(self, user_id: str) -> Gate:
        """Return the gate of a user's partition."""
        return self._gates[partition_of(user_id, len(self._gates))]

    async def reserve(self, make_request: Callable[[int], ReserveRequest], now_ms: int) -> ReserveReply:
        """Hold money for a call; `make_request` is called again if the Redis clock is in another period.

        Errors: IdempotencyConflict; CallsStopped; PolicyChanged; TooFewReplicas; ServerUnsafe, and what else
            `check_server` refuses calls for.
        """
        self._check_server()  # G8
        request = make_request(now_ms)
        self.gate_of(request.user_id).check_confirmed()  # G8

        async def attempt(gate: Gate, baselines: Sequence[Baseline]) -> ReserveReply:
            nonlocal request
            try:
                return await gate.reserve(request, baselines)
            except WindowClosed as exc:
                request = make_request(exc.now_ms)
                raise Stale(request.budgets[0].name) from exc

        return await self._with_baselines(
            request.user_id, lambda: [budget.name for budget in request.budgets], attempt, self._patience.reserve_s
        )

    async def record(self, request: RecordRequest) -> int | Denied | Waiting:
        """Record attempts and extend the hold; return the whole hold in nano-dollars, or why it was not extended.

        Errors: CallUnknown if the hold is no longer open; PolicyChanged where it would be extended; BudgetsMismatch
        where it would be, and stands against other budgets: a policy opened one meanwhile.
        """
        if not request.extension_nanousd:
            # No cap is checked, so the projection need not answer.
            gate = self.gate_of(request.user_id)

            async def record(recorded: RecordRequest) -> int | Denied | Waiting:
                unread = (EMPTY_BASELINE,) * len(recorded.budgets)
                return await self._repeat(lambda: gate.record(recorded, unread), self._patience.settle_s)

            try:
                return await record(request)
            except BudgetsMismatch as exc:
                return await record(replace(request, budgets=tuple(BudgetCap(name, 0) for name in exc.budgets)))
        return await self._with_baselines(
            request.user_id,
            lambda: [budget.name for budget in request.budgets],
            lambda gate, baselines: gate.record(request, baselines),
            self._patience.settle_s,
        )

    async def note(self, request: NoteRequest) -> None:
        """Keep the provider's id of a request with its open hold. Nothing is repeated. Errors: CallUnknown."""
        await self.gate_of(request.user_id).note(request)

    async def settle(self, request: SettleRequest) -> Settled | AlreadySettled:
        """Replace a hold by its cost and store the result. Errors: CallUnknown.

        While the ledger lacks an event that this process was told of, the hold may be missing although the money is
        spent: the cost is noted beside the ledger and settled once the newer data is back (G3).
        """
        gate, patience = self.gate_of(request.user_id), self._patience
        pause_s, waited_s, is_noted = patience.first_pause_s, 0.0, False
        while True:
            try:
                reply = await self.settle_now(request)
            except LedgerWentBack as exc:
                if not is_noted:
                    _log.error("settlement.kept", call_id=request.call_id, problem=str(exc))
                    await self._repeat(lambda: gate.note_unbooked(request), patience.settle_s)  # G3
                    is_noted = True
                if waited_s >= patience.settle_s:
                    raise
                await self._sleep(pause_s)
                waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, patience.max_pause_s)
            else:
                if is_noted:
                    await self._repeat(lambda: gate.forget_unbooked(request), patience.settle_s)
                return reply

    async def settle_now(self, request: SettleRequest) -> Settled | AlreadySettled:
        """Settle where nothing is lost if it fails, as the hold of a dead run. Errors: CallUnknown; LedgerWentBack."""
        return await self._where_it_stood(request, lambda gate, settled, baselines: gate.settle(settled, baselines))

    async def adjust(self, request: AdjustRequest) -> Adjusted:
        """Correct a settled hold to its true cost, in the budgets it stood against.

        Errors: CallUnknown; HoldChanged where it is not as `request.seen` says, and not corrected to this already.
        """
        return await self._where_it_stood(request, lambda gate, corrected, baselines: gate.adjust(corrected, baselines))

    async def settled_hold(self, user_id: str, call_id: str, hold: int) -> SettledHold | None:
        """Return what a settled hold stands at; None where the gate does not have it, or has it open."""
        gate = self.gate_of(user_id)
        record = await self._repeat(lambda: gate.call_record(call_id), self._patience.settle_s)
        return record.settled.get(hold) if record else None

    async def settled_cost(self, user_id: str, call_id: str) -> int:
        """Return what the settled holds of a call stand at together, nano-dollars."""
        gate = self.gate_of(user_id)
        record = await self._repeat(lambda: gate.call_record(call_id), self._patience.settle_s)
        return sum(hold.cost_nanousd for hold in record.settled.values()) if record else 0

    async def release(self, request: ReleaseRequest) -> Released:
        """Give back what an attempt was assumed to cost, in the budgets that its hold stood against, once.

        Errors: CallUnknown.
        """
        return await self._where_it_stood(
            request, lambda gate, given_back, baselines: gate.release(given_back, baselines)
        )

    async def charge(self, request: ChargeRequest) -> bool:
        """Book spend that happened without a hold; return whether it is new.

        Errors: IdempotencyConflict; PolicyChanged; LedgerWentBack, and then the charge is noted beside the ledger (G3):
        it is booked once the ledger has its newer data again, and a repeat under the same id does not book it twice.
        """
        try:
            return await self.charge_now(request)
        except LedgerWentBack as exc:
            _log.error("charge.kept", call_id=request.call_id, problem=str(exc))
            gate = self.gate_of(request.user_id)
            await self._repeat(lambda: gate.note_unbooked(request), self._patience.settle_s)  # G3
            raise

    async def charge_now(self, request: ChargeRequest) -> bool:
        """Book spend without a hold, and note nothing. Errors: IdempotencyConflict; LedgerWentBack."""
        return await self._with_baselines(
            request.user_id,
            lambda: request.budgets,
            lambda gate, baselines: gate.charge(request, baselines),
            self._patience.settle_s,
        )

    async def assign(self, request: AssignRequest) -> bool:
        """Change a plan, cap or credit at once; return whether it is new. Errors: IdempotencyConflict."""
        gate = self.gate_of(request.user_id)
        return await self._repeat(lambda: gate.assign(request), self._patience.reserve_s)

    async def withdraw(self, request: WithdrawRequest) -> bool:
        """Take back credit or an assigned plan at once; return whether it is new.

        Errors: IdempotencyConflict; CreditTooLow; NoPlanAssigned.
        """
        gate = self.gate_of(request.user_id)
        return await self._repeat(lambda: gate.withdraw(request), self._patience.reserve_s)

    async def apply_policy(self, partition: int, request: PolicyRequest) -> bool:
        """Put a policy in force in one partition; return whether that is new. Errors: PolicyChanged; CallsStopped."""
        gate = self._gates[partition]
        return await self._repeat(lambda: gate.apply_policy(request), self._patience.reserve_s)

    async def change_credit(self, request: CreditRequest) -> CreditChange:
        """Grant, take back or expire a budget's credit.

        Errors: IdempotencyConflict; BudgetCreditTooLow; CreditNotDue; PolicyChanged.
        """
        return await self._with_baselines(
            request.user_id,
            lambda: [request.budget.name],
            lambda gate, baselines: gate.change_credit(request, baselines),
            self._patience.reserve_s,
        )

    async def create_key(self, request: CreateKeyRequest) -> KeyCreation:
        """Make a key of the gateway known. Errors: IdempotencyConflict; KeyTaken."""
        return await self._repeat(lambda: self._gates[0].create_key(request), self._patience.reserve_s)

    async def revoke_key(self, request: RevokeKeyRequest) -> KeyRevocation:
        """Let a key of the gateway end. Errors: IdempotencyConflict; KeyUnknown; KeyAlreadyRevoked."""
        return await self._repeat(lambda: self._gates[0].revoke_key(request), self._patience.reserve_s)

    async def api_keys(self) -> dict[str, str]:
        """Return what Redis has of the gateway's keys, by the fields of their hash."""
        return await self._repeat(self._gates[0].api_keys, self._patience.reserve_s)

    async def account(self, user_id: str, period: str) -> Account:
        """Return what the ledger has assigned to a user."""
        gate = self.gate_of(user_id)
        return await self._repeat(lambda: gate.account(user_id, period), self._patience.reserve_s)

    async def balance(
        self, *, user_id: str, period: str, budgets: Sequence[BudgetCap], policy_version: int = 0
    ) -> tuple[Balance, ...]:
        """Return the balances and caps that a call of this user would be compared with now. Errors: PolicyChanged."""
        return await self._with_baselines(
            user_id,
            lambda: [budget.name for budget in budgets],
            lambda gate, baselines: gate.balance(
                user_id=user_id, period=period, budgets=budgets, baselines=baselines, policy_version=policy_version
            ),
            self._patience.reserve_s,
        )

    async def probe(self, partition: int) -> None:
        """Show that a hold could be written and announced now; nothing is waited for. Errors: RedisCannotServe."""
        await self._repeat(self._gates[partition].probe, patience_s=0)

    async def _with_baselines(
        self,
        user_id: str,
        names: Callable[[], Sequence[str]],
        step: Callable[[Gate, Sequence[Baseline]], Awaitable[T]],
        patience_s: float,
    ) -> T:
        """Take a step with the baselines of DuckDB. Errors: CallsStopped where that is why there are none."""
        try:
            return await self._with_read_baselines(user_id, names, step, patience_s)
        except BaselineUnavailable as exc:
            gate = self.gate_of(user_id)
            reason = await _stop_of(gate)
            if reason is None:
                raise
            # What needs no baseline is answered all the same, such as a call that is finished.
            unread = (EMPTY_BASELINE,) * len(names())
            try:
                return await self._repeat(lambda: step(gate, unread), patience_s)
            except Stale:
                raise CallsStopped(reason) from exc  # G8

    async def _with_read_baselines(
        self,
        user_id: str,
        names: Callable[[], Sequence[str]],
        step: Callable[[Gate, Sequence[Baseline]], Awaitable[T]],
        patience_s: float,
    ) -> T:
        partition = partition_of(user_id, len(self._gates))
        gate, kept = self._gates[partition], self._baselines[partition]
        for tries in range(_STALE_TRIES):
            baselines = await kept.get(names(), is_fresh=tries > 0)
            try:
                return await self._repeat(lambda given=baselines: step(gate, given), patience_s)
            except Stale:  # G6
                continue
        raise BaselineUnavailable("DuckDB is behind the ledger's watermark, since it is being rebuilt: try again later")

    async def _where_it_stood(
        self, request: HoldChange, step: Callable[[Gate, HoldChange, Sequence[Baseline]], Awaitable[T]]
    ) -> T:
        """Settle a hold, or change a settled one.

        The caller may know the budgets of the call's latest hold, of another period, or only those that the hold stood
        against before a policy opened another one.
        """

        async def change(changed: HoldChange) -> T:
            return await self._without_baselines(
                changed.user_id, changed.budgets, lambda gate, baselines: step(gate, changed, baselines)
            )

        try:
            return await change(request)
        except BudgetsMismatch as exc:
            return await change(replace(request, budgets=exc.budgets))

    async def _without_baselines(
        self, user_id: str, names: Sequence[str], step: Callable[[Gate, Sequence[Baseline]], Awaitable[T]]
    ) -> T:
        gate, patience_s = self.gate_of(user_id), self._patience.settle_s
        try:
            return await self._repeat(lambda: step(gate, ()), patience_s)
        except Stale:
            return await self._with_baselines(user_id, lambda: names, step, patience_s)

    async def _repeat(self, step: Callable[[], Awaitable[T]], patience_s: float) -> T:
        pause_s, waited_s, has_loaded = self._patience.first_pause_s, 0.0, False
        while True:
            try:
                return await step()
            except FunctionsMissing as exc:
                if has_loaded:
                    raise LedgerReplaced(expected="a ledger with its functions", found="") from exc
                await load_library(self._redis)
                has_loaded = True
            except BaselineUnavailable:
                raise
            except LedgerUnavailable as exc:
                if waited_s >= patience_s:
                    raise
                _log.warning("redis.answer_missed", problem=str(exc), waited_s=round(waited_s, 2))
                pause = pause_s * (0.5 + self._jitter())
                await self._sleep(pause)
                waited_s, pause_s = waited_s + pause, min(2 * pause_s, self._patience.max_pause_s)


async def _stop_of(gate: Gate) -> str | None:
    """Return why calls are stopped in a partition; None where they are not, or Redis does not say."""
    try:
        return await gate.stop_reason()
    except (LedgerUnavailable, ResponseError):
        return None
