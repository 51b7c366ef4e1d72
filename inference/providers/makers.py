"""Whose models understand what an earlier turn brings back: reasoning that is signed or encrypted by its maker.

A maker's own models go on with it; another maker's refuse the whole request, or cannot read it (November 2026). Left
out is only what is known to be of another maker: an id that says nothing of its model, as an alias, gets everything.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from tollbook.schemas.messages import Message

_ANTHROPIC, _GOOGLE, _OPENAI, _XAI = "anthropic", "google", "openai", "xai"
# Words in ids of models, and in what OpenRouter calls the formats of details (`anthropic-claude-v1`).
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
        # The last: others name their models' form `openai-...`, or distill them of `gpt`.
        _OPENAI: r"openai|gpt|chatgpt|o[1-9](?![a-z0-9])",
    }.items()
}
# The signed blocks of LiteLLM are of these makers.
_SIGN_BLOCKS: Final = (_ANTHROPIC, _GOOGLE)


def maker_of(name: object) -> str | None:
    """Return who made a model or a format of details, by its name; None where the name does not say."""
    if not isinstance(name, str):
        return None
    return next((maker for maker, words in _MAKERS.items() if words.search(name)), None)


def understood_by(model: str, message: Message) -> Message:
    """Return a message without what a maker other than the model's has signed or encrypted in it."""
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
