"""Typed calls of the gate's functions, for one partition.

Packs arguments; replies.py reads the answers, and ledger.py repeats what can be repeated. Every
function is idempotent on the call id, so a repeat after LedgerUnavailable is safe.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from redis.exceptions import ResponseError

from tollbook.ledger.errors import (
    BudgetCreditTooLow,
    CreditNotDue,
    CreditTooLow,
    HoldChanged,
    KeyAlreadyRevoked,
    KeyTaken,
    KeyUnknown,
    LedgerReplaced,
    NoPlanAssigned,
    PolicyChanged,
)
from tollbook.ledger.gate.call_record import CallRecord, parse_call_record
from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.policies import EventsNotCounted, Opened, PolicyRequest, StoredPolicy, read_policies
from tollbook.ledger.gate.probe import check_writable
from tollbook.ledger.gate.replies import FunctionsMissing, denied, refusal, reserve_reply, waiting
from tollbook.ledger.gate.requests import (
    Account,
    Adjusted,
    AdjustRequest,
    AlreadySettled,
    AssignRequest,
    AttemptEvent,
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
    Position,
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
from tollbook.ledger.gate.stops import read_stop
from tollbook.ledger.gate.unbooked import (
    UnbookedCharge,
    forget_unbooked,
    note_unbooked,
    read_unbooked,
    unbooked_charge,
)
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import as_map, time_ms
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

# The server-side names, made once: every step of every call needs one.
_FUNCTIONS: Final = {
    name: function(name)
    for name in (
        "reserve",
        "record",
        "note",
        "settle",
        "adjust",
        "release",
        "charge",
        "assign",
        "withdraw",
        "balance",
        "trim",
        "forget_alerts",
        "apply_policy",
        "change_credit",
        "create_key",
        "revoke_key",
    )
}
# After OK, they answer the id of the event that they appended, or nothing if there was none to append.
_APPENDING_FUNCTIONS: Final = frozenset(
    {
        "reserve",
        "record",
        "settle",
        "adjust",
        "release",
        "charge",
        "assign",
        "withdraw",
        "apply_policy",
        "change_credit",
        "create_key",
        "revoke_key",
    }
)


# A payment may be reported again long after; its credit must not be granted twice.
_CREDIT_TTL_S: Final = 400 * 86_400


@dataclass(frozen=True, slots=True)
class LedgerState:
    """The identity and progress of a partition's ledger."""

    ledger_id: str
    partitions: int
    head: Position
    trimmed_to: EntryId


