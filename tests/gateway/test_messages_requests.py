"""Requests of Anthropic's Messages become chat completions that are valid tasks, or are refused by the field's name."""

from typing import Any

import pytest

from tests.gateway.golden import events_in, load, names
from tollbook.gateway.messages.request import chat_fields
from tollbook.gateway.messages.stream import Events
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import InvalidTask, Task, task_from_fields

MARK = {"type": "ephemeral"}
PNG = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
CHAT_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"name": "f", "description": "Does it.", "input_schema": {"type": "object"}}
CHAT_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object"}},
}


def fields_of(**body: Any) -> dict[str, Any]:
    return chat_fields({"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **body})


def task_of(fields: dict[str, Any]) -> Task:
    return task_from_fields({**{k: v for k, v in fields.items() if k != "stream"}, "task": "t", "user_id": "u"})


def result(*content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "c1", "content": list(content), **more}


@pytest.mark.parametrize("name", names("bodies", "messages"))
def test_bodies_of_sdks_and_agents_become_tasks(name: str) -> None:
    body = load("bodies", name)
    fields = chat_fields(body)
    task = task_of(fields)
    assert (task.model, task.max_tokens) == (body["model"], body["max_tokens"])
    assert fields.get("stream") == (True if body.get("stream") else None)
    assert fields.keys() <= {
        "model", "messages", "max_tokens", "stream", "tools", "tool_choice", "reasoning", "response_format",
    }  # fmt: skip


def test_claude_code_keeps_its_cache_marks_tools_and_effort() -> None:
    fields = chat_fields(load("bodies", "messages-claude-code-adaptive"))
    assert [message["role"] for message in fields["messages"]] == [
        "system", "user", "system", "assistant", "tool",
    ]  # fmt: skip
    system, *_, call, tool = fields["messages"]
    assert [part.get("cache_control") for part in system["content"]] == [None, MARK, MARK]
    assert call["reasoning"] == "Thinking it over."
    assert call["tool_calls"][0]["function"]["name"] == "Bash"
    assert tool == {
        "role": "tool",
        "tool_call_id": "call_abc",
        "content": [{"type": "text", "text": "hi", "cache_control": MARK}],
    }
    assert fields["reasoning"] == {"effort": "high"}


@pytest.mark.parametrize(
    ("role", "content", "messages"),
    [
        ("user", "hi", [{"role": "user", "content": "hi"}]),
        ("user", [{"type": "text", "text": "hi"}], [{"role": "user", "content": "hi"}]),
        ("system", "Now be brief.", [{"role": "system", "content": "Now be brief."}]),
        (
            "user",
            [{"type": "text", "text": "hi", "cache_control": {**MARK, "ttl": "1h", "scope": "global"}}],
            [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {**MARK, "ttl": "1h"}}]}],
        ),
        (
            "user",
            [{"type": "image", "source": PNG, "cache_control": MARK}, {"type": "text", "text": "look"}],
            [{"role": "user", "content": [{**CHAT_IMAGE, "cache_control": MARK}, {"type": "text", "text": "look"}]}],
        ),
        (
            "user",
            [{"type": "document", "title": "a.pdf", "source": {**PNG, "media_type": "application/pdf"}}],
            [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "file",
                            "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"},
                        }
                    ],
                }
            ],
        ),
        (
            "user",
            [
                {
                    "type": "document",
                    "title": "T",
                    "source": {"type": "text", "media_type": "text/plain", "data": "body"},
                }
            ],
            [{"role": "user", "content": "T\nbody"}],
        ),
        (
            "user",
            [{"type": "search_result", "title": "T", "source": "s", "content": [{"type": "text", "text": "x"}]}],
            [{"role": "user", "content": "T\ns\nx"}],
        ),
        (
            "user",
            [result({"type": "text", "text": "1"}), {"type": "text", "text": "go on"}],
            [{"role": "tool", "tool_call_id": "c1", "content": "1"}, {"role": "user", "content": "go on"}],
        ),
        (
            "user",
            [result({"type": "text", "text": "no"}, is_error=True)],
            [{"role": "tool", "tool_call_id": "c1", "content": "Error: no"}],
        ),
        ("user", [result()], [{"role": "tool", "tool_call_id": "c1", "content": ""}]),
        (
            "user",
            [result({"type": "image", "source": PNG})],
            [
                {"role": "tool", "tool_call_id": "c1", "content": "The result follows in the next message."},
                {"role": "user", "content": [CHAT_IMAGE]},
            ],
        ),
        (
            "user",
            [result({"type": "tool_reference", "tool_name": "f"})],
            [{"role": "tool", "tool_call_id": "c1", "content": "The tool f is available."}],
        ),
        (
            "assistant",
            [{"type": "text", "text": "Let me."}, {"type": "text", "text": "\n"}, USE, {**USE, "id": "c2"}],
            [{"role": "assistant", "content": "Let me.", "tool_calls": [CHAT_CALL, {**CHAT_CALL, "id": "c2"}]}],
        ),
        (
            "assistant",
            [
                {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
                {"type": "redacted_thinking", "data": "x"},
                USE,
            ],
            [
                {
                    "role": "assistant",
                    "reasoning_details": [
                        {
                            "type": "reasoning.text",
                            "text": "Hm.",
                            "signature": "c2ln",
                            "format": "anthropic-claude-v1",
                            "index": 0,
                        },
                        {"type": "reasoning.encrypted", "data": "x", "format": "anthropic-claude-v1", "index": 1},
                    ],
                    "tool_calls": [CHAT_CALL],
                }
            ],
        ),
        (
            "assistant",
            [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "So."}],
            [{"role": "assistant", "reasoning": "Hm.", "content": "So."}],
        ),
        ("assistant", [{"type": "thinking", "thinking": "Hm.", "signature": ""}], []),
    ],
)
def test_content_becomes_messages(role: str, content: object, messages: list[dict[str, Any]]) -> None:
    hello = {"role": "user", "content": "hello"}
    fields = fields_of(messages=[hello, {"role": role, "content": content}])
    task_of(fields)
    assert fields["messages"] == [hello, *messages]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (
            {"stream": True, "top_p": 0.9, "top_k": 5, "temperature": 0.5},
            {"stream": True, "top_p": 0.9, "top_k": 5, "temperature": 0.5},
        ),
        # Anthropic's default, which Claude Code sends.
        ({"temperature": 1, "stream": False}, {}),
        ({"stop_sequences": ["END"]}, {"stop": ["END"]}),
        ({"stop_sequences": []}, {}),
        ({"cache_control": MARK}, {"cache_control": MARK}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"reasoning": {"max_tokens": 1024}}),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, {"reasoning": {"enabled": True}}),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, {"reasoning": {"effort": "low"}}),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, {"reasoning": {"enabled": False}}),
        ({"output_config": {"effort": "max"}}, {"reasoning": {"effort": "max"}}),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, {"tools": [CHAT_TOOL], "tool_choice": "required"}),
        (
            {
                "tools": [{**TOOL, "type": "custom", "cache_control": MARK, "eager_input_streaming": True}],
                "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
            },
            {
                "tools": [{**CHAT_TOOL, "cache_control": MARK}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "parallel_tool_calls": False,
            },
        ),
        ({"tools": [TOOL, {"type": "tool_search_tool_regex_20251119", "name": "t"}]}, {"tools": [CHAT_TOOL]}),
        ({"tools": [], "tool_choice": {"type": "auto"}}, {}),
        (
            {
                "metadata": {"user_id": "u"},
                "betas": ["b"],
                "context_management": {"edits": []},
                "mcp_servers": [],
                "service_tier": "auto",
                "speed": "standard",
                "diagnostics": {"previous_message_id": None},
                "container": None,
                "inference_geo": "global",
            },
            {},
        ),
    ],
)
def test_fields_become_those_of_a_chat_completion(body: dict[str, Any], fields: dict[str, Any]) -> None:
    made = fields_of(**body)
    task_of(made)
    assert made == {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}


