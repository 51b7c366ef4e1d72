"""LlamaIndex: `OpenAILike`."""

from typing import Any

from harness import EMBEDDINGS_MODEL, MODEL, PROMPTS, City, key, look_up, play, url
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike


def chat(name: str) -> Any:
    return OpenAILike(
        model=MODEL,
        api_base=url(name),
        api_key=key(name),
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        context_window=128_000,
        additional_kwargs={"stream_options": {"include_usage": True}} if name == "streaming" else {},
    )


def said(name: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=PROMPTS[name])]


def plain(name: str) -> dict[str, Any]:
    reply = chat(name).chat(said(name))
    return {"text": reply.message.content, "tokens": reply.raw.usage.completion_tokens}


def streaming(name: str) -> dict[str, Any]:
    texts, tokens, finish = [], None, None
    for part in chat(name).stream_chat(said(name)):
        texts += [part.delta] if part.delta else []
        usage = getattr(part.raw, "usage", None)
        tokens = usage.completion_tokens if usage else tokens
        finish = next((each.finish_reason for each in part.raw.choices if each.finish_reason), finish)
    return {"text": "".join(texts), "parts": len(texts), "tokens": tokens, "finish": finish}


def tools(name: str) -> dict[str, Any]:
    asking, offered = chat(name), [FunctionTool.from_defaults(fn=look_up)]
    first = asking.chat_with_tools(offered, chat_history=said(name))
    [call] = asking.get_tool_calls_from_response(first)
    result = ChatMessage(
        role="tool", content=look_up(**call.tool_kwargs), additional_kwargs={"tool_call_id": call.tool_id}
    )
    last = asking.chat_with_tools(offered, chat_history=[*said(name), first.message, result])
    return {"called": {call.tool_name: call.tool_kwargs}, "text": last.message.content}


def tools_streamed(name: str) -> dict[str, Any]:
    asking, last = chat(name), None
    for part in asking.stream_chat_with_tools([FunctionTool.from_defaults(fn=look_up)], chat_history=said(name)):
        last = part
    [call] = asking.get_tool_calls_from_response(last)
    return {"called": {call.tool_name: call.tool_kwargs}}


def structured(name: str) -> dict[str, Any]:
    reply = chat(name).as_structured_llm(City).chat(said(name))
    return {"parsed": reply.raw.model_dump()}


def embeddings(name: str) -> dict[str, Any]:
    making = OpenAILikeEmbedding(model_name=EMBEDDINGS_MODEL, api_base=url(name), api_key=key(name))
    vectors = making.get_text_embedding_batch(["one", "two"])
    return {"vectors": len(vectors), "dimensions": len(vectors[0])}


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
