"""The steps of calls: what holds, records, settles, corrects and gives back money (G1, G2).

Every step is idempotent on the call id, so a repeat after LedgerUnavailable is safe.
"""

from collections.abc import Sequence

from tollbook.ledger.errors import HoldChanged
from tollbook.ledger.gate.function_calls import GateFunctions
from tollbook.ledger.gate.packing import flatten, pack, pack_names
from tollbook.ledger.gate.replies import denied, refusal, reserve_reply, waiting
from tollbook.ledger.gate.requests import (
    Adjusted,
    AdjustRequest,
    AlreadySettled,
    Baseline,
    BudgetCap,
    ChargeRequest,
    Denied,
    NoteRequest,
    RecordRequest,
    Released,
    ReleaseRequest,
    ReserveReply,
    ReserveRequest,
    Settled,
    SettleRequest,
    Waiting,
)


class CallSteps(GateFunctions):
    """The steps of calls in one partition. Errors of every method: those of `Gate`."""

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
                *pack(request.budgets, baselines),
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
                *flatten(request.events),
                request.extension_payload,
                *pack(request.budgets, baselines),
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
                *flatten(request.events),
                *pack_names(request.budgets, baselines),
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
                *flatten(request.events),
                *pack_names(request.budgets, baselines),
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
                *pack_names(request.budgets, baselines),
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
                *pack(
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
