"""OpenAI's SDK for Python: chat completions."""

import json
from typing import Any

from harness import EMBEDDINGS_MODEL, MODEL, PROMPTS, TOOL, City, key, look_up, play, url
from openai import OpenAI


def client(name: str) -> OpenAI:
    return OpenAI(base_url=url(name), api_key=key(name))


def said(name: str) -> list[Any]:
    return [{"role": "user", "content": PROMPTS[name]}]


def plain(name: str) -> dict[str, Any]:
    reply = client(name).chat.completions.create(model=MODEL, messages=said(name))
    assert reply.usage is not None
    return {
        "text": reply.choices[0].message.content,
        "finish": reply.choices[0].finish_reason,
        "tokens": reply.usage.completion_tokens,
        "cost": getattr(reply.usage, "cost", None),
    }


def streaming(name: str) -> dict[str, Any]:
    texts: list[str] = []
    seen: dict[str, Any] = {"error": None}
    for chunk in client(name).chat.completions.create(
        model=MODEL, messages=said(name), stream=True, stream_options={"include_usage": True}
    ):
        texts += [choice.delta.content for choice in chunk.choices if choice.delta.content]
        finish = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), None)
        seen["finish"] = finish or seen.get("finish")
        if chunk.usage is not None:
            seen |= {"tokens": chunk.usage.completion_tokens, "cost": getattr(chunk.usage, "cost", None)}
    return {**seen, "text": "".join(texts), "parts": len(texts)}


def tools(name: str) -> dict[str, Any]:
    asking, messages = client(name), said(name)
    offered: Any = [{"type": "function", "function": TOOL}]
    first = asking.chat.completions.create(model=MODEL, messages=messages, tools=offered).choices[0]
    [call] = first.message.tool_calls or []
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": look_up(**arguments)}
    messages = [*messages, first.message, result]
    last = asking.chat.completions.create(model=MODEL, messages=messages, tools=offered).choices[0]
    return {"called": {call.function.name: arguments}, "finish": first.finish_reason, "text": last.message.content}


def tools_streamed(name: str) -> dict[str, Any]:
    offered: Any = [{"type": "function", "function": TOOL}]
    with client(name).chat.completions.stream(model=MODEL, messages=said(name), tools=offered) as stream:
        stream.until_done()
        [call] = stream.get_final_completion().choices[0].message.tool_calls or []
    return {"called": {call.function.name: json.loads(call.function.arguments)}}


def structured(name: str) -> dict[str, Any]:
    reply = client(name).chat.completions.parse(model=MODEL, messages=said(name), response_format=City)
    parsed = reply.choices[0].message.parsed
    assert parsed is not None
    return {"parsed": parsed.model_dump()}


def embeddings(name: str) -> dict[str, Any]:
    reply = client(name).embeddings.create(model=EMBEDDINGS_MODEL, input=["one", "two"])
    return {"vectors": len(reply.data), "dimensions": len(reply.data[0].embedding)}


play(
    plain=plain,
    streaming=streaming,
    tools=tools,
    tools_streamed=tools_streamed,
    structured=structured,
    cap=plain,
    cap_streamed=streaming,
    cut_off=streaming,
    embeddings=embeddings,
    retry=plain,
)
