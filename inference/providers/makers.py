"""Removing signed or encrypted reasoning of earlier turns that another maker's model does not understand.

Only the models of the same maker can use such reasoning; others refuse the whole request, or cannot read it (November
2026). Only reasoning that is known to be of another maker is removed: a model whose id does not show its maker, such as
an alias, gets everything.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from tollbook.schemas.messages import Message

_ANTHROPIC, _GOOGLE, _OPENAI, _XAI = "anthropic", "google", "openai", "xai"
# Words in model ids and in OpenRouter's names for formats of reasoning details (`anthropic-claude-v1`).
_MAKERS: Final[Mapping[str, re.Pattern[str]]] = {
    maker: re.compile(rf"(?<![a-z])({words})", re.IGNORECASE)
    for maker, words in {
        _ANTHROPIC: "anthropic|claude",
        _GOOGLE: "google|gemini|gemma",
        _XAI: "x-?ai(?![a-z])|grok",
        "deepseek": "deepseek",
        "mistral": "mistral|mixtral|ministral|magistral|codestral|devstral|pixtral",
        "moonshot": "moonshot|kimi",
        "minimax": "minimax",
        "qwen": "qwen|qwq",
        "zai": "z-?ai(?![a-z])|glm",
        "meta": "meta-llama|llama",
        "cohere": "cohere|command-[ar]",
        # Last: other makers' formats and models may also have `openai` or `gpt` in their names.
        _OPENAI: r"openai|gpt|chatgpt|o[1-9](?![a-z0-9])",
    }.items()
}
# The makers of the signed blocks that LiteLLM sends.
_SIGN_BLOCKS: Final = (_ANTHROPIC, _GOOGLE)


def maker_of(name: object) -> str | None:
    """Return the maker of a model or a format of details by its name; None if the name does not tell."""
    if not isinstance(name, str):
        return None
    return next((maker for maker, words in _MAKERS.items() if words.search(name)), None)


def understood_by(model: str, message: Message) -> Message:
    """Return a message without reasoning that was signed or encrypted by another maker than the model's."""
    if not message.has_reasoning:
        return message
    maker = maker_of(model)
    if maker is None:
        return message
    changes: dict[str, Any] = {}
    if message.reasoning_details:
        kept = tuple(each for each in message.reasoning_details if maker_of(each.get("format")) in (None, maker))
        changes["reasoning_details"] = kept or None
    if message.thinking_blocks and maker not in _SIGN_BLOCKS:
        changes["thinking_blocks"] = None
    if maker != _GOOGLE and message.tool_calls:
        changes["tool_calls"] = tuple(call.model_copy(update={"extra_content": None}) for call in message.tool_calls)
    return message.model_copy(update=changes)
