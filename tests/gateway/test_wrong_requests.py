"""Whatever a request holds, it is translated or refused with a sentence; nothing else is raised."""

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.golden import load, names
from tollbook.gateway.messages.document import document as message_document
from tollbook.gateway.messages.request import chat_fields as fields_of_message
from tollbook.gateway.messages.token_count import count_tokens
from tollbook.gateway.responses.document import document as response_document
from tollbook.gateway.responses.references import referenced_responses
from tollbook.gateway.responses.request import chat_fields as fields_of_response
from tollbook.gateway.responses.stream import Events
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import InvalidTask, task_from_fields

RESULT = InferenceResult.model_validate(
    {
        "task_id": "t",
        "status": "done",
        "content": "x",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "exec_command", "arguments": "{}"}}],
    }
)
LEAVES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.text(max_size=5)
)
WORDS = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "text",
        "name",
        "id",
        "input",
        "tools",
        "source",
        "user",
        "function",
        "custom",
        "namespace",
    ]
)
JSON = st.recursive(LEAVES, lambda each: st.lists(each, max_size=3) | st.dictionaries(WORDS, each, max_size=4))


def places_in(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, each in inner for found in places_in(each, (*place, key)))]


@st.composite
def wrong_bodies(draw: st.DrawFn, api: str) -> dict[str, Any]:
    """Draw a body of an SDK or agent of which one or two values are others."""
    body = copy.deepcopy(load("bodies", draw(st.sampled_from(names("bodies", api)))))
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from(places_in(body)[1:]))
        table = body
        for key in way:
            table = table[key]
        table[last] = draw(JSON)
    return body


def check_task(fields: dict[str, Any]) -> None:
    task_from_fields({**{k: v for k, v in fields.items() if k != "stream"}, "task": "t", "user_id": "u"})


@given(wrong_bodies("responses"))
def test_a_wrong_response_request_is_translated_or_refused(body: dict[str, Any]) -> None:
    referenced_responses(body)
    try:
        fields = fields_of_response(body)
        check_task(fields)
    except InvalidTask:
        return
    events = Events(response_id="resp_1", created_s=0, body=body)
    assert events.begin()
    assert events.end(RESULT)
    assert response_document(RESULT, response_id="resp_1", created_s=0, body=body)["output"]


@given(wrong_bodies("messages"))
def test_a_wrong_message_request_is_translated_or_refused(body: dict[str, Any]) -> None:
    try:
        check_task(fields_of_message(body))
        count_tokens(body)
    except InvalidTask:
        return
    assert message_document(RESULT, message_id="msg_1", body=body)["content"]


@given(JSON)
def test_other_json_is_translated_or_refused(value: Any) -> None:
    body = value if isinstance(value, dict) else {"messages": value, "input": value, "model": "m"}
    for translate in (fields_of_response, fields_of_message, count_tokens):
        with contextlib.suppress(InvalidTask):
            assert translate(body)


@pytest.mark.parametrize("body", [None, [], "x", 1])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    for translate in (fields_of_response, fields_of_message, count_tokens):
        with pytest.raises(InvalidTask, match="the body must be a JSON object"):
            translate(body)
