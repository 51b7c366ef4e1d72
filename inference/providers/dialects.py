"""The adapters of all dialects, by the dialect's name in the policy."""

from collections.abc import Mapping
from typing import Final

from tollbook.inference.providers.adapter import Adapter
from tollbook.inference.providers.anthropic import Anthropic
from tollbook.inference.providers.compatible import ChatCompletions
from tollbook.inference.providers.openai import OpenAI
from tollbook.inference.providers.openrouter import OpenRouter
from tollbook.schemas.policy import Dialect

ADAPTERS: Final[Mapping[Dialect, Adapter]] = {
    adapter.dialect: adapter for adapter in (OpenRouter(), OpenAI(), Anthropic(), ChatCompletions())
}
