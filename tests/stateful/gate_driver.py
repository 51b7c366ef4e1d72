"""The real gate behind plain calls: one event loop, one connection, a new ledger for each example.

Each step sends the command and a read of what it appended in one round trip, so that thousands
of steps fit into seconds. Replies come back in the form of `tests/model.py`.
"""

import asyncio
import itertools
import json
from collections.abc import Awaitable
from typing import Any

from redis.asyncio import Redis

from tests.model import Answer
from tollbook.ledger.errors import (
    BudgetCreditTooLow,
    CallUnknown,
    CreditNotDue,
    HoldChanged,
    IdempotencyConflict,
    LedgerAhead,
    LedgerDiverged,
    LedgerError,
    PolicyChanged,
)
from tollbook.ledger.gate.functions import LIBRARY
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.policies import EventsNotCounted
from tollbook.ledger.gate.replies import BudgetsMismatch, Stale
from tollbook.ledger.gate.requests import (
    Adjusted,
    AlreadySettled,
    Balance,
    CreditChange,
    Denied,
    FinishedCall,
    OpenCall,
    Position,
    Reserved,
    Settled,
    Waiting,
)
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

# Stamped by the Redis clock; checked on its own.
_CLOCK_STAMPS = ("deadline_ms",)
_GATE_STAMPS = ("hold", "cap_nanousd", "budgets", "budget", "settled_nanousd", "held_nanousd", "reason",
                "hold_nanousd", "holds", "overage_nanousd", "assumed_nanousd", "fraction", "cause")  # fmt: skip


class GateDriver:
    """Owns the loop and the connection; `begin` starts an empty ledger."""

    gate: Gate
    keys: Keys

    def __init__(self, url: str, code: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._redis = Redis.from_url(url)
        self._numbers = itertools.count(1)
        self._code = code
        self._run(self._load())
        self.pipeline = CommandPipeline(self._redis)

    def begin(self) -> None:
        number = next(self._numbers)
        self.keys = Keys(f"machine-{number}")
        self.gate = Gate(self.pipeline, self.keys, f"ledger-{number}", idempotency_ttl_s=3_600, result_ttl_s=3_600)
        self._last = "0-0"
        self.positions = [Position()]
        self._run(create_ledger(self.pipeline, self.keys, ledger_id=self.gate.ledger_id, partitions=1))

    def step(self, call: Awaitable[Any]) -> tuple[Answer, list[Any]]:
        """Return the answer in the model's form, and the raw entries that the step appended."""
        reply, entries = self._run(self._exchange(call))
        if entries:
            self._last = entries[-1][0].decode()
        for raw_id, _ in entries:
            self.positions.append(Position(EntryId.parse(raw_id.decode()), len(self.positions)))
        return answer_of(reply), entries

    def ask(self, call: Awaitable[Any]) -> Any:
        return self._run(call)

    def entry(self, seq: int) -> EntryId:
        return self.positions[seq].entry if seq else ZERO_ENTRY

    def close(self) -> None:
        self._run(self._close())
        self._loop.close()

    async def _load(self) -> None:
        await self._redis.flushall()
        await self._redis.function_load(self._code, replace=True)

    async def _close(self) -> None:
        await self.pipeline.aclose()
        await self._redis.flushall()
        await self._redis.function_delete(LIBRARY)
        await self._redis.aclose()

    async def _exchange(self, call: Awaitable[Any]) -> tuple[Any, list[Any]]:
        reply, entries = await asyncio.gather(
            call, self.pipeline.execute("XRANGE", self.keys.ledger, f"({self._last}", "+"), return_exceptions=True
        )
        if isinstance(entries, BaseException):
            raise entries
        return reply, entries

    def _run(self, work: Awaitable[Any]) -> Any:
        return self._loop.run_until_complete(work)


def answer_of(reply: Any) -> Answer:
    """Put a typed reply, or the error in its place, into the model's form."""
    match reply:
        case Reserved():
            return ("OK", reply.hold, reply.attempt, reply.amount_nanousd, reply.committed_nanousd, reply.cap_nanousd)
        case Denied():
            return _denied(reply)
        case Waiting():
            return ("WAIT", reply.budget, reply.settled_nanousd, reply.held_nanousd, reply.cap_nanousd)
        case OpenCall():
            progress = (reply.attempts_recorded, reply.attempts_begun, reply.spent_nanousd, reply.assumed_nanousd)
            noted = (reply.provider, reply.generation_id) if reply.generation_id else ()
            place = (reply.budgets, reply.period, *noted)
            return ("OPEN", reply.hold, reply.amount_nanousd, reply.worker, *progress, *place)
        case FinishedCall():
            return ("FINISHED", reply.state, reply.result, _denied(reply.denial) if reply.denial else None)
        case Settled():
            return ("OK", reply.committed_nanousd) if reply.entry_id else ("OK AGAIN",)
        case AlreadySettled():
            return ("SETTLED", reply.cost_nanousd, reply.assumed_nanousd)
        case Adjusted():
            return ("OK", reply.difference_nanousd, reply.is_call_over)
        case CreditChange():
            return ("CREDIT", reply.is_new, reply.change_nanousd)
        case None:
            return ("OK",)
        case bool():
            return ("NEW", reply)
        case int():
            return ("OK", reply)
        case tuple():
            return ("OK", *(_balance(balance) for balance in reply))
        case LedgerError():
            return _refusal(reply)
        case _:
            raise reply if isinstance(reply, BaseException) else AssertionError(f"unexpected reply {reply!r}")


def _balance(balance: Balance) -> tuple[int, int, int]:
    return (balance.settled_nanousd, balance.held_nanousd, balance.cap_nanousd)


def _denied(reply: Denied) -> Answer:
    numbers = (reply.settled_nanousd, reply.held_nanousd, reply.cap_nanousd, reply.amount_nanousd)
    return ("DENIED", reply.budget, *numbers, reply.reason)


def _refusal(error: LedgerError) -> Answer:
    match error:
        case IdempotencyConflict():
            return ("CONFLICT",)
        case Stale():
            return ("STALE",)
        case LedgerAhead():
            return ("AHEAD",)
        case LedgerDiverged():
            return ("DIVERGED", error.budget)
        case HoldChanged():
            return ("CHANGED",)
        case CallUnknown():
            return ("UNKNOWN",)
        case EventsNotCounted():
            return ("BEHIND", error.seq)
        case PolicyChanged():
            return ("POLICY", error.version)
        case BudgetsMismatch():
            return ("MISMATCH", error.budgets)
        case BudgetCreditTooLow():
            return ("LESS", error.left_nanousd)
        case CreditNotDue():
            return ("EARLY",)
        case _:
            raise error


def event_of(raw: list[Any]) -> dict[str, Any]:
    """The fields of a raw entry that the model predicts."""
    texts = [part.decode() for part in raw[1]]
    fields = dict(zip(texts[0::2], texts[1::2], strict=True))
    payload = json.loads(fields["payload"])
    return {
        "seq": int(fields["seq"]),
        "type": fields["type"],
        "user": fields["user_id"],
        "period": fields["period"],
        "call": fields["call_id"],
        "attempt": int(fields["attempt"]),
        "amount": int(fields["amount"]),
        "committed": int(fields["committed"]) if fields["committed"] else None,
        "stamps": {name: payload[name] for name in _GATE_STAMPS if name in payload},
        "has_clock": all(name in payload for name in _CLOCK_STAMPS),
        "policy": payload.get("version", payload.get("asked_policy")),
    }
