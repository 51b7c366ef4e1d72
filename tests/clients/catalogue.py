"""The clients, each with its program. Their versions are pinned in `requirements*.txt` and `package.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Environment = Literal["sdks", "frameworks", "node"]


@dataclass(frozen=True, slots=True)
class Client:
    """A client. `mode` is the program's argument. `differs` has what is otherwise than for the others, by scenario."""

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
    Client("openai-python", "OpenAI, Python", _CHAT, "sdks", "openai_sdk.py", ("openai",)),
    Client("openai-python-responses", "OpenAI, Python", _RESPONSES, "sdks", "openai_responses.py", ("openai",)),
    Client("anthropic-python", "Anthropic, Python", _MESSAGES, "sdks", "anthropic_sdk.py", ("anthropic",)),
    *(
        Client(f"langchain-{mode}", title, api, "frameworks", "langchain_chat.py", (package,), mode)
        for mode, title, api, package in (
            ("chat", "LangChain, `ChatOpenAI`", _CHAT, "langchain-openai"),
            ("responses", "LangChain, `ChatOpenAI`", _RESPONSES, "langchain-openai"),
            ("anthropic", "LangChain, `ChatAnthropic`", _MESSAGES, "langchain-anthropic"),
        )
    ),
    Client(
        "llama-index", "LlamaIndex, `OpenAILike`", _CHAT, "frameworks", "llama_index_chat.py",
        ("llama-index-llms-openai-like",),
    ),
    *(
        Client(f"pydantic-ai-{mode}", title, api, "frameworks", "pydantic_ai_agent.py", ("pydantic-ai-slim",), mode)
        for mode, title, api in (
            ("chat", "pydantic-ai, `OpenAIChatModel`", _CHAT),
            ("responses", "pydantic-ai, `OpenAIResponsesModel`", _RESPONSES),
            ("anthropic", "pydantic-ai, `AnthropicModel`", _MESSAGES),
        )
    ),
    Client("instructor", "instructor", _CHAT, "frameworks", "instructor_client.py", ("instructor",)),
    Client("litellm-openai", "LiteLLM, `openai/`", _CHAT, "frameworks", "litellm_sdk.py", ("litellm",), "openai"),
    Client(
        "litellm-anthropic", "LiteLLM, `anthropic/`", _MESSAGES, "frameworks", "litellm_sdk.py", ("litellm",),
        "anthropic",
    ),
)  # fmt: skip
