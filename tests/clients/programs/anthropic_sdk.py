"""Anthropic's SDK for Python."""

from typing import Any

from anthropic import Anthropic
from harness import MODEL, PROMPTS, SYSTEM, TOOL, City, key, look_up, play, url

OFFERED: Any = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}]
LIMIT = 500


def client(name: str) -> Anthropic:
    return Anthropic(base_url=url(name, version=""), api_key=key(name))


def said(name: str) -> Any:
    return [{"role": "user", "content": PROMPTS[name]}]


def plain(name: str) -> dict[str, Any]:
    reply = client(name).messages.create(model=MODEL, max_tokens=LIMIT, system=SYSTEM, messages=said(name))
    text = "".join(block.text for block in reply.content if block.type == "text")
    return {"text": text, "finish": reply.stop_reason, "tokens": reply.usage.output_tokens}


def streaming(name: str) -> dict[str, Any]:
    with client(name).messages.stream(model=MODEL, max_tokens=LIMIT, messages=said(name)) as stream:
        texts = list(stream.text_stream)
        reply = stream.get_final_message()
    return {
        "text": "".join(texts),
        "parts": len(texts),
        "finish": reply.stop_reason,
        "tokens": reply.usage.output_tokens,
    }


def tools(name: str) -> dict[str, Any]:
    asking, messages = client(name), said(name)
    first = asking.messages.create(model=MODEL, max_tokens=LIMIT, messages=messages, tools=OFFERED)
    [call] = [block for block in first.content if block.type == "tool_use"]
    arguments: Any = call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": look_up(**arguments)}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = asking.messages.create(model=MODEL, max_tokens=LIMIT, messages=messages, tools=OFFERED)
    text = "".join(block.text for block in last.content if block.type == "text")
    return {"called": {call.name: arguments}, "finish": first.stop_reason, "text": text}


def tools_streamed(name: str) -> dict[str, Any]:
    with client(name).messages.stream(model=MODEL, max_tokens=LIMIT, messages=said(name), tools=OFFERED) as stream:
        [call] = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    return {"called": {call.name: call.input}}


def structured(name: str) -> dict[str, Any]:
    reply = client(name).messages.parse(model=MODEL, max_tokens=LIMIT, messages=said(name), output_format=City)
    assert reply.parsed_output is not None
    return {"parsed": reply.parsed_output.model_dump()}


play(
    plain=plain,
    streaming=streaming,
    tools=tools,
    tools_streamed=tools_streamed,
    structured=structured,
    cap=plain,
    cap_streamed=streaming,
    cut_off=streaming,
    retry=plain,
)
