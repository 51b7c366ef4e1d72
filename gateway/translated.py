"""The APIs that are translated onto chat completions: OpenAI's Responses, and Anthropic's Messages."""

from collections.abc import Mapping
from typing import Any, Protocol

from tollbook.gateway.apis import Asked, Events
from tollbook.gateway.messages import document as messages_document
from tollbook.gateway.messages import request as messages_request
from tollbook.gateway.messages import stream as messages_stream
from tollbook.gateway.problems import Problem
from tollbook.gateway.responses import document as responses_document
from tollbook.gateway.responses import request as responses_request
from tollbook.gateway.responses import stream as responses_stream
from tollbook.schemas.results import InferenceResult


class _Translated(Protocol):
    """The events of one answer, as the translations write them."""

    def begin(self) -> list[bytes]: ...
    def delta(self, chunk: Mapping[str, Any]) -> list[bytes]: ...
    def end(self, result: InferenceResult) -> list[bytes]: ...
    def error(self, code: str, message: str) -> list[bytes]: ...


class _Events:
    """Writes them as one piece of the answer's body each."""

    def __init__(self, translated: _Translated) -> None:
        self._translated = translated

    def begin(self) -> bytes:
        return b"".join(self._translated.begin())

    def delta(self, chunk: Mapping[str, Any]) -> bytes:
        return b"".join(self._translated.delta(chunk))

    def end(self, result: InferenceResult) -> bytes:
        return b"".join(self._translated.end(result))

    def broken(self, problem: Problem) -> bytes:
        return b"".join(self._translated.error(problem.code, problem.message))


class Responses:
    """The API of `/v1/responses`."""

    def chat_fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the request as one for a chat completion. Errors: InvalidTask."""
        return responses_request.chat_fields(body)

    def document(self, result: InferenceResult, asked: Asked) -> dict[str, Any]:
        """Return a whole answer."""
        return responses_document.document(
            result, response_id=f"resp_{asked.call_id}", created_s=asked.created_s, body=asked.body
        )

    def events(self, asked: Asked) -> Events:
        """Return a writer of its events."""
        return _Events(
            responses_stream.Events(response_id=f"resp_{asked.call_id}", created_s=asked.created_s, body=asked.body)
        )

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:  # noqa: ARG002 - OpenAI's has none.
        """Return a refusal."""
        return responses_document.error_body(
            problem.status, problem.code, problem.message, problem.metadata, param=problem.param
        )


class Messages:
    """The API of `/v1/messages`."""

    def chat_fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the request as one for a chat completion. Errors: InvalidTask."""
        return messages_request.chat_fields(body)

    def document(self, result: InferenceResult, asked: Asked) -> dict[str, Any]:
        """Return a whole answer."""
        return messages_document.document(result, message_id=f"msg_{asked.call_id}", body=asked.body)

    def events(self, asked: Asked) -> Events:
        """Return a writer of its events."""
        return _Events(messages_stream.Events(message_id=f"msg_{asked.call_id}", body=asked.body))

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:
        """Return a refusal in Anthropic's form."""
        body = messages_document.error_body(problem.status, problem.code, problem.message, problem.metadata)
        return {**body, "request_id": request_id}
