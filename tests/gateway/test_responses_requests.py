"""Requests of OpenAI's Responses become chat completions that are valid tasks, or are refused by the field's name."""

import json
from typing import Any

import pytest

from tests.gateway.golden import load, names
from tollbook.gateway.responses.document import document
from tollbook.gateway.responses.references import items_by_id, referenced_responses
from tollbook.gateway.responses.request import chat_fields
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import InvalidTask, Task, task_from_fields

IMAGE = "data:image/png;base64,AAAA"
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {
    "type": "function",
    "name": "f",
    "description": "Does it.",
    "parameters": {"type": "object"},
    "strict": True,
}
CHAT_FUNCTION = {
    "type": "function",
    "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object"}, "strict": True},
}
TEXT_ARGUMENT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def fields_of(**body: Any) -> dict[str, Any]:
    return chat_fields({"model": "m", "input": "hi", **body})


def messages_of(*items: dict[str, Any]) -> list[dict[str, Any]]:
    messages = fields_of(input=list(items))["messages"]
    task_of(fields_of(input=list(items)))
    return messages


def task_of(fields: dict[str, Any]) -> Task:
    return task_from_fields({**{k: v for k, v in fields.items() if k != "stream"}, "task": "t", "user_id": "u"})


@pytest.mark.parametrize("name", names("bodies", "responses"))
def test_bodies_of_sdks_and_agents_become_tasks(name: str) -> None:
    body = load("bodies", name)
    result = InferenceResult.model_validate(
        {"task_id": "t", "status": "done", "content": "Let me look.", "reasoning": "Thinking it over."}
    )
    known: dict[str, Any] = {}
    for response_id in referenced_responses(body):
        known |= items_by_id(result, response_id=response_id, body=body)
    assert bool(known) == ("references" in name)
    fields = chat_fields(body, known)
    task = task_of(fields)
    assert task.model == body["model"]
    assert fields.get("stream") == (True if body.get("stream") else None)
    assert len(task.chat()) > 0


def test_a_loop_of_tools_keeps_its_order_and_its_reasoning() -> None:
    """As Codex sends it: what the model put out in a turn is one message, right before the results."""
    fields = chat_fields(load("bodies", "responses-codex"))
    assert [message["role"] for message in fields["messages"]] == [
        "developer", "developer", "user", "user", "assistant", "tool",
    ]  # fmt: skip
    turn, result = fields["messages"][-2:]
    assert turn["content"] == "Let me look."
    assert turn["reasoning"] == "Thinking it over."
    assert turn["tool_calls"][0]["id"] == result["tool_call_id"]


