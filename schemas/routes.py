"""Routes: the models of a task type and the providers that have them, their limits and parameters.

The table `MODELS` has the default models by short names; routes and tasks may use the short name or the id. They are
models of the default provider. If a route names another provider, its model ids are that provider's.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from tollbook.schemas.parameters import EMBEDDINGS_PARAMETERS, refuse_bool
from tollbook.schemas.problems import UTF8_WORDS, unknown_name
from tollbook.schemas.tasks import ModelId, Name

MODELS: Final[Mapping[str, str]] = {
    "claude-3-haiku": "anthropic/claude-3-haiku",
    "claude-sonnet-4": "anthropic/claude-sonnet-4",
    "gemini-flash": "google/gemini-2.5-flash",
    "gpt-4o-mini": "openai/gpt-4o-mini",
}
DEFAULT_PROVIDER: Final = "default"
"""Name of the provider that OPENROUTER_BASE_URL and OPENROUTER_API_KEY describe."""
MAX_FALLBACKS: Final = 20
# None of them changes the price of a token, or the number of completions, which is one.
PARAMETERS: Final = (
    "response_format", "top_p", "top_k", "min_p", "stop", "seed", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "logit_bias", "logprobs", "top_logprobs", "verbosity", "reasoning",
)  # fmt: skip
"""Names of the parameters that a route may have beside its own fields."""
EMBEDDINGS: Final = "embeddings"
"""The kind of a route whose models make vectors from texts."""
_MAX_PARAMS_BYTES: Final = 65_536


def resolve_model(name: str) -> str:
    """Return the model id of a short name; any other name is returned as it is."""
    return MODELS.get(name, name)


@dataclass(frozen=True, slots=True)
class Target:
    """What an attempt calls: a model, and the name of its provider."""

    model: str
    provider: str = DEFAULT_PROVIDER

    def __str__(self) -> str:
        """Return `MODEL at PROVIDER`, for people; for the default provider, only the model."""
        return self.model if self.provider == DEFAULT_PROVIDER else f"{self.model} at {self.provider}"


def named_provider(provider: str) -> str | None:
    """Return a provider's name as events have it: None for the default one."""
    return None if provider == DEFAULT_PROVIDER else provider


class ModelAt(BaseModel):
    """A model with its provider, for models of another provider than the route's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    provider: Name
    """Name of the provider: one of `providers`, or `default`."""
    model: ModelId
    """Its model."""


def _form(value: object) -> str:
    return "table" if isinstance(value, Mapping | ModelAt) else "id"


ModelChoice = Annotated[Annotated[ModelId, Tag("id")] | Annotated[ModelAt, Tag("table")], Discriminator(_form)]
"""A model id, or a table that names the provider too."""


def _each(value: object) -> object:
    """One model, a list of them, or null for none."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(cast("list[object]", value))
    return (cast("object", value),) if isinstance(value, str | Mapping | ModelAt) else value


def _resolve_short_name(value: object, provider: object) -> object:
    """Return a model of a route with its short name resolved, if its provider is the default one."""
    if isinstance(value, ModelAt):
        value = dict(value)
    if isinstance(value, Mapping):
        table = cast("Mapping[str, object]", value)
        return (
            {**table, "model": _resolve_short_name(table["model"], table.get("provider"))}
            if "model" in table
            else table
        )
    return resolve_model(value) if isinstance(value, str) and provider in (None, DEFAULT_PROVIDER) else value


