"""The price of a model at a moment: from the policy, else the provider's own list, else genai-prices' bundled table.

Prices may be dated; the latest price in force is used. The catalogue never guesses: a model without a price, or with a
price that the table cannot express, raises PriceUnknown (G8). A cost reported by the provider takes precedence over a
cost computed here.

If the provider's list and the table differ, the list is used, higher or lower: it is newer, and it is the seller's. A
price that is missing in the list is taken from the table, so that a hold is an upper bound (G1): see `completed`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, Self

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.models import EMBEDDINGS, ModelCatalogue
from tollbook.inference.prices.model_price import DatedPrice, ModelPrice, completed, dated_prices
from tollbook.inference.prices.price_lists import PriceList
from tollbook.schemas.policy import ModelRule, Policy, PriceRule
from tollbook.schemas.routes import DEFAULT_PROVIDER, Target
from tollbook.schemas.usage import Usage

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

# Model names come from publishers, so the number of cached ones is limited.
_MAX_CACHED_MODELS: Final = 10_000
_PRICED_OUTPUTS: Final = frozenset({"text", EMBEDDINGS})
_NO_LIMITS: Final = ModelRule()
POLICY: Final = "policy"
"""The source of prices in the policy."""


class PriceCatalogue:
    """Prices of models by id. The first look-up imports genai-prices (half a second); later ones take microseconds.

    `provider` is the table's id of the seller: OpenRouter sells other providers' models at its own prices. `at` returns
    the prices of the policy's other providers.
    """

    def __init__(
        self,
        overrides: Mapping[str, Sequence[DatedPrice]] | None = None,
        *,
        provider: str | None = "openrouter",
        models: ModelCatalogue | None = None,
        source: Literal["models", "catalogue", "policy"] = "models",
        others: Mapping[str, "PriceCatalogue"] | None = None,
        limits: Mapping[str, ModelRule] | None = None,
    ) -> None:
        """Without `models`, the provider's models and its own prices are unknown.

        `source` says where prices come from that are not in `overrides`, as in `ProviderRule`. `limits` are the
        policy's `[models]`.
        """
        self._source = source
        self._others = dict(others or {})
        self._limits = {model.lower(): rule for model, rule in (limits or {}).items()}
        self.models = models or ModelCatalogue()
        self._overrides = {model.lower(): _in_order(prices) for model, prices in (overrides or {}).items()}
        self._provider = provider
        self._found: dict[tuple[str, str], tuple[DatedPrice, ...] | PriceUnknown] = {}
        self._completed: dict[str, tuple[PriceList, ModelPrice, ModelPrice]] = {}

    @classmethod
    def of_policy(cls, policy: Policy, *, provider: str, models: ModelCatalogue | None = None) -> Self:
        """Make the catalogue of a policy, whose prices take precedence. Without `models`, no price list is known."""
        models = models or ModelCatalogue()
        others = {
            name: cls(
                {**_dated(policy.prices), **_dated(rule.prices)},
                provider=rule.catalogue_name,
                models=models.at(name, rule),
                source=rule.price_source,
                limits=policy.models,
            )
            for name, rule in policy.providers.items()
        }
        return cls(_dated(policy.prices), provider=provider, models=models, others=others, limits=policy.models)

    @classmethod
    def from_settings(cls, settings: "Settings", policy: Policy) -> Self:
        """Make the catalogue for a command that asks no provider, with the price lists in the data directory."""
        models = ModelCatalogue.from_settings(settings)
        return cls.of_policy(policy, provider=settings.price_provider, models=models)

    def at(self, provider: str) -> "PriceCatalogue":
        """Return the prices of a provider of the policy; a provider that the policy does not have has no prices."""
        if provider == DEFAULT_PROVIDER:
            return self
        return self._others.get(provider) or PriceCatalogue(provider=None, source="policy")

    @property
    def by_provider(self) -> Mapping[str, "PriceCatalogue"]:
        """The prices of every provider, the default one first."""
        return {DEFAULT_PROVIDER: self, **self._others}

    def refresh(self) -> None:
        """Read the list of stored price lists of every provider again: other processes store some too."""
        for prices in self.by_provider.values():
            prices.models.price_lists.refresh()

    def price(self, model: str, at_ms: int, *, service_tier: str = "") -> ModelPrice:
        """Return a model's price in force at `at_ms`, milliseconds since the epoch. Errors: PriceUnknown.

        For a `service_tier` such as `flex` or `priority` without its own price, return the usual price.
        """
        configured = self._overrides.get(model.lower(), ())
        own = _at(configured, at_ms)
        if own is not None:
            self._refuse_other_outputs(model, own)
            return replace(own, model=model, source=POLICY)
        try:
            self._refuse_other_outputs(model)
            if self._source == "policy":
                raise PriceUnknown.of_model(model, "the policy has no price for it, and allows no other source")
            return self._listed(model, at_ms, service_tier) or self._catalogued(model, at_ms, service_tier)
        except PriceUnknown:
            if configured:
                raise PriceUnknown.of_model(model, "its configured price is not in force yet") from None
            raise

    def price_anywhere(self, model: str, at_ms: int, provider: str | None = None) -> ModelPrice:
        """Return the price of a model at a provider.

        Without a provider, or if the policy no longer has it, return this catalogue's price, else the price of the
        first other provider that has one. Errors: PriceUnknown.
        """
        if provider is not None and provider in self.by_provider:
            return self.at(provider).price(model, at_ms)
        found = (prices for prices in self.by_provider.values() if prices.knows(model, at_ms))
        return next(found, self).price(model, at_ms)

    def limits(self, model: str) -> ModelRule:
        """Return the policy's limits for a model's images, sounds, files and videos."""
        return self._limits.get(model.lower(), _NO_LIMITS)

    def knows(self, model: str, at_ms: int) -> bool:
        """Whether a price of the model is known."""
        try:
            self.price(model, at_ms)
        except PriceUnknown:
            return False
        return True

    def reads_files(self, model: str, at_ms: int) -> bool:
        """Whether the policy has a price for the provider reading files, for a model that takes no files itself."""
        return self.knows(model, at_ms) and self.price(model, at_ms).file_nanousd > 0

    def has_larger_context(self, target: Target, than: Target) -> bool:
        """Whether a model's context is known to be larger than another one's."""
        larger, smaller = (self.at(each.provider).context_tokens(each.model) for each in (target, than))
        return larger is not None and smaller is not None and larger > smaller

    def context_tokens(self, model: str) -> int | None:
        """Return a model's context length in tokens, by the provider's list, else by the table; None if unknown."""
        from tollbook.inference.prices.genai_prices_table import context_tokens

        listed = self.models.of(model).context_length
        if listed is not None or self._provider is None:
            return listed
        return context_tokens(model, self._provider)

    def cost(self, model: str, usage: Usage, at_ms: int, *, service_tier: str = "") -> int:
        """Return what this usage costs in nano-dollars, rounded up once. Errors: PriceUnknown."""
        return self.price(model, at_ms, service_tier=service_tier).cost(usage)

    def _refuse_other_outputs(self, model: str, own: ModelPrice | None = None) -> None:
        outputs = (self.models.of(model).output_modalities or _PRICED_OUTPUTS) - _PRICED_OUTPUTS
        if own is not None and own.image_output is not None:
            outputs -= {"image"}
        if outputs:
            raise PriceUnknown.of_model(
                model, f"its output can be {', '.join(sorted(outputs))}; set image_output in its price in the policy"
            )

    def _listed(self, model: str, at_ms: int, service_tier: str) -> ModelPrice | None:
        """Return the price in the provider's list, completed from the table if that has the model too."""
        from tollbook.inference.prices.genai_prices_table import refuse_unpriceable

        prices = self.models.price_lists.in_force(at_ms) if self._source == "models" else None
        listed = None if prices is None else prices.price(model)
        if prices is None or listed is None:
            return None
        refuse_unpriceable(model)
        try:
            usual = self._catalogued(model, at_ms, "")
            in_tier = self._catalogued(model, at_ms, service_tier) if service_tier else usual
        except PriceUnknown:
            return replace(listed, model=model, source=prices.source)
        if in_tier != usual:
            return in_tier  # The provider lists no prices of service tiers.
        cached = self._completed.get(model)
        if cached is None or cached[0] is not prices or cached[1] is not usual:
            price = replace(completed(listed, usual), model=model, source=prices.source)
            if len(self._completed) >= _MAX_CACHED_MODELS:
                self._completed.clear()
            cached = self._completed[model] = (prices, usual, price)
        return cached[2]

    def _catalogued(self, model: str, at_ms: int, service_tier: str) -> ModelPrice:
        found = self._found.get((model, service_tier))
        if found is None:
            found = self._look_up(model, service_tier)
        if isinstance(found, PriceUnknown):
            raise PriceUnknown(found.message, found.data)
        price = _at(found, at_ms)
        assert price is not None, "the first price of the table is in force since ever"
        return price

    def _look_up(self, model: str, service_tier: str) -> tuple[DatedPrice, ...] | PriceUnknown:
        # Imported here: it loads the whole table, which most commands do not need.
        from tollbook.inference.prices.genai_prices_table import prices_of

        if self._provider is None:
            return PriceUnknown.of_model(model, "the provider does not list it, and has no name in the price catalogue")
        found: tuple[DatedPrice, ...] | PriceUnknown
        try:
            # With the requested model id, which is sent to the provider and written to the ledger.
            found = tuple(
                DatedPrice(dated.from_ms, replace(dated.price, model=model))
                for dated in prices_of(model, self._provider, service_tier)
            )
        except PriceUnknown as exc:
            found = exc
        if len(self._found) >= _MAX_CACHED_MODELS:
            self._found.clear()
        self._found[model, service_tier] = found
        return found


def _dated(prices: Mapping[str, Sequence[PriceRule]]) -> dict[str, tuple[DatedPrice, ...]]:
    # In lower case, so that a provider's own price replaces the general price of the same model.
    return {model.lower(): dated_prices(model, rules) for model, rules in prices.items()}


def _in_order(prices: Sequence[DatedPrice]) -> tuple[DatedPrice, ...]:
    return tuple(sorted(prices, key=lambda dated: dated.from_ms))


def _at(prices: Sequence[DatedPrice], at_ms: int) -> ModelPrice | None:
    """Return the latest price in force; `prices` is sorted, oldest first."""
    return next((dated.price for dated in reversed(prices) if dated.from_ms <= at_ms), None)
