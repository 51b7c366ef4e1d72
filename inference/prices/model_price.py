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

    `image_nanousd` is what an image of the prompt costs beside its tokens. Without `has_completion`, it is the price of
    a model that makes embeddings, and no completion has a price. `media` are prices of prompt tokens by kind (image,
    audio, video), `image_output` and `text_output` those of completion tokens, nano-dollars per million; the tiers have
    the dearer of the two. `search_nanousd` is what a request with web searches costs besides, `file_nanousd` what a
    file does beside its tokens. None: it is not known. `source` says where the price comes from, as the ledger has it:
    `policy`, `provider <when it was fetched>` or `catalogue <version>`.
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
        """Return what a million prompt tokens of a kind cost in nano-dollars; None where that is not known."""
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
        """Return the highest listed price of a prompt token that no cache is involved in, nano-dollars per Mtok."""
        tiers = [tier for tier in self.tiers if max_prompt_tokens > tier.above_prompt_tokens]
        return max(tier.prompt_nanousd_per_mtok for tier in tiers)

    def cost(self, usage: Usage) -> int:
        """Return the cost of one request in nano-dollars, rounded up once.

        Each token is billed once: cached and cache-write tokens, which are part of the prompt, at their own price, and
        those that are kept for an hour at theirs; reasoning tokens, which are part of the completion, at its price;
        tokens of media at the price of their kind, where the usage tells them. Which of them were cached is not told:
        the dearer is taken.
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
        """Whether every kind of token that a usage tells has a price; no price of sound in a completion is known."""
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
        """Return what media of the prompt cost above other tokens of it, in millionths of a nano-dollar.

        Less than nothing where they are cheaper; of those that may have been read from a cache or written to it,
        nothing is taken off, and they cost no less than they do without a cache.
        """
        prompt, surcharge = tier.prompt_nanousd_per_mtok, 0
        for kind, count in media_of(usage).items():
            own = self._media_price_in(kind, tier)
            if own < prompt:
                surcharge -= max(0, count - cached - written) * (prompt - own)
                surcharge += min(count, cached) * max(0, own - tier.cached_nanousd_per_mtok)
                continue
            surcharge += count * (own - prompt)
            # What is written to a cache costs more in proportion.
            above = max(0, tier.max_prompt_nanousd_per_mtok - prompt)
            surcharge += -(-min(count, written) * above * (own - prompt) // prompt) if prompt else 0
        return surcharge

    def _media_price_in(self, kind: str, tier: PriceTier) -> int:
        """Return what a million prompt tokens of a kind cost; of sound or videos without a price, the highest known."""
        prompt = tier.prompt_nanousd_per_mtok
        own = self.media_price(kind)
        if own is None:
            return prompt if kind == "image" else max([prompt, *(price for _, price in self.media)])
        # It is stated once for prompts of any length.
        return max(own, prompt) if own >= self.tiers[0].prompt_nanousd_per_mtok else own


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
    """Make a price of dollars per million tokens and dollars per request, rounded up. Errors: MoneyError."""
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
    """Return a provider's price with what its list does not state, taken from the catalogue (G1).

    A list may state one price for prompts of any length where long ones cost more, and none for what is written to a
    cache. There the catalogue's price stays: raised in proportion where the list is dearer, and never lowered. A model
    that is listed as free is free (G9).
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
        tiers += [_dearer(first, usual, tier) for tier in catalogued.tiers[1:]]
    return replace(listed, tiers=tuple(tiers), media=(*listed.media, *media))


def _with_write_prices(listed: PriceTier, catalogued: PriceTier) -> PriceTier:
    """Return a tier whose writes to a cache cost what the catalogue says, where they have no price of their own."""
    prompt, usual = listed.prompt_nanousd_per_mtok, catalogued.prompt_nanousd_per_mtok
    written, written_1h = listed.cache_write_nanousd_per_mtok, listed.cache_write_1h_nanousd_per_mtok
    is_stated, is_1h_stated = written != prompt, written_1h != written
    if not is_stated:
        written = max(written, _in_proportion(catalogued.cache_write_nanousd_per_mtok, prompt, usual))
    if not is_1h_stated:
        written_1h = max(written, _in_proportion(catalogued.cache_write_1h_nanousd_per_mtok, prompt, usual))
    return replace(listed, cache_write_nanousd_per_mtok=written, cache_write_1h_nanousd_per_mtok=written_1h)


def _dearer(listed: PriceTier, usual: PriceTier, dearer: PriceTier) -> PriceTier:
    """Return the catalogue's `dearer` tier for a list that differs from its `usual` one."""

    def price(own: int, before: int, after: int) -> int:
        return max(own, _in_proportion(after, own, before))

    return PriceTier(
        above_prompt_tokens=dearer.above_prompt_tokens,
        prompt_nanousd_per_mtok=price(
            listed.prompt_nanousd_per_mtok, usual.prompt_nanousd_per_mtok, dearer.prompt_nanousd_per_mtok
        ),
        completion_nanousd_per_mtok=price(
            listed.completion_nanousd_per_mtok, usual.completion_nanousd_per_mtok, dearer.completion_nanousd_per_mtok
        ),
        cached_nanousd_per_mtok=price(
            listed.cached_nanousd_per_mtok, usual.cached_nanousd_per_mtok, dearer.cached_nanousd_per_mtok
        ),
        cache_write_nanousd_per_mtok=price(
            listed.cache_write_nanousd_per_mtok,
            usual.cache_write_nanousd_per_mtok,
            dearer.cache_write_nanousd_per_mtok,
        ),
        cache_write_1h_nanousd_per_mtok=price(
            listed.cache_write_1h_nanousd_per_mtok,
            usual.cache_write_1h_nanousd_per_mtok,
            dearer.cache_write_1h_nanousd_per_mtok,
        ),
    )


def _in_proportion(price: int, own: int, usual: int) -> int:
    """Return a price raised as `own` is above `usual`, rounded up; it is never lowered."""
    return -(-price * own // usual) if own > usual > 0 else price


def tier_from_usd(
    above_prompt_tokens: int,
    prompt: Decimal,
    completion: Decimal,
    cached: Decimal | None,
    cache_write: Decimal | None,
    cache_write_1h: Decimal | None = None,
) -> PriceTier:
    """Make a tier of dollars per million tokens; without a price of their own, cached tokens cost as much as others.

    Writes to a cache that lasts an hour cost what other writes do, unless they have a price too. Errors: MoneyError.
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
    written, read = nanousd_from_usd(cache_write), nanousd_from_usd(prompt)
    # Google's cache-write price is for storage, on top of the prompt's price (genai-prices 0.2.3, November 2026).
    return nanousd_from_usd(cache_write + prompt) if written < read else written
