"""The gate's replies as values and errors. The codes are listed in functions/header.lua."""

from collections.abc import Sequence
from typing import Literal, cast

from tollbook.ledger.errors import (
    CallsStopped,
    CallUnknown,
    IdempotencyConflict,
    LedgerAhead,
    LedgerDiverged,
    LedgerError,
    LedgerReplaced,
    LedgerWentBack,
    PolicyChanged,
)
from tollbook.ledger.gate.requests import (
    Denied,
    FinishedCall,
    OpenCall,
    Reserved,
    ReserveReply,
    ReserveRequest,
    Waiting,
)
from tollbook.schemas.identifiers import EntryId, describe_budget


class Stale(LedgerError):
    """The baseline is older than the tail: read it from DuckDB again."""


class WindowClosed(LedgerError):
    """By the Redis clock, the request is for another billing period: make it again for `now_ms`."""

    def __init__(self, now_ms: int) -> None:
        super().__init__(f"the request's billing period does not contain {now_ms} ms, the time by the Redis clock")
        self.now_ms = now_ms


class FunctionsMissing(LedgerError):
    """The server has lost the function library: it was emptied or replaced. Load the library and repeat."""


class BudgetsMismatch(LedgerError):
    """The hold stands against other budgets than the caller named: against `budgets`."""

    def __init__(self, budgets: tuple[str, ...]) -> None:
        super().__init__(f"the hold stands against {'; '.join(map(describe_budget, budgets))}")
        self.budgets = budgets


def reserve_reply(request: ReserveRequest, reply: list[bytes]) -> ReserveReply:
    """Read the reply of `reserve`. Errors: WindowClosed; as `refusal`."""
    match reply[0]:
        case b"OK":
            hold, attempt, committed, cap, deadline = (int(number) for number in reply[2:7])
            amount, plan = request.amount_nanousd, reply[7].decode() or None
            return Reserved(reply[1].decode(), hold, attempt, amount, committed, cap, deadline, request.budgets, plan)
        case b"DENIED":
            return denied(reply[1:], request.amount_nanousd, reply[5].decode())
        case b"WAIT":
            return waiting(reply)
        case b"EXISTS":
            return _existing_call(reply)
        case b"WINDOW":
            raise WindowClosed(int(reply[1]))
        case _:
            raise refusal(reply, request.call_id, 0)


def _existing_call(reply: list[bytes]) -> OpenCall | FinishedCall:
    if reply[1] == b"open":
        hold, amount = int(reply[2]), int(reply[3])
        deadline, recorded, begun, spent, assumed = (int(number) for number in reply[5:10])
        budgets = tuple(reply[10].decode().split("\n"))
        provider, _, generation_id = reply[12].decode().partition("=")
        return OpenCall(
            hold, amount, reply[4].decode(), deadline, recorded, begun, spent, assumed, budgets, reply[11].decode(),
            provider or None, generation_id or None,
        )  # fmt: skip
    denial = None
    if reply[3]:
        fields = reply[3].rsplit(b" ", 5)  # A budget's name can have spaces.
        denial = denied(fields[:4], int(fields[4]), fields[5].decode())
    state = cast("Literal['settled', 'denied']", reply[1].decode())
    return FinishedCall(state, reply[2].decode(), denial)


def denied(fields: Sequence[bytes], amount_nanousd: int, reason: str) -> Denied:
    """Read a denial: budget, settled, held and cap."""
    settled, held, cap = (int(number) for number in fields[1:4])
    return Denied(fields[0].decode(), settled, held, cap, amount_nanousd, reason)


def waiting(reply: list[bytes]) -> Waiting:
    """Read a WAIT reply."""
    settled, held, cap = (int(number) for number in reply[2:5])
    return Waiting(reply[1].decode(), settled, held, cap)


def refusal(reply: list[bytes], call_id: str, hold: int) -> LedgerError:
    """Return the error that a reply stands for."""
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
        case b"POLICY":
            return PolicyChanged(int(words[0]))
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
