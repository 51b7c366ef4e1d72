"""The clients, each with its program. Their versions are pinned in `requirements*.txt` and `package.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Environment = Literal["newest", "older", "node", "fuzz"]


@dataclass(frozen=True, slots=True)
class Client:
    """A client. `mode` is the program's argument. `differs` has results unlike other clients', by scenario."""

    name: str
    title: str
    api: str
    environment: Environment
    program: str
    packages: tuple[str, ...]
    mode: str = ""
    differs: Mapping[str, str] = field(default_factory=dict[str, str])


_CHAT: Final = "`/v1/chat/completions`"
_RESPONSES: Final = "`/v1/responses`"
_MESSAGES: Final = "`/v1/messages`"

CLIENTS: Final = (
    Client("openai-python", "OpenAI, Python", _CHAT, "newest", "openai_sdk.py", ("openai",)),
    Client("openai-python-responses", "OpenAI, Python", _RESPONSES, "newest", "openai_responses.py", ("openai",)),
    Client("anthropic-python", "Anthropic, Python", _MESSAGES, "newest", "anthropic_sdk.py", ("anthropic",)),
    *(
        Client(f"langchain-{mode}", title, api, "newest", "langchain_chat.py", (package,), mode)
        for mode, title, api, package in (
            ("chat", "LangChain, `ChatOpenAI`", _CHAT, "langchain-openai"),
            ("responses", "LangChain, `ChatOpenAI`", _RESPONSES, "langchain-openai"),
            ("anthropic", "LangChain, `ChatAnthropic`", _MESSAGES, "langchain-anthropic"),
        )
    ),
    Client(
        "llama-index", "LlamaIndex, `OpenAILike`", _CHAT, "older", "llama_index_chat.py",
        ("llama-index-llms-openai-like",),
    ),
    *(
        Client(f"pydantic-ai-{mode}", title, api, "newest", "pydantic_ai_agent.py", ("pydantic-ai-slim",), mode)
        for mode, title, api in (
            ("chat", "pydantic-ai, `OpenAIChatModel`", _CHAT),
            ("responses", "pydantic-ai, `OpenAIResponsesModel`", _RESPONSES),
            ("anthropic", "pydantic-ai, `AnthropicModel`", _MESSAGES),
        )
    ),
    Client("instructor", "instructor", _CHAT, "older", "instructor_client.py", ("instructor",)),
    Client("litellm-openai", "LiteLLM, `openai/`", _CHAT, "newest", "litellm_sdk.py", ("litellm",), "openai"),
    Client(
        "litellm-anthropic", "LiteLLM, `anthropic/`", _MESSAGES, "newest", "litellm_sdk.py", ("litellm",),
        "anthropic",
    ),
    Client("openai-node", "OpenAI, Node", _CHAT, "node", "openai_node.mjs", ("openai",), "chat"),
    Client("openai-node-responses", "OpenAI, Node", _RESPONSES, "node", "openai_node.mjs", ("openai",), "responses"),
    Client("anthropic-node", "Anthropic, Node", _MESSAGES, "node", "anthropic_node.mjs", ("@anthropic-ai/sdk",)),
    *(
        Client(f"ai-sdk-{mode}", title, api, "node", "ai_sdk.mjs", ("ai", package), mode)
        for mode, title, api, package in (
            ("responses", "Vercel's AI SDK", _RESPONSES, "@ai-sdk/openai"),
            ("chat", "Vercel's AI SDK, `.chat`", _CHAT, "@ai-sdk/openai"),
            ("anthropic", "Vercel's AI SDK", _MESSAGES, "@ai-sdk/anthropic"),
        )
    ),
)  # fmt: skip
