"""Routes: which model serves which task type, with which limits, and what stands in when it fails."""

from pydantic import BaseModel, ConfigDict, Field

from tollbook.schemas.tasks import ModelId


class Route(BaseModel):
    """Model, fallback and sampling limits of one task type.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelId
    fallback: ModelId | None
    max_tokens: int = Field(ge=1, le=200_000)
    temperature: float = Field(ge=0, le=2, allow_inf_nan=False)
