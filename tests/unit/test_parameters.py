"""Parameters and messages of a task: which forms are taken, which are refused, and why."""

import json
from typing import Any

import pytest

from tollbook.schemas.parameters import REFUSED
from tollbook.schemas.tags import MAX_TAGS
from tollbook.schemas.tasks import InvalidTask, Task, task_from_fields

POST: dict[str, Any] = {"task": "score_post", "user_id": "u1", "prompt": "a post"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}
SECRET = "the text of the prompt"


def asked(**parameters: Any) -> Task:
    return task_from_fields({**POST, **parameters})


def task_with(content: Any, **fields: Any) -> Task:
    message = {"role": "user", "content": content, **fields}
    return task_from_fields({"task": "score_post", "user_id": "u1", "messages": [message]})


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"top_p": "0.9", "seed": "7", "logprobs": "true"}, {"top_p": 0.9, "seed": 7, "logprobs": True}),
        ({"stop": '["END", "\\n"]'}, {"stop": ["END", "\n"]}),
        ({"stop": "[not JSON"}, {"stop": "[not JSON"}),
        (
            {"tool_choice": '{"type": "function", "function": {"name": "a"}}'},
            {"tool_choice": {"type": "function", "function": {"name": "a"}}},
        ),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
        ({"tools": json.dumps([TOOL])}, {"tools": [TOOL]}),
        (
            {"tools": [{"type": "custom", "custom": {"name": "sql"}}]},
            {"tools": [{"type": "custom", "custom": {"name": "sql"}}]},
        ),
        ({"tools": [], "functions": [], "stop": []}, {}),
        ({"response_format": '{"type": "json_object"}'}, {"response_format": {"type": "json_object"}}),
        ({"reasoning": {"max_tokens": 100, "effort": None}}, {"reasoning": {"max_tokens": 100}}),
        ({"reasoning_effort": "minimal", "verbosity": "low"}, {"reasoning_effort": "minimal", "verbosity": "low"}),
        ({"cache_control": {"type": "ephemeral", "ttl": "1h"}}, {"cache_control": {"type": "ephemeral", "ttl": "1h"}}),
        ({"modalities": ["text"], "n": "1", "stream": "false", "service_tier": "default"}, {}),
        ({"n": 1.0, "models": [], "provider": {}, "mcp_servers": "[]"}, {}),
        ({"stream_options": {"include_usage": True, "continuous_usage_stats": False}}, {}),
    ],
)
def test_a_parameter_is_kept_in_its_form(parameters: dict[str, Any], kept: dict[str, Any]) -> None:
    assert asked(**parameters).parameters() == kept


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"top_p": 1.1}, "'top_p' must be a number from 0 to 1, not 1.1"),
        ({"top_p": True}, "'top_p' must be a number, not true"),
        ({"seed": 1.5}, "'seed' must be a whole number"),
        ({"stop": [""]}, "'stop' must be a text or a list of texts, none of them empty"),
        ({"stop": [1]}, "'stop' must be a text or a list of texts"),
        ({"logit_bias": {"word": 1}}, "'logit_bias' must name tokens by number, each with a number from -100 to 100"),
        ({"logit_bias": {"1": 101}}, "'logit_bias' must name tokens by number"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "'tools[0].function.name' must be"),
        ({"tools": [{"type": "web_search"}]}, "'tools[0]' is the server tool 'web_search': the provider runs it"),
        ({"tools": [{"type": "openrouter:web_search"}]}, "'tools[0]' is the server tool 'openrouter:web_search'"),
        ({"tools": [{"type": "code_interpreter", "container": {}}]}, "without an upper bound"),
        (
            {"tool_choice": "sometimes"},
            "'tool_choice' must be one of 'none', 'auto', 'required', 'any', or a JSON object",
        ),
        ({"response_format": {"type": "json_schema"}}, "'json_schema' is for the type 'json_schema' only"),
        ({"response_format": {"type": "yaml"}}, "'response_format.type' must be one of 'text', 'json_object'"),
        ({"response_format": "json"}, "'response_format' is not JSON"),
        ({"reasoning": {"efort": "high"}}, "unknown field 'efort' in 'reasoning'; did you mean 'effort'?"),
        ({"verbosity": "huge"}, "'verbosity' must be one of 'low', 'medium', 'high'"),
        ({"top_klein": 5}, "unknown field 'top_klein'; did you mean 'top_k'?"),
        ({"tools": [TOOL] * 513}, "'tools' must be a list with at most 512 entries"),
        (
            {"tools": '[{"type": "function", "function": {"name": "a", "parameters": {"x": 1e999}}}]'},
            "without infinities",
        ),
        ({"tags": {"user": "x"}}, "'tags' must not be named 'user': every call has this attribute already"),
        ({"tags": {"a b": "x"}}, "'tags' must have names of 1 to 64 letters"),
        ({"tags": {"team": ["x"]}}, "'tags' must have a text or a number under 'team', not a list"),
        ({"tags": {"team": True}}, "'tags' must have a text or a number under 'team', not true"),
        ({"tags": {"team": "x" * 201}}, "'tags' has a value under 'team' that must have 1 to 200 characters, not 201"),
        ({"tags": {f"t{n}": n for n in range(MAX_TAGS + 1)}}, "'tags' must have at most 16 tags, not 17"),
        ({"tags": "red"}, "'tags' is not JSON"),
    ],
)
def test_a_parameter_of_another_form_is_refused_with_its_name(parameters: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidTask) as refused:
        asked(**parameters)
    assert problem in str(refused.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_price_or_has_no_place_is_refused_with_the_reason(name: str) -> None:
    """G1 G8."""
    for value in ("x", 2, True, {"type": "x"}, ["web"]):
        with pytest.raises(InvalidTask) as refused:
            asked(**{name: value})
        assert str(refused.value) == f"'{name}' cannot be set: {REFUSED[name]}"
    assert asked(**{name: None}).parameters() == {}


def test_tags_are_text() -> None:
    tags = asked(tags={"team": "red", "cost": 42, "share": 0.5, "gone": None}).tags
    assert tags == {"team": "red", "cost": "42", "share": "0.5"}
    assert asked(tags='{"team": "O\'Hara & sons"}').tags == {"team": "O'Hara & sons"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "'messages[0]' has no content"),
        ([{"type": "output_text", "text": "secret"}], "'output_text' of another API: a chat completion has 'text'"),
        ([], "'messages[0]' has no content"),
        (5, "'messages[0].content' must be text or a list of parts"),
        (
            [{"type": "input_audio", "input_audio": {"format": "wav"}}],
            "'messages[0].content[0].input_audio.data' is missing",
        ),
        (
            [{"type": "file", "file": {"file_date": SECRET}}],
            "unknown field 'file_date' in 'messages[0].content[0].file'",
        ),
        ([{"type": "video_url", "video_url": {"url": SECRET}}], "'messages[0].content[0].video_url.url' must be text"),
        (
            [{"type": "input_file", "file_data": SECRET}],
            "'messages[0].content[0]' has the type 'input_file' of another API: a chat completion has 'file'",
        ),
        (
            [{"type": "tool_use", "text": SECRET}],
            "'messages[0].content[0]' has the unknown type 'tool_use'; known: 'text',",
        ),
        ([{"type": "text", "txt": SECRET}], "'messages[0].content[0].text' is missing"),
        (
            [{"type": "image_url", "image_url": {"url": "ftp://x"}}],
            "'messages[0].content[0].image_url.url' must be text",
        ),
        (
            [{"type": "image_url", "image_url": {"link": SECRET}}],
            "unknown field 'link' in 'messages[0].content[0].image_url'",
        ),
    ],
)
def test_a_message_of_another_form_is_refused_without_quoting_it(content: Any, problem: str) -> None:
    """G10."""
    with pytest.raises(InvalidTask) as refused:
        task_with(content)
    assert problem in str(refused.value)
    assert SECRET not in str(refused.value)


