"""Typed calls of the gate's functions, one partition each.

Arguments and replies only: what the codes mean for a caller is in `ledger/budgets.py`.
Every function is idempotent on the call id, so a repeat after LedgerUnavailable is safe.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from redis.exceptions import ResponseError

from tollbook.ledger.errors import (
    CallsStopped,
    CallUnknown,
    IdempotencyConflict,
    LedgerAhead,
    LedgerDiverged,
    LedgerError,
    LedgerReplaced,
    LedgerWentBack,
)
from tollbook.ledger.gate.call_record import CallRecord, parse_call_record
from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.requests import (
    Adjusted,
    AdjustRequest,
    AlreadySettled,
    AssignRequest,
    AttemptEvent,
    Balance,
    Baseline,
    BudgetCap,
    ChargeRequest,
    Denied,
    FinishedCall,
    OpenCall,
    Position,
    RecordRequest,
    Reserved,
    ReserveReply,
    ReserveRequest,
    Settled,
    SettleRequest,
    Waiting,
)
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

Baselines = Sequence[Baseline]
# Their first answer beside OK is the id of the event that they appended, or nothing where there was none to append.
_APPENDING = frozenset({"reserve", "record", "settle", "adjust", "charge", "assign"})


class Stale(LedgerError):
    """The baseline is older than the tail; read DuckDB again."""


class WindowClosed(LedgerError):
    """By the Redis clock the billing period is another one; make the request anew for `now_ms`."""

    def __init__(self, now_ms: int) -> None:
        super().__init__(f"the billing period of the request does not contain {now_ms}")
        self.now_ms = now_ms


class FunctionsMissing(LedgerError):
    """The server has lost the function library (it was emptied or replaced); load it and look again."""


class BudgetsMismatch(LedgerError):
    """The hold stands against other budgets than the caller named; `budgets` are the true ones."""

    def __init__(self, budgets: tuple[str, ...]) -> None:
        super().__init__(f"the hold stands against {', '.join(budgets)}")
        self.budgets = budgets


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
    ) -> None:
        """`seen` is the newest event that this process knows to be on the ledger; the gate keeps it up to date."""
        self.keys = keys
        self.ledger_id = ledger_id
        self.seen = seen
        self._identity = f"{ledger_id} {seen}"
        self._pipeline = pipeline
        self._idempotency_ttl_s = idempotency_ttl_s
        self._result_ttl_s = result_ttl_s

    async def reserve(self, request: ReserveRequest, baselines: Baselines) -> ReserveReply:
        """Hold money for a call, or say why not. Errors: IdempotencyConflict; WindowClosed; CallsStopped."""
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
                # In one argument, since redis-py takes half a microsecond to pack each.
                f"{request.user_id} {request.window.name} {request.content_hash} {request.worker} "
                f"{request.amount_nanousd} {request.lease_ms} {request.window.start_ms} {request.window.end_ms} "
                f"{int(request.is_final)} {self._idempotency_ttl_s}",
                request.payload,
                *_pack(request.budgets, baselines),
            ),
        )
        return _reserve_reply(request, reply)

    async def record(self, request: RecordRequest, baselines: Baselines) -> int | Denied | Waiting:
        """Tell of attempts and extend the hold; return the whole hold in nano-dollars, or why it was not extended.

        Errors: CallUnknown when the hold is no longer open.
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
        )
        match reply[0]:
            case b"OK":
                return int(reply[2])
            case b"DENIED":
                return _denied(reply[1:], request.extension_nanousd, "cap")
            case b"WAIT":
                return _waiting(reply)
            case _:
                raise _refusal(reply, request.call_id, request.hold)

    async def settle(self, request: SettleRequest, baselines: Baselines = ()) -> Settled | AlreadySettled:
        """Replace a hold by its cost, store the result.

        Errors: CallUnknown; BudgetsMismatch; Stale (give baselines).
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
                raise _refusal(reply, request.call_id, request.hold)

    async def adjust(self, request: AdjustRequest, baselines: Baselines = ()) -> Adjusted:
        """Correct a settled hold to its true cost. Errors: CallUnknown; BudgetsMismatch; Stale (give baselines)."""
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
                *_flatten(request.events),
                *_pack_names(request.budgets, baselines),
            ),
        )
        if reply[0] != b"OK":
            raise _refusal(reply, request.call_id, request.hold)
        return Adjusted(int(reply[2]), is_call_over=reply[3] == b"settled")

    async def charge(self, request: ChargeRequest, baselines: Baselines) -> bool:
        """Book spend without a hold; return whether it is new. Errors: IdempotencyConflict."""
        keys = self.keys
        reply = await self._call(
            "charge",
            (keys.meta, keys.ledger, keys.call(request.call_id), *(keys.tail(name) for name in request.budgets)),
            (
                request.call_id,
                request.user_id,
                request.period,
                request.content_hash,
                request.cost_nanousd,
                request.assumed_nanousd,
                self._idempotency_ttl_s,
                request.payload,
                *_pack_names(request.budgets, baselines),
            ),
        )
        if reply[0] in (b"OK", b"EXISTS"):
            return reply[0] == b"OK"
        raise _refusal(reply, request.call_id, 0)

    async def assign(self, request: AssignRequest) -> bool:
        """Change a plan, cap or credit at once; return whether it is new. Errors: IdempotencyConflict."""
        keys = self.keys
        reply = await self._call(
            "assign",
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
                request.plan,
                request.amount_nanousd,
                self._idempotency_ttl_s,
                request.payload,
            ),
        )
        if reply[0] in (b"OK", b"EXISTS"):
            return reply[0] == b"OK"
        raise _refusal(reply, request.command_id, 0)

    async def balance(
        self, *, user_id: str, period: str, budgets: Sequence[BudgetCap], baselines: Baselines
    ) -> tuple[Balance, ...]:
        """Return what a call would be weighed against now, with the caps in force; changes nothing."""
        keys = self.keys
        reply = await self._call(
            "balance",
            (keys.meta, keys.ledger, keys.account(user_id), *(keys.tail(budget.name) for budget in budgets)),
            (period, *_pack(budgets, baselines)),
        )
        if reply[0] != b"OK":
            raise _refusal(reply, user_id, 0)
        numbers = [int(number) for number in reply[1:]]
        return tuple(Balance(*numbers[i : i + 3]) for i in range(0, len(numbers), 3))

    async def trim(self, watermark: EntryId, budgets: Sequence[str]) -> int:
        """Move the watermark, then drop folded tail entries at or below it; return how many went."""
        reply = await self._call(
            "trim",
            (self.keys.meta, self.keys.ledger, *(self.keys.tail(name) for name in budgets)),
            (str(watermark),),
        )
        if reply[0] != b"OK":
            raise _refusal(reply, "", 0)
        return int(reply[2])

    async def now_ms(self) -> int:
        """Return the time by the Redis clock, in milliseconds since the epoch."""
        seconds, microseconds = await self._pipeline.execute("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def overdue(self, now_ms: int, *, skip: int = 0, count: int = 100) -> list[str]:
        """Return call ids of open holds past their deadline, the oldest first, without the first `skip` of them."""
        reply: Any = await self._pipeline.execute(
            "ZRANGEBYSCORE", self.keys.holds, "-inf", f"({now_ms}", "LIMIT", skip, count
        )
        return [call_id.decode() for call_id in reply]

    async def call_record(self, call_id: str) -> CallRecord | None:
        """Return the state of a call, or None where it never was or has expired."""
        value: bytes | None = await self._pipeline.execute("GET", self.keys.call(call_id))
        return parse_call_record(value) if value is not None else None

    async def _call(self, name: str, keys: Sequence[str], arguments: Iterable[str | int]) -> list[bytes]:
        try:
            # Whoever has seen more than the ledger now has is told so, and nothing is written (G1, G4).
            reply = await self._pipeline.execute("FCALL", function(name), len(keys), *keys, self._identity, *arguments)
        except ResponseError as exc:
            if "Function not found" in str(exc):
                raise FunctionsMissing(str(exc)) from exc
            raise
        if name in _APPENDING and reply[0] == b"OK" and reply[1]:
            self.see(EntryId.parse(reply[1].decode()))
        return cast("list[bytes]", reply)

    def see(self, entry: EntryId) -> None:
        """Remember an event that is on the ledger, if it is the newest one yet."""
        if entry > self.seen:
            self.seen, self._identity = entry, f"{self.ledger_id} {entry}"

    async def note_unbooked(self, request: SettleRequest) -> None:
        """Note beside the ledger what a call has cost whose hold the ledger lost: numbers, and no completion (G10)."""
        noted = {
            "call_id": request.call_id,
            "hold": request.hold,
            "user_id": request.user_id,
            "budgets": request.budgets,
            "cost_nanousd": request.cost_nanousd,
            "assumed_nanousd": request.assumed_nanousd,
            "attempt": request.attempt,
            "payload": json.loads(request.payload),
        }
        await self._pipeline.execute("HSET", self.keys.unbooked, _unbooked_field(request), json.dumps(noted))

    async def forget_unbooked(self, request: SettleRequest) -> None:
        """Take back the note of a cost that is booked."""
        await self._pipeline.execute("HDEL", self.keys.unbooked, _unbooked_field(request))

    async def stop_calls(self, reason: str) -> None:
        """Let no call begin in this partition until it is called again with an empty reason; writes no event."""
        reply: Any = await self._pipeline.execute(
            "FCALL", function("stop"), 1, self.keys.meta, self.ledger_id, " ".join(reason.split())
        )
        if reply[0] != b"OK":
            raise _refusal(reply, "", 0)


async def create_ledger(pipeline: CommandPipeline, keys: Keys, *, ledger_id: str, partitions: int) -> LedgerState:
    """Give a partition its identity, or read the one it has. Errors: LedgerReplaced for a stream without identity."""
    reply: Any = await pipeline.execute("FCALL", function("create"), 2, keys.meta, keys.ledger, ledger_id, partitions)
    if reply[0] != b"OK":
        raise LedgerReplaced(expected="a ledger with its identity", found="without identity")
    return LedgerState(
        ledger_id=reply[1].decode(),
        partitions=int(reply[2]),
        head=Position(EntryId.parse(reply[4].decode()), int(reply[3])),
        trimmed_to=EntryId.parse(reply[5].decode()),
    )


def _unbooked_field(request: SettleRequest) -> str:
    return f"{request.call_id} {request.hold}"


def _pack(budgets: Sequence[BudgetCap], baselines: Baselines) -> Iterable[str]:
    for budget, baseline in zip(budgets, baselines, strict=True):
        yield _budget(budget.name, budget.cap_nanousd, baseline)


def _pack_names(names: Sequence[str], baselines: Baselines) -> Iterable[str]:
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


def _reserve_reply(request: ReserveRequest, reply: list[bytes]) -> ReserveReply:
    match reply[0]:
        case b"OK":
            hold, attempt, committed, cap, deadline = (int(number) for number in reply[2:7])
            amount, plan = request.amount_nanousd, reply[7].decode() or None
            return Reserved(reply[1].decode(), hold, attempt, amount, committed, cap, deadline, plan)
        case b"DENIED":
            return _denied(reply[1:], request.amount_nanousd, reply[5].decode())
        case b"WAIT":
            return _waiting(reply)
        case b"EXISTS":
            return _existing_call(reply)
        case b"WINDOW":
            raise WindowClosed(int(reply[1]))
        case _:
            raise _refusal(reply, request.call_id, 0)


def _existing_call(reply: list[bytes]) -> OpenCall | FinishedCall:
    if reply[1] == b"open":
        hold, amount = int(reply[2]), int(reply[3])
        deadline, recorded, begun, spent, assumed = (int(number) for number in reply[5:10])
        budgets = tuple(reply[10].decode().split("\n"))
        return OpenCall(
            hold, amount, reply[4].decode(), deadline, recorded, begun, spent, assumed, budgets, reply[11].decode()
        )
    denial = None
    if reply[3]:
        fields = reply[3].split()
        denial = _denied(fields[:4], int(fields[4]), fields[5].decode())
    state = cast("Literal['settled', 'denied']", reply[1].decode())
    return FinishedCall(state, reply[2].decode(), denial)


def _denied(fields: Sequence[bytes], amount_nanousd: int, reason: str) -> Denied:
    settled, held, cap = (int(number) for number in fields[1:4])
    return Denied(fields[0].decode(), settled, held, cap, amount_nanousd, reason)


def _waiting(reply: list[bytes]) -> Waiting:
    settled, held, cap = (int(number) for number in reply[2:5])
    return Waiting(reply[1].decode(), settled, held, cap)


def _refusal(reply: list[bytes], call_id: str, hold: int) -> LedgerError:
    words = [word.decode() for word in reply[1:]]
    match reply[0]:
        case b"STALE":
            return Stale(words[0])
        case b"LEDGER":
            return LedgerReplaced(expected="another ledger", found=words[0])
        case b"BACK":
            return LedgerWentBack(EntryId.parse(words[0]))
        case b"STOPPED":
            return CallsStopped(words[0])
        case b"AHEAD":
            return LedgerAhead(folded_seq=int(words[0]), ledger_seq=int(words[1]))
        case b"DIVERGED":
            s, h, ledger_s, ledger_h = (int(number) for number in words[1:])
            return LedgerDiverged(budget=words[0], baseline_nanousd=(s, h), ledger_nanousd=(ledger_s, ledger_h))
        case b"CONFLICT":
            return IdempotencyConflict(call_id)
        case b"MISMATCH":
            return BudgetsMismatch(tuple(words[0].split("\n")))
        case b"UNKNOWN" | b"SETTLED":
            return CallUnknown(call_id, hold)
        case code:
            raise AssertionError(f"the gate answered {code!r}")
