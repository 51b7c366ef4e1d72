"""The open hold of one call: what it covers, what its attempts cost, and which events are still to be recorded.

Plain bookkeeping without I/O; the runner drives it. Every number of money is nano-dollars.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

from tollbook.inference.attempts import Attempt
from tollbook.inference.bounds import Bound
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.ledger.gate.requests import (
    AdjustRequest,
    AttemptEvent,
    BudgetCap,
    NoteRequest,
    RecordRequest,
    SettleRequest,
)
from tollbook.schemas.events import Basis, CostAdjusted, CostRecorded, FallbackUsed, ModelCalled, payload_json
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.routes import Target, named_provider
from tollbook.schemas.usage import Usage, media_of

_DEAR_TIERS = frozenset({"priority", "fast", "us"})
# Which basis names the whole, when attempts were charged on different ones: the least certain.
_LEAST_CERTAIN_FIRST: tuple[Basis, ...] = ("assumed", "priced", "reported", "released")


@dataclass(frozen=True, slots=True)
class Charge:
    """What one attempt is charged at, and why. `source` is the price's, where it was priced."""

    nanousd: int
    basis: Basis
    source: str | None = None

    @property
    def assumed_nanousd(self) -> int:
        """The part nobody confirmed: all or nothing."""
        return self.nanousd if self.basis == "assumed" else 0


def with_dearest_usage(attempt: Attempt, bound: Bound, prices: PriceCatalogue, now_ms: int) -> Attempt:
    """Return an attempt with the dearest of what its reported usage can mean, and a doubt if that matters (G3)."""
    if attempt.usage is None or not (attempt.other_readings or attempt.service_tier):
        return attempt
    try:
        price = prices.price(bound.model, now_ms, service_tier=attempt.service_tier)
        is_usual = price == prices.price(bound.model, now_ms)
    except PriceUnknown:
        return attempt
    readings = (attempt.usage, *attempt.other_readings)
    readings += tuple(_at_tiers(readings, price))
    costs = [price.cost(usage) for usage in readings]
    doubt = attempt.usage_doubt
    if doubt is None and attempt.reported_cost_nanousd is None:
        if min(costs) != max(costs):
            doubt = "the reported usage can be read in more than one way"
        elif is_usual and attempt.service_tier in _DEAR_TIERS:
            doubt = f"no price is known for {attempt.service_tier} processing"
    return replace(attempt, usage=readings[costs.index(max(costs))], other_readings=(), usage_doubt=doubt)


def _at_tiers(readings: Sequence[Usage], price: ModelPrice) -> Iterator[Usage]:
    """Yield the readings between those of the same total whose prompt just reaches a dearer tier."""
    for low, high in combinations(sorted(readings, key=lambda usage: usage.prompt_tokens), 2):
        for tier in price.tiers[1:] if low.total_tokens == high.total_tokens else ():
            start = tier.above_prompt_tokens + 1
            if low.prompt_tokens < start < high.prompt_tokens:
                completion = low.total_tokens - start
                yield low.model_copy(update={"prompt_tokens": start, "completion_tokens": completion})


def charge_of(attempt: Attempt, bound: Bound, prices: PriceCatalogue, now_ms: int) -> Charge:
    """Price an attempt: what the provider reports, else its usage priced, else its full bound (G3).

    `bound` is of this attempt. An explicit zero is a price. An attempt that provably was not charged is released.
    """
    if attempt.charge == "none":
        return Charge(0, "released")
    if attempt.reported_cost_nanousd is not None:
        return Charge(attempt.reported_cost_nanousd, "reported")
    if attempt.charge == "known" and attempt.usage is not None:
        try:
            price = prices.price(bound.model, now_ms, service_tier=attempt.service_tier)
            tokens_nanousd = price.cost(attempt.usage)
            fees_nanousd = attempt.fee_nanousd + bound.fee_beside(media_of(attempt.usage))
            priced = Charge(min(tokens_nanousd + fees_nanousd, MAX_NANOUSD), "priced", price.source or None)
            if price.can_price(attempt.usage):
                return priced
            return Charge(max(priced.nanousd, bound.amount_nanousd), "assumed")  # G3
        except PriceUnknown:
            pass  # The catalogue lost the model since the hold was made; the bound still covers it.
    return Charge(max(bound.amount_nanousd, attempt.fee_nanousd), "assumed")  # G3


