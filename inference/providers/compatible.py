"""OpenAI's chat completions as implemented by most servers: vLLM, Ollama, Groq, Mistral and many others.

Requests have only what all of these servers accept; replies may have anything that one of them was seen to send.
OpenRouter's and OpenAI's own APIs have the same form with further rules: `openrouter.py`, `openai.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

from pydantic import SecretStr

from tollbook.inference.attempts import Attempt, ChatRequest, EmbeddingsRequest
from tollbook.inference.models import ModelFacts, facts_of
from tollbook.inference.providers.adapter import Application, Question
from tollbook.inference.providers.json_values import as_table, tables_of
from tollbook.inference.providers.makers import understood_by
from tollbook.inference.providers.replies import Reply, name_in, name_of, read_reply
from tollbook.inference.providers.usage_report import read_generation_cost
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import Dialect

# Fields of OpenRouter's replies. OpenRouter accepts them in requests; strict servers refuse them.
_FOR_OPENROUTER: Final = ("annotations", "images")
# The tool choices of Anthropic's Messages, and OpenAI's for each.
_CHOICES: Final = {"auto": "auto", "none": "none", "any": "required", "required": "required"}
_ID_HEADERS: Final = ("x-generation-id", "x-request-id")


class ChatCompletions:
    """The dialect `compatible`, and the base class of dialects that differ from it in some points."""

    dialect: Dialect = "compatible"
    completion_path = "chat/completions"
    models_questions: tuple[Question, ...] = (Question("models"),)
    key_question = Question("models")
    _id_headers: tuple[str, ...] = _ID_HEADERS
    _is_insured = False
    """Whether a reply that ends in an error is provably not billed."""

    def headers(self, api_key: SecretStr | None, application: Application) -> dict[str, str]:  # noqa: ARG002
        """Return the headers of every request. `application` is not used: only OpenRouter gets it."""
        return {} if api_key is None else {"Authorization": f"Bearer {api_key.get_secret_value()}"}

    def completion_body(self, request: ChatRequest, *, is_streamed: bool = False) -> bytes:
        """Return the body of a request for a completion."""
        stream: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if is_streamed else {}
        body: dict[str, Any] = {
            "model": request.model,
            "messages": self._messages(request),
            request.limit_name: request.max_tokens,
            **self._parameters(_with_choice(request.parameters)),
            **self._preferences(request),
            **stream,
        }
        if request.user is not None:
            body["user"] = request.user
        return json.dumps(body).encode()

    def embeddings_request(self, request: EmbeddingsRequest) -> tuple[str, bytes] | None:
        """Return the path and body for embeddings. A single text is sent as a string: not every server takes a list."""
        inputs = list(request.inputs)
        body: dict[str, Any] = {
            "model": request.model,
            "input": inputs[0] if len(inputs) == 1 else inputs,
            **request.parameters,
            **self._embeddings_preferences(request),
        }
        if request.user is not None:
            body["user"] = request.user
        return "embeddings", json.dumps(body).encode()

    def read_reply(self, reply: Reply, request: ChatRequest | EmbeddingsRequest) -> Attempt:
        """Read a reply."""
        request_id = name_in(reply.headers, self._id_headers[0])
        attempt = read_reply(reply, request, is_insured=self._is_insured, request_id=request_id)
        # The id in the body is the completion's; some servers can look it up. An error has no such id.
        return attempt if attempt.generation_id else replace(attempt, generation_id=self.id_of(reply.headers))

    def id_of(self, headers: Mapping[str, str]) -> str | None:
        """Return the id of the request."""
        return next((found for name in self._id_headers if (found := name_in(headers, name))), None)

    def early_id(self, headers: Mapping[str, str], stream_id: object) -> str | None:
        """Return the id that the complete reply will have: from its header, else from the first event."""
        return name_in(headers, self._id_headers[0]) or name_of(stream_id)

    def cost_question(self, generation_id: str) -> Question | None:
        """Return OpenRouter's request for a generation: some routers copy it; other servers answer 404."""
        return Question("generation", {"id": generation_id})

    def read_cost(self, document: object) -> int | None:
        """Read the total cost of a generation, in nano-dollars."""
        return read_generation_cost(as_table(as_table(document).get("data")))

    def read_models(self, document: object) -> dict[str, ModelFacts]:
        """Read the list of models, with the facts that the server gives."""
        return {model["id"]: facts_of(model) for model in models_in(document)}

    def read_key(self, document: object) -> str:
        """Return how many models there are: a server that checks the key refuses a wrong one here."""
        return f"it answers and offers {len(self.read_models(document))} models"

    def _messages(self, request: ChatRequest) -> list[dict[str, Any]]:
        """Return the conversation, without the parts that only another maker's models understand."""
        messages = [understood_by(request.model, each) for each in request.messages]
        # A message that had only reasoning is empty without it; servers refuse its null content. But one must remain.
        sent = [each for each in messages if not self._is_empty(each)] or messages
        return [self._message(each) for each in sent]

    def _is_empty(self, message: Message) -> bool:
        """Whether a message is empty as it is sent."""
        return message.is_empty and not message.has_reasoning

    def _message(self, message: Message) -> dict[str, Any]:
        return without(with_arguments(message.as_json()), _FOR_OPENROUTER)

    def _parameters(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        return parameters

    def _preferences(self, request: ChatRequest) -> Mapping[str, Any]:  # noqa: ARG002
        return {}

    def _embeddings_preferences(self, request: EmbeddingsRequest) -> Mapping[str, Any]:  # noqa: ARG002
        return {}


def with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with `{}` for empty arguments of its tool calls: vLLM fails on an empty text (November 2026)."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_arguments(call) for call in message["tool_calls"]]}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if function is None or function["arguments"].strip():
        return call
    return {**call, "function": {**function, "arguments": "{}"}}


def _with_choice(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return parameters with the tool choice in the form of a chat completion; without tools, leave it out.

    SDKs send a choice even without tools, which OpenAI refuses (November 2026).
    """
    if "tools" not in parameters:
        is_named = isinstance(parameters.get("tool_choice"), dict) or parameters.get("tool_choice") == "required"
        return parameters if is_named else without(parameters, ("tool_choice", "parallel_tool_calls"))
    choice = as_table(parameters.get("tool_choice"))
    kind, name = choice.get("type"), choice.get("name")
    if kind in _CHOICES and name is None:
        return {**parameters, "tool_choice": _CHOICES[kind]}
    if kind in ("function", "tool") and name is not None:
        return {**parameters, "tool_choice": {"type": "function", "function": {"name": name}}}
    return parameters


def without(fields: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields without those named."""
    return {name: value for name, value in fields.items() if name not in names}


def models_in(document: object) -> list[dict[str, Any]]:
    """Return the entries of a list of models that have an id. Errors: ValueError if there is no list."""
    data: object = as_table(document).get("data")
    if not isinstance(data, list):
        raise ValueError("the list of models cannot be read")  # noqa: TRY004 - as the interface says.
    return [model for model in tables_of(cast("object", data)) if isinstance(model.get("id"), str)]
