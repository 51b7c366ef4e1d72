"""Routes: the model of a task type, its limits, and the model that is called when the first one fails."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tollbook.schemas.tasks import ModelId


class Route(BaseModel):
    """Model, fallback and request parameters of one task type.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2, or none, which is not sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelId
    fallback: ModelId | None
    max_tokens: int = Field(ge=1, le=200_000)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)

    @model_validator(mode="after")
    def _falls_back_to_another_model(self) -> Self:
        if self.fallback == self.model:
            raise ValueError(f"the fallback is the model itself, {self.model}: name another model, or null for none")
        return self
