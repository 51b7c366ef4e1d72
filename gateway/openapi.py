"""The OpenAPI document of the gateway. It uses the models of `schemas/` that tasks use too, so they cannot differ."""

from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from typing import Any, Final

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from tollbook.gateway.openapi_requests import count_request, messages_request, responses_request
from tollbook.schemas.messages import Message
from tollbook.schemas.parameters import EMBEDDINGS_PARAMETERS, Parameters
from tollbook.schemas.tasks import MAX_INPUTS, MAX_MESSAGES, MODEL_ID_PATTERN

_REFS: Final = "#/components/schemas/{model}"
_ERRORS: Final = {
    "400": "the request is invalid, or its cost has no upper bound: `invalid_task`, `price_unknown`",
    "401": "the key is missing, unknown, expired or revoked: `invalid_api_key`",
    "402": "the call does not fit a budget: `plan_limit_reached`",
    "403": "the key does not allow this: `model_not_allowed`, `attribute_not_allowed`, `stream_not_allowed`, `no_user`",
    "408": "the body stopped arriving for half a minute: `request_timeout`",
    "409": "the same `Idempotency-Key` was sent with other content: `idempotency_conflict`",
    "413": "the body is too large: `request_too_large`",
    "429": "other calls hold the money that is left: `budget_wait_timeout`; or the provider's own rate limit",
    "502": "no model answered: `inference_failed`",
    "503": "no call can be made now: `ledger_unavailable`, `overloaded`, `gateway_stopping`",
    "504": "the provider, or the call, took too long",
}
_FREE_ERRORS: Final = ("400", "401", "403", "408", "413", "503")
"""Errors of a request that makes no call."""
_MODEL: Final = {
    "type": "string",
    "pattern": MODEL_ID_PATTERN,
    "description": "A model id, `model@provider` for one of the policy's providers, or a task type of the policy.",
}
_LIMIT: Final = {"type": "integer", "minimum": 1, "maximum": 200_000}


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    _, shared = models_json_schema([(Message, "validation"), (Parameters, "validation")], ref_template=_REFS)
    schemas: dict[str, Any] = dict(shared["$defs"])
    parameters = schemas.pop("Parameters")["properties"]
    of_embeddings = {name: parameters.pop(name) for name in EMBEDDINGS_PARAMETERS}
    schemas |= {
        "ChatCompletionRequest": _chat_request(parameters),
        "EmbeddingsRequest": _embeddings_request(of_embeddings),
        "ResponsesRequest": responses_request(_MODEL, MAX_MESSAGES),
        "MessagesRequest": messages_request(_MODEL, MAX_MESSAGES),
        "CountRequest": count_request(_MODEL, MAX_MESSAGES),
        "Error": _ERROR,
        "MessagesError": _MESSAGES_ERROR,
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tollbook gateway",
            "version": version("tollbook"),
            "description": "OpenAI's and Anthropic's APIs under the caps of a Tollbook ledger.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"bearer": []}, {"header": []}],
        "paths": {
            "/v1/chat/completions": _post("createChatCompletion", "Make a chat completion", "ChatCompletionRequest"),
            "/v1/responses": _post("createResponse", "Make a response", "ResponsesRequest"),
            "/v1/messages": _post("createMessage", "Make a message", "MessagesRequest", error="MessagesError"),
            "/v1/messages/count_tokens": _post(
                "countTokens", "Count a prompt's tokens", "CountRequest", error="MessagesError", makes_call=False
            ),
            "/v1/embeddings": _post(
                "createEmbeddings", "Make vectors of texts", "EmbeddingsRequest", is_streamed=False
            ),
            "/v1/models": _get("listModels", "List task types and models"),
            "/v1/models/{model}": _get("showModel", "Show a model", {"model": {"type": "string"}}),
            "/v1/key": _get("showKey", "Show this key and its budgets"),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "metadata": {"type": "object"},
            },
        }
    },
}


_MESSAGES_ERROR: Final = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}, "code": {"type": "string"}},
        },
        "request_id": {"type": "string"},
    },
}


def _chat_request(parameters: dict[str, Any]) -> dict[str, Any]:
    messages = TypeAdapter(tuple[Message, ...]).json_schema(ref_template=_REFS)
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "messages"],
        "properties": {
            "model": _MODEL,
            "messages": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_MESSAGES,
                "items": messages["items"],
            },
            "max_tokens": _LIMIT,
            "max_completion_tokens": _LIMIT,
            "temperature": {"type": "number", "minimum": 0, "maximum": 2},
            "stream": {"type": "boolean"},
            "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
            "usage": {"type": "object", "properties": {"include": {"type": "boolean"}}},
            "user": {"type": "string"},
            "metadata": {"type": "object"},
            **parameters,
        },
    }


def _embeddings_request(parameters: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "string", "minLength": 1}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "input"],
        "properties": {
            "model": _MODEL,
            "input": {"anyOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_INPUTS}]},
            "user": {"type": "string"},
            **parameters,
        },
    }


def _post(
    name: str,
    summary: str,
    request: str,
    *,
    error: str = "Error",
    is_streamed: bool = True,
    makes_call: bool = True,
) -> dict[str, Any]:
    headers = {
        "idempotency-key": "Identifies the call: a repeat with the same content gets the first answer, at no cost.",
        "x-tollbook-user": "Who is charged, if the key allows it.",
        "x-tollbook-plan": "The user's plan, if the key allows it.",
        "x-tollbook-campaign": "The campaign, if the key allows it.",
        "x-tollbook-tags": "Tags such as `team=red, tier=2`, if the key allows them.",
        "x-tollbook-stream": "The task stream that the call counts under; one that the key allows.",
    }
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "parameters": [
                {"name": header, "in": "header", "description": text, "schema": {"type": "string"}}
                for header, text in (headers if makes_call else {}).items()
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": _REFS.format(model=request)}}},
            },
            "responses": _responses(
                _ERRORS if makes_call else _FREE_ERRORS, error, is_streamed=is_streamed and makes_call
            ),
        }
    }


def _get(name: str, summary: str, path: dict[str, Any] | None = None) -> dict[str, Any]:
    parameters = [
        {"name": each, "in": "path", "required": True, "schema": schema} for each, schema in (path or {}).items()
    ]
    errors = ["401", "503", *(["404"] if path else [])]
    return {"get": {"operationId": name, "summary": summary, "parameters": parameters, "responses": _responses(errors)}}


def _responses(statuses: Iterable[str], form: str = "Error", *, is_streamed: bool = False) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REFS.format(model=form)}}}
    refused = {status: {"description": _ERRORS.get(status, "not found"), "content": error} for status in statuses}
    answer: dict[str, Any] = {"application/json": {}, **({"text/event-stream": {}} if is_streamed else {})}
    return {"200": {"description": "the answer", "content": answer}, **refused}