def _plain(value: object) -> object:
    """Return a value with decimals as floats: files and settings are read with decimals, which JSON does not have."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in cast("Mapping[str, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast("list[object]", value)]
    return value


_CHOICE_SCHEMA: Final[dict[str, Any]] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {"provider": {"type": "string"}, "model": {"type": "string"}},
            "required": ["provider", "model"],
            "additionalProperties": False,
        },
    ]
}


def _kind(value: object) -> object:
    return None if value == "chat" else value


def _model_at(target: Target) -> ModelAt:
    return ModelAt(provider=target.provider, model=target.model)


class Route(BaseModel):
    """Models, limits and parameters of one task type.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2, not sent if None. If the limit cut off a reply and
    `retry_max_tokens` is set, the request is sent once more with it: the second try is held and charged as well.
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

    model: ModelId
    """Model that is called first."""
    fallback: Annotated[
        tuple[ModelChoice, ...],
        BeforeValidator(_each),
        Field(max_length=MAX_FALLBACKS),
        WithJsonSchema(
            {
                "anyOf": [
                    _CHOICE_SCHEMA,
                    {"type": "array", "items": _CHOICE_SCHEMA, "maxItems": MAX_FALLBACKS, "uniqueItems": True},
                ]
            },
            mode="validation",
        ),
    ] = ()
    """Model, or list of models, called in this order when the model before fails. A model of another provider:
    `{ provider = "openai", model = "gpt-5-mini" }`."""
    cheaper: Annotated[ModelChoice | None, WithJsonSchema(_CHOICE_SCHEMA, mode="validation")] = None
    """Model that is called instead of the first if the first model's hold does not fit a budget."""
    provider: Name | None = None
    """Provider of the route's models, one of `providers`; absent: the default one."""
    kind: Annotated[
        Literal["embeddings"] | None,
        BeforeValidator(_kind),
        WithJsonSchema({"type": "string", "enum": ["chat", "embeddings"]}, mode="validation"),
    ] = None
    """What the route makes: `embeddings`, which are vectors of a task's `input`; absent or `chat`: chat completions."""
    max_tokens: Annotated[int | None, BeforeValidator(refuse_bool)] = Field(
        default=None, ge=1, le=200_000, validate_default=True
    )
    """Maximum completion tokens, reasoning included; required, except for embeddings."""
    temperature: Annotated[float | None, BeforeValidator(refuse_bool)] = Field(
        default=None, ge=0, le=2, allow_inf_nan=False
    )
    """Sampling temperature, 0 to 2; absent: not sent."""
    retry_max_tokens: Annotated[int | None, BeforeValidator(refuse_bool)] = Field(default=None, ge=1, le=200_000)
    """Maximum completion tokens of a second try after the limit has cut off a reply; absent: no second try."""
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
            raise ValueError("must contain only JSON values") from None
        if size > _MAX_PARAMS_BYTES:
            raise ValueError(f"must have at most {_MAX_PARAMS_BYTES} bytes as JSON, not {size}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        fields = dict(cast("Mapping[str, object]", value))
        provider = fields.get("provider")
        for name in ("model", "cheaper"):
            if name in fields:
                fields[name] = _resolve_short_name(fields[name], provider)
        fallback = _each(fields.get("fallback"))
        if isinstance(fallback, tuple):
            fields["fallback"] = tuple(
                [_resolve_short_name(each, provider) for each in cast("tuple[object, ...]", fallback)]
            )
        return fields

    @model_validator(mode="after")
    def _names_each_model_once(self) -> Self:
        fallbacks = self.fallbacks
        if self.first in fallbacks:
            raise ValueError(f"the fallback is the model itself, {self.first}: name another model, or none")
        if self.cheaper is not None and self.kind == EMBEDDINGS:
            raise ValueError("'cheaper' is not for embeddings: vectors of two models cannot be compared")
        if self.cheaper_target == self.first:
            raise ValueError(f"the cheaper model is the model itself, {self.first}: name another, or none")
        for target in fallbacks:
            if fallbacks.count(target) > 1:
                raise ValueError(f"the fallback {target} is named twice")
        return self

    @model_validator(mode="after")
    def _retry_limit_is_larger(self) -> Self:
        if self.retry_max_tokens is not None and self.retry_max_tokens <= (self.max_tokens or 0):
            raise ValueError(
                f"retry_max_tokens must be above max_tokens, which is {self.max_tokens}, got {self.retry_max_tokens}"
            )
        return self

    @property
    def first(self) -> Target:
        """The model that is called first."""
        return self._target(self.model)

    @property
    def fallbacks(self) -> tuple[Target, ...]:
        """The fallbacks in their order."""
        return tuple(map(self._target, self.fallback))

    @property
    def cheaper_target(self) -> Target | None:
        """The cheaper model, if there is one."""
        return None if self.cheaper is None else self._target(self.cheaper)

    @property
    def targets(self) -> tuple[Target, ...]:
        """Every model that the route may call, each once: the first, the fallbacks in their order, the cheaper one."""
        cheaper = self.cheaper_target
        return tuple(dict.fromkeys((self.first, *self.fallbacks, *(() if cheaper is None else (cheaper,)))))

    def after(self, target: Target) -> tuple[Target, ...]:
        """Return the fallbacks that are left when this model has failed, in their order.

        For a model that is not a fallback, these are all fallbacks.
        """
        fallbacks = self.fallbacks
        return fallbacks[fallbacks.index(target) + 1 :] if target in fallbacks else fallbacks

    def downgraded(self) -> Self:
        """Return this route with its cheaper model as the first; there must be one."""
        assert self.cheaper_target is not None
        return self._beginning_with(self.cheaper_target, self.fallbacks).model_copy(update={"cheaper": None})

    def from_fallback(self, target: Target) -> Self:
        """Return this route with one of its fallbacks as the first, and those after it."""
        return self._beginning_with(target, self.after(target))

    def _beginning_with(self, first: Target, fallbacks: Sequence[Target]) -> Self:
        # A plain model id belongs to the route's provider, which may change here: so each model names its provider.
        cheaper = self.cheaper_target
        return self.model_copy(
            update={
                "model": first.model,
                "provider": first.provider,
                "fallback": tuple(map(_model_at, fallbacks)),
                "cheaper": None if cheaper is None else _model_at(cheaper),
            }
        )

    def _target(self, choice: str | ModelAt) -> Target:
        """Return a choice with its provider: a plain model id belongs to the route's provider."""
        if isinstance(choice, ModelAt):
            return Target(choice.model, choice.provider)
        return Target(choice, self.provider or DEFAULT_PROVIDER)
