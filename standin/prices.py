"""The stand-in's own price list: nano-dollars per million tokens, from OpenRouter's published prices (2025).

It stands here and is not taken from Tollbook's price catalogue, so that the provider's book and the ledger are computed
independently.
"""

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


# Dollars per million tokens: prompt, completion, prompt read from a cache, prompt written to one.
_LISTED: Final = {
    "anthropic/claude-3-haiku": ("0.25", "1.25", "0.03", "0.30"),
    "anthropic/claude-sonnet-4": ("3", "15", "0.30", "3.75"),
    "google/gemini-2.5-flash": ("0.30", "2.50", "0.03", "0.383333333"),
    "openai/gpt-4o-mini": ("0.15", "0.60", "0.075", "0.15"),
}
# Dollars per million tokens of models that make embeddings.
_LISTED_EMBEDDINGS: Final = {"openai/text-embedding-3-small": "0.02", "openai/text-embedding-3-large": "0.13"}
PRICES: Final[dict[str, ListPrice]] = {
    model: ListPrice(*(int(Decimal(usd) * 1_000_000_000) for usd in prices)) for model, prices in _LISTED.items()
}


EMBEDDINGS_PRICES: Final[dict[str, ListPrice]] = {
    model: ListPrice(nanousd, 0, nanousd, nanousd)
    for model, nanousd in ((model, int(Decimal(usd) * 1_000_000_000)) for model, usd in _LISTED_EMBEDDINGS.items())
}


def charge_nanousd(
    model: str, *, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, written_tokens: int = 0
) -> int:
    """Return a request's cost by model, rounded up to the next nano-dollar. Errors: KeyError if it is not listed."""
    price = PRICES.get(model) or EMBEDDINGS_PRICES[model]
    total = (
        (prompt_tokens - cached_tokens - written_tokens) * price.prompt
        + cached_tokens * price.cached
        + written_tokens * price.written
        + completion_tokens * price.completion
    )
    return -(-total // 1_000_000)


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