@pytest.mark.parametrize(
    ("system", "message"),
    [
        ("Be brief.", {"role": "system", "content": "Be brief."}),
        ([{"type": "text", "text": "Be brief."}], {"role": "system", "content": "Be brief."}),
        (
            [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": MARK}],
            {
                "role": "system",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": MARK}],
            },
        ),
        ("", None),
        ([], None),
    ],
)
def test_the_system_prompt_comes_first(system: object, message: dict[str, Any] | None) -> None:
    made = fields_of(system=system)["messages"]
    assert made == [*([message] if message else []), {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"max_tokens": None}, "'max_tokens' is missing"),
        ({"messages": None}, "'messages' is missing"),
        ({"messages": "hi"}, "'messages' must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role' is 'tool': it must be one of"),
        ({"service_tier": "priority"}, "'service_tier' cannot be set: it changes the price"),
        ({"speed": "fast"}, "'speed' cannot be set: it changes the price"),
        ({"inference_geo": "us"}, "'inference_geo' cannot be set: it changes the price"),
        ({"container": "c"}, "'container' cannot be set: the gateway stores nothing"),
        (
            {"mcp_servers": [{"url": "u"}]},
            "'mcp_servers' cannot be set: the cost of tools that the provider runs has no upper bound",
        ),
        (
            {"tools": [{"type": "web_search_20250305", "name": "w"}]},
            "'tools[0]' is the server tool 'web_search_20250305'",
        ),
        ({"tools": [{"type": "bash_20250124", "name": "b"}]}, "'tools[0]' is Anthropic's tool 'bash_20250124'"),
        ({"tools": [{"name": "f"}]}, "'tools[0].input_schema' must be a JSON object"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "'tool_choice.type' is 'some': it must be one of"),
        ({"thinking": {"type": "deep"}}, "'thinking.type' is 'deep': it must be one of"),
        ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "'thinking.budget_tokens' must be a whole number"),
        ({"output_config": {"format": {"type": "text"}}}, "'output_config.format.type' is 'text'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}
                ]
            },
            "'messages[0].content[0].source' cannot name a file: the gateway stores nothing",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use", "id": "s"}]}]},
            "'messages[0].content[0]' has the type 'server_tool_use'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "f"}]}]},
            "'messages[0].content[0]' has the type 'container_upload'",
        ),
    ],
)
def test_what_cannot_be_translated_is_refused_by_its_name(body: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidTask) as refused:
        fields_of(**body)
    assert str(refused.value).startswith(sentence)


