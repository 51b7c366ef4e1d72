"""The stand-in's own price list: nano-dollars per million tokens, from OpenRouter's published prices (2025).

It stands here and is not taken from Tollbook's price catalogue, so that the provider's book and the ledger are computed
independently.
"""

from dataclasses import dataclass
from typing import Final

_USD: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class ListPrice:
    """Prices in nano-dollars per million tokens."""

    prompt: int
    completion: int
    cached: int


PRICES: Final[dict[str, ListPrice]] = {
    "anthropic/claude-3-haiku": ListPrice(prompt=_USD // 4, completion=5 * _USD // 4, cached=3 * _USD // 100),
    "anthropic/claude-sonnet-4": ListPrice(prompt=3 * _USD, completion=15 * _USD, cached=3 * _USD // 10),
    "google/gemini-2.5-flash": ListPrice(prompt=3 * _USD // 10, completion=5 * _USD // 2, cached=3 * _USD // 100),
    "openai/gpt-4o-mini": ListPrice(prompt=15 * _USD // 100, completion=6 * _USD // 10, cached=75 * _USD // 1000),
}


def charge_nanousd(model: str, *, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> int:
    """Return a request's cost by model, rounded up to the next nano-dollar. Errors: KeyError if it is not listed."""
    price = PRICES[model]
    total = (
        (prompt_tokens - cached_tokens) * price.prompt
        + cached_tokens * price.cached
        + completion_tokens * price.completion
    )
    return -(-total // 1_000_000)
