"""Tollbook: an event-sourced spend ledger for LLM calls.

    from tollbook import InferenceClient, Publisher, MODEL_ROUTING, COST_CAPS

These are the public names. Importing this package does no work; a name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tollbook.inference.client import InferenceClient
    from tollbook.inference.cost_tracker import CostTracker
    from tollbook.inference.errors import AppError, ResultTimeout
    from tollbook.inference.publisher import Publisher, TaskUnconfirmed
    from tollbook.inference.routing import COST_CAPS, MODEL_ROUTING
    from tollbook.inference.runtime import connect_runtime
    from tollbook.inference.usage_service import UsageService
    from tollbook.ledger.errors import LedgerUnavailable
    from tollbook.schemas.tasks import InvalidTask

__version__ = "0.1.0"

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
    "connect_runtime",
]

_MODULES = {
    "InferenceClient": "tollbook.inference.client",
    "CostTracker": "tollbook.inference.cost_tracker",
    "AppError": "tollbook.inference.errors",
    "ResultTimeout": "tollbook.inference.errors",
    "Publisher": "tollbook.inference.publisher",
    "TaskUnconfirmed": "tollbook.inference.publisher",
    "COST_CAPS": "tollbook.inference.routing",
    "MODEL_ROUTING": "tollbook.inference.routing",
    "UsageService": "tollbook.inference.usage_service",
    "connect_runtime": "tollbook.inference.runtime",
    "LedgerUnavailable": "tollbook.ledger.errors",
    "InvalidTask": "tollbook.schemas.tasks",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module 'tollbook' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
