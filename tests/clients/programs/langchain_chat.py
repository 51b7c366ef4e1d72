"""LangChain: `ChatOpenAI` over chat completions or responses, or `ChatAnthropic`."""

import sys
from typing import Any

from harness import EMBEDDINGS_MODEL, MODEL, PROMPTS, TOOL, City, key, look_up, play, url
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

MODE = sys.argv[1]
OFFERED: Any = [{"type": "function", "function": TOOL}]


def chat(name: str) -> Any:
    if MODE == "anthropic":
        return ChatAnthropic(model=MODEL, base_url=url(name, version=""), api_key=key(name), max_tokens=500)
    return ChatOpenAI(model=MODEL, base_url=url(name), api_key=key(name), use_responses_api=MODE == "responses")


def text_of(message: Any) -> str:
    return message.text if isinstance(message.text, str) else message.text()


def plain(name: str) -> dict[str, Any]:
    reply = chat(name).invoke(PROMPTS[name])
    return {"text": text_of(reply), "tokens": reply.usage_metadata["output_tokens"]}


def streaming(name: str) -> dict[str, Any]:
    whole, texts = None, []
    for chunk in chat(name).stream(PROMPTS[name]):
        texts += [text_of(chunk)] if text_of(chunk) else []
        whole = chunk if whole is None else whole + chunk
    tokens = whole.usage_metadata["output_tokens"] if whole is not None and whole.usage_metadata else None
    finish = whole.response_metadata.get("finish_reason") if whole is not None else None
    return {"text": "".join(texts), "parts": len(texts), "tokens": tokens, "finish": finish}


def tools(name: str) -> dict[str, Any]:
    asking, said = chat(name).bind_tools(OFFERED), [HumanMessage(PROMPTS[name])]
    first = asking.invoke(said)
    [call] = first.tool_calls
    last = asking.invoke([*said, first, ToolMessage(look_up(**call["args"]), tool_call_id=call["id"])])
    return {"called": {call["name"]: call["args"]}, "text": text_of(last)}


def tools_streamed(name: str) -> dict[str, Any]:
    whole = None
    for chunk in chat(name).bind_tools(OFFERED).stream(PROMPTS[name]):
        whole = chunk if whole is None else whole + chunk
    [call] = whole.tool_calls if whole is not None else []
    return {"called": {call["name"]: call["args"]}}


def structured(name: str) -> dict[str, Any]:
    return {"parsed": chat(name).with_structured_output(City).invoke(PROMPTS[name]).model_dump()}


def embeddings(name: str) -> dict[str, Any]:
    # What it counts by itself are tokens of a model that it knows by name.
    making = OpenAIEmbeddings(
        model=EMBEDDINGS_MODEL, base_url=url(name), api_key=key(name), check_embedding_ctx_length=False
    )
    vectors = making.embed_documents(["one", "two"])
    return {"vectors": len(vectors), "dimensions": len(vectors[0])}


scenarios: dict[str, Any] = {
    "plain": plain,
    "streaming": streaming,
    "tools": tools,
    "tools_streamed": tools_streamed,
    "structured": structured,
    "cap": plain,
    "cap_streamed": streaming,
    "cut_off": streaming,
    "retry": plain,
}
play(**scenarios, **({"embeddings": embeddings} if MODE == "chat" else {}))
