"""OpenAI's chat completions as most servers speak it: vLLM, Ollama, Groq, Mistral and many others.

It sends what all of them take, and takes what any of them was seen to send. OpenRouter's and OpenAI's own API are of
the same form, with rules of their own: `openrouter.py`, `openai.py`.
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

# OpenRouter's replies have them, and it takes them back; strict servers refuse a request with them.
_FOR_OPENROUTER: Final = ("annotations", "images")
# Choices of a tool in the form of Anthropic's Messages.
_CHOICES: Final = {"auto": "auto", "none": "none", "any": "required", "required": "required"}
_ID_HEADERS: Final = ("x-generation-id", "x-request-id")


class ChatCompletions:
    """The dialect `compatible`, and the base of those that differ from it in some points."""

    dialect: Dialect = "compatible"
    completion_path = "chat/completions"
    models_questions: tuple[Question, ...] = (Question("models"),)
    key_question = Question("models")
    _id_headers: tuple[str, ...] = _ID_HEADERS
    _is_insured = False
    """Whether a reply that ends in an error is provably not billed."""

    def headers(self, api_key: SecretStr | None, application: Application) -> dict[str, str]:  # noqa: ARG002
        """Return the headers of every request; only OpenRouter is told of the application."""
        return {} if api_key is None else {"Authorization": f"Bearer {api_key.get_secret_value()}"}

    def completion_body(self, request: ChatRequest, *, is_streamed: bool = False) -> bytes:
        """Return the body that asks for a completion."""
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
        """Return how vectors are asked for; one text is sent as such, since not every server takes a list."""
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
        # The id in the body is the completion's, which some servers know again; an error has none.
        return attempt if attempt.generation_id else replace(attempt, generation_id=self.id_of(reply.headers))

    def id_of(self, headers: Mapping[str, str]) -> str | None:
        """Return the id of the request."""
        return next((found for name in self._id_headers if (found := name_in(headers, name))), None)

    def early_id(self, headers: Mapping[str, str], stream_id: object) -> str | None:
        """Return the id that the whole reply will have: of its own header, else of the first event."""
        return name_in(headers, self._id_headers[0]) or name_of(stream_id)

    def cost_question(self, generation_id: str) -> Question | None:
        """Ask for a generation, as OpenRouter is asked: routers copy that, and other servers know no such address."""
        return Question("generation", {"id": generation_id})

    def read_cost(self, document: object) -> int | None:
        """Read what a generation cost in all."""
        return read_generation_cost(as_table(as_table(document).get("data")))

    def read_models(self, document: object) -> dict[str, ModelFacts]:
        """Read the list of models, which says more or less of each."""
        return {model["id"]: facts_of(model) for model in models_in(document)}

    def read_key(self, document: object) -> str:
        """Say how many models there are: a server that refuses a wrong key does so here."""
        return f"it answers and offers {len(self.read_models(document))} models"

    def _messages(self, request: ChatRequest) -> list[dict[str, Any]]:
        """Return the conversation, without what only another maker's models understand."""
        said = [understood_by(request.model, each) for each in request.messages]
        # What had nothing but a thought is empty without it, and refused: its content is null. A message is the least.
        sent = [each for each in said if not self._says_nothing(each)] or said
        return [self._message(each) for each in sent]

    def _says_nothing(self, message: Message) -> bool:
        """Whether nothing is left of a message as it is sent."""
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
    """Return a message whose calls have a JSON object as arguments: vLLM fails on an empty text (November 2026)."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_arguments(call) for call in message["tool_calls"]]}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if function is None or function["arguments"].strip():
        return call
    return {**call, "function": {**function, "arguments": "{}"}}


def _with_choice(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return parameters with the choice of a tool in the form of a chat completion, and none without tools.

    SDKs send one all the same, which OpenAI refuses (November 2026).
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
    """Return fields but for some of them."""
    return {name: value for name, value in fields.items() if name not in names}


def models_in(document: object) -> list[dict[str, Any]]:
    """Return the entries of a list of models that have an id. Errors: ValueError where there is no list."""
    data: object = as_table(document).get("data")
    if not isinstance(data, list):
        raise ValueError("the list of models cannot be read")  # noqa: TRY004 - as the interface says.
    return [model for model in tables_of(cast("object", data)) if isinstance(model.get("id"), str)]
