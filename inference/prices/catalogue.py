"""The catalogue of prices: configured prices first, then genai-prices' bundled table, read without any network.

Prices may be dated; the latest one in force counts. It never guesses: a model without a price, or with a price that
the table cannot state, raises PriceUnknown (G8). A cost that the provider reports wins over one computed here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Self

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice, dated_prices
from tollbook.schemas.policy import Policy
from tollbook.schemas.usage import Usage

# Model names come from publishers, so the number of cached ones is limited.
_MAX_CACHED_MODELS: Final = 10_000


class PriceCatalogue:
    """Prices of models by id. The first look-up imports genai-prices (half a second); later ones take microseconds.

    `provider` is the table's id of the seller: OpenRouter sells other providers' models at prices of its own.
    """

    def __init__(self, overrides: Mapping[str, Sequence[DatedPrice]] | None = None, *, provider: str = "openrouter"):
        self._overrides = {model.lower(): _in_order(prices) for model, prices in (overrides or {}).items()}
        self._provider = provider
        self._found: dict[str, tuple[DatedPrice, ...] | PriceUnknown] = {}

    @classmethod
    def of_policy(cls, policy: Policy, *, provider: str) -> Self:
        """Make the catalogue with the prices of a policy before the table's."""
        return cls({model: dated_prices(model, rules) for model, rules in policy.prices.items()}, provider=provider)

    def price(self, model: str, at_ms: int) -> ModelPrice:
        """Return a model's price in force at `at_ms`, milliseconds since the epoch. Errors: PriceUnknown."""
        found = self._found.get(model)
        if found is None:
            found = self._look_up(model)
        if isinstance(found, PriceUnknown):
            raise PriceUnknown(found.message, found.data)
        for dated in reversed(found):
            if dated.from_ms <= at_ms:
                return dated.price
        raise PriceUnknown.of_model(model, "its configured price is not in force yet")

    def knows(self, model: str, at_ms: int) -> bool:
        """Whether a price of the model is known."""
        try:
            self.price(model, at_ms)
        except PriceUnknown:
            return False
        return True

    def cost(self, model: str, usage: Usage, at_ms: int) -> int:
        """Return what this usage costs in nano-dollars, rounded up once. Errors: PriceUnknown."""
        return self.price(model, at_ms).cost(usage)

    def _look_up(self, model: str) -> tuple[DatedPrice, ...] | PriceUnknown:
        # Imported here, since it loads the whole table, which most commands do not need.
        from tollbook.inference.prices.genai_prices_table import prices_of

        found: tuple[DatedPrice, ...] | PriceUnknown
        overrides = self._overrides.get(model.lower(), ())
        if overrides and overrides[0].from_ms == FOREVER_MS:
            found = _named(model, overrides)
        else:
            try:
                # Configured prices replace the table's from the day on which the first of them begins.
                listed = prices_of(model, self._provider)
                before = [dated for dated in listed if not overrides or dated.from_ms < overrides[0].from_ms]
                found = _named(model, (*before, *overrides))
            except PriceUnknown as exc:
                found = _named(model, overrides) if overrides else exc
        if len(self._found) >= _MAX_CACHED_MODELS:
            self._found.clear()
        self._found[model] = found
        return found


def _in_order(prices: Sequence[DatedPrice]) -> tuple[DatedPrice, ...]:
    return tuple(sorted(prices, key=lambda dated: dated.from_ms))


def _named(model: str, prices: Iterable[DatedPrice]) -> tuple[DatedPrice, ...]:
    """Set the model id that was asked for: it is sent to the provider and written into the ledger."""
    return tuple(DatedPrice(dated.from_ms, replace(dated.price, model=model)) for dated in prices)