def test_signed_reasoning_goes_through_a_client_and_back() -> None:
    details = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}
    chunks: list[dict[str, Any]] = [
        {"reasoning": "Ea", "reasoning_details": [{**details, "text": "Ea"}]},
        {"reasoning": "sy.", "reasoning_details": [{**details, "text": "sy."}]},
        {"reasoning_details": [{**details, "signature": "c2ln"}]},
        {"content": "Sunny."},
    ]
    events = Events(message_id="msg_1", body={})
    whole = InferenceResult.model_validate(
        {"task_id": "t", "status": "done", "content": "Sunny.", "reasoning": "Easy.", "finish_reason": "stop"}
    )
    parts = [part for delta in chunks for part in events.delta({"choices": [{"index": 0, "delta": delta}]})]
    deltas = [
        event["delta"] for event in events_in([*parts, *events.end(whole)]) if "index" in event and "delta" in event
    ]
    signature = next(delta["signature"] for delta in deltas if delta["type"] == "signature_delta")
    thinking = {"type": "thinking", "thinking": "Easy.", "signature": signature}
    answer = {"role": "assistant", "content": [thinking, {"type": "text", "text": "Sunny."}]}
    messages = fields_of(messages=[{"role": "user", "content": "hi"}, answer])["messages"]
    assert messages[1] == {
        "role": "assistant",
        "reasoning_details": [{**details, "text": "Easy.", "signature": "c2ln"}],
        "content": "Sunny.",
    }
