"""The interface of an API format: it translates requests into chat completions, and results into its documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tollbook.gateway.problems import Problem
from tollbook.schemas.results import InferenceResult


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request: its call's id, when it arrived (seconds since the epoch), the model it names, and its body."""

    call_id: str
    created_s: int
    model: str
    body: Mapping[str, Any] = field(repr=False)  # G10


class Events(Protocol):
    """Writes one answer as server-sent events."""

    def begin(self) -> bytes:
        """Return the events before the answer."""
        ...

    def delta(self, chunk: Mapping[str, Any]) -> bytes:
        """Return the events of one delta: a chunk of a chat completion."""
        ...

    def end(self, result: InferenceResult) -> bytes:
        """Return the last events of a complete answer, with its usage."""
        ...

    def broken(self, problem: Problem) -> bytes:
        """Return the last events of an incomplete answer, so that no client takes it as complete."""
        ...


class Api(Protocol):
    """One API's format of requests, answers and refusals."""

    @property
    def optional_fields(self) -> frozenset[str]:
        """Fields that its clients send by default: left out if the model does not support them."""
        ...

    def earlier_calls(self, body: Mapping[str, Any]) -> frozenset[str]:
        """Return the ids of earlier calls whose answers a request refers to."""
        ...

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:
        """Translate a request into one for a chat completion; `earlier` are the answers that it refers to.

        Errors: InvalidTask; Problem.
        """
        ...

    def document(self, result: InferenceResult, api_request: ApiRequest) -> dict[str, Any]:
        """Return a whole answer."""
        ...

    def events(self, api_request: ApiRequest) -> Events:
        """Return a writer for the answer to one request."""
        ...

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:
        """Return the body of a refusal."""
        ...
