"""The stand-in's answers by schema: each is valid by the schema that it was asked for."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from tollbook.standin.replies import BadRequest, completion, filler, read_request
from tollbook.standin.structured import value_of

MODEL = "openai/gpt-4o-mini"
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {"id": {"type": "integer"}}}},
    }
    for name in ("look_up", "finish")
]
USER = {"role": "user", "content": "Go on. [[call=finish]]"}
PLAIN = {"role": "user", "content": "Go on."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **TOOLS[0]}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "seven"}


class Place(BaseModel):
    name: str
    kind: str | None = None
    population: int
    parts: list["Place"]
    near: "Place | None"


def message(**fields: Any) -> dict[str, Any]:
    asked = read_request({"model": MODEL, "messages": [PLAIN], **fields})
    return json.loads(completion(asked, "gen-1", 0, None))["choices"][0]


def test_json_is_of_the_schema_although_it_contains_itself() -> None:
    schema = {"name": "place", "schema": Place.model_json_schema()}

    asked = read_request(
        {"model": MODEL, "messages": [PLAIN], "response_format": {"type": "json_schema", "json_schema": schema}}
    )

    assert Place.model_validate_json(filler(asked)).population == 7


@given(
    st.recursive(
        st.sampled_from([int, str, float, bool, int | None]),
        lambda inner: inner.map(lambda kind: list[kind]) | inner.map(lambda kind: dict[str, kind]),
        max_leaves=4,
    )
)
def test_values_are_of_their_types(kind: Any) -> None:
    adapter = TypeAdapter(kind)

    adapter.validate_python(value_of(adapter.json_schema()), strict=True)


@pytest.mark.parametrize(
    ("messages", "choice", "called"),
    [
        ([PLAIN], "auto", None),
        ([USER], "auto", "finish"),
        ([USER], "none", None),
        ([USER, CALLED, RESULT], "auto", None),
        ([PLAIN], "required", "look_up"),
        ([PLAIN, CALLED, RESULT], "required", "finish"),
        ([PLAIN], {"type": "function", "function": {"name": "finish"}}, "finish"),
    ],
)
def test_tools_are_called_if_demanded_or_marked(
    messages: list[dict[str, Any]], choice: Any, called: str | None
) -> None:
    choice = message(messages=messages, tools=TOOLS, tool_choice=choice)

    if called is None:
        assert choice["message"]["content"]
        return
    assert choice["finish_reason"] == "tool_calls"
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == (called, '{"id": 7}')


@pytest.mark.parametrize("schema", [{"type": "array", "minItems": "3"}, {"allOf": [{"$ref": 3}]}, {"enum": 3}])
def test_a_malformed_schema_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="schema"):
        message(response_format={"type": "json_schema", "json_schema": {"schema": schema}})