@dataclass(slots=True, kw_only=True)
class Hold:
    """One open hold. `bound` is of the attempt that it pays for next; `attempts` counts the call's over all its holds.

    `downgraded_from` is the route's first model where that did not fit a budget.
    `run` is the run that opened it, as the ledger has it; `budgets` are those it stands against, with their caps by the
    policy of `policy_version`.
    """

    call_id: str
    user_id: str
    run: str
    number: int
    amount_nanousd: int
    budgets: tuple[BudgetCap, ...]
    bound: Bound
    attempts: int
    downgraded_from: str | None = None
    policy_version: int
    spent_nanousd: int = 0
    assumed_nanousd: int = 0
    last: Attempt | None = None
    generation_id: str | None = None
    """The provider's id of the attempt in flight, once its reply has begun."""
    _bases: set[Basis] = field(default_factory=set[Basis])
    _attempts_by_target: Counter[Target] = field(default_factory=Counter[Target])
    _pending_events: list[AttemptEvent] = field(default_factory=list[AttemptEvent])
    _is_attempting: bool = False
    _last_basis: Basis | None = None

    def begin_attempt(self) -> None:
        """Count an attempt that starts now."""
        self.attempts += 1
        self._attempts_by_target[self.bound.target] += 1
        self._is_attempting = True
        self.generation_id = None

    def finish_attempt(self, attempt: Attempt, charge: Charge) -> None:
        """Charge the attempt in flight."""
        self._is_attempting = False
        self.last = attempt
        self._charge(charge)
        self._add_event(
            "model-called",
            ModelCalled(
                hold=self.number,
                model=self.bound.model,
                provider=named_provider(self.bound.provider),
                model_used=attempt.model_used,
                outcome=attempt.outcome,
                http_status=attempt.http_status,
                error=attempt.error,
                latency_ms=attempt.latency_ms,
                usage=attempt.usage,
                generation_id=attempt.generation_id,
                charge_nanousd=charge.nanousd,
                charge_basis=charge.basis,
                price_source=charge.source,
                finish_reason=attempt.finish_reason,
                reason=attempt.reason,
                error_details=attempt.error_details,
                usage_doubt=attempt.usage_doubt,
            ),
        )

    def abandon_attempt(self, told_nanousd: int | None = None) -> None:
        """Charge an attempt whose reply nobody will read, if one is in flight.

        It is charged at what the provider says that it cost, else at its full bound (G3).
        """
        if not self._is_attempting:
            return
        self._is_attempting = False
        charge = Charge(self.bound.amount_nanousd, "assumed")  # G3
        if told_nanousd is not None:
            charge = Charge(told_nanousd, "reported")
        self._charge(charge)
        self._add_event(
            "model-called",
            ModelCalled(
                hold=self.number,
                model=self.bound.model,
                provider=named_provider(self.bound.provider),
                outcome="abandoned",
                error="cancelled",
                latency_ms=0,
                generation_id=self.generation_id,
                charge_nanousd=charge.nanousd,
                charge_basis=charge.basis,
            ),
        )

    def note_fallback(self, payload: FallbackUsed) -> None:
        """Note a change of model; it is recorded with the next step."""
        self._add_event("fallback-used", payload.model_copy(update={"hold": self.number}))

    def attempts_of(self, target: Target) -> int:
        """How often a model was tried under this hold."""
        return self._attempts_by_target[target]

    @property
    def id_in_flight(self) -> str | None:
        """The provider's id of the attempt in flight; None without one, or while it is not known."""
        return self.generation_id if self._is_attempting else None

    @property
    def shortage_nanousd(self) -> int:
        """What is missing for the next attempt."""
        return max(0, self.spent_nanousd + self.bound.amount_nanousd - self.amount_nanousd)

    @property
    def is_last_assumed(self) -> bool:
        """Whether nobody has told this run what its last attempt cost."""
        return self._last_basis == "assumed"

    @property
    def basis(self) -> Basis:
        """The least certain basis of what was spent."""
        for basis in _LEAST_CERTAIN_FIRST:
            if basis in self._bases:
                return basis
        return "released"

    def record_request(self, *, extension_payload: str) -> RecordRequest:
        """Record the attempts so far, and extend the hold for the next, which begins."""
        return RecordRequest(
            call_id=self.call_id,
            user_id=self.user_id,
            hold=self.number,
            attempts_begun=self.attempts + 1,
            spent_nanousd=self.spent_nanousd,
            assumed_nanousd=self.assumed_nanousd,
            events=tuple(self._pending_events),
            budgets=self.budgets,
            extension_nanousd=self.shortage_nanousd,  # G1
            extension_payload=extension_payload,
            policy_version=self.policy_version,
        )

    def mark_recorded(self) -> None:
        """Note that the pending events are on the ledger."""
        self._pending_events.clear()

    def note_request(self, generation_id: str) -> NoteRequest:
        """Keep the provider's id of the attempt in flight."""
        return NoteRequest(
            call_id=self.call_id,
            user_id=self.user_id,
            hold=self.number,
            attempt=self.attempts,
            provider=self.bound.provider,
            generation_id=generation_id,
        )

    def settle_request(
        self, *, outcome: Literal["done", "failed"], reason: str | None, result: str, is_final: bool
    ) -> SettleRequest:
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
            budgets=tuple([budget.name for budget in self.budgets]),
            result=result,
            events=tuple(self._pending_events),
        )

    def adjust_request(self, *, reason: str, result: str) -> AdjustRequest:
        """Correct a hold that somebody else settled meanwhile."""
        payload = CostAdjusted(
            basis=self.basis,
            reason=reason,
            author=self.run,
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
            budgets=tuple([budget.name for budget in self.budgets]),
            result=result,
            events=tuple(self._pending_events),
        )

    def _charge(self, charge: Charge) -> None:
        self.spent_nanousd += charge.nanousd
        self.assumed_nanousd += charge.assumed_nanousd
        self._bases.add(charge.basis)
        self._last_basis = charge.basis

    def _add_event(self, kind: Literal["model-called", "fallback-used"], payload: ModelCalled | FallbackUsed) -> None:
        self._pending_events.append(AttemptEvent(kind, self.attempts, payload_json(payload)))
