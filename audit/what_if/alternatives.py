"""The changes of a what-if: caps, prices, routes, and the rules by which they replace what was recorded.

Invariant: what is not changed keeps the recorded amount, to the nano-dollar.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tollbook.inference.budgets import calendar_of
from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.model_price import TOKENS_PER_MTOK, ModelPrice
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.routes import DEFAULT_PROVIDER, Route, Target
from tollbook.schemas.usage import Usage

PriceOf = Callable[[str, int, str | None], ModelPrice]
"""Returns the price of a model at a moment (milliseconds since the epoch) at a provider; None: at whichever has it.

Errors: PriceUnknown.
"""


@dataclass(frozen=True, slots=True)
class OtherRoute:
    """Other models for a task type. None keeps the recorded ones; an empty `fallbacks` means no fallback.

    `cheaper` is the model for calls whose first model does not fit; it counts only where the route `states_cheaper`,
    else that of the policy then does. `providers` are those of the model and the fallbacks, in order, where the route
    says so.
    """

    model: str | None = None
    fallbacks: tuple[str, ...] | None = None
    cheaper: str | None = None
    states_cheaper: bool = False
    providers: tuple[str | None, ...] = ()
    cheaper_provider: str | None = None

    def over(self, other: "OtherRoute") -> "OtherRoute":
        """Return this route, completed with what only the other one states."""
        if self.states_cheaper:
            return self
        first = other.provider_at(0) if self.model is None else None
        return replace(
            other,
            model=other.model if self.model is None else self.model,
            fallbacks=other.fallbacks if self.fallbacks is None else self.fallbacks,
            providers=(first, *(other.providers[1:] if self.fallbacks is None else ())),
        )

    def provider_at(self, place: int) -> str | None:
        """Return the provider of the model at a place, counted from 0; None if it is not stated."""
        return self.providers[place] if place < len(self.providers) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """What is changed. Caps in nano-dollars; prices by model id in lower case; routes by task type.

    `policy` is another policy as a whole, whose further budgets count if it `changes_budgets`; `repriced` are the
    models that have its prices, each at its moment: by provider, in lower case.
    """

    plan_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    user_caps_nanousd: Mapping[str, int] = field(default_factory=dict[str, int])
    prices: Mapping[str, ModelPrice] = field(default_factory=dict[str, ModelPrice])
    routes: Mapping[str, OtherRoute] = field(default_factory=dict[str, OtherRoute])
    policy: Policy | None = None
    changes_budgets: bool = False
    repriced: frozenset[tuple[str, str]] = frozenset()

    @classmethod
    def of_policy(cls, other: Policy, in_force: Policy) -> "Alternatives":
        """Return the differences of another policy from the one in force. Where both agree, recorded values stay."""
        plans, users = other.plan_caps_nanousd, other.user_caps_nanousd
        return cls(
            plan_caps_nanousd={name: cap for name, cap in plans.items() if in_force.plan_caps_nanousd.get(name) != cap},
            user_caps_nanousd={name: cap for name, cap in users.items() if in_force.user_caps_nanousd.get(name) != cap},
            routes={
                name: OtherRoute(
                    route.model,
                    tuple(target.model for target in route.fallbacks),
                    None if route.cheaper_target is None else route.cheaper_target.model,
                    states_cheaper=True,
                    providers=tuple(target.provider for target in (route.first, *route.fallbacks)),
                    cheaper_provider=None if route.cheaper_target is None else route.cheaper_target.provider,
                )
                for name, route in other.tasks.items()
                if name in in_force.tasks and _targets(in_force.tasks[name]) != _targets(route)
            },
            policy=other,
            changes_budgets=(other.budgets, calendar_of(other)) != (in_force.budgets, calendar_of(in_force)),
            repriced=frozenset(_repriced(other, in_force)),
        )

    def with_changes(self, other: "Alternatives") -> "Alternatives":
        """Return these changes combined with others, which take precedence."""
        return Alternatives(
            plan_caps_nanousd={**self.plan_caps_nanousd, **other.plan_caps_nanousd},
            user_caps_nanousd={**self.user_caps_nanousd, **other.user_caps_nanousd},
            prices={**self.prices, **other.prices},
            routes={
                **self.routes,
                **{name: route.over(self.routes.get(name, OtherRoute())) for name, route in other.routes.items()},
            },
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


def _repriced(other: Policy, in_force: Policy) -> Iterator[tuple[str, str]]:
    """Yield provider and model where two policies state another price."""
    for provider in sorted({DEFAULT_PROVIDER, *other.providers, *in_force.providers}):
        stated, before = ({**policy.prices, **_own_prices(policy, provider)} for policy in (other, in_force))
        yield from ((provider, model.lower()) for model in {*stated, *before} if stated.get(model) != before.get(model))


def _own_prices(policy: Policy, provider: str) -> Mapping[str, Any]:
    return policy.providers[provider].prices if provider in policy.providers else {}


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

    def price(self, model: Target, at_ms: int, *, task_type: str = "", place: int = 0) -> ModelPrice | None:
        """Return the changed price of an attempt at `model`, or None if it is not changed.

        `place` is that of the model among those that its call tried, from 0.
        """
        route = self.route(task_type)
        other = dict(enumerate((route.model, *(route.fallbacks or ())))).get(place)
        if other is None:
            return self.price_instead(model, model.model, at_ms)
        return self.price_instead(model, other, at_ms, provider=route.provider_at(place))

    def price_instead(self, model: Target, asked: str, at_ms: int, *, provider: str | None = None) -> ModelPrice | None:
        """Return the price of `asked` in the place of the recorded `model`; None if it is not changed.

        Without a `provider`, the recorded model is asked for where it was; so is another one if it has a price there,
        else at whichever provider has one.
        """
        if (found := self._prices.get(asked.lower())) is not None:
            return found
        is_same = asked.lower() == model.model.lower()
        if provider is None and is_same:
            provider = model.provider
        if is_same and provider == model.provider and (provider, asked.lower()) not in self._repriced:
            return None
        if provider is None:
            with contextlib.suppress(PriceUnknown):
                return self._price_of(asked, at_ms, model.provider)
        return self._price_of(asked, at_ms, provider)


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
