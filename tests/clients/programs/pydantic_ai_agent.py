"""pydantic-ai: agents over chat completions, responses or messages."""

import sys
from typing import Any

from harness import MODEL, PROMPTS, City, key, look_up, play, url
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

MODE = sys.argv[1]


def agent(name: str, **options: Any) -> Agent[None, Any]:
    if MODE == "anthropic":
        provider: Any = AnthropicProvider(base_url=url(name, version=""), api_key=key(name))
        return Agent(AnthropicModel(MODEL, provider=provider), **options)
    provider = OpenAIProvider(base_url=url(name), api_key=key(name))
    kind = OpenAIResponsesModel if MODE == "responses" else OpenAIChatModel
    return Agent(kind(MODEL, provider=provider), **options)


def called_in(messages: list[Any]) -> dict[str, Any]:
    parts = [part for message in messages for part in message.parts if isinstance(part, ToolCallPart)]
    return {part.tool_name: part.args_as_dict() for part in parts if part.tool_name == look_up.__name__}


async def plain(name: str) -> dict[str, Any]:
    run = await agent(name).run(PROMPTS[name])
    return {"text": run.output, "tokens": usage_of(run).output_tokens}


def usage_of(run: Any) -> Any:
    return run.usage() if callable(run.usage) else run.usage


async def streaming(name: str) -> dict[str, Any]:
    async with agent(name).run_stream(PROMPTS[name]) as run:
        texts = [text async for text in run.stream_text(delta=True, debounce_by=None)]
        finish = run.response.finish_reason
    return {"text": "".join(texts), "parts": len(texts), "tokens": usage_of(run).output_tokens, "finish": finish}


async def tools(name: str) -> dict[str, Any]:
    run = await agent(name, tools=[look_up]).run(PROMPTS[name])
    return {"called": called_in(run.all_messages()), "text": run.output}


async def tools_streamed(name: str) -> dict[str, Any]:
    async with agent(name, tools=[look_up]).run_stream(PROMPTS[name]) as run:
        await run.get_output()
    return {"called": called_in(run.all_messages())}


async def structured(name: str) -> dict[str, Any]:
    """By a tool for the output, as pydantic-ai does by default, and by a schema of the answer.

    The latter it does over Anthropic's API only for models that it knows by name.
    """
    by_tool = await agent(name, output_type=City).run(PROMPTS[name])
    if MODE != "anthropic":
        by_schema = await agent(name, output_type=NativeOutput(City)).run(PROMPTS[name])
        assert by_tool.output == by_schema.output
    return {"parsed": by_tool.output.model_dump()}


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
