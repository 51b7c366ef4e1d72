"""The errors that Tollbook raises to an application: one tree, so that `except AppError` catches them all.

    AppError
    ├── InvalidTask                 INVALID_TASK           correct the value that the message names
    │   └── ParameterUnsupported    INVALID_TASK           leave the parameter out, or choose another model
    ├── SettingsError               SETTINGS_INVALID       correct the environment or `.env`; every problem is listed
    ├── PlanLimitReached            PLAN_LIMIT_REACHED     a smaller call, a higher cap, or the next period
    ├── BudgetWaitTimeout           BUDGET_WAIT_TIMEOUT    retry later: other calls held the money
    ├── PriceUnknown                PRICE_UNKNOWN          configure a price, or choose another model
    ├── InferenceFailed             INFERENCE_FAILED       retry with a new task id; `data` says what was spent
    │   ├── OutputLimitReached      OUTPUT_LIMIT_REACHED   raise max_tokens, or ask for less reasoning
    │   └── ContentFiltered         CONTENT_FILTERED       change the prompt
    ├── OutputInvalid               OUTPUT_INVALID         the answer was charged and is in `result`; change the prompt
    ├── AttemptsExhausted           ATTEMPTS_EXHAUSTED     find out why workers ended, then retry the dead letter
    ├── ResultTimeout               RESULT_TIMEOUT         wait again: the task is still to be done
    ├── ProviderError               PROVIDER_ERROR         a request to the provider other than a completion failed
    │   ├── ProviderUnavailable     PROVIDER_UNAVAILABLE   retry later: nothing was charged
    │   ├── ProviderRefused         PROVIDER_REFUSED       correct the key or the request
    │   └── ProviderNotConfigured PROVIDER_NOT_CONFIGURED name a provider of the policy, and set its key
    └── LedgerError                 LEDGER_ERROR           see the message
        ├── IdempotencyConflict     IDEMPOTENCY_CONFLICT   use a new id: this one was used with other content
        ├── CallUnknown             CALL_UNKNOWN           correct the call id, or its record has expired
        ├── LedgerUnavailable       LEDGER_UNAVAILABLE     retry with the same task id
        │   ├── TaskUnconfirmed     LEDGER_UNAVAILABLE     publish again with `task_id`
        │   └── BaselineUnavailable LEDGER_UNAVAILABLE     retry later: the projection is down or being rebuilt
        └── LedgerRefused           LEDGER_UNAVAILABLE     a person must look: the stores disagree or cannot serve

The codes of `schemas.results.ErrorCode` are the same on a task's result. The classes are defined in
`inference.errors`, `ledger.errors` and `schemas.tasks`, and further subclasses beside the code that raises them.
Errors of Redis, DuckDB and HTTP are translated where they occur, and kept as the cause.
"""

from collections.abc import Mapping
from typing import ClassVar


class AppError(Exception):
    """Base of every error that Tollbook raises on purpose.

    `code` tells programs the reason, `message` tells people, and `data` has the values of the message by name.
    """

    code: ClassVar[str]

    def __init__(self, message: str, data: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.data: dict[str, object] = dict(data or {})
