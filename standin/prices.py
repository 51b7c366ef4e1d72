"""The stand-in's own price lists: nano-dollars per million tokens, from published prices.

OpenRouter's prices are of 2025, OpenAI's and Anthropic's of 2026. They are not taken from Tollbook's price catalogue,
so that the provider's book and the ledger are computed independently.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Final


@dataclass(frozen=True, slots=True)
class ListPrice:
    """Prices in nano-dollars per million tokens."""

    prompt: int
    completion: int
    cached: int
    written: int
    request: int = 0
    """Price per request, nano-dollars."""


# Dollars per million tokens: prompt, completion, prompt read from a cache, prompt written to one.
_LISTED: Final = {
    "anthropic/claude-3-haiku": ("0.25", "1.25", "0.03", "0.30"),
    "anthropic/claude-sonnet-4": ("3", "15", "0.30", "3.75"),
    "google/gemini-2.5-flash": ("0.30", "2.50", "0.03", "0.383333333"),
    "openai/gpt-4o-mini": ("0.15", "0.60", "0.075", "0.15"),
}
# Dollars per million tokens of models that make embeddings.
_LISTED_EMBEDDINGS: Final = {"openai/text-embedding-3-small": "0.02", "openai/text-embedding-3-large": "0.13"}
# Models of OpenAI, Anthropic and a self-hosted server, under their own names.
_AT_OPENAI: Final = {
    "gpt-4o-mini": ("0.15", "0.60", "0.075", "0.15"),
    "gpt-5-mini": ("0.25", "2", "0.025", "0.25"),
}
_AT_ANTHROPIC: Final = {
    "claude-haiku-4-5": ("1", "5", "0.10", "1.25"),
    "claude-opus-4-8": ("5", "25", "0.50", "6.25"),
}
_COMPATIBLE: Final = {"own/small": ("0.02", "0.04", "0.02", "0.02")}


def _prices(listed: Mapping[str, tuple[str, str, str, str]]) -> dict[str, ListPrice]:
    return {
        model: ListPrice(*(int(Decimal(usd) * 1_000_000_000) for usd in prices)) for model, prices in listed.items()
    }


PRICES: Final = _prices(_LISTED)
OPENAI_PRICES: Final = _prices(_AT_OPENAI)
ANTHROPIC_PRICES: Final = _prices(_AT_ANTHROPIC)
COMPATIBLE_PRICES: Final = _prices(_COMPATIBLE)
EMBEDDINGS_PRICES: Final = _prices(
    {model: (prompt, "0", prompt, prompt) for model, prompt in _LISTED_EMBEDDINGS.items()}
)
_LISTS: Final = (PRICES, EMBEDDINGS_PRICES, OPENAI_PRICES, ANTHROPIC_PRICES, COMPATIBLE_PRICES)


def charge_nanousd(
    model: str, *, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, written_tokens: int = 0
) -> int:
    """Return a request's cost by model, rounded up to the next nano-dollar. Errors: KeyError if it is not listed."""
    price = next((prices[model] for prices in _LISTS if model in prices), None)
    if price is None:
        raise KeyError(model)
    total = (
        (prompt_tokens - cached_tokens - written_tokens) * price.prompt
        + cached_tokens * price.cached
        + written_tokens * price.written
        + completion_tokens * price.completion
    )
    return -(-total // 1_000_000) + price.request


def add_prices(prices: Mapping[str, Mapping[str, str]]) -> None:
    """Add models, or change the prices of known ones: dollars per million tokens by kind, and per request.

    Kinds that are left out have the prompt's price. Errors: KeyError; decimal.InvalidOperation.
    """
    for model, usd in prices.items():
        nanousd = {name: int(Decimal(value) * 1_000_000_000) for name, value in usd.items()}
        prompt = nanousd["prompt"]
        PRICES[model] = ListPrice(
            prompt=prompt,
            completion=nanousd["completion"],
            cached=nanousd.get("cached", prompt),
            written=nanousd.get("cache_write", prompt),
            request=nanousd.get("request", 0),
        )


def listing(price: ListPrice) -> dict[str, str]:
    """Return a price as OpenRouter's `/models` states it: dollars per token."""
    per_token = {
        "prompt": price.prompt,
        "completion": price.completion,
        "input_cache_read": price.cached,
        "input_cache_write": price.written,
    }
    return {name: f"{Decimal(nanousd).scaleb(-15).normalize():f}" for name, nanousd in per_token.items()}


def usd_literal(nanousd: int) -> str:
    """Return dollars as an exact JSON number."""
    return f"{nanousd // 1_000_000_000}.{nanousd % 1_000_000_000:09d}"
