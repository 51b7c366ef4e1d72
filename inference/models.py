"""Models as the provider describes them in `/models`: what each supports, takes and puts out, how much it reads.

A provider that says nothing leaves everything open. What is known only narrows: a call is refused before money is held
for it where the provider would refuse it, and a bound is lowered to what the model can read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from tollbook.inference.prices.listed_price import Pricing, read_pricing, relevant_pricing
from tollbook.inference.prices.price_lists import PriceLists
from tollbook.inference.tokenizers import Counter, counter_of

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
# What OpenAI's own API does not know.
_NOT_AT_OPENAI: Final = frozenset(
    {"top_k", "min_p", "top_a", "repetition_penalty", "structured_outputs", "include_reasoning", "transforms"}
)
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
    """The models of one provider. `is_openai`: it is OpenAI's own API, or Azure's."""

    def __init__(
        self,
        models: Mapping[str, ModelFacts] | None = None,
        *,
        is_openai: bool = False,
        ids_of: Literal["openai", "openrouter"] | None = None,
        price_lists: PriceLists | None = None,
    ) -> None:
        """Without `price_lists`, no prices of the provider's are known.

        `ids_of`: whose model ids these are. None: a server's own, such as Azure's, where any model may have any id.
        """
        self._ids_of = ids_of
        self.price_lists = price_lists or PriceLists()
        self._is_openai = is_openai
        self._models: dict[str, ModelFacts] = {}
        self._listed_names: frozenset[str] = frozenset()
        self.learn(models or {})

    def learn(self, models: Mapping[str, ModelFacts]) -> None:
        """Take over what the provider says now; what it said before is forgotten."""
        self._models = dict(models)
        lists = [facts.supported_parameters for facts in models.values() if facts.supported_parameters is not None]
        self._listed_names = frozenset[str]().union(*lists)

    def of(self, model: str) -> ModelFacts:
        """Return what is known of a model."""
        return self._models.get(model, _NOTHING_KNOWN)

    @property
    def has_public_ids(self) -> bool:
        """Whether a model's id says which model it is."""
        return self._ids_of is not None

    def counter(self, model: str) -> Counter | None:
        """Return what counts a model's tokens as its provider does; None where nobody but the provider can."""
        prefix = "openai/" if self._ids_of == "openrouter" else ""
        return counter_of(model.removeprefix(prefix)) if self._ids_of and model.startswith(prefix) else None

    def unsupported(self, model: str, names: Iterable[str]) -> list[str]:
        """Return which of these parameters the model is known not to support.

        A parameter that the provider lists for no model at all is not judged.
        """
        supported = self.of(model).supported_parameters
        found: list[str] = []
        for name in names:
            listed = _LISTED_AS.get(name, name)
            is_missing = supported is not None and listed in self._listed_names and listed not in supported
            if is_missing or (self._is_openai and name in _NOT_AT_OPENAI):
                found.append(name)
        return found

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
        if self._is_openai or (not self._models and _WANTS_COMPLETION_LIMIT.search(model.lower())):
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
