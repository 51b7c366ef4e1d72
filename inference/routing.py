"""Routing: which model serves which task type.

Model ids stand in one table, `MODELS`, under short names; routes and overrides may use either. The defaults are the
documented ones. Their providers retire these models in the course of 2026 (checked November 2026), so every route can
be overridden, and `tollbook doctor` says which models the provider no longer offers.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Final, Protocol

from pydantic import ValidationError

from tollbook.inference.errors import SettingsError
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.plans import CAPS_NANOUSD
from tollbook.schemas.problems import problems_of, unknown_name
from tollbook.schemas.routes import Route
from tollbook.schemas.tasks import TaskType

MODELS: Final[dict[str, str]] = {
    "claude-3-haiku": "anthropic/claude-3-haiku",
    "claude-sonnet-4": "anthropic/claude-sonnet-4",
    "gemini-flash": "google/gemini-2.5-flash",
    "gpt-4o-mini": "openai/gpt-4o-mini",
}

MODEL_ROUTING: Final[dict[TaskType, Route]] = {
    TaskType.CLASSIFY_ARCHETYPE: Route(
        model=MODELS["claude-3-haiku"], fallback=MODELS["gemini-flash"], max_tokens=200, temperature=0.1
    ),
    TaskType.GENERATE_DRAFT: Route(
        model=MODELS["claude-sonnet-4"], fallback=MODELS["gpt-4o-mini"], max_tokens=2000, temperature=0.7
    ),
    TaskType.SCORE_POST: Route(
        model=MODELS["claude-3-haiku"], fallback=MODELS["gemini-flash"], max_tokens=500, temperature=0.0
    ),
    TaskType.EXTRACT_PATTERNS: Route(
        model=MODELS["claude-3-haiku"], fallback=MODELS["gemini-flash"], max_tokens=1000, temperature=0.2
    ),
}
"""The default routes. `ping` has none: it calls no model."""

COST_CAPS: Final[dict[str, Decimal]] = {
    # Two decimal places, since nine would print as 5.000000000.
    plan.value: usd_from_nanousd(cap).quantize(Decimal("0.01"))
    for plan, cap in CAPS_NANOUSD.items()
}
"""Dollars per billing period by plan, for people; the ledger uses `schemas.plans.CAPS_NANOUSD`."""


class PriceBook(Protocol):
    """Knows the prices of models."""

    def knows(self, model: str, at_ms: int) -> bool:
        """Whether a price of the model is known."""
        ...


def resolve_model(name: str) -> str:
    """Return the model id of a short name; any other name is returned as it is."""
    return MODELS.get(name, name)


def routing_with(overrides: Mapping[str, Mapping[str, object]]) -> dict[TaskType, Route]:
    """Return the default routes with some of their fields replaced.

    `overrides` maps task types to any of `model`, `fallback` (null for none), `max_tokens`, `temperature`.
    Errors: SettingsError, one line for each problem.
    """
    routing = dict(MODEL_ROUTING)
    problems: list[str] = []
    for name, fields in overrides.items():
        task_type = _task_type(name)
        if task_type is None:
            known = [routed.value for routed in MODEL_ROUTING]
            problems.append(
                "'ping' calls no model and has no route" if name == "ping" else unknown_name("task type", name, known)
            )
            continue
        merged: dict[str, object] = {**MODEL_ROUTING[task_type].model_dump(), **fields}
        for field in ("model", "fallback"):
            if isinstance(value := merged[field], str):
                merged[field] = resolve_model(value)
        try:
            routing[task_type] = Route.model_validate(merged)
        except ValidationError as exc:
            problems += problems_of(exc, Route, root=name)
    if problems:
        raise SettingsError(problems)
    return routing


def unpriced_routes(routing: Mapping[TaskType, Route], prices: PriceBook, at_ms: int) -> list[str]:
    """Return one line for each model of a route without a known price; its calls would be refused (G8)."""
    return [
        f"{task_type.value}: no price is known for its {role} {model}"
        for task_type, route in routing.items()
        for role, model in (("model", route.model), ("fallback", route.fallback))
        if model is not None and not prices.knows(model, at_ms)
    ]


def _task_type(name: str) -> TaskType | None:
    return next((task_type for task_type in MODEL_ROUTING if task_type.value == name), None)
