"""The changes of a what-if: caps, prices, routes, and the rules by which they replace what was recorded.

Invariant: what is not changed keeps the recorded amount, to the nano-dollar.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tollbook.inference.budgets import calendar_of
from tollbook.inference.prices.model_price import TOKENS_PER_MTOK, ModelPrice
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.routes import Route, Target
from tollbook.schemas.usage import Usage

PriceOf = Callable[[str, int], ModelPrice]
"""Returns the price of a model at a moment (milliseconds since the epoch). Errors: PriceUnknown."""


@dataclass(frozen=True, slots=True)
class OtherRoute:
    """Other models for a task type. None keeps the recorded ones; without a model in `fallbacks`, there is none.

    `cheaper` is the model for calls whose first model does not fit; it counts only where the route `states_cheaper`,
    else that of the policy then does.
    """

    model: str | None = None
    fallbacks: tuple[str, ...] | None = None
    cheaper: str | None = None
    states_cheaper: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """What is changed. Caps in nano-dollars; prices by model id in lower case; routes by task type.

    `policy` is another policy as a whole, whose further budgets count if it `changes_budgets`; `repriced` are the
    models, in lower case, that have its prices, each at its moment.
    """

    plan_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    user_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    prices: Mapping[str, ModelPrice] = field(default_factory=dict[str, ModelPrice])
    routes: Mapping[str, OtherRoute] = field(default_factory=dict[str, OtherRoute])
    policy: Policy | None = None
    changes_budgets: bool = False
    repriced: frozenset[str] = frozenset()

    @classmethod
    def of_policy(cls, other: Policy, in_force: Policy) -> "Alternatives":
        """Return what another policy changes of the one in force. What both say alike keeps what was recorded."""
        plans, users = other.plan_caps_nanousd, other.user_caps_nanousd
        models = [*other.prices, *in_force.prices]
        return cls(
            plan_caps_nanousd={name: cap for name, cap in plans.items() if in_force.plan_caps_nanousd.get(name) != cap},
            user_caps_nanousd={name: cap for name, cap in users.items() if in_force.user_caps_nanousd.get(name) != cap},
            routes={
                name: OtherRoute(
                    route.model,
                    tuple(target.model for target in route.fallbacks),
                    None if route.cheaper_target is None else route.cheaper_target.model,
                    states_cheaper=True,
                )
                for name, route in other.tasks.items()
                if name in in_force.tasks and _targets(in_force.tasks[name]) != _targets(route)
            },
            policy=other,
            changes_budgets=(other.budgets, calendar_of(other)) != (in_force.budgets, calendar_of(in_force)),
            repriced=frozenset(
                model.lower() for model in models if in_force.prices.get(model) != other.prices.get(model)
            ),
        )

    def with_changes(self, other: "Alternatives") -> "Alternatives":
        """Return these changes with others, which win."""
        return Alternatives(
            plan_caps_nanousd={**self.plan_caps_nanousd, **other.plan_caps_nanousd},
            user_caps_nanousd={**self.user_caps_nanousd, **other.user_caps_nanousd},
            prices={**self.prices, **other.prices},
            routes={**self.routes, **other.routes},
            policy=self.policy,
            changes_budgets=self.changes_budgets,
            repriced=self.repriced,
        )

    @property
    def has_cheaper(self) -> bool:
        """Whether a changed route, or one of the other policy, has a cheaper model."""
        others = () if self.policy is None else self.policy.tasks.values()
        return any(route.cheaper for route in (*self.routes.values(), *others))

    @property
    def changes_prices(self) -> bool:
        """Whether an attempt could have another cost."""
        return bool(self.prices or self.routes or self.repriced)

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.plan_caps_nanousd or self.user_caps_nanousd or self.changes_prices or self.changes_budgets)


def _targets(route: Route) -> tuple[Target | None, ...]:
    return (route.cheaper_target, route.first, *route.fallbacks)


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
        self._repriced = alternatives.repriced
        self._routes = alternatives.routes
        self._price_of = price_of

    def route(self, task_type: str) -> OtherRoute:
        """Return the changed route of a task type; one that changes nothing where it is not changed."""
        return self._routes.get(task_type, OtherRoute())

    def changes_route(self, task_type: str) -> bool:
        """Whether the calls of this type would have had another route."""
        return task_type in self._routes

    def drops_fallback(self, task_type: str, place: int) -> bool:
        """Whether calls of this type would have had no model at this place of their route, from 0."""
        fallbacks = self.route(task_type).fallbacks
        return fallbacks is not None and place > len(fallbacks)

    def price(self, model: str, at_ms: int, *, task_type: str = "", place: int = 0) -> ModelPrice | None:
        """Return the changed price of an attempt at `model`, or None if it is not changed.

        `place` is that of the model among those that its call tried, from 0.
        """
        route = self.route(task_type)
        other = dict(enumerate((route.model, *(route.fallbacks or ())))).get(place)
        return self.price_instead(model, model if other is None else other, at_ms)

    def price_instead(self, model: str, asked: str, at_ms: int) -> ModelPrice | None:
        """Return the price of `asked` in the place of the recorded `model`; None if it is not changed."""
        if (found := self._prices.get(asked.lower())) is not None:
            return found
        is_same = asked.lower() == model.lower() and asked.lower() not in self._repriced
        return None if is_same else self._price_of(asked, at_ms)


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
