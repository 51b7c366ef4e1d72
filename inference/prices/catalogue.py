"""What a model costs at a moment: by the policy, else by the provider's own list, else by genai-prices' bundled table.

Prices may be dated; the latest one in force counts. It never guesses: a model without a price, or with a price that
the table cannot state, raises PriceUnknown (G8). A cost that the provider reports wins over one computed here.

Where the provider's list and the table differ, the list counts, higher or lower: it is newer, and it is the seller's.
What it does not state stays at the table's, so that a hold is an upper bound (G1): see `completed`.
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
"""The source of prices that stand in the policy."""


class PriceCatalogue:
    """Prices of models by id. The first look-up imports genai-prices (half a second); later ones take microseconds.

    `provider` is the table's id of the seller: OpenRouter sells other providers' models at prices of its own. `at` has
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
        """Without `models`, nothing is known that the provider says: neither of its models nor of their prices.

        `source` says where prices come from that `overrides` lack, as in `ProviderRule`. `limits` are what the policy
        says of models.
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
        """Make the catalogue with the prices of a policy before all others. Without `models`, no list is known."""
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
        """Make the catalogue for a command that asks no provider: with the lists kept in the data directory."""
        models = ModelCatalogue.from_settings(settings)
        return cls.of_policy(policy, provider=settings.price_provider, models=models)

    def at(self, provider: str) -> "PriceCatalogue":
        """Return the prices of a provider of the policy; one that is not in it has none."""
        if provider == DEFAULT_PROVIDER:
            return self
        return self._others.get(provider) or PriceCatalogue(provider=None, source="policy")

    @property
    def by_provider(self) -> Mapping[str, "PriceCatalogue"]:
        """The prices of every provider, the default one first."""
        return {DEFAULT_PROVIDER: self, **self._others}

    def refresh(self) -> None:
        """Note the lists of every provider that there are now: other processes keep some too."""
        for prices in self.by_provider.values():
            prices.models.price_lists.refresh()

    def price(self, model: str, at_ms: int, *, service_tier: str = "") -> ModelPrice:
        """Return a model's price in force at `at_ms`, milliseconds since the epoch. Errors: PriceUnknown.

        In a `service_tier` such as `flex` or `priority` for which the catalogue has no price, it is the usual one.
        """
        configured = self._overrides.get(model.lower(), ())
        own = _at(configured, at_ms)
        if own is not None:
            self._refuse_other_outputs(model, own)
            return replace(own, model=model, source=POLICY)
        try:
            self._refuse_other_outputs(model)
            if self._source == "policy":
                raise PriceUnknown.of_model(model, "the policy does not state it, and takes it from nowhere else")
            return self._listed(model, at_ms, service_tier) or self._catalogued(model, at_ms, service_tier)
        except PriceUnknown:
            if configured:
                raise PriceUnknown.of_model(model, "its configured price is not in force yet") from None
            raise

    def price_anywhere(self, model: str, at_ms: int, provider: str | None = None) -> ModelPrice:
        """Return the price of a model at a provider; without one, this provider's, else the first other's that has one.

        So too for a provider that the policy has no more. Errors: PriceUnknown.
        """
        if provider is not None and provider in self.by_provider:
            return self.at(provider).price(model, at_ms)
        found = (prices for prices in self.by_provider.values() if prices.knows(model, at_ms))
        return next(found, self).price(model, at_ms)

    def limits(self, model: str) -> ModelRule:
        """Return what the policy says of a model's images, sounds, files and videos."""
        return self._limits.get(model.lower(), _NO_LIMITS)

    def knows(self, model: str, at_ms: int) -> bool:
        """Whether a price of the model is known."""
        try:
            self.price(model, at_ms)
        except PriceUnknown:
            return False
        return True

    def reads_files(self, model: str, at_ms: int) -> bool:
        """Whether the policy pays for files being read by the provider, for a model that takes none itself."""
        return self.knows(model, at_ms) and self.price(model, at_ms).file_nanousd > 0

    def has_larger_context(self, target: Target, than: Target) -> bool:
        """Whether a model's context is known to be larger than another one's."""
        larger, smaller = (self.at(each.provider).context_tokens(each.model) for each in (target, than))
        return larger is not None and smaller is not None and larger > smaller

    def context_tokens(self, model: str) -> int | None:
        """Return how many tokens a model's context has: by the provider's list, else by the price catalogue."""
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
                model, f"it puts out {', '.join(sorted(outputs))}; set image_output in its price of the policy"
            )

    def _listed(self, model: str, at_ms: int, service_tier: str) -> ModelPrice | None:
        """Return the price in the provider's list, completed by the catalogue's where that has one too."""
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
        kept = self._completed.get(model)
        if kept is None or kept[0] is not prices or kept[1] is not usual:
            price = replace(completed(listed, usual), model=model, source=prices.source)
            if len(self._completed) >= _MAX_CACHED_MODELS:
                self._completed.clear()
            kept = self._completed[model] = (prices, usual, price)
        return kept[2]

    def _catalogued(self, model: str, at_ms: int, service_tier: str) -> ModelPrice:
        found = self._found.get((model, service_tier))
        if found is None:
            found = self._look_up(model, service_tier)
        if isinstance(found, PriceUnknown):
            raise PriceUnknown(found.message, found.data)
        price = _at(found, at_ms)
        assert price is not None, "the first price of the table has no beginning"
        return price

    def _look_up(self, model: str, service_tier: str) -> tuple[DatedPrice, ...] | PriceUnknown:
        # Imported here, since it loads the whole table, which most commands do not need.
        from tollbook.inference.prices.genai_prices_table import prices_of

        if self._provider is None:
            return PriceUnknown.of_model(model, "the provider does not list it, and has no name in the price catalogue")
        found: tuple[DatedPrice, ...] | PriceUnknown
        try:
            # The model id that was asked for: it is sent to the provider and written into the ledger.
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
    # In lower case, so that a provider's own price replaces one for every provider.
    return {model.lower(): dated_prices(model, rules) for model, rules in prices.items()}


def _in_order(prices: Sequence[DatedPrice]) -> tuple[DatedPrice, ...]:
    return tuple(sorted(prices, key=lambda dated: dated.from_ms))


def _at(prices: Sequence[DatedPrice], at_ms: int) -> ModelPrice | None:
    """Return the latest price in force; the prices ascend."""
    return next((dated.price for dated in reversed(prices) if dated.from_ms <= at_ms), None)
