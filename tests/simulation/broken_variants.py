"""Copies of the code under test that are broken on purpose: in the gate's Lua, or in a method of worker or runner."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.simulation.world import Variant
from tollbook.consumers.messages import Delivery
from tollbook.consumers.worker import Worker
from tollbook.inference.calls.call import Call, RunId, failed_result
from tollbook.inference.calls.earlier_runs import settle_dead_hold
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.reservations import Acquired, Reservations, WaitLimits
from tollbook.inference.calls.runner import CallRunner
from tollbook.ledger.errors import CallUnknown, LedgerUnavailable, LedgerWentBack
from tollbook.ledger.gate.functions import library_code
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import (
    Adjusted,
    AdjustRequest,
    AlreadySettled,
    OpenCall,
    Settled,
    SettleRequest,
)
from tollbook.schemas.identifiers import ZERO_ENTRY
from tollbook.schemas.results import ErrorCode


@dataclass(frozen=True)
class BrokenVariant:
    """`seen_as` is a pattern of the check's message; `seeds` is how many runs it may take to find the fault.

    `known_seed` is tried first: it found the fault when this was written. `changes` make the trouble likelier that
    shows the fault.
    """

    name: str
    variant: Callable[[], Variant]
    seen_as: str
    seeds: int = 300
    known_seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _gate(*replacements: tuple[str, str]) -> Callable[[], Variant]:
    def make() -> Variant:
        code = library_code()
        for old, new in replacements:
            assert code.count(old) == 1, f"the text stands {code.count(old)} times in the gate: {old}"
            code = code.replace(old, new)
        return Variant(lua=code)

    return make


class EagerTakeoverWorker(Worker):
    """Takes every worker with an open hold for dead."""

    async def _is_dead(self, delivery: Delivery, found: OpenCall) -> bool:
        return True


class EarlyAcknowledgeWorker(Worker):
    """Acknowledges a task before it is executed."""

    async def _execute(self, delivery: Delivery, slot: Any, run: Any, record_result: Any) -> None:
        await self.claims.acknowledge(delivery)
        await super()._execute(delivery, slot, run, record_result)


class NewRunIdWorker(Worker):
    """Has a new run id at each try, so that it takes the hold of its own lost reservation for another worker's."""

    async def _execute(self, delivery: Delivery, slot: Any, run: Any, record_result: Any) -> None:
        run.id = RunId(self.name, str(next(self._run_numbers)))
        self._active_runs.add(run.id)
        await super()._execute(delivery, slot, run, record_result)


class UnlimitedAttempts(Reservations):
    """Begins a task anew after any number of attempts."""

    async def acquire(self, call: Call, limits: WaitLimits, **named: Any) -> Acquired:
        return await super().acquire(call, replace(limits, max_attempts=None), **named)


class FreeTakeover(Reservations):
    """Settles a dead worker's hold as if its request had never been sent."""

    async def take_over(self, call: Call, found: OpenCall, *, give_up: str | None = None) -> None:
        request: SettleRequest = settle_dead_hold(
            call_id=call.call_id, user_id=call.user_id, found=found, outcome="taken_over", reason="dead"
        )
        await self._ledger.settle(replace(request, cost_nanousd=found.spent_nanousd, assumed_nanousd=0))


class UncorrectedRunner(CallRunner):
    """Does not check whether another process has settled its hold."""

    async def _correct(self, hold: Hold, *, result: str) -> bool:
        return False


class GivingUpWithoutHold(Reservations):
    """Gives up a call without a hold, although an earlier run of the call may still answer."""

    async def acquire(self, call: Call, limits: WaitLimits, *, give_up: str | None = None, **named: Any) -> Acquired:
        if give_up is None:
            return await super().acquire(call, limits, **named)
        result = failed_result(call, ErrorCode.ATTEMPTS_EXHAUSTED, give_up, self._now_ms())
        await self._results.put(result)
        return Acquired(call=call, result=result, give_up=give_up)


class UnretriedCorrection(CallRunner):
    """Books a late answer only if the projection answers at once."""

    async def _adjust(self, request: AdjustRequest) -> Adjusted:
        return await self._ledger.adjust(request)


class ForgettingGate(Gate):
    """Forgets, with each lost connection, which events it has seen."""

    async def _call(
        self, name: str, keys: Sequence[str], arguments: Iterable[str | int], *, policy_version: int | None = None
    ) -> list[bytes]:
        try:
            return await super()._call(name, keys, arguments, policy_version=policy_version)
        except LedgerUnavailable:
            self.seen, self._identity = ZERO_ENTRY, f"{self.ledger_id} {ZERO_ENTRY}"
            raise


class HoldDroppingLedger(Ledger):
    """Treats a hold that the ledger has lost as settled by another process."""

    async def settle(self, request: SettleRequest) -> Settled | AlreadySettled:
        try:
            return await self._without_baselines(
                request.user_id, request.budgets, lambda gate, baselines: gate.settle(request, baselines)
            )
        except LedgerWentBack:
            raise CallUnknown(request.call_id, request.hold) from None


class UnrecordedAttempts(CallRunner):
    """Begins the next attempt without recording it on the ledger."""

    async def _prepare_next(self, *arguments: Any, **named: Any) -> str | None:
        return None


