"""Tollbook: an event-sourced spend ledger for LLM calls.

    from tollbook import InferenceClient, Publisher, MODEL_ROUTING, COST_CAPS

`__all__` has the public names. Importing the package loads no module; a name's module is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tollbook.inference.client import InferenceClient
    from tollbook.inference.cost_tracker import CostTracker, UsageSummary
    from tollbook.inference.current_runtime import connect_runtime
    from tollbook.inference.errors import (
        AttemptsExhausted,
        BudgetWaitTimeout,
        ContentFiltered,
        InferenceFailed,
        OutputInvalid,
        OutputLimitReached,
        ParameterUnsupported,
        PlanLimitReached,
        PriceUnknown,
        ProviderError,
        ProviderNotConfigured,
        ProviderRefused,
        ProviderUnavailable,
        ResultTimeout,
        SettingsError,
        TaskUnconfirmed,
    )
    from tollbook.inference.publisher import Publisher
    from tollbook.inference.routing import COST_CAPS, MODEL_ROUTING
    from tollbook.inference.structured_output import ParsedResult
    from tollbook.inference.task_deltas import TaskUpdate
    from tollbook.inference.usage_service import UsageService
    from tollbook.ledger.errors import (
        BaselineUnavailable,
        CallUnknown,
        IdempotencyConflict,
        LedgerError,
        LedgerRefused,
        LedgerUnavailable,
    )
    from tollbook.schemas.errors import AppError
    from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
    from tollbook.schemas.tasks import InvalidTask

    __version__: str

__all__ = [
    "COST_CAPS", "MODEL_ROUTING", "AppError", "AttemptsExhausted", "BaselineUnavailable", "BudgetWaitTimeout",
    "CallUnknown", "ContentFiltered", "CostTracker", "ErrorCode", "IdempotencyConflict", "InferenceClient",
    "InferenceFailed", "InferenceResult", "InvalidTask", "LedgerError", "LedgerRefused", "LedgerUnavailable",
    "OutputInvalid", "OutputLimitReached", "ParameterUnsupported", "ParsedResult", "PlanLimitReached", "PriceUnknown",
    "ProviderError", "ProviderNotConfigured", "ProviderRefused", "ProviderUnavailable", "Publisher", "ResultTimeout",
    "SettingsError", "TaskStatus", "TaskUnconfirmed", "TaskUpdate", "UsageService", "UsageSummary", "connect_runtime",
]  # fmt: skip

_NAMES: Final = {
    "tollbook.inference.client": ("InferenceClient",),
    "tollbook.inference.cost_tracker": ("CostTracker", "UsageSummary"),
    "tollbook.inference.current_runtime": ("connect_runtime",),
    "tollbook.inference.errors": (
        "AttemptsExhausted", "BudgetWaitTimeout", "ContentFiltered", "InferenceFailed", "OutputInvalid",
        "OutputLimitReached", "ParameterUnsupported", "PlanLimitReached", "PriceUnknown", "ProviderError",
        "ProviderNotConfigured", "ProviderRefused", "ProviderUnavailable", "ResultTimeout", "SettingsError",
        "TaskUnconfirmed",
    ),
    "tollbook.inference.publisher": ("Publisher",),
    "tollbook.inference.routing": ("COST_CAPS", "MODEL_ROUTING"),
    "tollbook.inference.structured_output": ("ParsedResult",),
    "tollbook.inference.task_deltas": ("TaskUpdate",),
    "tollbook.inference.usage_service": ("UsageService",),
    "tollbook.ledger.errors": (
        "BaselineUnavailable", "CallUnknown", "IdempotencyConflict", "LedgerError", "LedgerRefused",
        "LedgerUnavailable",
    ),
    "tollbook.schemas.errors": ("AppError",),
    "tollbook.schemas.results": ("ErrorCode", "InferenceResult", "TaskStatus"),
    "tollbook.schemas.tasks": ("InvalidTask",),
}  # fmt: skip
_MODULES: Final = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from its module, and `__version__` from the metadata of the installed distribution."""
    if name == "__version__":
        return globals().setdefault(name, import_module("importlib.metadata").version("tollbook"))
    if name not in _MODULES:
        raise AttributeError(f"module 'tollbook' has no attribute {name!r}")
    return globals().setdefault(name, getattr(import_module(_MODULES[name]), name))


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
