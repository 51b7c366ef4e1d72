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
)
