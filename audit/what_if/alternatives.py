"""The changes of a what-if: caps, prices, routes, and the rules by which they replace what was recorded.

Invariant: what is not changed keeps the recorded amount, to the nano-dollar.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tollbook.inference.prices.model_price import TOKENS_PER_MTOK, ModelPrice, dated_prices
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.policy import Policy, PriceRule, default_policy
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

    @classmethod
    def of_policy(cls, other: Policy, in_force: Policy, at_ms: int) -> "Alternatives":
        """Return what another policy changes of the one in force: caps of plans and users, prices, routes.

        Prices are those of `at_ms`, milliseconds since the epoch. What both say alike keeps what was recorded.
        """
        plans, users = other.plan_caps_nanousd, other.user_caps_nanousd
        return cls(
            plan_caps_nanousd={name: cap for name, cap in plans.items() if in_force.plan_caps_nanousd.get(name) != cap},
            user_caps_nanousd={name: cap for name, cap in users.items() if in_force.user_caps_nanousd.get(name) != cap},
            prices={
                model.lower(): _price_at(model, rules, at_ms)
                for model, rules in other.prices.items()
                if in_force.prices.get(model) != rules
            },
            routes={
                name: OtherRoute(
                    route.model, route.fallbacks[0].model if route.fallback else None, bool(route.fallback)
                )
                for name, route in other.tasks.items()
                if name in in_force.tasks and in_force.tasks[name].targets[:2] != route.targets[:2]
            },
        )

    def with_changes(self, other: "Alternatives") -> "Alternatives":
        """Return these changes with others, which win."""
        return Alternatives(
            plan_caps_nanousd={**self.plan_caps_nanousd, **other.plan_caps_nanousd},
            user_caps_nanousd={**self.user_caps_nanousd, **other.user_caps_nanousd},
            prices={**self.prices, **other.prices},
            routes={**self.routes, **other.routes},
        )

    @property
    def changes_prices(self) -> bool:
        """Whether an attempt could have another cost."""
        return bool(self.prices or self.routes)

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.plan_caps_nanousd or self.user_caps_nanousd or self.changes_prices)


def _price_at(model: str, rules: Sequence[PriceRule], at_ms: int) -> ModelPrice:
    dated = dated_prices(model, rules)
    begun = [each for each in dated if each.from_ms <= at_ms]
    return (begun[-1] if begun else dated[0]).price


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
