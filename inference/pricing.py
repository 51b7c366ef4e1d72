"""Prices: exact integers, nano-dollars per million tokens.

The catalogue is genai-prices' bundled table, read without any network. Prices from the
configuration come first; they may be dated, and the latest one in force counts. What a
provider reports wins over anything computed here. Never guesses: a model without a price,
or one whose price the catalogue cannot state, raises PriceUnknown (G8).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from inference.errors import PriceUnknown
from schemas.money import MAX_NANOUSD, nanousd_from_usd
from schemas.usage import Usage

if TYPE_CHECKING:
    from inference.settings import Settings

__all__ = ["FOREVER_MS", "TOKENS_PER_MTOK", "DatedPrice", "ModelPrice", "PriceCatalogue", "PriceTier", "PriceUnknown"]

TOKENS_PER_MTOK: Final = 1_000_000
FOREVER_MS: Final = -(2**62)
"""The start of a price that was always in force."""

# Model names come from publishers; what is remembered of them is bounded.
_MAX_REMEMBERED: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTier:
    """Prices of all tokens of a request whose prompt has more than `above_prompt_tokens` tokens."""

    above_prompt_tokens: int
    prompt_nanousd_per_mtok: int
    completion_nanousd_per_mtok: int
    cached_nanousd_per_mtok: int
    cache_write_nanousd_per_mtok: int

    @property
    def dearest_prompt_nanousd_per_mtok(self) -> int:
        """The dearest class that a prompt token can fall into."""
        return max(self.prompt_nanousd_per_mtok, self.cached_nanousd_per_mtok, self.cache_write_nanousd_per_mtok)


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """The price of one model. `tiers` ascend and begin with the one above minus one tokens, that is, the base."""

    model: str
    tiers: tuple[PriceTier, ...]
    request_nanousd: int = 0

    def __post_init__(self) -> None:
        assert self.tiers, "a price has a base tier"
        assert self.tiers[0].above_prompt_tokens < 0, "the base tier applies to any prompt"
        assert all(low.above_prompt_tokens < high.above_prompt_tokens for low, high in pairwise(self.tiers))

    @property
    def base(self) -> PriceTier:
        """The prices below any long-context tier."""
        return self.tiers[0]

    def tier_at(self, prompt_tokens: int) -> PriceTier:
        """Return the tier of a request with a prompt of this many tokens."""
        return next(tier for tier in reversed(self.tiers) if prompt_tokens > tier.above_prompt_tokens)

    def dearest(self, prompt_tokens_at_most: int) -> tuple[int, int]:
        """Return the dearest prompt and completion price, per million, of any prompt up to this many tokens."""
        tiers = [tier for tier in self.tiers if prompt_tokens_at_most > tier.above_prompt_tokens]
        return (
            max(tier.dearest_prompt_nanousd_per_mtok for tier in tiers),
            max(tier.completion_nanousd_per_mtok for tier in tiers),
        )

    def cost(self, usage: Usage) -> int:
        """Return the cost of one request in nano-dollars, rounded up once.

        Cached and cache-write tokens are part of the prompt's, reasoning tokens of the completion's: each is
        billed once, at its own class.
        """
        tier = self.tier_at(usage.prompt_tokens)
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        written = min(usage.cache_write_tokens, usage.prompt_tokens - cached)
        tokens_nanousd = (
            (usage.prompt_tokens - cached - written) * tier.prompt_nanousd_per_mtok
            + cached * tier.cached_nanousd_per_mtok
            + written * tier.cache_write_nanousd_per_mtok
            + usage.completion_tokens * tier.completion_nanousd_per_mtok
        )
        return min(-(-tokens_nanousd // TOKENS_PER_MTOK) + self.request_nanousd, MAX_NANOUSD)


@dataclass(frozen=True, slots=True)
class DatedPrice:
    """A price and when it comes into force, in milliseconds since the epoch."""

    from_ms: int
    price: ModelPrice


class PriceCatalogue:
    """Prices of models by id. The first look-up imports the catalogue (half a second); later ones are microseconds.

    `provider` is the catalogue's name of who sells: OpenRouter resells models at prices of its own.
    """

    def __init__(self, overrides: Mapping[str, Sequence[DatedPrice]] | None = None, *, provider: str = "openrouter"):
        self._overrides = {model.lower(): _in_order(prices) for model, prices in (overrides or {}).items()}
        self._provider = provider
        self._found: dict[str, tuple[DatedPrice, ...] | PriceUnknown] = {}

    @classmethod
    def from_settings(cls, settings: "Settings") -> "PriceCatalogue":
        """Make the catalogue that the settings describe."""
        return cls(settings.price_overrides, provider=settings.price_provider)

    def price(self, model: str, at_ms: int) -> ModelPrice:
        """Return the price of a model in force at `at_ms` (milliseconds since the epoch).

        Errors: PriceUnknown, with the reason.
        """
        found = self._found.get(model)
        if found is None:
            found = self._look_up(model)
        if isinstance(found, PriceUnknown):
            raise PriceUnknown(found.model, found.why)
        for dated in reversed(found):
            if dated.from_ms <= at_ms:
                return dated.price
        raise PriceUnknown(model, "its configured price is not in force yet")

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
        from inference.price_table import prices_of

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


def price_from_usd(
    model: str,
    *,
    prompt: Decimal,
    completion: Decimal,
    cached: Decimal | None = None,
    cache_write: Decimal | None = None,
    request: Decimal = Decimal(0),
) -> ModelPrice:
    """Make a price of dollars per million tokens and dollars per request, rounded up to the nano-dollar."""
    base = tier_from_usd(-1, prompt, completion, cached, cache_write)
    return ModelPrice(model, (base,), request_nanousd=nanousd_from_usd(request))


def tier_from_usd(
    above_prompt_tokens: int, prompt: Decimal, completion: Decimal, cached: Decimal | None, cache_write: Decimal | None
) -> PriceTier:
    """Make a tier of dollars per million tokens; without a price of their own, cached tokens cost what others do."""
    if cache_write is not None and cache_write < prompt:
        # Google's cache-write price is storage, on top of the prompt's own (genai-prices 0.2.3, November 2026).
        cache_write += prompt
    return PriceTier(
        above_prompt_tokens=above_prompt_tokens,
        prompt_nanousd_per_mtok=nanousd_from_usd(prompt),
        completion_nanousd_per_mtok=nanousd_from_usd(completion),
        cached_nanousd_per_mtok=nanousd_from_usd(prompt if cached is None else cached),
        cache_write_nanousd_per_mtok=nanousd_from_usd(prompt if cache_write is None else cache_write),
    )
