"""OpenAI's SDK for Python: responses."""

import json
from typing import Any

from harness import MODEL, PROMPTS, SYSTEM, TOOL, City, key, look_up, play, url
from openai import OpenAI

OFFERED: Any = [{"type": "function", **TOOL}]


def client(name: str) -> OpenAI:
    return OpenAI(base_url=url(name), api_key=key(name))


def plain(name: str) -> dict[str, Any]:
    reply = client(name).responses.create(model=MODEL, input=PROMPTS[name], instructions=SYSTEM)
    assert reply.usage is not None
    return {"text": reply.output_text, "finish": reply.status, "tokens": reply.usage.output_tokens}


def streaming(name: str) -> dict[str, Any]:
    texts: list[str] = []
    with client(name).responses.stream(model=MODEL, input=PROMPTS[name]) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        reply = stream.get_final_response()
    assert reply.usage is not None
    return {
        "text": "".join(texts),
        "parts": len(texts),
        "finish": reply.status,
        "tokens": reply.usage.output_tokens,
    }


def tools(name: str) -> dict[str, Any]:
    asking, said = client(name), [{"role": "user", "content": PROMPTS[name]}]
    first = asking.responses.create(model=MODEL, input=said, tools=OFFERED)  # type: ignore[arg-type]
    [call] = [item for item in first.output if item.type == "function_call"]
    arguments = json.loads(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": look_up(**arguments)}
    last = asking.responses.create(model=MODEL, input=[*said, *first.output, result], tools=OFFERED)  # type: ignore[arg-type, list-item]
    return {"called": {call.name: arguments}, "text": last.output_text}


def tools_streamed(name: str) -> dict[str, Any]:
    with client(name).responses.stream(model=MODEL, input=PROMPTS[name], tools=OFFERED) as stream:
        stream.until_done()
        [call] = [item for item in stream.get_final_response().output if item.type == "function_call"]
    return {"called": {call.name: json.loads(call.arguments)}}


def structured(name: str) -> dict[str, Any]:
    reply = client(name).responses.parse(model=MODEL, input=PROMPTS[name], text_format=City)
    assert reply.output_parsed is not None
    return {"parsed": reply.output_parsed.model_dump()}


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
