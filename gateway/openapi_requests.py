"""The requests of Responses and Messages for the OpenAPI document: only the fields that are translated.

Further fields that SDKs send are accepted too.
"""

from typing import Any, Final

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_LIMIT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 200_000}
_TEMPERATURE: Final[Schema] = {"type": "number", "minimum": 0, "maximum": 2}
_SHARE: Final[Schema] = {"type": "number", "minimum": 0, "maximum": 1}
_OBJECT: Final[Schema] = {"type": "object"}


def responses_request(model: Schema, max_messages: int) -> Schema:
    """Return the schema of a request for a response."""
    return {
        "type": "object",
        "required": ["model", "input"],
        "properties": {
            "model": model,
            "input": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "array", "minItems": 1, "maxItems": max_messages, "items": _response_item()},
                ]
            },
            "instructions": {"type": ["string", "null"]},
            "max_output_tokens": _LIMIT,
            "temperature": _TEMPERATURE,
            "top_p": _SHARE,
            "stream": {"type": "boolean"},
            "store": {"type": "boolean", "description": "Accepted, but nothing is stored."},
            "tools": {"type": "array", "maxItems": 128, "items": _tagged("function", name=_NAME, parameters=_OBJECT)},
            "tool_choice": {"enum": ["auto", "none", "required"]},
            "parallel_tool_calls": {"type": "boolean"},
            "reasoning": {
                "type": "object",
                "properties": {"effort": {"enum": ["minimal", "low", "medium", "high"]}, "summary": _TEXT},
            },
            "text": {"type": "object", "properties": {"format": _TEXT_FORMAT, "verbosity": _VERBOSITY}},
            "metadata": _OBJECT,
            "user": _TEXT,
        },
    }


def messages_request(model: Schema, max_messages: int) -> Schema:
    """Return the schema of a request for a message."""
    counted = count_request(model, max_messages)
    further = {
        "max_tokens": _LIMIT,
        "temperature": {**_TEMPERATURE, "maximum": 1},
        "top_p": _SHARE,
        "top_k": {"type": "integer", "minimum": 1, "maximum": 1_000},
        "stop_sequences": {"type": "array", "maxItems": 4, "items": {"type": "string", "minLength": 1}},
        "stream": {"type": "boolean"},
        "metadata": {"type": "object", "properties": {"user_id": _TEXT}},
        "output_config": {"type": "object", "properties": {"format": _json_schema("schema")}},
    }
    return {
        **counted,
        "required": [*counted["required"], "max_tokens"],
        "properties": {**counted["properties"], **further},
    }


def count_request(model: Schema, max_messages: int) -> Schema:
    """Return the schema of a request to count the tokens of a prompt."""
    blocks = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"anyOf": _BLOCKS}}]}
    turn = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": ["user", "assistant"]}, "content": blocks},
    }
    choice = {"anyOf": [_tagged(kind) for kind in ("auto", "any", "none")] + [_tagged("tool", name=_NAME)]}
    tool = {
        "type": "object",
        "required": ["name", "input_schema"],
        "properties": {"name": _NAME, "description": _TEXT, "input_schema": _OBJECT, "cache_control": _CACHE},
    }
    return {
        "type": "object",
        "required": ["model", "messages"],
        "properties": {
            "model": model,
            "messages": {"type": "array", "minItems": 1, "maxItems": max_messages, "items": turn},
            "system": {"anyOf": [_TEXT, {"type": "array", "items": _block("text", text=_TEXT)}]},
            "thinking": {
                "type": "object",
                "properties": {"type": {"enum": ["enabled", "adaptive", "disabled"]}, "budget_tokens": _LIMIT},
            },
            "tools": {"type": "array", "maxItems": 128, "items": tool},
            "tool_choice": choice,
        },
    }


def _tagged(kind: str, **properties: Schema) -> Schema:
    """Return the schema of an object with this `type`; all of its properties are required."""
    return {
        "type": "object",
        "required": ["type", *properties],
        "properties": {"type": {"const": kind}, **properties},
    }


def _block(kind: str, **properties: Schema) -> Schema:
    block = _tagged(kind, **properties)
    return {**block, "properties": {**block["properties"], "cache_control": _CACHE}}


def _json_schema(*required: str, **properties: Schema) -> Schema:
    return {**_tagged("json_schema", schema=_OBJECT, **properties), "required": ["type", *required]}


def _response_item() -> Schema:
    media = [_tagged("input_image", image_url=_TEXT), _tagged("input_file", file_data=_TEXT)]
    parts = {"anyOf": [_tagged("input_text", text=_TEXT), _tagged("output_text", text=_TEXT), *media]}
    content = {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": parts}]}
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "type": {"const": "message"},
            "role": {"enum": ["user", "assistant", "system", "developer"]},
            "content": content,
        },
    }
    return {
        "anyOf": [
            message,
            _tagged("function_call", call_id=_NAME, name=_NAME, arguments=_TEXT),
            _tagged("function_call_output", call_id=_NAME, output=content),
            _tagged("reasoning", summary={"type": "array", "items": _tagged("summary_text", text=_TEXT)}),
        ]
    }


_NAME: Final[Schema] = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
_CACHE: Final[Schema] = _tagged("ephemeral")
_VERBOSITY: Final[Schema] = {"enum": ["low", "medium", "high"]}
_TEXT_FORMAT: Final[Schema] = {
    "anyOf": [_tagged("text"), _tagged("json_object"), _json_schema("name", "schema", name=_NAME)]
}
_SOURCE: Final[Schema] = {
    "anyOf": [_tagged("url", url=_TEXT), _tagged("base64", media_type=_TEXT, data=_TEXT)],
}
_BLOCKS: Final[list[Schema]] = [
    _block("text", text=_TEXT),
    _block("image", source=_SOURCE),
    _block("tool_use", id=_NAME, name=_NAME, input=_OBJECT),
    _block("tool_result", tool_use_id=_NAME, content=_TEXT),
    _tagged("thinking", thinking=_TEXT, signature=_TEXT),
]
