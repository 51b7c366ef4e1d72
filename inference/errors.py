"""What can go wrong with an inference, one class for each thing a caller can do something about.

AppError                      what the Python API raises: a code of `schemas.results.ErrorCode`, a message, data
InferenceError
├── SettingsError             final: correct the environment, every problem is listed
├── ResultTimeout             wait again: the task's result was not there in time; the task goes on
├── CostUnbounded             final: no upper bound of the call's cost can be given, so no money is held (G8)
│   └── PriceUnknown          final: no price is known for the model; choose another or configure one
└── ProviderError             a question to the provider (not a completion) was not answered
    ├── ProviderUnavailable   retry later: nothing was charged
    └── ProviderRefused       final: the key or the request is refused

A completion that fails raises nothing: it is an `Attempt` whose outcome says how it ended,
since money may have been spent on it.
"""

from collections.abc import Mapping, Sequence

from tollbook.schemas.results import ErrorCode


class AppError(Exception):
    """A call did not produce a completion.

    `code` is the machine's reason, `message` the person's, `data` holds the numbers behind it.
    """

    def __init__(self, code: ErrorCode, message: str, data: Mapping[str, object] | None = None) -> None:
        super().__init__(f"{code.value}: {message}")
        self.code = code
        self.message = message
        self.data: dict[str, object] = dict(data or {})


class InferenceError(Exception):
    """Base of everything the inference package raises on purpose, beside AppError."""


class SettingsError(InferenceError):
    """The settings cannot be used; one line for each problem, none of them shows a secret."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ResultTimeout(InferenceError, TimeoutError):
    """A task has no result yet. Nothing is lost: wait again, or look later, by `task_id`."""

    def __init__(self, task_id: str, timeout_s: float) -> None:
        super().__init__(f"no result for {task_id} after {timeout_s:g} s")
        self.task_id = task_id
        self.timeout_s = timeout_s


class CostUnbounded(InferenceError):
    """No upper bound of a call's cost can be given, so no money can be held for it."""


class PriceUnknown(CostUnbounded):
    """No price is known for the model, so a call of it cannot be bounded."""

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"no price is known for model {model}: {why}")
        self.model = model
        self.why = why


class ProviderError(InferenceError):
    """The provider did not answer a question that is not a completion."""


class ProviderUnavailable(ProviderError):
    """The provider could not be reached or failed; nothing was charged, a retry is safe."""


class ProviderRefused(ProviderError):
    """The provider refused the key or the request."""

    def __init__(self, message: str, *, http_status: int) -> None:
        super().__init__(message)
        self.http_status = http_status
