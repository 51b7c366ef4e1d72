"""The open hold of one call: what it covers, what its attempts cost, what is still to be told.

Plain bookkeeping without I/O; `inference/calls.py` drives it. Every number is nano-dollars.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tollbook.inference.attempts import Attempt
from tollbook.inference.bounds import Bound
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.ledger.gate.requests import (
    AdjustRequest,
    AttemptEvent,
    BudgetCap,
    OpenCall,
    RecordRequest,
    Reserved,
    ReserveRequest,
    SettleRequest,
)
from tollbook.schemas.events import Basis, CostAdjusted, CostRecorded, FallbackUsed, ModelCalled, payload_json

# Which basis names the whole, when attempts were charged on different ones: the least certain.
_CERTAINTY: tuple[Basis, ...] = ("assumed", "priced", "reported", "released")

CostOutcome = Literal["done", "failed", "expired", "taken_over", "recorded"]


@dataclass(frozen=True, slots=True)
class Charge:
    """What one attempt is booked at, and why."""

    nanousd: int
    basis: Basis

    @property
    def assumed_nanousd(self) -> int:
        """The part nobody confirmed: all or nothing."""
        return self.nanousd if self.basis == "assumed" else 0


def charge_of(attempt: Attempt, model: str, bound: Bound, prices: PriceCatalogue, now_ms: int) -> Charge:
    """Price an attempt: what the provider reports, else its usage priced, else its full bound (G3).

    An explicit zero is a price. An attempt that provably was not charged is released.
    """
    if attempt.charge == "none":
        return Charge(0, "released")
    if attempt.reported_cost_nanousd is not None:
        return Charge(attempt.reported_cost_nanousd, "reported")
    if attempt.charge == "known" and attempt.usage is not None:
        try:
            return Charge(prices.cost(model, attempt.usage, now_ms), "priced")
        except PriceUnknown:
            pass  # The catalogue lost the model since the hold was made; the bound still covers it.
    return Charge(bound.amount_nanousd, "assumed")


def model_called(attempt: Attempt, model: str, hold: int, charge: Charge) -> ModelCalled:
    """Describe an attempt for the ledger; nothing of the prompt or the completion."""
    return ModelCalled(
        hold=hold,
        model=model,
        model_used=attempt.model_used,
        outcome=attempt.outcome,
        http_status=attempt.http_status,
        error=attempt.error,
        latency_ms=attempt.latency_ms,
        usage=attempt.usage,
        generation_id=attempt.generation_id,
        charge_nanousd=charge.nanousd,
        charge_basis=charge.basis,
        finish_reason=attempt.finish_reason,
    )


@dataclass(slots=True)
class Hold:
    """One open hold. `attempts` counts the call's attempts over all its holds."""

    call_id: str
    user_id: str
    worker: str
    number: int
    amount_nanousd: int
    budgets: tuple[BudgetCap, ...]
    attempts: int
    spent_nanousd: int = 0
    assumed_nanousd: int = 0
    last: Attempt | None = None
    _bases: set[Basis] = field(default_factory=set[Basis])
    _models: Counter[str] = field(default_factory=Counter[str])
    _untold: list[AttemptEvent] = field(default_factory=list[AttemptEvent])
    _is_under_way: bool = False

    @classmethod
    def opened(cls, request: ReserveRequest, reply: Reserved) -> "Hold":
        """The hold that a reservation opened."""
        return cls(
            request.call_id,
            request.user_id,
            request.worker,
            reply.hold,
            reply.amount_nanousd,
            request.budgets,
            attempts=reply.attempt - 1,
        )

    @classmethod
    def found(cls, request: ReserveRequest, reply: OpenCall) -> "Hold":
        """The hold that this run had opened by a request whose reply was lost; nothing is sent under it yet."""
        caps = [budget.cap_nanousd for budget in request.budgets]
        budgets = tuple(BudgetCap(name, cap) for name, cap in zip(reply.budgets, caps, strict=True))
        return cls(
            request.call_id,
            request.user_id,
            request.worker,
            reply.hold,
            reply.amount_nanousd,
            budgets,
            attempts=reply.attempts_begun - 1,
            spent_nanousd=reply.spent_nanousd,
            assumed_nanousd=reply.assumed_nanousd,
        )

    def begin(self, model: str) -> None:
        """Count an attempt that starts now."""
        self.attempts += 1
        self._models[model] += 1
        self._is_under_way = True

    def finish(self, attempt: Attempt, model: str, charge: Charge) -> None:
        """Book the attempt under way."""
        self._is_under_way = False
        self.last = attempt
        self.spent_nanousd += charge.nanousd
        self.assumed_nanousd += charge.assumed_nanousd
        self._bases.add(charge.basis)
        self._tell("model-called", payload_json(model_called(attempt, model, self.number, charge)))

    def abandon(self, bound: Bound) -> None:
        """Book an attempt whose reply nobody will read, if one is under way, at its full bound."""
        if self._is_under_way:
            self._is_under_way = False
            self.spent_nanousd += bound.amount_nanousd
            self.assumed_nanousd += bound.amount_nanousd
            self._bases.add("assumed")
            payload = ModelCalled(
                hold=self.number,
                model=bound.model,
                outcome="abandoned",
                error="cancelled",
                latency_ms=0,
                charge_nanousd=bound.amount_nanousd,
                charge_basis="assumed",
            )
            self._tell("model-called", payload_json(payload))

    def note_fallback(self, payload: FallbackUsed) -> None:
        """Note a change of model; it is told with the next step."""
        self._tell("fallback-used", payload_json(payload.model_copy(update={"hold": self.number})))

    def attempts_of(self, model: str) -> int:
        """How often a model was tried under this hold."""
        return self._models[model]

    def shortage_for(self, bound: Bound) -> int:
        """What is missing for another attempt of this bound."""
        return max(0, self.spent_nanousd + bound.amount_nanousd - self.amount_nanousd)

    @property
    def basis(self) -> Basis:
        """The least certain basis of what was spent."""
        for basis in _CERTAINTY:
            if basis in self._bases:
                return basis
        return "released"

    def record_request(self, *, extension_nanousd: int, payload: str) -> RecordRequest:
        """Tell of the attempts so far; another one begins."""
        return RecordRequest(
            call_id=self.call_id,
            user_id=self.user_id,
            hold=self.number,
            attempts_begun=self.attempts + 1,
            spent_nanousd=self.spent_nanousd,
            assumed_nanousd=self.assumed_nanousd,
            events=tuple(self._untold),
            budgets=self.budgets,
            extension_nanousd=extension_nanousd,
            extension_payload=payload,
        )

    def told(self) -> None:
        """The ledger has what there was to tell."""
        self._untold.clear()

    def settle_request(self, *, outcome: CostOutcome, reason: str | None, result: str, is_final: bool) -> SettleRequest:
        """Settle at what the attempts cost."""
        last = self.last
        payload = CostRecorded(
            basis=self.basis,
            assumed_nanousd=self.assumed_nanousd,
            outcome=outcome,
            reason=reason,
            model=last.model_used if last else None,
            usage=last.usage if last else None,
            generation_id=last.generation_id if last else None,
        )
        return SettleRequest(
            call_id=self.call_id,
            user_id=self.user_id,
            hold=self.number,
            cost_nanousd=self.spent_nanousd,
            assumed_nanousd=self.assumed_nanousd,
            attempt=self.attempts,
            is_final=is_final,
            payload=payload_json(payload),
            budgets=_names(self.budgets),
            result=result,
            events=tuple(self._untold),
        )

    def adjust_request(self, *, reason: str, result: str) -> AdjustRequest:
        """Correct a hold that somebody else settled meanwhile."""
        payload = CostAdjusted(
            basis=self.basis,
            reason=reason,
            author=self.worker,
            generation_id=self.last.generation_id if self.last else None,
        )
        return AdjustRequest(
            call_id=self.call_id,
            user_id=self.user_id,
            hold=self.number,
            cost_nanousd=self.spent_nanousd,
            assumed_nanousd=self.assumed_nanousd,
            attempt=self.attempts,
            payload=payload_json(payload),
            budgets=_names(self.budgets),
            result=result,
            events=tuple(self._untold),
        )

    def _tell(self, kind: Literal["model-called", "fallback-used"], payload: str) -> None:
        self._untold.append(AttemptEvent(kind, self.attempts, payload))


