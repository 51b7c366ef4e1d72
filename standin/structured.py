"""Answers in the form that a request asks for: JSON of a schema, and calls of its tools.

Their values have no meaning. They are the first values that a schema allows, so that clients can validate them.
An invalid schema is refused, as by providers: TypeError, ValueError, AttributeError, KeyError or RecursionError.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, cast

_CALL: Final = re.compile(r"\[\[call=([A-Za-z0-9_-]{1,64})\]\]")
# Schemas may be recursive: below the first depth, optional parts are left out; below the second, everything is.
_DEEP, _DEEPEST = 8, 32
_MAX_ITEMS: Final = 100
_MAX_CHARACTERS: Final = 10_000
_FORMATS: Final = {
    "date": "2026-01-31", "date-time": "2026-01-31T12:00:00Z", "time": "12:00:00Z", "email": "nobody@example.com",
    "uri": "https://example.com", "uuid": "00000000-0000-4000-8000-000000000000",
}  # fmt: skip
Table = Mapping[str, Any]


def json_answer(body: Table) -> str | None:
    """Return the JSON that `response_format` asks for; None if it asks for text."""
    asked = _table(body.get("response_format"))
    match asked.get("type"):
        case "json_schema":
            return json.dumps(value_of(_table(_table(asked.get("json_schema")).get("schema"))))
        case "json_object":
            return "{}"
        case _:
            return None


def tool_call(body: Table) -> tuple[str, str] | None:
    """Return the name of a tool to call, and its arguments as JSON; None if no tool is called.

    A tool is called if `tool_choice` demands it, or if the last message is the user's and has the mark `[[call=NAME]]`.
    Of several tools, this is the first one that the conversation has not called yet, else the last one.
    """
    tools = {
        str(function["name"]): _table(function.get("parameters"))
        for tool in _tables(body.get("tools"))
        if "name" in (function := _table(tool.get("function")))
    }
    name = _chosen(body, tools)
    return None if name is None else (name, json.dumps(value_of(tools[name])))


def _chosen(body: Table, tools: Mapping[str, Table]) -> str | None:
    choice, messages = body.get("tool_choice"), _tables(body.get("messages"))
    named = _table(_table(choice).get("function")).get("name")
    if named in tools:
        return str(named)
    last: Table = messages[-1] if messages else {}
    mark = _CALL.search(json.dumps(last.get("content"))) if last.get("role") == "user" else None
    if mark and mark[1] in tools and choice != "none":
        return mark[1]
    if choice != "required" or not tools:
        return None
    calls = [_table(call.get("function")) for message in messages for call in _tables(message.get("tool_calls"))]
    called = {call.get("name") for call in calls}
    return next((name for name in tools if name not in called), list(tools)[-1])


def value_of(schema: Table, root: Table | None = None, depth: int = 0) -> Any:
    """Return a value that a JSON Schema allows; None below the deepest level, or if the schema has no type."""
    root = schema if root is None else root
    if depth > _DEEPEST:
        return None
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    if schema.get("enum"):
        return schema["enum"][0]
    if isinstance(reference := schema.get("$ref"), str):
        return value_of(_referred(reference, root), root, depth + 1)
    for name in ("anyOf", "oneOf"):
        if choices := _tables(schema.get(name)):
            is_null = depth > _DEEP
            first = next((each for each in choices if (each.get("type") == "null") == is_null), choices[0])
            return value_of(first, root, depth + 1)
    if parts := _tables(schema.get("allOf")):
        merged: dict[str, Any] = {}
        for part in parts:
            merged |= _referred(part["$ref"], root) if "$ref" in part else part
        return value_of(
            {**merged, **{name: value for name, value in schema.items() if name != "allOf"}}, root, depth + 1
        )
    return _value_of_type(schema, root, depth)


def _value_of_type(schema: Table, root: Table, depth: int) -> Any:
    kind = schema.get("type", "object" if "properties" in schema else None)
    if isinstance(kind, list):
        kind = next((each for each in cast("list[str]", kind) if each != "null"), "null")
    match kind:
        case "object":
            properties = _table(schema.get("properties"))
            return {name: value_of(_table(each), root, depth + 1) for name, each in properties.items()}
        case "array":
            items = min(schema.get("minItems", 0 if depth > _DEEP else 1), _MAX_ITEMS)
            return [value_of(_table(schema.get("items")), root, depth + 1)] * items if items else []
        case "string":
            text = _FORMATS.get(str(schema.get("format")), "nothing")[: schema.get("maxLength")]
            return text.ljust(min(schema.get("minLength", 0), _MAX_CHARACTERS), ".")
        case "integer":
            return max(7, schema.get("minimum", 7)) if schema.get("maximum", 7) >= 7 else schema["maximum"]
        case "number":
            return min(max(0.5, schema.get("minimum", 0.5)), schema.get("maximum", float("inf")))
        case "boolean":
            return True
        case _:
            return None


def _referred(reference: str, root: Table) -> Table:
    found: Any = root
    for name in reference.removeprefix("#/").split("/") if reference.startswith("#/") else ():
        found = _table(found).get(name.replace("~1", "/").replace("~0", "~"))
    return _table(found)


def _table(value: object) -> Table:
    return cast("Table", value) if isinstance(value, Mapping) else {}


def _tables(value: object) -> list[Table]:
    listed = cast("list[object]", value) if isinstance(value, list) else []
    return [cast("Table", each) for each in listed if isinstance(each, Mapping)]
