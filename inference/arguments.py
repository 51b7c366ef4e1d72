"""Arguments of the public classes: read as the fields of a task are, so that a wrong one is an InvalidTask."""

import math
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tollbook.schemas.identifiers import CampaignId, Identifier, UserId, id_text
from tollbook.schemas.json_text import replace_surrogates
from tollbook.schemas.parameters import refuse_bool
from tollbook.schemas.problems import as_text, problems_of
from tollbook.schemas.tags import Tags
from tollbook.schemas.tasks import InvalidTask


def _seconds(value: float) -> float:
    if math.isnan(value):
        raise ValueError("must be a number, not nan")
    return value


_Text = Annotated[str, AfterValidator(replace_surrogates)]


class Arguments(BaseModel):
    """Valid arguments, by their names; only those that were given have a meaning."""

    model_config = ConfigDict(frozen=True)

    user_id: UserId = ""
    campaign_id: CampaignId | None = None
    idempotency_key: Identifier | None = None
    tags: Tags = Field(default_factory=dict[str, str])
    model: _Text | None = None
    reason: _Text = ""
    prompt: _Text = Field(default="", repr=False)  # G10
    # To look a task up: what no id can be is the id of none.
    task_id: Annotated[str, BeforeValidator(id_text)] = ""
    timeout_s: Annotated[float, BeforeValidator(refuse_bool), AfterValidator(_seconds)] = math.inf


def read_arguments(**given: object) -> Arguments:
    """Read arguments of a public method; whole numbers and UUIDs are ids too. Errors: InvalidTask."""
    try:
        return Arguments.model_validate(given)
    except ValidationError as exc:
        raise InvalidTask(as_text(problems_of(exc, Arguments))) from None
