"""Routes: the model of a task type, its limits, and the model that is called when the first one fails."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tollbook.schemas.tasks import ModelId


class Route(BaseModel):
    """Model, fallback and request parameters of one task type.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2, or none, which is not sent. A reply that the limit cut
    off is asked for once more with `retry_max_tokens`, if that is set: the second try is held and paid for as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelId
    fallback: ModelId | None
    max_tokens: int = Field(ge=1, le=200_000)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    retry_max_tokens: int | None = Field(default=None, ge=1, le=200_000)

    @model_validator(mode="after")
    def _falls_back_to_another_model(self) -> Self:
        if self.fallback == self.model:
            raise ValueError(f"the fallback is the model itself, {self.model}: name another model, or null for none")
        return self

    @model_validator(mode="after")
    def _tries_again_with_a_larger_limit(self) -> Self:
        if self.retry_max_tokens is not None and self.retry_max_tokens <= self.max_tokens:
            raise ValueError(
                f"retry_max_tokens must be above max_tokens, which is {self.max_tokens}, got {self.retry_max_tokens}"
            )
        return self
