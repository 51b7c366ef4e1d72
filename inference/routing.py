"""Routing: which models serve which task type, and what a policy's routes lack.

The defaults are the documented ones. Their providers retire these models in the course of 2026 (checked November
2026), so every route can be replaced, and `tollbook doctor` says which models the provider no longer offers.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Final, Protocol

from pydantic import ValidationError

from tollbook.inference.errors import SettingsError
from tollbook.inference.prices.model_price import ModelPrice
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.problems import problems_of, unknown_name
from tollbook.schemas.routes import Route
from tollbook.schemas.tasks import PING

MODEL_ROUTING: Final[Mapping[str, Route]] = dict(default_policy().tasks)
"""The routes of the default policy. `ping` has none: it calls no model."""

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


def routing_with(
    overrides: Mapping[str, Mapping[str, object]], routes: Mapping[str, Route] = MODEL_ROUTING
) -> dict[str, Route]:
    """Return routes with some of their fields replaced.

    `overrides` maps task types to any fields of their routes (`fallback` null for none).
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
    """Return one line for each model of a route without a known price; its calls would be refused (G8)."""
    return [
        f"{task_type}: no price is known for its {role} {model}"
        for task_type, route in routing.items()
        for role, model in roles_of(route)
        if not prices.knows(model, at_ms)
    ]


def policy_errors(policy: Policy) -> list[str]:
    """Return why a policy cannot be in force: what it states and nothing would follow.

    What is wrong with its form is refused when it is read: a route whose fallback is its own model, for example.
    """
    return [
        f"providers.{name}: no route can name a provider; OPENROUTER_BASE_URL sets the one that is called"
        for name in policy.providers
    ]


def policy_warnings(policy: Policy, prices: Prices, at_ms: int) -> list[str]:
    """Return what a person should know of a policy before it is in force; `prices` are by that policy."""
    warnings = [f"{problem}: its calls would be refused" for problem in unpriced_routes(policy.tasks, prices, at_ms)]
    for task_type, route in policy.tasks.items():
        if route.cheaper is not None and not _is_cheaper(route.cheaper, route.model, prices, at_ms):
            warnings.append(f"{task_type}: its cheaper model {route.cheaper} is not cheaper than {route.model}")
    return warnings


def _is_cheaper(model: str, than: str, prices: Prices, at_ms: int) -> bool:
    """Whether a model costs less for prompt or completion; true where a price is not known, which is told anyway."""
    if not prices.knows(model, at_ms) or not prices.knows(than, at_ms):
        return True
    one, other = prices.price(model, at_ms).max_prices(0), prices.price(than, at_ms).max_prices(0)
    return one[0] < other[0] or one[1] < other[1]


def roles_of(route: Route) -> list[tuple[str, str]]:
    """Return each model of a route with what it is there for: model, fallback, cheaper model."""
    roles = [("model", route.model), *(("fallback", model) for model in route.fallback)]
    return [*roles, ("cheaper model", route.cheaper)] if route.cheaper is not None else roles
