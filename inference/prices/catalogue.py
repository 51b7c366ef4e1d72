"""What a model costs at a moment: by the policy, else by the provider's own list, else by genai-prices' bundled table.

Prices may be dated; the latest one in force counts. It never guesses: a model without a price, or with a price that
the table cannot state, raises PriceUnknown (G8). A cost that the provider reports wins over one computed here.

Where the provider's list and the table differ, the list counts, higher or lower: it is newer, and it is the seller's.
What it does not state stays at the table's, so that a hold is an upper bound (G1): see `completed`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.models import EMBEDDINGS, ModelCatalogue
from tollbook.inference.prices.model_price import DatedPrice, ModelPrice, completed, dated_prices
from tollbook.inference.prices.price_lists import PriceList, PriceLists
from tollbook.schemas.policy import ModelRule, Policy
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

    `provider` is the table's id of the seller: OpenRouter sells other providers' models at prices of its own.
    """

    def __init__(
        self,
        overrides: Mapping[str, Sequence[DatedPrice]] | None = None,
        *,
        provider: str = "openrouter",
        models: ModelCatalogue | None = None,
        limits: Mapping[str, ModelRule] | None = None,
    ) -> None:
        """Without `models`, nothing is known that the provider says: neither of its models nor of their prices.

        `limits` are what the policy says of models.
        """
        self._limits = {model.lower(): rule for model, rule in (limits or {}).items()}
        self.models = models or ModelCatalogue()
        self._overrides = {model.lower(): _in_order(prices) for model, prices in (overrides or {}).items()}
        self._provider = provider
        self._found: dict[tuple[str, str], tuple[DatedPrice, ...] | PriceUnknown] = {}
        self._completed: dict[str, tuple[PriceList, ModelPrice, ModelPrice]] = {}

    @classmethod
    def of_policy(cls, policy: Policy, *, provider: str, models: ModelCatalogue | None = None) -> Self:
        """Make the catalogue with the prices of a policy before all others. Without `models`, no list is known."""
        overrides = {model: dated_prices(model, rules) for model, rules in policy.prices.items()}
        return cls(overrides, provider=provider, models=models, limits=policy.models)

    @classmethod
    def from_settings(cls, settings: "Settings", policy: Policy) -> Self:
        """Make the catalogue for a command that asks no provider: with the lists kept in the data directory."""
        models = ModelCatalogue(price_lists=PriceLists.from_settings(settings))
        return cls.of_policy(policy, provider=settings.price_provider, models=models)

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
            return self._listed(model, at_ms, service_tier) or self._catalogued(model, at_ms, service_tier)
        except PriceUnknown:
            if configured:
                raise PriceUnknown.of_model(model, "its configured price is not in force yet") from None
            raise

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

    def has_larger_context(self, model: str, than: str) -> bool:
        """Whether a model's context is known to be larger than another's: by the provider's list, else the table."""
        larger, smaller = self._context_tokens(model), self._context_tokens(than)
        return larger is not None and smaller is not None and larger > smaller

    def _context_tokens(self, model: str) -> int | None:
        from tollbook.inference.prices.genai_prices_table import context_tokens

        listed = self.models.of(model).context_length
        return context_tokens(model, self._provider) if listed is None else listed

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

        prices = self.models.price_lists.in_force(at_ms)
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


def _in_order(prices: Sequence[DatedPrice]) -> tuple[DatedPrice, ...]:
    return tuple(sorted(prices, key=lambda dated: dated.from_ms))


def _at(prices: Sequence[DatedPrice], at_ms: int) -> ModelPrice | None:
    """Return the latest price in force; the prices ascend."""
    return next((dated.price for dated in reversed(prices) if dated.from_ms <= at_ms), None)
