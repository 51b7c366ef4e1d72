"""Anthropic's own API: Messages (version 2023-06-01, as of November 2026).

Requests are converted from chat completions. Replies and usage are read like those of other servers: the readers know
Anthropic's form (`stop_reason`, `tool_use`, `thinking`, cache tokens beside the input).
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from pydantic import SecretStr

from tollbook.inference.attempts import Attempt, ChatRequest, EmbeddingsRequest
from tollbook.inference.models import ModelFacts
from tollbook.inference.providers.adapter import Application, Question
from tollbook.inference.providers.anthropic_messages import may_think, messages_of, tool_choice_of, tools_of
from tollbook.inference.providers.compatible import models_in
from tollbook.inference.providers.json_values import as_table
from tollbook.inference.providers.replies import Reply, name_in, read_reply
from tollbook.schemas.policy import Dialect

_VERSION: Final = "2023-06-01"
# Models that decide themselves how much they think, and refuse a thinking budget: 4.6 and later.
_ADAPTIVE: Final = re.compile(r"claude-(?!3|2|instant)[a-z]+-(4[.-][6-9]|[5-9]|[1-9]\d)(?!\d)|claude-(mythos|fable)")
_MIN_THINKING_TOKENS: Final = 1_024
# The share of `max_tokens` that older models may use for thinking, by effort, as at OpenRouter.
_SHARES: Final = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95, "max": 0.95}
_INPUTS: Final = frozenset({"text", "image", "file"})
_AS_THEY_ARE: Final = ("temperature", "top_p", "top_k", "cache_control")
_NOT_WITH_THINKING: Final = ("temperature", "top_p", "top_k")


class Anthropic:
    """The dialect `anthropic`."""

    dialect: Dialect = "anthropic"
    completion_path = "messages"
    models_questions: tuple[Question, ...] = (Question("models", {"limit": "1000"}),)
    key_question = Question("models", {"limit": "1"})

    def headers(self, api_key: SecretStr | None, application: Application) -> dict[str, str]:  # noqa: ARG002
        """Return the headers of every request."""
        key = {} if api_key is None else {"x-api-key": api_key.get_secret_value()}
        return {"anthropic-version": _VERSION, **key}

    def completion_body(self, request: ChatRequest, *, is_streamed: bool = False) -> bytes:
        """Return the body of a request for a message. `max_tokens` is required, and includes thinking."""
        system, messages = messages_of(request.messages)
        parameters = request.parameters
        body: dict[str, Any] = {
            "model": request.model,
            "max_tokens": request.max_tokens,  # G1
            "service_tier": "standard_only",  # G1
            "messages": messages,
            **({"system": system} if system else {}),
            **{name: parameters[name] for name in _AS_THEY_ARE if name in parameters},
            **_stops(parameters),
            **tools_of(parameters),
            **tool_choice_of(parameters),
            **({"stream": True} if is_streamed else {}),
        }
        if body.get("top_k", 1) < 1:
            del body["top_k"]  # 0 means all tokens, and so does its absence.
        if request.user is not None:
            body["metadata"] = {"user_id": request.user}
        thinking, effort = _thinking(request)
        if thinking and thinking["type"] == "enabled" and not may_think(messages):
            thinking = None
        output = {**({"effort": effort} if effort else {}), **_format(parameters)}
        if output:
            body["output_config"] = output
        if thinking:
            body["thinking"] = thinking
        if thinking and thinking["type"] != "disabled":
            body = {name: value for name, value in body.items() if name not in _NOT_WITH_THINKING}
        return json.dumps(body).encode()

    def embeddings_request(self, request: EmbeddingsRequest) -> tuple[str, bytes] | None:  # noqa: ARG002
        """Return None: Anthropic makes no embeddings."""
        return None

    def read_reply(self, reply: Reply, request: ChatRequest | EmbeddingsRequest) -> Attempt:
        """Read a reply."""
        return read_reply(reply, request, is_insured=False, request_id=self.id_of(reply.headers))

    def id_of(self, headers: Mapping[str, str]) -> str | None:
        """Return Anthropic's id of a request."""
        return name_in(headers, "request-id")

    def early_id(self, headers: Mapping[str, str], stream_id: object) -> str | None:  # noqa: ARG002
        """Return the id of the request."""
        return self.id_of(headers)

    def cost_question(self, generation_id: str) -> Question | None:  # noqa: ARG002
        """Return None: Anthropic cannot be asked what a request cost."""
        return None

    def read_cost(self, document: object) -> int | None:  # noqa: ARG002
        """Return None: there is no `cost_question`."""
        return None

    def read_models(self, document: object) -> dict[str, ModelFacts]:
        """Read the list of models, with their context lengths."""
        return {
            model["id"]: ModelFacts(context_length=_length(model), input_modalities=_INPUTS)
            for model in models_in(document)
        }

    def read_key(self, document: object) -> str:
        """Return that the key is valid: with a wrong key, the list of models is refused."""
        models_in(document)
        return "the key is valid"


def _length(model: Mapping[str, Any]) -> int | None:
    length = model.get("max_input_tokens")
    return length if type(length) is int and length > 0 else None


def _stops(parameters: Mapping[str, Any]) -> dict[str, Any]:
    stop = parameters.get("stop")
    if stop is None:
        return {}
    return {"stop_sequences": [stop] if isinstance(stop, str) else list(stop)}


def _format(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the requested form of the answer: a JSON Schema, or {} for text."""
    schema = as_table(as_table(parameters.get("response_format")).get("json_schema")).get("schema")
    return {} if schema is None else {"format": {"type": "json_schema", "schema": schema}}


def _thinking(request: ChatRequest) -> tuple[dict[str, Any] | None, str | None]:
    """Return the thinking parameter, and the effort; each None if the task does not set it."""
    asked = as_table(request.parameters.get("reasoning"))
    effort: str | None = asked.get("effort") or request.parameters.get("reasoning_effort")
    budget: int | None = asked.get("max_tokens")
    if effort == "none" or asked.get("enabled") is False or budget == 0:
        return {"type": "disabled"}, None
    if effort is None and budget is None and not asked.get("enabled"):
        return None, None
    if _ADAPTIVE.search(request.model.lower()):
        return {"type": "adaptive"}, "low" if effort == "minimal" else effort
    share = round(_SHARES[effort or "medium"] * request.max_tokens)
    tokens = min(max(budget or share, _MIN_THINKING_TOKENS), request.max_tokens - 1)
    # Anthropic refuses a smaller budget, so a call with so low a limit runs without thinking.
    return ({"type": "enabled", "budget_tokens": tokens} if tokens >= _MIN_THINKING_TOKENS else None), None
