"""Token usage as a provider reports it: a numeric boundary that lets only counts through."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# A count beyond any model's context is a broken reply, not usage.
TokenCount = Annotated[int, Field(strict=True, ge=0, le=1_000_000_000)]


class Usage(BaseModel):
    """Tokens of one attempt. Cached tokens are part of the prompt's, reasoning tokens of the completion's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: TokenCount = Field(default=0, description="Tokens of the prompt, cached ones included.")
    completion_tokens: TokenCount = Field(default=0, description="Tokens of the completion, reasoning included.")
    cached_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were read from a cache.")
    cache_write_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were written to a cache.")
    reasoning_tokens: TokenCount = Field(default=0, description="Tokens of the completion that were reasoning.")

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens
