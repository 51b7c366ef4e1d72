"""Calls to models under a budget.

    from inference import InferenceClient, Publisher, MODEL_ROUTING, COST_CAPS

Importing this package does no work; what it names is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.client import InferenceClient
    from inference.cost_tracker import CostTracker
    from inference.errors import AppError, ResultTimeout
    from inference.publisher import Publisher, TaskUnconfirmed
    from inference.routing import COST_CAPS, MODEL_ROUTING
    from inference.usage_service import UsageService
    from ledger.errors import LedgerUnavailable
    from schemas.tasks import InvalidTask

__all__ = [
    "COST_CAPS",
    "MODEL_ROUTING",
    "AppError",
    "CostTracker",
    "InferenceClient",
    "InvalidTask",
    "LedgerUnavailable",
    "Publisher",
    "ResultTimeout",
    "TaskUnconfirmed",
    "UsageService",
]

_HOME = {
    "InferenceClient": "inference.client",
    "CostTracker": "inference.cost_tracker",
    "AppError": "inference.errors",
    "ResultTimeout": "inference.errors",
    "Publisher": "inference.publisher",
    "TaskUnconfirmed": "inference.publisher",
    "COST_CAPS": "inference.routing",
    "MODEL_ROUTING": "inference.routing",
    "UsageService": "inference.usage_service",
    "LedgerUnavailable": "ledger.errors",
    "InvalidTask": "schemas.tasks",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module 'inference' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