# A server that sometimes loses its last writes.
LOSSES: Mapping[str, Any] = {"losses": 0.1}
BROKEN = (
    BrokenVariant(
        "holds do not count against the cap",
        _gate(("b.s + b.h + amount > cap then", "b.s + amount > cap then")),
        "G1: .* its cap is",
    ),
    BrokenVariant(
        "only the first budget is checked",
        _gate(
            ("denied = denied or i", "denied = denied or (i == 1 and i or nil)"),
            ("waiting = waiting or i", "waiting = waiting or (i == 1 and i or nil)"),
        ),
        "G1: .* its cap is",
    ),
    BrokenVariant(
        "an extension is not checked",
        _gate(("local refused = extends and (w.denied or w.waiting)", "local refused = nil")),
        "G1: .* its cap is",
        seeds=600,
    ),
    BrokenVariant(
        "a settlement ignores the number of the hold",
        _gate(
            ("return nil, { 'SETTLED', cost .. ' ' .. assumed, call.state }", ""),
            ("if call.state ~= 'open' or call.hold ~= hold then", "if call.state ~= 'open' then"),
        ),
        "G2|G3",
        seeds=600,
        known_seed=191,
    ),
    BrokenVariant(
        "a baseline below the watermark is taken",
        _gate(("if is_after(meta.trim_ms, meta.trim_n, q.ms, q.n) then", "if false then")),
        "G1: .* the gate stamped|G1: the tail",
    ),
    BrokenVariant(
        "tails are trimmed without moving the watermark",
        _gate(("redis.call('HSET', keys[1], 'trimmed_to', args[2])", "")),
        "G1",
    ),
    BrokenVariant(
        "the newest entry of a tail is trimmed while its hold is open",
        _gate((" or (length == 1 and held ~= 0) then", " then")),
        "G6",
    ),
    BrokenVariant(
        "a settlement frees nothing",
        _gate(("push(tail, id, cost, -amount, balances[i])", "push(tail, id, cost, 0, balances[i])")),
        "G1",
    ),
    BrokenVariant(
        "a call that should wait for open holds is refused",
        _gate(("waiting = waiting or i", "denied = denied or i")),
        "G9",
    ),
    BrokenVariant(
        "a finished call may be reserved for again",
        _gate(("elseif call.state ~= 'closed' then", "elseif call.state == 'open' then")),
        "G4",
    ),
    BrokenVariant(
        "a late answer replaces the result",
        _gate(
            (
                "(is_over or args[7] ~= '') and call.state == 'closed' and call.hold == args[3]",
                "is_over or args[7] ~= ''",
            )
        ),
        "G4: .* second result",
        seeds=600,
        known_seed=5,
    ),
    BrokenVariant(
        "attempts of a second hold have the numbers of the first",
        _gate(("math.max(exact(call.recorded), exact(call.begun)) + 1", "exact(call.recorded) + 1")),
        "G3",
        seeds=600,
        changes={"claim_after_s": 3.0, "pauses": 0.15, "deaths": 0.15, "workers": 3, "max_attempts": 2},
        known_seed=184,
    ),
    BrokenVariant(
        "a hold is taken over from a living worker",
        lambda: Variant(worker=EagerTakeoverWorker),
        "G4: .* lives and is well",
        known_seed=2336,
    ),
    BrokenVariant(
        "a task is acknowledged before its result", lambda: Variant(worker=EarlyAcknowledgeWorker), "G4: .* 0 results"
    ),
    BrokenVariant(
        "a lost reservation is taken for another worker's",
        lambda: Variant(worker=NewRunIdWorker),
        "G3: .* its worker lives and sent nothing",
        seeds=600,
        changes={"outages": 0.1, "deaths": 0.0, "pauses": 0.0, "stops": 0.0, "workers": 1},
        known_seed=306,
    ),
    BrokenVariant(
        "the number of attempts is not limited",
        lambda: Variant(reservations=UnlimitedAttempts),
        "G3: .* is begun anew",
        changes={"max_attempts": 1, "stops": 0.05},
    ),
    BrokenVariant("dead holds are released", lambda: Variant(reservations=FreeTakeover), "G3"),
    BrokenVariant(
        "a late answer is not booked",
        lambda: Variant(runner=UncorrectedRunner),
        "G3: .* stays assumed|G3: .* settled at",
        changes={"claim_after_s": 3.0, "outages": 0.1},
    ),
    BrokenVariant(
        "a late answer is dropped while the projection is down",
        lambda: Variant(runner=UnretriedCorrection),
        "G3: .* stays assumed",
        seeds=1000,
        changes={"claim_after_s": 3.0, "outages": 0.1, "projection_trouble": 0.3, "tail_keep_s": 0.0, "deaths": 0.0},
        known_seed=196,
    ),
    BrokenVariant(
        "a call is given up without a hold", lambda: Variant(reservations=GivingUpWithoutHold), "G4", seeds=2000
    ),
    BrokenVariant(
        "the gate does not check whether the ledger went back",
        _gate(("and not has_event(meta, ledger, seen) then", "and false then")),
        "G1: .* on a ledger that lacks",
        changes=LOSSES,
        known_seed=14,
    ),
    BrokenVariant(
        "the gate trusts its memory of events although the ledger was changed",
        _gate(("if not events or events.seq ~= seq then", "if not events then")),
        "G1: .* on a ledger that lacks",
        changes=LOSSES,
        known_seed=14,
    ),
    BrokenVariant(
        "a process forgets the events that it has seen with each new connection",
        lambda: Variant(gate=ForgettingGate),
        "G1: .* on a ledger that lacks",
        changes=LOSSES,
        known_seed=23,
    ),
    BrokenVariant(
        "a run that finds its own hold does not learn the event's id",
        _gate(("return entries[1] and entries[1][1] or ''", "return ''")),
        "G3: .* stays assumed",
        seeds=600,
        changes=LOSSES,
        known_seed=3602,
    ),
    BrokenVariant(
        "an answer is dropped if its hold is lost",
        lambda: Variant(ledger=HoldDroppingLedger),
        "G3: .* stays assumed|G3: .* settled at",
        changes=LOSSES,
    ),
    BrokenVariant("a fallback is not paid for", lambda: Variant(runner=UnrecordedAttempts), "G1|G3", seeds=300),
)
