"""The open hold of one call: its amount, what its attempts cost, and the events that are not yet recorded.

Plain bookkeeping without I/O; the runner uses it. All money is in nano-dollars.
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

_EXPENSIVE_TIERS = frozenset({"priority", "fast", "us"})
# If attempts were charged on different bases, the basis of the whole is the least certain one.
_LEAST_CERTAIN_FIRST: tuple[Basis, ...] = ("assumed", "priced", "reported", "released")


@dataclass(frozen=True, slots=True)
class Charge:
    """What one attempt is charged at, and why. `source` is the source of the price, if it was priced."""

    nanousd: int
    basis: Basis
    source: str | None = None

    @property
    def assumed_nanousd(self) -> int:
        """The unconfirmed part of the charge: all of it, or nothing."""
        return self.nanousd if self.basis == "assumed" else 0


def with_costliest_usage(attempt: Attempt, bound: Bound, prices: PriceCatalogue, now_ms: int) -> Attempt:
    """Return an attempt with the costliest reading of its reported usage, and a doubt if the readings differ (G3)."""
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
        elif is_usual and attempt.service_tier in _EXPENSIVE_TIERS:
            doubt = f"no price is known for {attempt.service_tier} processing"
    return replace(attempt, usage=readings[costs.index(max(costs))], other_readings=(), usage_doubt=doubt)


def _at_tiers(readings: Sequence[Usage], price: ModelPrice) -> Iterator[Usage]:
    """Yield further readings between two of the same total, whose prompt just reaches a more expensive tier."""
    for low, high in combinations(sorted(readings, key=lambda usage: usage.prompt_tokens), 2):
        for tier in price.tiers[1:] if low.total_tokens == high.total_tokens else ():
            start = tier.above_prompt_tokens + 1
            if low.prompt_tokens < start < high.prompt_tokens:
                completion = low.total_tokens - start
                yield low.model_copy(update={"prompt_tokens": start, "completion_tokens": completion})


def charge_of(attempt: Attempt, bound: Bound, prices: PriceCatalogue, now_ms: int) -> Charge:
    """Price an attempt: at the cost that the provider reports, else at its priced usage, else at its full bound (G3).

    `bound` is this attempt's. An explicit zero is a cost. An attempt that provably was not charged is released.
    """
    if attempt.charge == "none":
        return Charge(0, "released")
    if attempt.reported_cost_nanousd is not None:
        return Charge(attempt.reported_cost_nanousd, "reported")
    if attempt.charge == "known" and attempt.usage is not None:
        try:
            price = prices.price(bound.model, now_ms, service_tier=attempt.service_tier)
            tokens_nanousd = price.cost(attempt.usage)
            fees_nanousd = attempt.fee_nanousd + bound.fee_without(media_of(attempt.usage))
            priced = Charge(min(tokens_nanousd + fees_nanousd, MAX_NANOUSD), "priced", price.source or None)
            if price.can_price(attempt.usage):
                return priced
            return Charge(max(priced.nanousd, bound.amount_nanousd), "assumed")  # G3
        except PriceUnknown:
            pass  # The catalogue no longer has the model; the bound still covers the attempt.
    return Charge(max(bound.amount_nanousd, attempt.fee_nanousd), "assumed")  # G3


@dataclass(slots=True, kw_only=True)
class Hold:
    """One open hold. `bound` is the next attempt's; `attempts` counts the call's attempts over all its holds.

    `downgraded_from` is the route's first model if that model did not fit a budget.
    `run` is the run that opened the hold, as on the ledger; `budgets` are the hold's budgets, with their caps by the
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
        """Start an attempt: count it."""
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

    def abandon_attempt(self, reported_nanousd: int | None = None) -> None:
        """Charge the attempt in flight, if there is one, without its reply.

        `reported_nanousd` is the cost by the provider; if it is None, the full bound is charged (G3).
        """
        if not self._is_attempting:
            return
        self._is_attempting = False
        charge = Charge(self.bound.amount_nanousd, "assumed")  # G3
        if reported_nanousd is not None:
            charge = Charge(reported_nanousd, "reported")
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
        """Add a change of model to the pending events."""
        self._add_event("fallback-used", payload.model_copy(update={"hold": self.number}))

    def attempts_of(self, target: Target) -> int:
        """Return how often a model was tried under this hold."""
        return self._attempts_by_target[target]

    @property
    def id_in_flight(self) -> str | None:
        """The provider's id of the attempt in flight; None if there is none, or its id is not known yet."""
        return self.generation_id if self._is_attempting else None

    @property
    def shortage_nanousd(self) -> int:
        """How much the hold must be extended by to cover the next attempt."""
        return max(0, self.spent_nanousd + self.bound.amount_nanousd - self.amount_nanousd)

    @property
    def is_last_assumed(self) -> bool:
        """Whether the cost of the last attempt is unknown to this run."""
        return self._last_basis == "assumed"

    @property
    def basis(self) -> Basis:
        """The least certain basis of what was spent."""
        for basis in _LEAST_CERTAIN_FIRST:
            if basis in self._bases:
                return basis
        return "released"

    def record_request(self, *, extension_payload: str) -> RecordRequest:
        """Return the request that records the attempts so far and extends the hold for the next one."""
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
        """Clear the pending events: they are on the ledger."""
        self._pending_events.clear()

    def note_request(self, generation_id: str) -> NoteRequest:
        """Return the request that notes the provider's id of the attempt in flight."""
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
        """Return the request that settles the hold at the cost of its attempts."""
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
        """Return the request that corrects the cost of a hold that another process has settled meanwhile."""
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