def test_custom_tools_of_namespaces_are_called_as_functions() -> None:
    """As Codex sends them for OpenAI's newest models: in the input, with a grammar."""
    fields = chat_fields(load("bodies", "responses-codex-custom-tools"))
    tool = next(tool["function"] for tool in fields["tools"] if tool["function"]["name"] == "functions__exec")
    assert tool["parameters"] == TEXT_ARGUMENT
    assert "must follow this grammar (lark)" in tool["description"]
    call = next(message for message in fields["messages"] if "tool_calls" in message)["tool_calls"][0]["function"]
    assert call["name"] == "functions__exec"
    assert json.loads(call["arguments"]).keys() == {"input"}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]),
        (
            [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            [{"role": "user", "content": "hi"}],
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "look"},
                        {"type": "input_image", "image_url": IMAGE, "detail": "low", "file_id": None},
                        {"type": "input_file", "file_data": "data:application/pdf;base64,AA", "filename": "a.pdf"},
                    ],
                }
            ],
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "look"},
                        {"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}},
                        {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA", "filename": "a.pdf"}},
                    ],
                }
            ],
        ),
        (
            [
                {"role": "user", "content": "hi"},
                {
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Hel"}, {"type": "output_text", "text": "lo"}],
                },
                {"role": "user", "content": "go on"},
            ],
            [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "go on"},
            ],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
            [{"role": "assistant", "refusal": "No."}],
        ),
        (
            [
                CALL,
                {**CALL, "call_id": "c2"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
            ],
            [
                {"role": "assistant", "tool_calls": [CHAT_CALL, {**CHAT_CALL, "id": "c2"}]},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
                {"role": "tool", "tool_call_id": "c2", "content": "2"},
            ],
        ),
        (
            [
                CALL,
                {
                    "type": "function_call_output",
                    "call_id": "c1",
                    "output": [{"type": "input_image", "image_url": IMAGE}],
                },
                {"role": "user", "content": "hi"},
            ],
            [
                {"role": "assistant", "tool_calls": [CHAT_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "The result follows in the next message."},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]},
                {"role": "user", "content": "hi"},
            ],
        ),
        (
            [
                {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "OpenAI's own"},
                {**CALL, "namespace": "ns"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
            ],
            [
                {"role": "assistant", "tool_calls": [{**CHAT_CALL, "function": {"name": "ns__f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c1", "content": "1"},
            ],
        ),
        (
            [
                {"role": "user", "content": "hi"},
                {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "x"}]},
            ],
            [{"role": "user", "content": "hi"}],
        ),
        (
            [{"type": "image_generation_call", "id": "ig", "status": "completed", "result": "AAAA"}],
            [
                {
                    "role": "assistant",
                    "content": "",
                    "images": [{"type": "image_url", "image_url": {"url": IMAGE}}],
                }
            ],
        ),
        (
            [{"role": "user", "content": "hi"}, {"type": "web_search_call", "id": "ws", "status": "completed"}],
            [{"role": "user", "content": "hi"}],
        ),
    ],
)
def test_items_become_messages(items: list[dict[str, Any]], messages: list[dict[str, Any]]) -> None:
    assert messages_of(*items) == messages


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (
            {"instructions": "Be brief."},
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]},
        ),
        ({"max_output_tokens": 9}, {"max_tokens": 9}),
        (
            {"temperature": 0.5, "top_p": 0.9, "metadata": {"a": "b"}},
            {"temperature": 0.5, "top_p": 0.9, "metadata": {"a": "b"}},
        ),
        ({"stream": True}, {"stream": True}),
        ({"stream": False}, {}),
        ({"reasoning": {"effort": "low", "summary": "auto", "context": "all_turns"}}, {"reasoning_effort": "low"}),
        ({"text": {"verbosity": "low", "format": {"type": "text"}}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ({"tools": [FUNCTION], "tool_choice": "required"}, {"tools": [CHAT_FUNCTION], "tool_choice": "required"}),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}, "parallel_tool_calls": False},
            {
                "tools": [CHAT_FUNCTION],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "parallel_tool_calls": False,
            },
        ),
        (
            {
                "tools": [FUNCTION, {**FUNCTION, "name": "g"}],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            },
            {"tools": [CHAT_FUNCTION], "tool_choice": "auto"},
        ),
        (
            {"tools": [{"type": "custom", "name": "c", "description": "Text."}]},
            {
                "tools": [
                    {"type": "function", "function": {"name": "c", "description": "Text.", "parameters": TEXT_ARGUMENT}}
                ]
            },
        ),
        (
            {
                "tools": [
                    {
                        "type": "namespace",
                        "name": "ns",
                        "description": "All.",
                        "tools": [FUNCTION, {**FUNCTION, "name": "g"}],
                    }
                ]
            },
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            **CHAT_FUNCTION["function"],
                            "name": "ns__f",
                            "description": "ns: All.\n\nDoes it.",
                        },
                    },
                    {"type": "function", "function": {**CHAT_FUNCTION["function"], "name": "ns__g"}},
                ]
            },
        ),
        # Codex offers it by default; a search of live pages is refused.
        ({"tools": [FUNCTION, {"type": "web_search", "external_web_access": False}]}, {"tools": [CHAT_FUNCTION]}),
        ({"tools": [FUNCTION, {"type": "tool_search"}]}, {"tools": [CHAT_FUNCTION]}),
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ({"prompt_cache_key": "k"}, {"prompt_cache_key": "k"}),
        ({"prompt_cache_key": "k" * 65}, {}),
        # Fields that SDKs and agents always send, or that only state the default.
        (
            {
                "store": True,
                "include": ["reasoning.encrypted_content"],
                "truncation": "auto",
                "service_tier": "auto",
                "safety_identifier": "s",
                "user": "u",
                "background": False,
                "previous_response_id": None,
                "conversation": None,
                "top_logprobs": 0,
                "client_metadata": {"a": "b"},
                "max_tool_calls": 3,
                "context_management": [{"type": "compaction"}],
                "stream_options": {"include_obfuscation": False},
            },
            {},
        ),
    ],
)
def test_fields_become_those_of_a_chat_completion(body: dict[str, Any], fields: dict[str, Any]) -> None:
    made = fields_of(**body)
    task_of(made)
    assert made == {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"previous_response_id": "resp_1"},
            "'previous_response_id' cannot be set: the gateway stores nothing between requests",
        ),
        ({"conversation": "conv_1"}, "'conversation' cannot be set: the gateway stores nothing between requests"),
        ({"background": True}, "'background' cannot be set: the gateway stores nothing between requests"),
        ({"prompt": {"id": "p"}}, "'prompt' cannot be set: the gateway stores nothing between requests"),
        ({"service_tier": "flex"}, "'service_tier' cannot be set: it changes the price"),
        ({"top_logprobs": 2}, "'top_logprobs' cannot be set"),
        ({"include": ["message.output_text.logprobs"]}, "'include' cannot ask for log probabilities"),
        ({"moderation": {"model": "m"}}, "'moderation' cannot be set"),
        ({"reasoning": {"mode": "pro"}}, "'reasoning.mode' cannot be set"),
        ({"tools": [{"type": "web_search"}]}, "'tools[0]' is the server tool 'web_search'"),
        ({"tools": [FUNCTION, {"type": "mcp", "server_label": "s"}]}, "'tools[1]' is the server tool 'mcp'"),
        ({"tools": [{"type": "tool_search", "execution": "client"}]}, "'tools[0]' searches for tools"),
        ({"tools": [{"type": "local_shell"}]}, "'tools[0]' is OpenAI's tool 'local_shell'"),
        (
            {"tools": [FUNCTION], "tool_choice": {"type": "file_search"}},
            "'tool_choice' names the server tool 'file_search'",
        ),
        (
            {"input": [{"type": "item_reference", "id": "msg_1_0"}]},
            "'input[0]' refers to an earlier item: the gateway stores nothing",
        ),
        ({"input": [{"id": "msg_1_0"}]}, "'input[0]' refers to an earlier item"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "'input[0]' is a compaction"),
        ({"input": [{"type": "mcp_call", "id": "m"}]}, "'input[0]' has the type 'mcp_call'"),
        ({"input": [{"role": "robot", "content": "x"}]}, "'input[0].role' is 'robot': it must be one of"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}]},
            "'input[0].content[0].file_id' cannot be set",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_video"}]}]},
            "'input[0].content[0]' has the type 'input_video'",
        ),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "'input[0].arguments' is missing"),
        ({"input": {"a": 1}}, "'input' must be a list"),
        ({"input": None}, "'input' is missing"),
        ({"text": {"format": {"type": "grammar"}}}, "'text.format' has the type 'grammar'"),
        ({"tools": [{"type": "custom"}]}, "'tools[0].name' is missing"),
    ],
)
def test_what_cannot_be_translated_is_refused_by_its_name(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidTask) as refused:
        fields_of(**body)
    assert str(refused.value).startswith(sentence)


