"""The changes of a what-if: caps, prices, routes, and the rules by which they replace what was recorded.

Invariant: what is not changed keeps the recorded amount, to the nano-dollar.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tollbook.inference.prices.model_price import TOKENS_PER_MTOK, ModelPrice
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.policy import default_policy
from tollbook.schemas.usage import Usage

PriceOf = Callable[[str, int], ModelPrice]
"""Returns the price of a model at a moment (milliseconds since the epoch). Errors: PriceUnknown."""


@dataclass(frozen=True, slots=True)
class OtherRoute:
    """Other models for a task type. None keeps the recorded model; `has_fallback` false drops the fallback."""

    model: str | None = None
    fallback: str | None = None
    has_fallback: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """What is changed. Caps in nano-dollars; prices by model id in lower case; routes by task type."""

    plan_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    user_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    prices: Mapping[str, ModelPrice] = field(default_factory=dict[str, ModelPrice])
    routes: Mapping[str, OtherRoute] = field(default_factory=dict[str, OtherRoute])

    @property
    def changes_prices(self) -> bool:
        """Whether an attempt could have another cost."""
        return bool(self.prices or self.routes)

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.plan_caps_nanousd or self.user_caps_nanousd or self.changes_prices)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCaps:
    """The caps in the settings, which tell a user's own cap from the plan's."""

    plans: Mapping[str, int] = field(default_factory=lambda: default_policy().plan_caps_nanousd)
    users: Mapping[str, int] = field(default_factory=dict[str, int])

    def is_of_plan(self, plan: str, cap_nanousd: int) -> bool:
        """Whether an assigned cap is just its plan's: the one in the settings, or the documented one."""
        return cap_nanousd in (self.plans.get(plan), default_policy().plan_caps_nanousd.get(plan))


@dataclass(frozen=True, slots=True)
class BoundTokens:
    """The most tokens that an attempt of a call can have, taken as the same for every model."""

    prompt: int
    completion: int

    def cost_at_most(self, price: ModelPrice) -> int:
        """Return the bound of an attempt at this price, as a reservation is bounded, in nano-dollars."""
        prompt_price, completion_price = price.max_prices(self.prompt)
        tokens_nanousd = self.prompt * prompt_price + self.completion * completion_price
        return min(-(-tokens_nanousd // TOKENS_PER_MTOK) + price.request_nanousd, MAX_NANOUSD)


class Repricing:
    """The changed price of an attempt; None where the recorded amount is kept."""

    def __init__(self, alternatives: Alternatives, price_of: PriceOf) -> None:
        self._prices = alternatives.prices
        self._routes = alternatives.routes
        self._price_of = price_of

    def drops_fallback(self, task_type: str) -> bool:
        """Whether calls of this type would have had no fallback."""
        route = self._routes.get(task_type)
        return route is not None and not route.has_fallback

    def price(self, model: str, at_ms: int, *, task_type: str = "", is_fallback: bool = False) -> ModelPrice | None:
        """Return the changed price of an attempt at `model`, or None if it is not changed."""
        route = self._routes.get(task_type)
        other = None if route is None else route.fallback if is_fallback else route.model
        asked = model if other is None else other
        found = self._prices.get(asked.lower())
        if found is not None:
            return found
        return None if asked.lower() == model.lower() else self._price_of(asked, at_ms)


def charge_at(
    price: ModelPrice, *, basis: str, usage: Mapping[str, int] | None, tokens: BoundTokens | None
) -> int | None:
    """Price an attempt again by its recorded tokens; None if they are not known.

    An attempt that was assumed at its bound is assumed at the new bound; one that was not charged is not charged.
    """
    if basis == "released":
        return 0
    if basis == "assumed":
        return None if tokens is None else tokens.cost_at_most(price)
    return None if usage is None else price.cost(Usage(**usage))
