"""Finding the price of a model.

The catalogue is genai-prices' bundled table, read without any network. Prices from the
configuration come first; they may be dated, and the latest one in force counts. What a
provider reports wins over anything computed here. Never guesses: a model without a price,
or one whose price the catalogue cannot state, raises PriceUnknown (G8).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.model_price import FOREVER_MS, DatedPrice, ModelPrice
from tollbook.schemas.usage import Usage

# Model names come from publishers; what is remembered of them is bounded.
_MAX_REMEMBERED: Final = 10_000


class PriceCatalogue:
    """Prices of models by id. The first look-up imports the catalogue (half a second); later ones are microseconds.

    `provider` is the catalogue's name of who sells: OpenRouter resells models at prices of its own.
    """

    def __init__(self, overrides: Mapping[str, Sequence[DatedPrice]] | None = None, *, provider: str = "openrouter"):
        self._overrides = {model.lower(): _in_order(prices) for model, prices in (overrides or {}).items()}
        self._provider = provider
        self._found: dict[str, tuple[DatedPrice, ...] | PriceUnknown] = {}

    def price(self, model: str, at_ms: int) -> ModelPrice:
        """Return the price of a model in force at `at_ms` (milliseconds since the epoch).

        Errors: PriceUnknown, with the reason.
        """
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

    def warm(self, models: Iterable[str]) -> None:
        """Look prices up before the first call needs them; unknown ones are left to that call."""
        for model in models:
            if model not in self._found:
                self._look_up(model)

    def _look_up(self, model: str) -> tuple[DatedPrice, ...] | PriceUnknown:
        # Imported here: it loads the catalogue, which commands that price nothing should not wait for.
        from tollbook.inference.prices.genai_prices_table import prices_of

        found: tuple[DatedPrice, ...] | PriceUnknown
        overrides = self._overrides.get(model.lower(), ())
        if overrides and overrides[0].from_ms == FOREVER_MS:
            found = _named(model, overrides)
        else:
            try:
                # Configured prices that begin later follow the catalogue's; they replace what it has from then on.
                listed = prices_of(model, self._provider)
                before = [dated for dated in listed if not overrides or dated.from_ms < overrides[0].from_ms]
                found = _named(model, (*before, *overrides))
            except PriceUnknown as exc:
                found = _named(model, overrides) if overrides else exc
        if len(self._found) >= _MAX_REMEMBERED:
            self._found.clear()
        self._found[model] = found
        return found


def _in_order(prices: Sequence[DatedPrice]) -> tuple[DatedPrice, ...]:
    return tuple(sorted(prices, key=lambda dated: dated.from_ms))


def _named(model: str, prices: Iterable[DatedPrice]) -> tuple[DatedPrice, ...]:
    """Put the asked-for id on the prices: it is what is sent to the provider and written into the ledger."""
    return tuple(DatedPrice(dated.from_ms, replace(dated.price, model=model)) for dated in prices)
