"""Typed calls of the gate's functions, for one partition.

Packs arguments; replies.py reads the answers, and ledger.py repeats what can be repeated. The steps of calls are in
call_steps.py, what people change in people_commands.py; here is what is read of a partition, and what tidies it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tollbook.ledger.errors import LedgerReplaced
from tollbook.ledger.gate.call_record import CallRecord, parse_call_record
from tollbook.ledger.gate.call_steps import CallSteps
from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.packing import pack
from tollbook.ledger.gate.people_commands import PeopleCommands
from tollbook.ledger.gate.policies import StoredPolicy, read_policies
from tollbook.ledger.gate.probe import check_writable
from tollbook.ledger.gate.replies import refusal
from tollbook.ledger.gate.requests import (
    Account,
    Balance,
    Baseline,
    BudgetCap,
    ChargeRequest,
    Position,
    SettleRequest,
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
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId


@dataclass(frozen=True, slots=True)
class LedgerState:
    """The identity and progress of a partition's ledger."""

    ledger_id: str
    partitions: int
    head: Position
    trimmed_to: EntryId


class Gate(CallSteps, PeopleCommands):
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
        super().__init__(
            pipeline,
            keys,
            ledger_id,
            idempotency_ttl_s=idempotency_ttl_s,
            result_ttl_s=result_ttl_s,
            seen=seen,
        )
        self._process = process
        self._unbooked_folder = unbooked_folder

    def check_confirmed(self) -> None:
        """See that replicas had what was written last. Errors: TooFewReplicas; LedgerUnavailable where none said so."""
        if (problem := self._pipeline.unconfirmed_at(self.keys.ledger)) is not None:
            raise problem

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

    async def policy(self) -> StoredPolicy:
        """Return this partition's policy as it stands there. Errors: LedgerUnavailable."""
        (stored,) = await read_policies(self._pipeline, (self.keys,))
        return stored

    async def has_events(self) -> bool:
        """Whether anything was ever appended to this partition."""
        length = await self._pipeline.execute("XLEN", self.keys.ledger)
        removed = await self._pipeline.execute("HGET", self.keys.meta, "removed")
        return bool(length or int(removed or 0))

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
            (period, *pack(budgets, baselines)),
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
        return await self._pipeline.now_ms(self.keys.meta)

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