HELLO = {"role": "user", "content": "hello"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "message",
    [
        # What LiteLLM, Ollama and Gemini add to a reply that is sent back.
        {"tool_calls": [{**CALL, "provider_specific_fields": {"thought_signature": "s"}}]},
        {"tool_calls": [{**CALL, "function": {**CALL["function"], "provider_specific_fields": None, "index": 0}}]},
        {"tool_calls": [CALL], "thinking": "so", "extra_content": {"google": {"thought_signature": "s"}}},
        {"tool_calls": [{**CALL, "type": None}]},
    ],
)
def test_what_libraries_add_to_a_reply_is_left_out(message: dict[str, Any]) -> None:
    task = task_from_fields(
        {"task": "score_post", "user_id": "u1", "messages": [HELLO, {"role": "assistant", **message}]}
    )
    assert task.chat()[1].as_json() == {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_id_of_a_call_may_be_a_number() -> None:
    messages = [
        HELLO,
        {"role": "assistant", "tool_calls": [{**CALL, "id": 7}]},
        {"role": "tool", "tool_call_id": 7, "content": "rain"},
    ]
    _, call, result = task_from_fields({"task": "score_post", "user_id": "u1", "messages": messages}).chat()
    assert call.tool_calls is not None
    assert (call.tool_calls[0].id, result.tool_call_id) == ("7", "7")


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"tool_calls": [{"id": "c1", "type": "function"}]}, "'messages[0].tool_calls[0]' has no 'function'"),
        ({"tool_calls": [{**CALL, "type": "custom"}]}, "'messages[0].tool_calls[0]' has no 'custom'"),
        ({"content": "hi", "name": ""}, "'messages[0].name' must be text of 1 to 256 characters"),
        # A name is told although a short text stands in it.
        ({"content": "x", "prefix": True}, "unknown field 'prefix' in 'messages[0]'"),
        ({"content": [{"type": "image_url", "image_url": {"url": "gs://x"}}]}, "with at most 2000000 characters"),
    ],
)
def test_a_wrong_message_is_refused_with_its_place(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidTask) as refused:
        task_from_fields({"task": "score_post", "user_id": "u1", "messages": [{"role": "assistant", **message}]})
    assert problem in str(refused.value)


@pytest.mark.parametrize("limits", [(100, 100.0), ("100", 100), (100.0, "100.0")])
def test_a_limit_that_is_given_twice_may_be_written_in_two_ways(limits: tuple[Any, Any]) -> None:
    assert asked(max_tokens=limits[0], max_completion_tokens=limits[1]).max_tokens == 100


def test_audio_of_an_earlier_reply_is_refused() -> None:
    with pytest.raises(InvalidTask, match=r"'messages\[0\]\.audio' is audio, whose cost has no upper bound"):
        task_with("hi", audio={"id": "audio_1"})


def test_data_that_is_nested_too_deep_is_refused_in_every_field() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    for field in ("tools", "messages", "reasoning", "prompt", "tags", "color"):
        with pytest.raises(InvalidTask, match=f"'{field}' must not be nested deeper than 64 levels"):
            task_from_fields({"data": json.dumps({**POST, field: deep})})
