"""The APIs that are translated to chat completions: OpenAI's Responses, and Anthropic's Messages."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from tollbook.gateway.apis import ApiRequest, Events
from tollbook.gateway.messages import document as messages_document
from tollbook.gateway.messages import request as messages_request
from tollbook.gateway.messages import stream as messages_stream
from tollbook.gateway.messages.blocks import NOTHING_KEPT
from tollbook.gateway.problems import Problem
from tollbook.gateway.responses import document as responses_document
from tollbook.gateway.responses import request as responses_request
from tollbook.gateway.responses import stream as responses_stream
from tollbook.gateway.responses.references import items_by_id, referenced_responses
from tollbook.schemas.results import InferenceResult

_RESPONSE: Final = "resp_"


class _Translated(Protocol):
    """Writes the events of one answer as a list, as the translations do."""

    def begin(self) -> list[bytes]: ...
    def delta(self, chunk: Mapping[str, Any]) -> list[bytes]: ...
    def end(self, result: InferenceResult) -> list[bytes]: ...
    def error(self, code: str, message: str) -> list[bytes]: ...


class _Events:
    """Writes the translated events as bytes of the response body."""

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
    """The API of `/v1/responses`. An answer's id contains its call's id, by which a later request finds it."""

    optional_fields = responses_request.OPTIONAL_FIELDS

    def earlier_calls(self, body: Mapping[str, Any]) -> frozenset[str]:
        """Return the calls whose items the input refers to, as Vercel's SDK does."""
        return frozenset(each.removeprefix(_RESPONSE) for each in referenced_responses(body))

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:
        """Translate the request into one for a chat completion. Errors: InvalidTask."""
        known: dict[str, Mapping[str, Any]] = {}
        for result in earlier:
            known |= items_by_id(result, response_id=f"{_RESPONSE}{result.task_id}", body=body)
        return responses_request.chat_fields(body, known)

    def document(self, result: InferenceResult, api_request: ApiRequest) -> dict[str, Any]:
        """Return a whole answer."""
        return responses_document.document(
            result,
            response_id=f"{_RESPONSE}{api_request.call_id}",
            created_s=api_request.created_s,
            body=api_request.body,
        )

    def events(self, api_request: ApiRequest) -> Events:
        """Return a writer of the answer's events."""
        return _Events(
            responses_stream.Events(
                response_id=f"{_RESPONSE}{api_request.call_id}", created_s=api_request.created_s, body=api_request.body
            )
        )

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:  # noqa: ARG002 - OpenAI's has none.
        """Return a refusal."""
        return responses_document.error_body(
            problem.status, problem.code, problem.message, problem.metadata, param=problem.param
        )


class Messages:
    """The API of `/v1/messages`."""

    optional_fields = messages_request.OPTIONAL_FIELDS

    def earlier_calls(self, body: Mapping[str, Any]) -> frozenset[str]:  # noqa: ARG002
        """Return no ids: a request has its whole conversation."""
        return frozenset()

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:  # noqa: ARG002
        """Translate the request into one for a chat completion. Errors: InvalidTask; Problem for a thread."""
        if "thread" in body:
            message = f"'thread' cannot be set: {NOTHING_KEPT}; send the whole conversation in `messages`"
            raise Problem(400, messages_document.THREAD_REFUSED, message, should_retry=False)
        return messages_request.chat_fields(body)

    def document(self, result: InferenceResult, api_request: ApiRequest) -> dict[str, Any]:
        """Return a whole answer."""
        return messages_document.document(result, message_id=f"msg_{api_request.call_id}", body=api_request.body)

    def events(self, api_request: ApiRequest) -> Events:
        """Return a writer of the answer's events."""
        return _Events(messages_stream.Events(message_id=f"msg_{api_request.call_id}", body=api_request.body))

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:
        """Return a refusal in Anthropic's format."""
        body = messages_document.error_body(problem.status, problem.code, problem.message, problem.metadata)
        return {**body, "request_id": request_id}