class Gate:
    """The gate of one partition.

    Errors of every method: LedgerUnavailable, LedgerReplaced, LedgerWentBack, LedgerAhead, LedgerDiverged, Stale,
        FunctionsMissing.
    """

    def __init__(
        self,
        pipeline: CommandPipeline,
        keys: Keys,
        ledger_id: str,
        *,
        idempotency_ttl_s: int,
        result_ttl_s: int,
        seen: EntryId = ZERO_ENTRY,
        process: str = "",
        unbooked_folder: Path | None = None,
    ) -> None:
        """`seen` is the newest event that this process knows to be on the ledger; the gate keeps it up to date.

        `process` and `unbooked_folder` are for charges that the ledger cannot take: see `unbooked.py`.
        """
        self.keys = keys
        self.ledger_id = ledger_id
        self.seen = seen
        self._identity = f"{ledger_id} {seen}"
        self._pipeline = pipeline
        self._idempotency_ttl_s = idempotency_ttl_s
        self._result_ttl_s = result_ttl_s
        self._process = process
        self._unbooked_folder = unbooked_folder

    async def reserve(self, request: ReserveRequest, baselines: Sequence[Baseline]) -> ReserveReply:
        """Hold money for a call, or say why not.

        Errors: IdempotencyConflict; WindowClosed; CallsStopped; PolicyChanged.
        """
        keys = self.keys
        reply = await self._call(
            "reserve",
            (
                keys.meta,
                keys.ledger,
                keys.holds,
                keys.waiters,
                keys.account(request.user_id),
                keys.call(request.call_id),
                keys.result(request.call_id),
                *(keys.tail(budget.name) for budget in request.budgets),
            ),
            (
                request.call_id,
                # One argument, since redis-py takes half a microsecond to pack each.
                f"{request.user_id} {request.window.name} {request.content_hash} {request.worker} "
                f"{request.amount_nanousd} {request.lease_ms} {request.window.start_ms} {request.window.end_ms} "
                f"{2 if request.is_trial else int(request.is_final)} {self._idempotency_ttl_s}",
                request.payload,
                *_pack(request.budgets, baselines),
            ),
            policy_version=request.policy_version,
        )
        return reserve_reply(request, reply)

    async def record(self, request: RecordRequest, baselines: Sequence[Baseline]) -> int | Denied | Waiting:
        """Record attempts and extend the hold; return the whole hold in nano-dollars, or why it was not extended.

        Errors: CallUnknown if the hold is no longer open; CallsStopped and PolicyChanged where it would be
            extended.
        """
        keys = self.keys
        reply = await self._call(
            "record",
            (
                keys.meta,
                keys.ledger,
                keys.account(request.user_id),
                keys.call(request.call_id),
                *(keys.tail(budget.name) for budget in request.budgets),
            ),
            (
                request.call_id,
                request.hold,
                request.attempts_begun,
                request.spent_nanousd,
                request.assumed_nanousd,
                request.extension_nanousd,
                len(request.events),
                *_flatten(request.events),
                request.extension_payload,
                *_pack(request.budgets, baselines),
            ),
            policy_version=request.policy_version,
        )
        match reply[0]:
            case b"OK":
                return int(reply[2])
            case b"DENIED":
                return denied(reply[1:], request.extension_nanousd, "cap")
            case b"WAIT":
                return waiting(reply)
            case _:
                raise refusal(reply, request.call_id, request.hold)

    async def note(self, request: NoteRequest) -> None:
        """Keep the provider's id of the request in flight with the open hold. Errors: CallUnknown."""
        reply = await self._call(
            "note",
            (self.keys.meta, self.keys.ledger, self.keys.call(request.call_id)),
            (request.hold, request.attempt, request.provider, request.generation_id),
        )
        if reply[0] != b"OK":
            raise refusal(reply, request.call_id, request.hold)

    async def settle(self, request: SettleRequest, baselines: Sequence[Baseline] = ()) -> Settled | AlreadySettled:
        """Replace a hold by its cost and store the result.

        Errors: CallUnknown; BudgetsMismatch; Stale (repeat with baselines).
        """
        keys = self.keys
        reply = await self._call(
            "settle",
            (
                keys.meta,
                keys.ledger,
                keys.holds,
                keys.waiters,
                keys.call(request.call_id),
                keys.result(request.call_id),
                *(keys.tail(name) for name in request.budgets),
            ),
            (
                request.call_id,
                f"{request.hold} {request.cost_nanousd} {request.assumed_nanousd} {request.attempt} "
                f"{int(request.is_final)} {self._result_ttl_s} {self._idempotency_ttl_s} {len(request.events)}",
                request.result,
                request.payload,
                *_flatten(request.events),
                *_pack_names(request.budgets, baselines),
            ),
        )
        match reply[0]:
            case b"OK":
                return Settled(reply[1].decode(), int(reply[2]))
            case b"SETTLED":
                cost, assumed = (int(number) for number in reply[1].split())
                if (cost, assumed) == (request.cost_nanousd, request.assumed_nanousd):
                    return Settled("", None)
                return AlreadySettled(cost, assumed)
            case _:
                raise refusal(reply, request.call_id, request.hold)

    async def adjust(self, request: AdjustRequest, baselines: Sequence[Baseline] = ()) -> Adjusted:
        """Correct a settled hold to its true cost.

        Errors: CallUnknown; HoldChanged; BudgetsMismatch; Stale (repeat with baselines).
        """
        keys = self.keys
        reply = await self._call(
            "adjust",
            (
                keys.meta,
                keys.ledger,
                keys.waiters,
                keys.call(request.call_id),
                keys.result(request.call_id),
                *(keys.tail(name) for name in request.budgets),
            ),
            (
                request.call_id,
                request.hold,
                request.cost_nanousd,
                request.assumed_nanousd,
                request.attempt,
                request.result,
                self._result_ttl_s,
                request.payload,
                len(request.events),
                self._idempotency_ttl_s,
                " ".join(str(int(value)) for value in (request.ends_call, *(request.seen or ()))),
                *_flatten(request.events),
                *_pack_names(request.budgets, baselines),
            ),
        )
        if reply[0] == b"CHANGED":
            raise HoldChanged(request.call_id)
        if reply[0] != b"OK":
            raise refusal(reply, request.call_id, request.hold)
        return Adjusted(int(reply[2]), is_call_over=reply[3] == b"settled")

    async def release(self, request: ReleaseRequest, baselines: Sequence[Baseline] = ()) -> Released:
        """Give back what an attempt was assumed to cost, once, if its hold stands as it was read.

        Errors: CallUnknown; BudgetsMismatch; Stale (repeat with baselines).
        """
        keys = self.keys
        reply = await self._call(
            "release",
            (
                keys.meta,
                keys.ledger,
                keys.waiters,
                keys.call(request.call_id),
                *(keys.tail(name) for name in request.budgets),
            ),
            (
                request.call_id,
                request.hold,
                f"{request.hold_cost_nanousd} {request.hold_assumed_nanousd}",
                request.attempt,
                request.amount_nanousd,
                self._idempotency_ttl_s,
                request.payload,
                *_pack_names(request.budgets, baselines),
            ),
        )
        match reply[0]:
            case b"OK":
                return "released"
            case b"EXISTS":
                return "before"
            case b"CHANGED":
                return "changed"
            case _:
                raise refusal(reply, request.call_id, request.hold)

    async def charge(self, request: ChargeRequest, baselines: Sequence[Baseline]) -> bool:
        """Book spend without a hold; return whether it is new. Errors: IdempotencyConflict; PolicyChanged."""
        keys = self.keys
        reply = await self._call(
            "charge",
            (
                keys.meta,
                keys.ledger,
                keys.call(request.call_id),
                keys.account(request.user_id),
                *(keys.tail(name) for name in request.budgets),
            ),
            (
                request.call_id,
                request.user_id,
                request.period,
                request.content_hash,
                request.cost_nanousd,
                request.assumed_nanousd,
                self._idempotency_ttl_s,
                request.payload,
                *_pack(
                    [
                        BudgetCap(name, 0 if number else request.cap_nanousd)
                        for number, name in enumerate(request.budgets)
                    ],
                    baselines,
                ),
            ),
            policy_version=request.policy_version,
        )
        if reply[0] in (b"OK", b"EXISTS"):
            return reply[0] == b"OK"
        raise refusal(reply, request.call_id, 0)

    async def raised_alerts(self) -> list[str]:
        """Return which alerts are known to be raised, each as budget and fraction. Errors: LedgerUnavailable."""
        found: list[bytes] | dict[bytes, bytes] = await self._pipeline.execute("HGETALL", self.keys.alerts)
        return [field.decode() for field in (found if isinstance(found, dict) else found[0::2])]

    async def forget_alerts(self, fields: Sequence[str]) -> int:
        """Forget alerts that were raised, in windows that are over; return how many."""
        keys = self.keys
        reply = await self._call("forget_alerts", (keys.meta, keys.ledger, keys.alerts), fields)
        if reply[0] == b"OK":
            return int(reply[1])
        raise refusal(reply, "", 0)

    async def apply_policy(self, request: PolicyRequest) -> bool:
        """Put a policy in force in this partition; return whether that is new.

        Errors: PolicyChanged where another one is in force than the request says; EventsNotCounted; CallsStopped.
        """
        opened = request.opened or Opened()
        reply = await self._call(
            "apply_policy",
            (self.keys.meta, self.keys.ledger, *(self.keys.tail(each.budget) for each in opened.openings)),
            (
                request.in_force,
                request.version,
                request.digest,
                request.payload,
                opened.counted,
                *(f"{each.spent_nanousd} {each.cap_nanousd} {each.budget}" for each in opened.openings),
            ),
        )
        match reply[0]:
            case b"OK" | b"EXISTS":
                return reply[0] == b"OK"
            case b"MOVED":
                raise PolicyChanged(int(reply[1]))
            case b"BEHIND":
                raise EventsNotCounted(int(reply[1]))
            case _:
                raise refusal(reply, "", 0)

    async def policy(self) -> StoredPolicy:
        """Return this partition's policy as it stands there. Errors: LedgerUnavailable."""
        (stored,) = await read_policies(self._pipeline, (self.keys,))
        return stored

    async def has_events(self) -> bool:
        """Whether anything was ever appended to this partition."""
        length = await self._pipeline.execute("XLEN", self.keys.ledger)
        removed = await self._pipeline.execute("HGET", self.keys.meta, "removed")
        return bool(length or int(removed or 0))

    async def assign(self, request: AssignRequest) -> bool:
        """Change a plan, cap or credit at once; return whether it is new. Errors: IdempotencyConflict."""
        reply = await self._change("assign", request, request.plan, request.amount_nanousd)
        if reply[0] in (b"OK", b"EXISTS"):
            return reply[0] == b"OK"
        raise refusal(reply, request.command_id, 0)

    async def withdraw(self, request: WithdrawRequest) -> bool:
        """Take back credit or an assigned plan at once; return whether it is new.

        Errors: IdempotencyConflict; CreditTooLow; NoPlanAssigned.
        """
        reply = await self._change("withdraw", request, request.amount_nanousd)
        match reply[0]:
            case b"OK" | b"EXISTS":
                return reply[0] == b"OK"
            case b"LESS":
                raise CreditTooLow(request.user_id, request.period, int(reply[1]))
            case b"NONE":
                raise NoPlanAssigned(request.user_id)
            case _:
                raise refusal(reply, request.command_id, 0)

    async def change_credit(self, request: CreditRequest, baselines: Sequence[Baseline]) -> CreditChange:
        """Grant, take back or expire a budget's credit.

        Errors: IdempotencyConflict; BudgetCreditTooLow; CreditNotDue; PolicyChanged.
        """
        keys = self.keys
        reply = await self._call(
            "change_credit",
            (keys.meta, keys.ledger, keys.waiters, keys.call(request.command_id), keys.tail(request.budget.name)),
            (
                request.command_id,
                request.content_hash,
                request.type,
                request.credit_id,
                request.amount_nanousd,
                request.expires_ms,
                max(self._idempotency_ttl_s, _CREDIT_TTL_S),
                request.payload,
                *_pack((request.budget,), baselines),
            ),
            policy_version=request.policy_version,
        )
        match reply[0]:
            case b"OK":
                return CreditChange(is_new=True, change_nanousd=int(reply[2]))
            case b"EXISTS":
                return CreditChange(is_new=False)
            case b"LESS":
                raise BudgetCreditTooLow(request.credit_id, int(reply[1]))
            case b"EARLY":
                raise CreditNotDue(request.credit_id)
            case _:
                raise refusal(reply, request.command_id, 0)

    async def create_key(self, request: CreateKeyRequest) -> KeyCreation:
        """Make a key known. Errors: IdempotencyConflict; KeyTaken."""
        reply = await self._change_key("create_key", request, request.key_hash)
        match reply[0]:
            case b"OK":
                return "created"
            case b"EXISTS":
                return "before" if reply[1] == b"1" else "other"
            case b"TAKEN":
                raise KeyTaken(request.key_id)
            case _:
                raise refusal(reply, request.command_id, 0)

    async def revoke_key(self, request: RevokeKeyRequest) -> KeyRevocation:
        """Let a key end. Errors: IdempotencyConflict; KeyUnknown; KeyAlreadyRevoked."""
        reply = await self._change_key("revoke_key", request, request.after_ms)
        match reply[0]:
            case b"OK":
                return KeyRevocation(int(reply[2]), is_new=True)
            case b"EXISTS":
                return KeyRevocation(int(reply[1] or 0), is_new=False)
            case b"UNKNOWN":
                raise KeyUnknown(request.key_id)
            case b"REVOKED":
                raise KeyAlreadyRevoked(request.key_id, int(reply[1]))
            case _:
                raise refusal(reply, request.command_id, 0)

    async def api_keys(self) -> dict[str, str]:
        """Return what this partition has of the gateway's keys, by the fields of their hash in Redis."""
        found: Any = as_map(await self._pipeline.execute("HGETALL", self.keys.api_keys))
        return {field.decode(): value.decode(errors="replace") for field, value in found.items()}

    async def _change_key(
        self, name: str, request: CreateKeyRequest | RevokeKeyRequest, argument: str | int
    ) -> list[bytes]:
        keys = self.keys
        return await self._call(
            name,
            (keys.meta, keys.ledger, keys.call(request.command_id), keys.api_keys),
            (
                request.command_id,
                request.content_hash,
                request.key_id,
                argument,
                self._idempotency_ttl_s,
                request.payload,
            ),
        )

    async def _change(self, name: str, request: AssignRequest | WithdrawRequest, *change: str | int) -> list[bytes]:
        keys = self.keys
        return await self._call(
            name,
            (
                keys.meta,
                keys.ledger,
                keys.account(request.user_id),
                keys.call(request.command_id),
                keys.tail(request.budget),
            ),
            (
                request.command_id,
                request.user_id,
                request.period,
                request.content_hash,
                request.type,
                *change,
                self._idempotency_ttl_s,
                request.payload,
            ),
        )

    async def account(self, user_id: str, period: str) -> Account:
        """Return what the ledger has assigned to a user."""
        found: list[bytes | None] = await self._pipeline.execute(
            "HMGET", self.keys.account(user_id), "plan", "cap_nanousd", f"credit:{period}"
        )
        plan, cap, credit = found
        return Account(plan.decode() if plan else None, None if cap is None else int(cap), int(credit or 0))

    async def balance(
        self,
        *,
        user_id: str,
        period: str,
        budgets: Sequence[BudgetCap],
        baselines: Sequence[Baseline],
        policy_version: int = 0,
    ) -> tuple[Balance, ...]:
        """Return the balances and caps that a call would be compared with now. Errors: CallsStopped; PolicyChanged."""
        keys = self.keys
        reply = await self._call(
            "balance",
            (keys.meta, keys.ledger, keys.account(user_id), *(keys.tail(budget.name) for budget in budgets)),
            (period, *_pack(budgets, baselines)),
            policy_version=policy_version,
        )
        if reply[0] != b"OK":
            raise refusal(reply, user_id, 0)
        numbers = [int(number) for number in reply[1:]]
        return tuple(Balance(*numbers[i : i + 3]) for i in range(0, len(numbers), 3))

    async def trim(self, watermark: EntryId, budgets: Sequence[str]) -> int:
        """Move the watermark, then drop folded tail entries at or below it; return how many were dropped."""
        reply = await self._call(
            "trim",
            (self.keys.meta, self.keys.ledger, *(self.keys.tail(name) for name in budgets)),
            (str(watermark),),
        )
        if reply[0] != b"OK":
            raise refusal(reply, "", 0)
        return int(reply[2])

    async def is_on_stream(self, entry: EntryId) -> bool:
        """Whether an event is on the ledger's stream; none is at the beginning of every ledger."""
        found = await self._pipeline.execute("XRANGE", self.keys.ledger, str(entry), str(entry), "COUNT", 1)
        return bool(found) or entry == ZERO_ENTRY

    async def stop_reason(self) -> str | None:
        """Return why no call may begin in this partition, or None while they may."""
        return await read_stop(self._pipeline, (self.keys,))

    async def probe(self) -> None:
        """Write and take back. Errors: RedisCannotServe; PermissionsMissing, and what else keeps holds from it."""
        await check_writable(self._pipeline, self.keys)

    async def now_ms(self) -> int:
        """Return the time by the Redis clock, in milliseconds since the epoch."""
        return time_ms(await self._pipeline.execute("TIME"))

    async def overdue(self, now_ms: int, *, skip: int = 0, count: int = 100) -> list[str]:
        """Return the call ids of open holds past their deadline, oldest first; `skip` of them, then up to `count`."""
        reply: Any = await self._pipeline.execute(
            "ZRANGEBYSCORE", self.keys.holds, "-inf", f"({now_ms}", "LIMIT", skip, count
        )
        return [call_id.decode() for call_id in reply]

    async def call_record(self, call_id: str) -> CallRecord | None:
        """Return the record of a call; None if there was none or it has expired."""
        value: bytes | None = await self._pipeline.execute("GET", self.keys.call(call_id))
        return parse_call_record(value) if value is not None else None

    async def _call(
        self, name: str, keys: Sequence[str], arguments: Iterable[str | int], *, policy_version: int | None = None
    ) -> list[bytes]:
        # A process that has seen more than the ledger now has is told so, and nothing is written; so is one that
        # decides by another policy than the ledger's.
        identity = self._identity if policy_version is None else f"{self._identity} {policy_version}"  # G11
        try:
            reply = await self._pipeline.execute("FCALL", _FUNCTIONS[name], len(keys), *keys, identity, *arguments)
        except ResponseError as exc:
            if "Function not found" in str(exc):
                raise FunctionsMissing(str(exc)) from exc
            raise
        if name in _APPENDING_FUNCTIONS and reply[0] == b"OK" and reply[1]:
            self.see(EntryId.parse(reply[1].decode()))
        elif (reply[0] == b"EXISTS" or (name, reply[0]) == ("settle", b"SETTLED")) and reply[-1]:
            self.see(EntryId.parse(reply[-1].decode()))
        return cast("list[bytes]", reply)

    def see(self, entry: EntryId) -> None:
        """Remember an event that is on the ledger, if it is the newest one yet."""
        if entry > self.seen:
            self.seen, self._identity = entry, f"{self.ledger_id} {entry.ms}-{entry.seq}"

    async def note_unbooked(self, request: SettleRequest | ChargeRequest) -> None:
        """Note beside the ledger a charge that it cannot take now."""
        await note_unbooked(self._pipeline, self.keys, self._unbooked(request), folder=self._unbooked_folder)

    async def forget_unbooked(self, request: SettleRequest | ChargeRequest) -> None:
        """Take back the note of a charge that is booked."""
        await self.forget(self._unbooked(request))

    async def forget(self, charge: UnbookedCharge) -> None:
        """Take back a note. Errors: OSError."""
        await forget_unbooked(self._pipeline, self.keys, charge, folder=self._unbooked_folder)

    async def unbooked(self) -> list[UnbookedCharge]:
        """Return the partition's noted charges, this process's own and those of others that it can read."""
        return await read_unbooked(self._pipeline, self.keys, ledger_id=self.ledger_id, folder=self._unbooked_folder)

    def _unbooked(self, request: SettleRequest | ChargeRequest) -> UnbookedCharge:
        return unbooked_charge(
            request, ledger_id=self.ledger_id, partition=self.keys.partition, seen=self.seen, process=self._process
        )


