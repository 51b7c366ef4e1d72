"""Token usage as a provider reports it: only counts are accepted, no bools, floats or negatives."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

# A larger count than any model's context is a broken reply, not usage.
MAX_TOKEN_COUNT: Final = 1_000_000_000
TokenCount = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_COUNT)]


class Usage(BaseModel):
    """Tokens of one attempt. Cached tokens are part of the prompt tokens, reasoning tokens of the completion tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: TokenCount = Field(default=0, description="Tokens of the prompt, cached ones included.")
    completion_tokens: TokenCount = Field(default=0, description="Tokens of the completion, reasoning included.")
    cached_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were read from a cache.")
    cache_write_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were written to a cache.")
    reasoning_tokens: TokenCount = Field(default=0, description="Tokens of the completion that were reasoning.")

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens
