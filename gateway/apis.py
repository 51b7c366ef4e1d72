"""What the endpoints need of an API's form: requests become those of chat completions, results its documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tollbook.gateway.problems import Problem
from tollbook.schemas.results import InferenceResult


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: the id of its call, when it came (seconds since the epoch), the model it names, and its body."""

    call_id: str
    created_s: int
    model: str
    body: Mapping[str, Any] = field(repr=False)  # G10


class Events(Protocol):
    """Writes one answer as server-sent events."""

    def begin(self) -> bytes:
        """Return what stands before the answer."""
        ...

    def delta(self, chunk: Mapping[str, Any]) -> bytes:
        """Return the events of one delta: a chunk of a chat completion."""
        ...

    def end(self, result: InferenceResult) -> bytes:
        """Return what ends a whole answer, its usage among it."""
        ...

    def broken(self, problem: Problem) -> bytes:
        """Return what ends an answer that broke off, so that no client takes it for whole."""
        ...


class Api(Protocol):
    """One API's form of requests, answers and refusals."""

    @property
    def dispensable(self) -> frozenset[str]:
        """Fields that its clients send unasked: they are left out where the model does not support them."""
        ...

    def earlier_calls(self, body: Mapping[str, Any]) -> frozenset[str]:
        """Return the ids of the calls to whose answers a request refers."""
        ...

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:
        """Return a request as one for a chat completion; `earlier` are the answers to which it refers.

        Errors: InvalidTask; Problem.
        """
        ...

    def document(self, result: InferenceResult, asked: Asked) -> dict[str, Any]:
        """Return a whole answer."""
        ...

    def events(self, asked: Asked) -> Events:
        """Return a writer for the answer to one request."""
        ...

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:
        """Return the body of a refusal."""
        ...
