"""Models as the provider describes them in `/models`: parameters, modalities and context length.

Facts are optional: without them, nothing is checked. A known fact only restricts: a call that the provider would refuse
is refused before money is reserved, and a bound is lowered to the model's context length.
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
"""The scheme of a provider's model ids."""
EMBEDDINGS: Final = "embeddings"
LIMIT: Final = "max_tokens"
COMPLETION_LIMIT: Final = "max_completion_tokens"
# OpenAI's reasoning models refuse `max_tokens`, also on other providers' servers (checked November 2026).
_WANTS_COMPLETION_LIMIT: Final = re.compile(r"(^|/)(o[1-9]|gpt-[5-9])")
# These refuse `temperature` and other sampling parameters (checked November 2026).
_REFUSES_SAMPLING: Final = re.compile(
    r"(^|/)(o[1-9](-|$)|gpt-[5-9](?!.*chat)|claude-([a-z]+-)?(4[.-][7-9](?!\d)|[5-9]([.-]|$)))"
)
_SAMPLING: Final = frozenset({"temperature", "top_p", "top_k"})
# Parameters that a dialect does not have (checked November 2026).
_REFUSED: Final[Mapping[Dialect, frozenset[str]]] = {
    "openai": frozenset(
        {"top_k", "min_p", "top_a", "repetition_penalty", "structured_outputs", "include_reasoning", "transforms"}
    ),
    "anthropic": frozenset(
        {"frequency_penalty", "presence_penalty", "repetition_penalty", "min_p", "top_a", "seed", "logit_bias",
         "logprobs", "top_logprobs", "verbosity", "prediction", "transforms"}
    ),
}  # fmt: skip
# The name under which `/models` lists a parameter, if it differs. None: the parameter is not listed at all.
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
    """What a provider says about one model; None if it says nothing readable. `context_length` is in tokens."""

    context_length: int | None = None
    supported_parameters: frozenset[str] | None = None
    input_modalities: frozenset[str] | None = None
    output_modalities: frozenset[str] | None = None
    pricing: Pricing | None = None

    @property
    def makes_embeddings(self) -> bool | None:
        """Whether the model makes embeddings; None if unknown."""
        return None if self.output_modalities is None else EMBEDDINGS in self.output_modalities

    @property
    def makes_text(self) -> bool | None:
        """Whether the model makes text; None if unknown."""
        return None if self.output_modalities is None else "text" in self.output_modalities


_NOTHING_KNOWN: Final = ModelFacts()


class ModelCatalogue:
    """The models of one provider and its dialect."""

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
        """Without `price_lists`, the provider's prices are unknown.

        `ids_of` is the scheme of the model ids; None for a server such as Azure's, where any model may have any id.
        `lists_of` and `ids_at` return the price lists and the scheme of another provider.
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
        """Make the catalogue of the settings' provider, with the price lists in the data directory."""
        return cls(
            dialect=settings.provider_dialect,
            price_lists=PriceLists.from_settings(settings),
            ids_of=settings.model_ids_of(settings.provider_dialect, settings.openrouter_base_url),
            lists_of=lambda rule: PriceLists(settings.data_dir / FOLDER, settings.url_of(rule)),
            ids_at=lambda rule: settings.model_ids_of(rule.dialect, rule.base_url),
        )

    def at(self, provider: str, rule: ProviderRule) -> "ModelCatalogue":
        """Return the models of another provider; the same object for every policy with the same description of it."""
        key = provider, rule.base_url, rule.dialect
        if key not in self._others:
            self._others[key] = ModelCatalogue(
                dialect=rule.dialect, ids_of=self._ids_at(rule), price_lists=self._lists_of(rule)
            )
        return self._others[key]

    def learn(self, models: Mapping[str, ModelFacts]) -> None:
        """Replace all facts by what the provider says now."""
        self._models = dict(models)
        lists = [facts.supported_parameters for facts in models.values() if facts.supported_parameters is not None]
        self._listed_names = frozenset[str]().union(*lists)

    def of(self, model: str) -> ModelFacts:
        """Return the known facts of a model."""
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
        """Whether a model id tells which model it is."""
        return self._ids_of is not None

    def counter(self, model: str) -> Counter | None:
        """Return a counter of a model's tokens that counts as its provider does; None if there is none."""
        prefix = "openai/" if self._ids_of == "openrouter" else ""
        return counter_of(model.removeprefix(prefix)) if self._ids_of and model.startswith(prefix) else None

    def unsupported(self, model: str, names: Iterable[str]) -> list[str]:
        """Return which of these parameters, given by name or with their values, the model is known not to support.

        A parameter that the provider lists for no model at all is not checked.
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
        """Return a route's default parameters without those that the model does not support or would refuse."""
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
    """Parse one entry of `/models` in OpenRouter's form; a field of another form counts as missing."""
    architecture = _table(listed.get("architecture"))
    endpoint = _table(listed.get("top_provider"))
    pricing = _table(listed.get("pricing"))
    lengths = [
        length
        for length in (listed.get("context_length"), endpoint.get("context_length"))
        if type(length) is int and length > 0
    ]
    return ModelFacts(
        # The endpoints of a model differ. The longest context counts, since any endpoint may be chosen.
        context_length=max(lengths, default=None),
        supported_parameters=_names(listed.get("supported_parameters")),
        input_modalities=_names(architecture.get("input_modalities")),
        output_modalities=_names(architecture.get("output_modalities")),
        pricing=relevant_pricing(pricing) if read_pricing("", pricing) is not None else None,
    )


def _table(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _names(value: object) -> frozenset[str] | None:
    """Return a list of names; None for an empty list."""
    if not isinstance(value, list):
        return None
    names = [name for name in cast("list[object]", value) if isinstance(name, str)]
    return frozenset(names) or None