async def create_ledger(pipeline: CommandPipeline, keys: Keys, *, ledger_id: str, partitions: int) -> LedgerState:
    """Give a partition its identity, or read the one it has.

    Errors: LedgerReplaced for a stream without identity.
    """
    reply: Any = await pipeline.execute("FCALL", function("create"), 2, keys.meta, keys.ledger, ledger_id, partitions)
    if reply[0] != b"OK":
        raise LedgerReplaced(expected="a ledger with its identity", found="without identity")
    return LedgerState(
        ledger_id=reply[1].decode(),
        partitions=int(reply[2]),
        head=Position(EntryId.parse(reply[4].decode()), int(reply[3])),
        trimmed_to=EntryId.parse(reply[5].decode()),
    )


def _pack(budgets: Sequence[BudgetCap], baselines: Sequence[Baseline]) -> Iterable[str]:
    for budget, baseline in zip(budgets, baselines, strict=True):
        yield _budget(budget.name, budget.cap_nanousd, baseline)


def _pack_names(names: Sequence[str], baselines: Sequence[Baseline]) -> Iterable[str]:
    if not baselines:
        return names
    return (_budget(name, 0, baseline) for name, baseline in zip(names, baselines, strict=True))


def _budget(name: str, cap_nanousd: int, baseline: Baseline) -> str:
    entry = baseline.position.entry
    return (
        f"{cap_nanousd} {baseline.settled_nanousd} {baseline.held_nanousd} "
        f"{entry.ms} {entry.seq} {baseline.position.seq} {name}"
    )


def _flatten(events: Sequence[AttemptEvent]) -> Iterable[str | int]:
    for event in events:
        yield event.type
        yield event.attempt
        yield event.payload
