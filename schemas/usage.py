"""Token usage of one attempt, in one form for all providers: counts only, no bools, floats or negatives."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

# A larger count than any model's context is a broken reply, not usage.
MAX_TOKEN_COUNT: Final = 1_000_000_000
TokenCount = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_COUNT)]


class Usage(BaseModel):
    """Tokens of one attempt, whatever its provider calls them and counts them.

    Cached and cache-written tokens are part of the prompt tokens, reasoning tokens of the completion tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: TokenCount = Field(default=0, description="Tokens of the prompt, cached ones included.")
    completion_tokens: TokenCount = Field(default=0, description="Tokens of the completion, reasoning included.")
    cached_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were read from a cache.")
    cache_write_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were written to a cache.")
    cache_write_1h_tokens: TokenCount = Field(
        default=0, description="Those of them that were written to a cache that lasts an hour, which costs more."
    )
    reasoning_tokens: TokenCount = Field(default=0, description="Tokens of the completion that were reasoning.")

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens
