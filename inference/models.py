"""Models as the provider describes them in `/models`: what each supports, takes and puts out, how much it reads.

A provider that says nothing leaves everything open. What is known only narrows: a call is refused before money is held
for it where the provider would refuse it, and a bound is lowered to what the model can read.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self, cast

from tollbook.inference.prices.listed_price import Pricing, read_pricing, relevant_pricing
from tollbook.inference.prices.price_lists import FOLDER, PriceLists
from tollbook.inference.tokenizers import Counter, counter_of
from tollbook.schemas.policy_rules import WITHOUT_EMBEDDINGS, Dialect, ProviderRule

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

IdsOf = Literal["openai", "openrouter"]
"""Whose ids a provider's models have."""
EMBEDDINGS: Final = "embeddings"
LIMIT: Final = "max_tokens"
COMPLETION_LIMIT: Final = "max_completion_tokens"
# OpenAI's reasoning models refuse `max_tokens`, also behind servers of others (checked November 2026).
_WANTS_COMPLETION_LIMIT: Final = re.compile(r"(^|/)(o[1-9]|gpt-[5-9])")
# These refuse `temperature` and other sampling parameters (checked November 2026).
_REFUSES_SAMPLING: Final = re.compile(
    r"(^|/)(o[1-9](-|$)|gpt-[5-9](?!.*chat)|claude-([a-z]+-)?(4[.-][7-9](?!\d)|[5-9]([.-]|$)))"
)
_SAMPLING: Final = frozenset({"temperature", "top_p", "top_k"})
# What a dialect has no word for (checked November 2026).
_REFUSED: Final[Mapping[Dialect, frozenset[str]]] = {
    "openai": frozenset(
        {"top_k", "min_p", "top_a", "repetition_penalty", "structured_outputs", "include_reasoning", "transforms"}
    ),
    "anthropic": frozenset(
        {"frequency_penalty", "presence_penalty", "repetition_penalty", "min_p", "top_a", "seed", "logit_bias",
         "logprobs", "top_logprobs", "verbosity", "prediction", "transforms"}
    ),
}  # fmt: skip
# Names under which `/models` lists a parameter, where they differ. What stands here with nothing is listed nowhere.
_LISTED_AS: Final[Mapping[str, str | None]] = {
    "reasoning_effort": "reasoning",
    "functions": "tools",
    "function_call": "tool_choice",
    "parallel_tool_calls": "tools",
    "cache_control": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "store": None,
    "transforms": None,
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a provider says of one model. None: it says nothing that can be read. Units: `context_length` tokens."""

    context_length: int | None = None
    supported_parameters: frozenset[str] | None = None
    input_modalities: frozenset[str] | None = None
    output_modalities: frozenset[str] | None = None
    pricing: Pricing | None = None

    @property
    def makes_embeddings(self) -> bool | None:
        """Whether it makes vectors; None where nothing is said."""
        return None if self.output_modalities is None else EMBEDDINGS in self.output_modalities

    @property
    def makes_text(self) -> bool | None:
        """Whether it makes text; None where nothing is said."""
        return None if self.output_modalities is None else "text" in self.output_modalities


_NOTHING_KNOWN: Final = ModelFacts()


class ModelCatalogue:
    """The models of one provider, which is spoken to in a dialect."""

    def __init__(
        self,
        models: Mapping[str, ModelFacts] | None = None,
        *,
        dialect: Dialect = "compatible",
        ids_of: IdsOf | None = None,
        price_lists: PriceLists | None = None,
        lists_of: Callable[[ProviderRule], PriceLists] = lambda rule: PriceLists(),  # noqa: ARG005 - none are known.
        ids_at: Callable[[ProviderRule], IdsOf | None] = lambda rule: None,  # noqa: ARG005
    ) -> None:
        """Without `price_lists`, no prices of the provider's are known.

        `ids_of`: whose model ids these are. None: a server's own, such as Azure's, where any model may have any id.
        `lists_of` and `ids_at` return the same of another provider.
        """
        self._ids_of = ids_of
        self._ids_at = ids_at
        self.price_lists = price_lists or PriceLists()
        self._dialect: Dialect = dialect
        self._lists_of = lists_of
        self._others: dict[tuple[str, str, Dialect], ModelCatalogue] = {}
        self._models: dict[str, ModelFacts] = {}
        self._listed_names: frozenset[str] = frozenset()
        self.learn(models or {})

    @classmethod
    def from_settings(cls, settings: "Settings") -> Self:
        """Make the catalogue of the provider that the settings describe, with the lists kept in the data directory."""
        return cls(
            dialect=settings.provider_dialect,
            price_lists=PriceLists.from_settings(settings),
            ids_of=settings.model_ids_of(settings.provider_dialect, settings.openrouter_base_url),
            lists_of=lambda rule: PriceLists(settings.data_dir / FOLDER, settings.url_of(rule)),
            ids_at=lambda rule: settings.model_ids_of(rule.dialect, rule.base_url),
        )

    def at(self, provider: str, rule: ProviderRule) -> "ModelCatalogue":
        """Return the models of another provider; the same object for every policy that describes it alike."""
        key = provider, rule.base_url, rule.dialect
        if key not in self._others:
            self._others[key] = ModelCatalogue(
                dialect=rule.dialect, ids_of=self._ids_at(rule), price_lists=self._lists_of(rule)
            )
        return self._others[key]

    def learn(self, models: Mapping[str, ModelFacts]) -> None:
        """Take over what the provider says now; what it said before is forgotten."""
        self._models = dict(models)
        lists = [facts.supported_parameters for facts in models.values() if facts.supported_parameters is not None]
        self._listed_names = frozenset[str]().union(*lists)

    def of(self, model: str) -> ModelFacts:
        """Return what is known of a model."""
        return self._models.get(model, _NOTHING_KNOWN)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all models that the provider lists, in their order."""
        return tuple(self._models)

    @property
    def has_embeddings(self) -> bool:
        """Whether the provider can make embeddings at all."""
        return self._dialect not in WITHOUT_EMBEDDINGS

    @property
    def has_public_ids(self) -> bool:
        """Whether a model's id says which model it is."""
        return self._ids_of is not None

    def counter(self, model: str) -> Counter | None:
        """Return what counts a model's tokens as its provider does; None where nobody but the provider can."""
        prefix = "openai/" if self._ids_of == "openrouter" else ""
        return counter_of(model.removeprefix(prefix)) if self._ids_of and model.startswith(prefix) else None

    def unsupported(self, model: str, names: Iterable[str]) -> list[str]:
        """Return which of these parameters, given by name or with their values, the model is known not to support.

        A parameter that the provider lists for no model at all is not judged.
        """
        supported = self.of(model).supported_parameters
        found: list[str] = []
        for name in names:
            listed = _LISTED_AS.get(name, name)
            is_missing = supported is not None and listed in self._listed_names and listed not in supported
            if is_missing or name in _REFUSED.get(self._dialect, ()) or self._refuses_value(name, names):
                found.append(name)
        return found

    def _refuses_value(self, name: str, given: Iterable[str]) -> bool:
        """Whether Anthropic has the parameter, but not this value of it."""
        if self._dialect != "anthropic" or not isinstance(given, Mapping):
            return False
        value = cast("Mapping[str, Any]", given)[name]
        match name:
            case "response_format":
                return _table(value).get("type") == "json_object"
            case "temperature":
                return value > 1
            case _:
                return False

    def without_unsupported(self, model: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return a route's defaults without those that the model does not support, or would refuse."""
        left_out = set(self.unsupported(model, defaults))
        if self.of(model).supported_parameters is None and _REFUSES_SAMPLING.search(model.lower()):
            left_out |= _SAMPLING
        return {name: value for name, value in defaults.items() if name not in left_out}

    def limit_name(self, model: str) -> str:
        """Return the parameter that limits the completion tokens of this model at this provider."""
        supported = self.of(model).supported_parameters
        if supported is not None:
            is_only = COMPLETION_LIMIT in supported and LIMIT not in supported
            return COMPLETION_LIMIT if is_only else LIMIT
        if self._dialect == "openai" or (not self._models and _WANTS_COMPLETION_LIMIT.search(model.lower())):
            return COMPLETION_LIMIT
        return LIMIT


def facts_of(listed: Mapping[str, Any]) -> ModelFacts:
    """Read one entry of `/models`, in OpenRouter's form; what has another form counts as not said."""
    architecture = _table(listed.get("architecture"))
    endpoint = _table(listed.get("top_provider"))
    pricing = _table(listed.get("pricing"))
    lengths = [
        length
        for length in (listed.get("context_length"), endpoint.get("context_length"))
        if type(length) is int and length > 0
    ]
    return ModelFacts(
        # Endpoints of one model differ; the longest one counts, since any may be chosen.
        context_length=max(lengths, default=None),
        supported_parameters=_names(listed.get("supported_parameters")),
        input_modalities=_names(architecture.get("input_modalities")),
        output_modalities=_names(architecture.get("output_modalities")),
        pricing=relevant_pricing(pricing) if read_pricing("", pricing) is not None else None,
    )


def _table(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _names(value: object) -> frozenset[str] | None:
    """Return a list of names; an empty one says nothing."""
    if not isinstance(value, list):
        return None
    names = [name for name in cast("list[object]", value) if isinstance(name, str)]
    return frozenset(names) or None