def cost_of_dead_hold(found: OpenCall) -> int:
    """What a hold comes to whose worker is gone: all of it where a request may be under way, else what is known."""
    return found.amount_nanousd if found.may_be_under_way else found.spent_nanousd


def settle_dead_hold(
    *,
    call_id: str,
    user_id: str,
    found: OpenCall,
    outcome: Literal["expired", "taken_over"],
    reason: str,
    result: str = "",
) -> SettleRequest:
    """Settle a hold whose worker is gone: in full where a request may be under way, else at what is known (G3).

    With a `result` the call is over; without one it may be run again.
    """
    cost = cost_of_dead_hold(found)
    assumed = found.assumed_nanousd + cost - found.spent_nanousd
    basis: Basis = "assumed" if assumed else "reported" if cost else "released"
    payload = CostRecorded(basis=basis, assumed_nanousd=assumed, outcome=outcome, reason=reason)
    return SettleRequest(
        call_id=call_id,
        user_id=user_id,
        hold=found.hold,
        cost_nanousd=cost,
        assumed_nanousd=assumed,
        attempt=found.attempts_begun,
        is_final=bool(result),
        payload=payload_json(payload),
        budgets=found.budgets,
        result=result,
    )


def _names(budgets: Sequence[BudgetCap]) -> tuple[str, ...]:
    return tuple(budget.name for budget in budgets)
