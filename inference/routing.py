"""Routing: the models of each task type, and warnings about a policy's routes.

The default routes are the documented ones. Providers retire these models in the course of 2026 (checked November 2026),
so every route can be replaced, and `tollbook doctor` reports models that the provider no longer offers.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Final, Protocol

from pydantic import ValidationError

from tollbook.inference.errors import SettingsError
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.problems import problems_of, unknown_name
from tollbook.schemas.routes import Route, Target
from tollbook.schemas.tasks import PING

MODEL_ROUTING: Final[Mapping[str, Route]] = dict(default_policy().tasks)
"""The routes of the default policy. `ping` has no route: it calls no model."""

COST_CAPS: Final[Mapping[str, Decimal]] = {
    # Two decimal places, as people write dollars.
    name: plan.cap_usd.quantize(Decimal("0.01"))
    for name, plan in default_policy().plans.items()
}
"""Dollars per billing period by plan of the default policy, for people; the gate takes nano-dollars."""


class Prices(Protocol):
    """Knows the prices of models."""

    def price(self, model: str, at_ms: int) -> ModelPrice:
        """Return a price. Errors: PriceUnknown."""
        ...

    def knows(self, model: str, at_ms: int) -> bool:
        """Whether a price of the model is known."""
        ...

    def at(self, provider: str) -> "Prices":
        """Return the prices of a provider of the policy."""
        ...


def routing_with(
    overrides: Mapping[str, Mapping[str, object]], routes: Mapping[str, Route] = MODEL_ROUTING
) -> dict[str, Route]:
    """Return routes with some of their fields replaced.

    `overrides` maps task types to fields of their routes (`fallback` null means no fallback).
    Errors: SettingsError, one line for each problem.
    """
    routing = dict(routes)
    problems: list[str] = []
    for name, fields in overrides.items():
        if name not in routes:
            problems.append(
                f"{PING!r} calls no model and has no route"
                if name == PING
                else unknown_name("task type", name, list(routes))
            )
            continue
        try:
            routing[name] = Route.model_validate({**dict(routes[name]), **fields})
        except ValidationError as exc:
            problems += problems_of(exc, Route, root=name, limit=exc.error_count())
    if problems:
        raise SettingsError(problems)
    return routing


def unpriced_routes(routing: Mapping[str, Route], prices: Prices, at_ms: int) -> list[str]:
    """Return one line for each model of a route without a known price: its calls would be refused (G8)."""
    return [
        f"{task_type}: no price is known for its {role} {target}"
        for task_type, route in routing.items()
        for role, target in roles_of(route)
        if not prices.at(target.provider).knows(target.model, at_ms)
    ]


def policy_warnings(policy: Policy, prices: Prices, at_ms: int) -> list[str]:
    """Return what a person should know about a policy before it is applied; `prices` are the policy's."""
    warnings = [f"{problem}: its calls would be refused" for problem in unpriced_routes(policy.tasks, prices, at_ms)]
    for task_type, route in policy.tasks.items():
        cheaper = route.cheaper_target
        if cheaper is not None and not _is_cheaper(cheaper, route.first, prices, at_ms):
            warnings.append(f"{task_type}: its cheaper model {cheaper} is not cheaper than {route.first}")
    return warnings


def _is_cheaper(target: Target, than: Target, prices: Prices, at_ms: int) -> bool:
    """Whether a model is cheaper for prompt or completion; True if a price is unknown, which has another warning."""
    if not all(prices.at(each.provider).knows(each.model, at_ms) for each in (target, than)):
        return True
    one, other = (prices.at(each.provider).price(each.model, at_ms).max_prices(0) for each in (target, than))
    return one[0] < other[0] or one[1] < other[1]


def roles_of(route: Route) -> list[tuple[str, Target]]:
    """Return each model of a route with its role: model, fallback, cheaper model."""
    roles = [("model", route.first), *(("fallback", target) for target in route.fallbacks)]
    return roles if route.cheaper_target is None else [*roles, ("cheaper model", route.cheaper_target)]
