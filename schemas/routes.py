"""Routes: the models of a task type, their limits and parameters.

Model ids of the defaults stand in one table, `MODELS`, under short names; routes and tasks may use either.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from tollbook.schemas.parameters import EMBEDDINGS_PARAMETERS
from tollbook.schemas.problems import UTF8_WORDS, shown, unknown_name
from tollbook.schemas.tasks import ModelId

MODELS: Final[Mapping[str, str]] = {
    "claude-3-haiku": "anthropic/claude-3-haiku",
    "claude-sonnet-4": "anthropic/claude-sonnet-4",
    "gemini-flash": "google/gemini-2.5-flash",
    "gpt-4o-mini": "openai/gpt-4o-mini",
}
MAX_FALLBACKS: Final = 20
# What leaves the price of a token as it is, and the number of completions at one.
PARAMETERS: Final = (
    "response_format", "top_p", "top_k", "min_p", "stop", "seed", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "logit_bias", "logprobs", "top_logprobs", "verbosity", "reasoning",
)  # fmt: skip
"""Names of the parameters that a route may have beside its own fields."""
EMBEDDINGS: Final = "embeddings"
"""The kind of routes that make vectors of texts."""
_MAX_PARAMS_BYTES: Final = 65_536


def resolve_model(name: str) -> str:
    """Return the model id of a short name; any other name is returned as it is."""
    return MODELS.get(name, name)


def _resolved(value: object) -> object:
    return resolve_model(value) if isinstance(value, str) else value


def _resolved_each(value: object) -> object:
    """One model, a list of them, or null for none."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple([_resolved(each) for each in cast("list[object]", value)])
    return (_resolved(value),) if isinstance(value, str) else value


def _number(value: object) -> object:
    # To Python, and so to pydantic, true is the number 1.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {shown(value)}")  # noqa: TRY004 - pydantic turns only ValueErrors into problems.
    return value


def _plain(value: object) -> object:
    """Decimals, as which files and settings are read, as the numbers that JSON has."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in cast("Mapping[str, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast("list[object]", value)]
    return value


def _kind(value: object) -> object:
    return None if value == "chat" else value


ResolvedModel = Annotated[ModelId, BeforeValidator(_resolved)]


class Route(BaseModel):
    """Models, limits and parameters of one task type.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2, or none, which is not sent. A reply that the limit cut
    off is asked for once more with `retry_max_tokens`, if that is set: the second try is held and paid for as well.
    A route of kind `embeddings` has no limits and no cheaper model: it has models and `params`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra={
            "if": {"properties": {"kind": {"const": EMBEDDINGS}}, "required": ["kind"]},
            "else": {"required": ["max_tokens"]},
        },
    )

    model: ResolvedModel
    """Model that is called first."""
    fallback: Annotated[
        tuple[ModelId, ...],
        BeforeValidator(_resolved_each),
        Field(max_length=MAX_FALLBACKS),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "string"}, "maxItems": MAX_FALLBACKS, "uniqueItems": True},
                ]
            },
            mode="validation",
        ),
    ] = ()
    """Model, or list of models, that are called in this order when the one before fails."""
    cheaper: ResolvedModel | None = None
    """Model that is called instead of the first where the first one's hold does not fit a budget."""
    kind: Annotated[
        Literal["embeddings"] | None,
        BeforeValidator(_kind),
        WithJsonSchema({"type": "string", "enum": ["chat", "embeddings"]}, mode="validation"),
    ] = None
    """What is asked for: `embeddings`, which are vectors of a task's `input`; absent or `chat`: chat completions."""
    max_tokens: Annotated[int | None, BeforeValidator(_number)] = Field(
        default=None, ge=1, le=200_000, validate_default=True
    )
    """Maximum completion tokens, reasoning included; required, except for embeddings."""
    temperature: Annotated[float | None, BeforeValidator(_number)] = Field(
        default=None, ge=0, le=2, allow_inf_nan=False
    )
    """Sampling temperature, 0 to 2; absent: not sent."""
    retry_max_tokens: Annotated[int | None, BeforeValidator(_number)] = Field(default=None, ge=1, le=200_000)
    """Maximum completion tokens of a second try, where the limit has cut off a reply; absent: there is none."""
    params: Annotated[dict[str, Any], BeforeValidator(_plain), PlainSerializer(dict)] = Field(
        default_factory=dict[str, Any]
    )
    """Further parameters of the request, such as `response_format`."""

    @field_validator("max_tokens")
    @classmethod
    def _chat_has_a_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is None and info.data.get("kind") is None:
            raise ValueError("is missing")
        return value

    @field_validator("max_tokens", "temperature", "retry_max_tokens")
    @classmethod
    def _embeddings_have_none(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("kind") == EMBEDDINGS:
            raise ValueError("is for chat completions, and not for embeddings")
        return value

    @field_validator("params")
    @classmethod
    def _params_are_known(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        known = EMBEDDINGS_PARAMETERS if info.data.get("kind") == EMBEDDINGS else PARAMETERS
        for name in value:
            if name not in known:
                raise ValueError(f"has an {unknown_name('parameter', name, known)}")
        try:
            size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        except UnicodeEncodeError:
            raise ValueError(f"must be {UTF8_WORDS}") from None
        except (TypeError, ValueError, RecursionError):
            raise ValueError("must hold only what JSON can hold") from None
        if size > _MAX_PARAMS_BYTES:
            raise ValueError(f"must have at most {_MAX_PARAMS_BYTES} bytes as JSON, not {size}")
        return value

    @model_validator(mode="after")
    def _names_each_model_once(self) -> Self:
        if self.model in self.fallback:
            raise ValueError(f"the fallback is the model itself, {self.model}: name another model, or none")
        if self.cheaper is not None and self.kind == EMBEDDINGS:
            raise ValueError("'cheaper' is not for embeddings: vectors of two models cannot be compared")
        if self.cheaper == self.model:
            raise ValueError(f"the cheaper model is the model itself, {self.model}: name another, or none")
        for model in self.fallback:
            if self.fallback.count(model) > 1:
                raise ValueError(f"the fallback {model} is named twice")
        return self

    @model_validator(mode="after")
    def _tries_again_with_a_larger_limit(self) -> Self:
        if self.retry_max_tokens is not None and self.retry_max_tokens <= (self.max_tokens or 0):
            raise ValueError(
                f"retry_max_tokens must be above max_tokens, which is {self.max_tokens}, got {self.retry_max_tokens}"
            )
        return self

    @property
    def models(self) -> tuple[str, ...]:
        """Every model of the route, each once: the first, the fallbacks in their order, the cheaper one."""
        extra = () if self.cheaper is None else (self.cheaper,)
        return tuple(dict.fromkeys((self.model, *self.fallback, *extra)))

    def after(self, model: str) -> tuple[str, ...]:
        """Return the fallbacks that are left when this model has failed, in their order.

        A model that is none of the fallbacks comes before all of them.
        """
        fallbacks = self.fallback
        return fallbacks[fallbacks.index(model) + 1 :] if model in fallbacks else fallbacks
