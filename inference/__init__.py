"""Calls to models under a budget.

    from inference import InferenceClient, MODEL_ROUTING, COST_CAPS

Importing this package does no work; what it names is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.client import InferenceClient
    from inference.cost_tracker import CostTracker
    from inference.errors import AppError
    from inference.routing import COST_CAPS, MODEL_ROUTING
    from inference.usage_service import UsageService

__all__ = ["COST_CAPS", "MODEL_ROUTING", "AppError", "CostTracker", "InferenceClient", "UsageService"]

_HOME = {
    "InferenceClient": "client",
    "CostTracker": "cost_tracker",
    "AppError": "errors",
    "COST_CAPS": "routing",
    "MODEL_ROUTING": "routing",
    "UsageService": "usage_service",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'inference' has no attribute {name!r}")
    return getattr(import_module(f"inference.{_HOME[name]}"), name)
