"""LiteLLM's SDK: chat completions of OpenAI, or messages of Anthropic."""

import json
import os
import sys
import uuid
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # Else its import waits for a list from GitHub.

import litellm
from harness import EMBEDDINGS_MODEL, MODEL, PROMPTS, TOOL, City, key, look_up, play, url

litellm.suppress_debug_info = True
litellm.telemetry = False
MODE = sys.argv[1]
OFFERED: Any = [{"type": "function", "function": TOOL}]


def ask(name: str, messages: Any = None, **options: Any) -> Any:
    address = url(name, version="") if MODE == "anthropic" else url(name)
    return litellm.completion(
        model=f"{MODE}/{MODEL}",
        api_base=address,
        api_key=key(name),
        messages=messages or said(name),
        **options,
    )


def said(name: str) -> list[Any]:
    return [{"role": "user", "content": PROMPTS[name]}]


def plain(name: str) -> dict[str, Any]:
    reply = ask(name)
    return {"text": reply.choices[0].message.content, "tokens": reply.usage.completion_tokens}


def retried(name: str) -> dict[str, Any]:
    """Over Anthropic's API it retries by itself, if told to, and does not say so: a key names the call."""
    options: dict[str, Any] = {}
    if MODE == "anthropic":
        options = {"num_retries": 1, "extra_headers": {"Idempotency-Key": str(uuid.uuid4())}}
    return {"text": ask(name, **options).choices[0].message.content}


def streaming(name: str) -> dict[str, Any]:
    texts, tokens, finish = [], None, None
    for chunk in ask(name, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts += [choice.delta.content] if choice.delta.content else []
            finish = choice.finish_reason or finish
        usage = getattr(chunk, "usage", None)
        tokens = usage.completion_tokens if usage else tokens
    return {"text": "".join(texts), "parts": len(texts), "tokens": tokens, "finish": finish}


def tools(name: str) -> dict[str, Any]:
    first = ask(name, tools=OFFERED).choices[0].message
    [call] = first.tool_calls
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": look_up(**arguments)}
    last = ask(name, [*said(name), first.model_dump(), result], tools=OFFERED)
    return {"called": {call.function.name: arguments}, "text": last.choices[0].message.content}


def tools_streamed(name: str) -> dict[str, Any]:
    chunks = list(ask(name, tools=OFFERED, stream=True))
    [call] = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    return {"called": {call.function.name: json.loads(call.function.arguments)}}


def structured(name: str) -> dict[str, Any]:
    reply = ask(name, response_format=City)
    return {"parsed": json.loads(reply.choices[0].message.content)}


def embeddings(name: str) -> dict[str, Any]:
    reply = litellm.embedding(
        model=f"openai/{EMBEDDINGS_MODEL}", api_base=url(name), api_key=key(name), input=["one", "two"]
    )
    return {"vectors": len(reply.data), "dimensions": len(reply.data[0]["embedding"])}


scenarios: dict[str, Any] = {
    "plain": plain,
    "streaming": streaming,
    "tools": tools,
    "tools_streamed": tools_streamed,
    "structured": structured,
    "cap": plain,
    "cap_streamed": streaming,
    "cut_off": streaming,
    "retry": retried,
}
play(**scenarios, **({"embeddings": embeddings} if MODE == "openai" else {}))
