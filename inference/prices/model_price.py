"""Prices of models: exact integers, nano-dollars per million tokens. Pure; costs round up."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import pairwise
from typing import Final

from tollbook.schemas.money import MAX_NANOUSD, nanousd_from_usd
from tollbook.schemas.policy import PriceRule
from tollbook.schemas.usage import MediaUsage, Usage, media_of

TOKENS_PER_MTOK: Final = 1_000_000
FOREVER_MS: Final = -(2**62)
"""When a price without a date came into force: before any moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTier:
    """Prices for all tokens of a request whose prompt has more than `above_prompt_tokens` tokens."""

    above_prompt_tokens: int
    prompt_nanousd_per_mtok: int
    completion_nanousd_per_mtok: int
    cached_nanousd_per_mtok: int
    cache_write_nanousd_per_mtok: int
    cache_write_1h_nanousd_per_mtok: int

    @property
    def max_prompt_nanousd_per_mtok(self) -> int:
        """The highest price that a prompt token can have, cached or not."""
        return max(
            self.prompt_nanousd_per_mtok,
            self.cached_nanousd_per_mtok,
            self.cache_write_nanousd_per_mtok,
            self.cache_write_1h_nanousd_per_mtok,
        )


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """The price of one model. `tiers` ascend; the first, above -1 prompt tokens, is for any prompt.

    `image_nanousd` and `file_nanousd` are the prices of an image and a file in the prompt, in addition to its tokens;
    `search_nanousd` is the extra price of a request with web searches. Without `has_completion`, the model makes
    embeddings, and completions have no price. `media` has the prices of prompt tokens by kind (image, audio, video).
    `image_output` and `text_output` are those of completion tokens; the tiers have the higher of the two. These three
    are in nano-dollars per million tokens. None: the price is unknown. `source` is the source of the price, as on the
    ledger: `policy`, `provider <when it was fetched>` or `catalogue <version>`.
    """

    model: str
    tiers: tuple[PriceTier, ...]
    request_nanousd: int = 0
    image_nanousd: int = 0
    has_completion: bool = True
    media: tuple[tuple[str, int], ...] = ()
    image_output: int | None = None
    text_output: int | None = None
    search_nanousd: int | None = None
    file_nanousd: int = 0
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        assert self.tiers, "a price has a base tier"
        assert self.tiers[0].above_prompt_tokens < 0, "the base tier applies to any prompt"
        assert all(low.above_prompt_tokens < high.above_prompt_tokens for low, high in pairwise(self.tiers))

    def media_price(self, kind: str) -> int | None:
        """Return what a million prompt tokens of a kind of media cost, in nano-dollars; None if unknown."""
        return dict(self.media).get(kind)

    def tier_at(self, prompt_tokens: int) -> PriceTier:
        """Return the tier for a prompt of this many tokens."""
        return next(tier for tier in reversed(self.tiers) if prompt_tokens > tier.above_prompt_tokens)

    def max_prices(self, max_prompt_tokens: int) -> tuple[int, int]:
        """Return the highest prompt and completion price of any prompt up to this size, nano-dollars per Mtok."""
        tiers = [tier for tier in self.tiers if max_prompt_tokens > tier.above_prompt_tokens]
        return (
            max(tier.max_prompt_nanousd_per_mtok for tier in tiers),
            max(tier.completion_nanousd_per_mtok for tier in tiers),
        )

    def max_prompt_price(self, max_prompt_tokens: int) -> int:
        """Return the highest listed price of prompt tokens without caching, in nano-dollars per Mtok."""
        tiers = [tier for tier in self.tiers if max_prompt_tokens > tier.above_prompt_tokens]
        return max(tier.prompt_nanousd_per_mtok for tier in tiers)

    def cost(self, usage: Usage) -> int:
        """Return the cost of one request in nano-dollars, rounded up once.

        Each token is billed once. Cached tokens and tokens written to the cache are part of the prompt; they have their
        own prices, and so have those written for an hour. Reasoning tokens are part of the completion and have its
        price. Media tokens have the price of their kind, if the usage reports them. The usage does not say which of
        them were cached: the higher cost is taken.
        """
        tier = self.tier_at(usage.prompt_tokens)
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        written = min(usage.cache_write_tokens, usage.prompt_tokens - cached)
        written_1h = min(usage.cache_write_1h_tokens, written)
        tokens_nanousd = (
            (usage.prompt_tokens - cached - written) * tier.prompt_nanousd_per_mtok
            + cached * tier.cached_nanousd_per_mtok
            + (written - written_1h) * tier.cache_write_nanousd_per_mtok
            + written_1h * tier.cache_write_1h_nanousd_per_mtok
            + self._completion_cost(usage, tier)
            + self._media_surcharge(usage, tier, cached=cached, written=written)
        )
        return min(-(-tokens_nanousd // TOKENS_PER_MTOK) + self.request_nanousd, MAX_NANOUSD)

    def can_price(self, usage: Usage) -> bool:
        """Whether every kind of token in a usage has a price; sound in a completion never has one."""
        if not isinstance(usage, MediaUsage):
            return True
        return not usage.completion_audio_tokens and (
            self.image_output is not None or not usage.completion_image_tokens
        )

    def _completion_cost(self, usage: Usage, tier: PriceTier) -> int:
        """Return what the completion costs, in millionths of a nano-dollar."""
        images = usage.completion_image_tokens if isinstance(usage, MediaUsage) else 0
        if not images or self.image_output is None or self.text_output is None:
            return usage.completion_tokens * tier.completion_nanousd_per_mtok
        return (usage.completion_tokens - images) * self.text_output + images * self.image_output

    def _media_surcharge(self, usage: Usage, tier: PriceTier, *, cached: int, written: int) -> int:
        """Return how much the prompt's media cost above text tokens, in millionths of a nano-dollar.

        Negative if media are cheaper. Media tokens that may have been read from a cache or written to it get no
        reduction, and cost at least as much as without a cache.
        """
        prompt, surcharge = tier.prompt_nanousd_per_mtok, 0
        for kind, count in media_of(usage).items():
            price = self._media_price_in(kind, tier)
            if price < prompt:
                surcharge -= max(0, count - cached - written) * (prompt - price)
                surcharge += min(count, cached) * max(0, price - tier.cached_nanousd_per_mtok)
                continue
            surcharge += count * (price - prompt)
            # Tokens written to a cache cost proportionally more.
            above = max(0, tier.max_prompt_nanousd_per_mtok - prompt)
            surcharge += -(-min(count, written) * above * (price - prompt) // prompt) if prompt else 0
        return surcharge

    def _media_price_in(self, kind: str, tier: PriceTier) -> int:
        """Return the price of a kind of media in a tier; for sound or video without a price, the highest known one."""
        prompt = tier.prompt_nanousd_per_mtok
        price = self.media_price(kind)
        if price is None:
            return prompt if kind == "image" else max([prompt, *(price for _, price in self.media)])
        # There is one media price for prompts of any length.
        return max(price, prompt) if price >= self.tiers[0].prompt_nanousd_per_mtok else price


@dataclass(frozen=True, slots=True)
class DatedPrice:
    """A price, and when it comes into force, in milliseconds since the epoch."""

    from_ms: int
    price: ModelPrice


def price_from_usd(
    model: str,
    *,
    prompt: Decimal,
    completion: Decimal,
    cached: Decimal | None = None,
    cache_write: Decimal | None = None,
    request: Decimal = Decimal(0),
) -> ModelPrice:
    """Make a price from dollars per million tokens and dollars per request, rounded up. Errors: MoneyError."""
    base = tier_from_usd(-1, prompt, completion, cached, cache_write)
    return ModelPrice(model, (base,), request_nanousd=nanousd_from_usd(request))


def dated_prices(model: str, rules: Iterable[PriceRule]) -> tuple[DatedPrice, ...]:
    """Return the prices of a policy as exact integers."""
    return tuple(
        DatedPrice(FOREVER_MS if rule.starts_ms is None else rule.starts_ms, _price_of(model, rule)) for rule in rules
    )


def _price_of(model: str, rule: PriceRule) -> ModelPrice:
    price = price_from_usd(
        model,
        prompt=rule.prompt,
        completion=max(rule.completion, rule.image_output or Decimal(0)),
        cached=rule.cached,
        cache_write=rule.cache_write,
        request=rule.request,
    )
    media = {"image": rule.image, "audio": rule.audio, "video": rule.video}
    return replace(
        price,
        media=tuple((kind, nanousd_from_usd(usd)) for kind, usd in media.items() if usd is not None),
        image_output=None if rule.image_output is None else nanousd_from_usd(rule.image_output),
        text_output=None if rule.image_output is None else nanousd_from_usd(rule.completion),
        search_nanousd=None if rule.web_search is None else nanousd_from_usd(rule.web_search),
        file_nanousd=nanousd_from_usd(rule.file or Decimal(0)),
    )


def completed(listed: ModelPrice, catalogued: ModelPrice) -> ModelPrice:
    """Return a provider's listed price, with missing prices taken from the catalogue (G1).

    A list may have only one price although long prompts cost more, and no price for writing to a cache. Then the
    catalogue's price is used: raised in proportion if the list is more expensive, and never lowered. A model that is
    listed as free is free (G9).
    """
    if all(max(tier.max_prompt_nanousd_per_mtok, tier.completion_nanousd_per_mtok) == 0 for tier in listed.tiers):
        return listed
    own, common = (each.tiers[0].prompt_nanousd_per_mtok for each in (listed, catalogued))
    media = tuple(
        (kind, _in_proportion(price, own, common))
        for kind, price in catalogued.media
        if listed.media_price(kind) is None
    )
    tiers = [_with_write_prices(tier, catalogued.tier_at(tier.above_prompt_tokens + 1)) for tier in listed.tiers]
    if len(tiers) == 1:
        first, usual = tiers[0], catalogued.tiers[0]
        tiers += [_raised_tier(first, usual, tier) for tier in catalogued.tiers[1:]]
    return replace(listed, tiers=tuple(tiers), media=(*listed.media, *media))


def _with_write_prices(listed: PriceTier, catalogued: PriceTier) -> PriceTier:
    """Return a tier with the catalogue's prices for writing to a cache, if the list has none."""
    prompt, usual = listed.prompt_nanousd_per_mtok, catalogued.prompt_nanousd_per_mtok
    written, written_1h = listed.cache_write_nanousd_per_mtok, listed.cache_write_1h_nanousd_per_mtok
    is_stated, is_1h_stated = written != prompt, written_1h != written
    if not is_stated:
        written = max(written, _in_proportion(catalogued.cache_write_nanousd_per_mtok, prompt, usual))
    if not is_1h_stated:
        written_1h = max(written, _in_proportion(catalogued.cache_write_1h_nanousd_per_mtok, prompt, usual))
    return replace(listed, cache_write_nanousd_per_mtok=written, cache_write_1h_nanousd_per_mtok=written_1h)


def _raised_tier(listed: PriceTier, usual: PriceTier, higher: PriceTier) -> PriceTier:
    """Return the catalogue's `higher` tier, raised as the listed tier is above the catalogue's `usual` one."""

    def price(own: int, before: int, after: int) -> int:
        return max(own, _in_proportion(after, own, before))

    return PriceTier(
        above_prompt_tokens=higher.above_prompt_tokens,
        prompt_nanousd_per_mtok=price(
            listed.prompt_nanousd_per_mtok, usual.prompt_nanousd_per_mtok, higher.prompt_nanousd_per_mtok
        ),
        completion_nanousd_per_mtok=price(
            listed.completion_nanousd_per_mtok, usual.completion_nanousd_per_mtok, higher.completion_nanousd_per_mtok
        ),
        cached_nanousd_per_mtok=price(
            listed.cached_nanousd_per_mtok, usual.cached_nanousd_per_mtok, higher.cached_nanousd_per_mtok
        ),
        cache_write_nanousd_per_mtok=price(
            listed.cache_write_nanousd_per_mtok,
            usual.cache_write_nanousd_per_mtok,
            higher.cache_write_nanousd_per_mtok,
        ),
        cache_write_1h_nanousd_per_mtok=price(
            listed.cache_write_1h_nanousd_per_mtok,
            usual.cache_write_1h_nanousd_per_mtok,
            higher.cache_write_1h_nanousd_per_mtok,
        ),
    )


def _in_proportion(price: int, own: int, usual: int) -> int:
    """Return a price raised by the ratio of `own` to `usual`, rounded up; it is never lowered."""
    return -(-price * own // usual) if own > usual > 0 else price


def tier_from_usd(
    above_prompt_tokens: int,
    prompt: Decimal,
    completion: Decimal,
    cached: Decimal | None,
    cache_write: Decimal | None,
    cache_write_1h: Decimal | None = None,
) -> PriceTier:
    """Make a tier from dollars per million tokens. Without their own price, cached tokens have the prompt's price.

    Without their own price, writes to a one-hour cache have the price of other writes. Errors: MoneyError.
    """
    written = _write_price(cache_write, prompt)
    return PriceTier(
        above_prompt_tokens=above_prompt_tokens,
        prompt_nanousd_per_mtok=nanousd_from_usd(prompt),
        completion_nanousd_per_mtok=nanousd_from_usd(completion),
        cached_nanousd_per_mtok=nanousd_from_usd(prompt if cached is None else cached),
        cache_write_nanousd_per_mtok=written,
        cache_write_1h_nanousd_per_mtok=written if cache_write_1h is None else _write_price(cache_write_1h, prompt),
    )


def _write_price(cache_write: Decimal | None, prompt: Decimal) -> int:
    if cache_write is None:
        return nanousd_from_usd(prompt)
    write_price, prompt_price = nanousd_from_usd(cache_write), nanousd_from_usd(prompt)
    # Google's cache-write price is for storage, on top of the prompt's price (genai-prices 0.2.3, November 2026).
    return nanousd_from_usd(cache_write + prompt) if write_price < prompt_price else write_price