def test_refusals_quote_no_prompt() -> None:
    """G10."""
    secret = "my secret plan"
    for body in (
        {"input": [{"role": secret * 9, "content": "x"}]},
        {"input": [{"type": "message", "content": secret}]},
    ):
        with pytest.raises(InvalidTask) as refused:
            fields_of(**body)
        assert secret not in str(refused.value)


def test_unknown_fields_are_judged_where_the_task_is_made() -> None:
    with pytest.raises(InvalidTask, match="unknown field 'modle'"):
        task_of(fields_of(modle="m"))
    with pytest.raises(InvalidTask, match="'n' cannot be set"):
        task_of(fields_of(n=2))


def test_a_body_that_is_nested_too_deeply_is_refused() -> None:
    value: Any = {}
    for _ in range(200):
        value = {"a": value}
    with pytest.raises(InvalidTask, match="nested deeper"):
        fields_of(metadata=value)


def test_images_of_results_come_before_the_next_turn() -> None:
    output = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_image", "image_url": IMAGE}]}
    following = {**CALL, "call_id": "c2"}
    messages = messages_of(CALL, output, following, {**output, "call_id": "c2", "output": "1"})
    assert [message["role"] for message in messages] == ["assistant", "tool", "user", "assistant", "tool"]


def test_a_tool_that_is_listed_twice_is_sent_once() -> None:
    item = {"type": "additional_tools", "role": "developer", "tools": [{**FUNCTION, "description": "Newer."}]}
    fields = fields_of(tools=[FUNCTION], input=[item, {"role": "user", "content": "hi"}])
    assert [tool["function"]["description"] for tool in fields["tools"]] == ["Newer."]


def test_items_of_a_result_stand_in_for_references() -> None:
    """Vercel's SDK does not repeat an item that may be stored."""
    body = {"model": "m", "input": "hi", "tools": [FUNCTION]}
    result = InferenceResult.model_validate(
        {"task_id": "t", "status": "done", "content": "Looking.", "reasoning": "Hm.", "tool_calls": [CHAT_CALL]}
    )
    answer = document(result, response_id="resp_a_b", created_s=0, body=body)
    references = [{"type": "item_reference", "id": item["id"]} for item in answer["output"]]
    output = {"type": "function_call_output", "call_id": "c1", "output": "1"}
    following = {**body, "input": [{"role": "user", "content": "hi"}, *references, output]}
    assert referenced_responses(following) == {"resp_a_b"}
    known = items_by_id(result, response_id="resp_a_b", body=following)
    whole = {**body, "input": [{"role": "user", "content": "hi"}, *answer["output"], output]}
    assert chat_fields(following, known) == chat_fields(whole)
    # A stream can have cut the text in two.
    more = {**body, "input": [{"role": "user", "content": "hi"}, *references, {"id": "msg_a_b_1"}, output]}
    assert chat_fields(more, known) == chat_fields(whole)


def test_functions_are_repeated_with_all_that_one_has_and_objects_with_what_is_default() -> None:
    result = InferenceResult.model_validate({"task_id": "t", "status": "done", "content": "x"})
    body = {"model": "m", "input": "hi", "tools": [{"type": "function", "name": "f"}], "text": {"verbosity": "low"}}
    answer = document(result, response_id="resp_1", created_s=0, body=body)
    assert answer["tools"] == [
        {"type": "function", "name": "f", "description": None, "parameters": None, "strict": None}
    ]
    assert answer["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert answer["store"] is False
