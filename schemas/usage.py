"""Token usage of one attempt, in one form for all providers: counts only, no bools, floats or negatives."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

# A larger count than any model's context is a broken reply, not usage.
MAX_TOKEN_COUNT: Final = 1_000_000_000
TokenCount = Annotated[int, Field(strict=True, ge=0, le=MAX_TOKEN_COUNT)]


class Usage(BaseModel):
    """Tokens of one attempt, in the same form for every provider.

    Cached and cache-written tokens are part of the prompt tokens, reasoning tokens of the completion tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: TokenCount = Field(default=0, description="Tokens of the prompt, cached ones included.")
    completion_tokens: TokenCount = Field(default=0, description="Tokens of the completion, reasoning included.")
    cached_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were read from a cache.")
    cache_write_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were written to a cache.")
    cache_write_1h_tokens: TokenCount = Field(
        default=0, description="Part of `cache_write_tokens`: written for an hour, which costs more."
    )
    reasoning_tokens: TokenCount = Field(default=0, description="Tokens of the completion that were reasoning.")

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class MediaUsage(Usage):
    """A usage whose provider reported how many tokens were of images, sound or videos.

    It is used for results and prices only: the ledger stores a plain `Usage`.
    """

    prompt_image_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were of images.")
    prompt_audio_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were sound.")
    prompt_video_tokens: TokenCount = Field(default=0, description="Tokens of the prompt that were of videos.")
    completion_image_tokens: TokenCount = Field(default=0, description="Tokens of the completion that were of images.")
    completion_audio_tokens: TokenCount = Field(default=0, description="Tokens of the completion that were sound.")

    @property
    def prompt_media(self) -> dict[str, int]:
        """The tokens of the prompt by kind of media, without zeros."""
        kinds = {
            "image": self.prompt_image_tokens,
            "audio": self.prompt_audio_tokens,
            "video": self.prompt_video_tokens,
        }
        return {kind: count for kind, count in kinds.items() if count}

    def without_media(self) -> Usage:
        """Return the usage without the counts of media."""
        return Usage.model_construct(**{name: getattr(self, name) for name in Usage.model_fields})


def media_of(usage: Usage) -> dict[str, int]:
    """Return the tokens of a prompt by kind of media, as far as the provider reported them."""
    return usage.prompt_media if isinstance(usage, MediaUsage) else {}


def media_details(usage: Usage) -> dict[str, dict[str, int]]:
    """Return the reported tokens of media, in the form of OpenAI's details of `prompt` and `completion`."""
    names = MediaUsage.model_fields.keys() - Usage.model_fields.keys() if isinstance(usage, MediaUsage) else ()
    counts: dict[str, int] = {name: getattr(usage, name) for name in sorted(names)}
    return {
        whole: {name.removeprefix(f"{whole}_"): count for name, count in counts.items() if count and whole in name}
        for whole in ("prompt", "completion")
    }
