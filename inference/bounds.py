"""Upper bounds of a call's cost, computed before the call is sent.

Invariant (G1): the bound is at least the true cost, if the tokenizer makes at most one token per UTF-8 byte of the text
or of its NFKC form, plus the constants below. This holds for byte-level BPE, and for SentencePiece after normalisation
(where one character can become eighteen). Tools, schemas and other JSON count in their longest spelling. If the model's
own tokenizer is known, a text counts with its true number of tokens (`tokenizers`). Images, sounds, files and videos
count with the most tokens that the model can make of each (`media`).
"""

import collections
import json
import unicodedata
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.media import NO_LIMITS, NO_MEDIA, bound_media
from tollbook.inference.models import ModelFacts
from tollbook.inference.prices.model_price import TOKENS_PER_MTOK, ModelPrice
from tollbook.inference.tokenizers import Counter, is_countable
from tollbook.schemas.events import BoundPrice
from tollbook.schemas.messages import Message
from tollbook.schemas.money import MAX_NANOUSD
from tollbook.schemas.parameters import IMAGE_PARAMETERS, SEARCH
from tollbook.schemas.policy import ModelRule
from tollbook.schemas.routes import DEFAULT_PROVIDER, Target, named_provider

# Chat templates add a role and a few markers to a message: 3 to 5 tokens in OpenAI's and Anthropic's, up to 10 in
# Llama's. A request adds the start of the reply and, in some templates, a default system message (November 2026). Both
# constants are several times that.
TOKENS_PER_MESSAGE: Final = 32
TOKENS_PER_REQUEST: Final = 128
# Providers add their own instructions to tools and schemas: up to 735 tokens at Anthropic (November 2026).
TOKENS_FOR_TOOLS: Final = 1_536
TOKENS_PER_TOOL: Final = 64
# The price of writing a token to the cache, in percent of a prompt token's price: at Anthropic 125 for five minutes and
# 200 for an hour, elsewhere no more (November 2026).
_CACHE_WRITE_PERCENT: Final = 125
_LONG_CACHE_WRITE_PERCENT: Final = 200
_NEVER_IN_PROMPT: Final = frozenset(
    {"cache_control", "logit_bias", "prompt_cache_key", "prompt_cache_retention", "transforms"}
)
MAX_COMPLETION_TOKENS: Final = 1_000_000
# CPython sorts combining marks by insertion: a megabyte of them in bad order takes minutes (3.11, November 2026).
# Longer texts are normalised character by character; the bound is then wider by the accents in them.
MAX_NORMALISED_CHARACTERS: Final = 4_096


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that a call can cost, in nano-dollars, and how it was computed."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    prompt_nanousd_per_mtok: int
    completion_nanousd_per_mtok: int
    request_nanousd: int
    amount_nanousd: int
    endpoint_nanousd_per_mtok: int
    """The listed price of prompt tokens: no more expensive endpoint may be used. Writing to the cache costs more."""
    image_nanousd: int = 0
    """The most that one image can cost; 0 if there is none."""
    fee_nanousd: int = 0
    """What media and searches can cost beyond prompt tokens; `prompt_tokens` is raised by as many as cost the same."""
    covers_reading_files: bool = False
    """Whether the fee includes the provider's possible charge for reading each file."""
    surcharges: Mapping[str, int] = field(default_factory=dict[str, int])
    """By kind of media, how much its tokens cost above text tokens, in millionths of a nano-dollar; part of the fee."""
    prompt_basis: Literal["text", "tokenizer", "context_length"] = "text"
    """What bounds the prompt: the bytes of its texts, its tokens as counted, or the model's context length."""
    source: str = ""
    """Where the price comes from, as in `ModelPrice`."""
    provider: str = DEFAULT_PROVIDER
    """The provider that is asked."""

    @property
    def target(self) -> Target:
        """The model and its provider."""
        return Target(self.model, self.provider)

    def fee_without(self, reported: Container[str]) -> int:
        """Return the fee without the surcharges of the kinds of media that a usage reports, in nano-dollars."""
        left = [amount for kind, amount in self.surcharges.items() if kind not in reported]
        return self.fee_nanousd - _nanousd(self.surcharges.values()) + _nanousd(left)

    def as_price(self) -> BoundPrice:
        """Return the part that is written to the ledger."""
        return BoundPrice(
            model=self.model,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            prompt_nanousd_per_mtok=self.prompt_nanousd_per_mtok,
            completion_nanousd_per_mtok=self.completion_nanousd_per_mtok,
            request_nanousd=self.request_nanousd,
            prompt_basis=self.prompt_basis,
            source=self.source or None,
            provider=named_provider(self.provider),
        )


def _nanousd(millionths: Iterable[int]) -> int:
    return -(-sum(millionths) // TOKENS_PER_MTOK)


def text_tokens_at_most(text: str, count: Counter | None = None) -> int:
    """Return how many tokens a text can have at most: the true number if `count` can count it."""
    counted = None if count is None else count(text)
    if counted is not None:
        return counted
    if text.isascii():
        return len(text)
    if len(text) <= MAX_NORMALISED_CHARACTERS:
        return max(_bytes(text), _bytes(unicodedata.normalize("NFKC", text)))
    return _bytes_of_parts(text)


def _bytes(text: str) -> int:
    # A lone surrogate cannot be sent; its replacement, U+FFFD, has three bytes as well.
    return len(text.encode("utf-8", "surrogatepass"))


def _bytes_of_parts(text: str) -> int:
    """Sum the bytes of each decomposed character: at least as many as NFKC has, since composing never adds a byte."""
    return sum(
        count * max(_bytes(character), _bytes(unicodedata.normalize("NFKD", character)))
        for character, count in collections.Counter(text).items()
    )


def json_tokens_at_most(value: object) -> int:
    """Return how many tokens a JSON value can have at most, however the provider formats it in its template."""
    written = json.dumps(value, ensure_ascii=False, indent=4)
    return max(text_tokens_at_most(written), len(json.dumps(value, indent=4)))


def prompt_tokens_at_most(
    messages: Sequence[Message], parameters: Mapping[str, Any] | None = None, *, count: Counter | None = None
) -> int:
    """Return how many prompt tokens a conversation can have at most, without its images and other media.

    `count` counts tokens as the model does.
    """
    tokens = TOKENS_PER_REQUEST + sum(_message_tokens_at_most(message, count) for message in messages)
    in_prompt = {name: value for name, value in (parameters or {}).items() if _may_be_in_prompt(name, value)}
    if parameters and in_prompt:
        tokens += json_tokens_at_most(in_prompt)
        tools = (*parameters.get("tools", ()), *parameters.get("functions", ()))
        if tools or "response_format" in parameters:
            tokens += TOKENS_FOR_TOOLS + TOKENS_PER_TOOL * len(tools)
    return tokens


def _may_be_in_prompt(name: str, value: object) -> bool:
    """Whether a provider may put a parameter into the prompt; it does not put numbers and cache options there."""
    return not isinstance(value, bool | int | float) and name not in _NEVER_IN_PROMPT


def _message_tokens_at_most(message: Message, count: Counter | None) -> int:
    texts = message.texts
    # Consecutive texts may be joined, and can have more tokens together than the sum of each counted alone.
    count = count if len(texts) == 1 else None
    tokens = TOKENS_PER_MESSAGE + sum(text_tokens_at_most(text, count) for text in texts)
    structures = message.structures
    if structures:
        tokens += json_tokens_at_most(structures)
        # Arguments are JSON within JSON; a template may format them again, with spaces after punctuation.
        calls = message.tool_calls or ()
        arguments = [call.function.arguments for call in calls if call.function is not None]
        arguments += [message.function_call.arguments] if message.function_call else []
        tokens += TOKENS_PER_MESSAGE * len(calls) + sum(text_tokens_at_most(text) for text in arguments)
    return tokens


def bound(
    messages: Sequence[Message],
    max_tokens: int | None,
    price: ModelPrice,
    *,
    parameters: Mapping[str, Any] | None = None,
    facts: ModelFacts | None = None,
    limits: ModelRule = NO_LIMITS,
    count: Counter | None = None,
) -> Bound:
    """Bound the cost of one attempt: every token counts at the highest price that it can have.

    `facts` is what the provider says about the model: a prompt cannot be longer than the context length.
    Units: `max_tokens` counts completion tokens, including reasoning, as sent to the provider.
    `limits` is what the policy says about the model; `count` counts tokens as the model does.
    Errors: PriceUnknown if there is no message, `max_tokens` is not a valid limit, a message has media whose tokens
        cannot be bounded, a price is missing, or the bound is above 1,000,000 USD.
    """
    if type(max_tokens) is not int or not 1 <= max_tokens <= MAX_COMPLETION_TOKENS:
        raise PriceUnknown(f"max_tokens must be an integer from 1 to {MAX_COMPLETION_TOKENS}, got {max_tokens!r}")
    if not messages:
        raise PriceUnknown("a call needs at least one message")
    if not price.has_completion:
        raise PriceUnknown.of_model(price.model, "the price catalogue has no price for its completions")
    parameters = parameters or {}
    cache_percent = _cache_percent(messages, parameters)
    parts = [part for message in messages for part in message.media_parts]
    media = bound_media(parts, price, limits, cache_percent=cache_percent) if parts else NO_MEDIA
    prompt_tokens = prompt_tokens_at_most(messages, parameters, count=count) + media.tokens
    context_length = facts.context_length if facts is not None else None
    is_searching = SEARCH in parameters
    if IMAGE_PARAMETERS & parameters.keys() and price.image_output is None:
        raise PriceUnknown.of_model(price.model, "the policy has no image_output price for generated images")
    if is_searching:
        prompt_tokens += _search_tokens_at_most(price.model, limits, context_length)
    is_context_length = context_length is not None and context_length < prompt_tokens
    if is_context_length:
        assert context_length is not None
        prompt_tokens = context_length
    # The unused part of a prediction is billed as completion tokens.
    completion_tokens = max_tokens + (
        json_tokens_at_most(parameters["prediction"]) if "prediction" in parameters else 0
    )
    # With a reasoning budget above the limit, a model may use the reasoning budget and `max_tokens` for the answer.
    reasoning_tokens = parameters.get("reasoning", {}).get("max_tokens", 0)
    if reasoning_tokens >= max_tokens:
        completion_tokens += reasoning_tokens
    prompt_price, completion_price = price.max_prices(prompt_tokens)
    endpoint_price = price.max_prompt_price(prompt_tokens)
    prompt_price = max(prompt_price, -(-endpoint_price * cache_percent // 100))
    fee = media.images * price.image_nanousd + media.files * price.file_nanousd + _nanousd(media.surcharges.values())
    if is_searching:
        if price.search_nanousd is None:
            raise PriceUnknown.of_model(price.model, "the policy has no web_search price for it")
        fee += price.search_nanousd
    if fee and not prompt_price:
        what = "searches" if is_searching else "images" if media.images else "media"
        raise PriceUnknown.of_model(price.model, f"it bills for {what} and not for tokens; set it in TOLLBOOK_PRICES")
    # The fee is added as tokens, so that the ledger's tokens times prices give the amount.
    prompt_tokens += -(-fee * TOKENS_PER_MTOK // prompt_price) if fee else 0
    tokens_nanousd = prompt_tokens * prompt_price + completion_tokens * completion_price
    amount = -(-tokens_nanousd // TOKENS_PER_MTOK) + price.request_nanousd
    if amount > MAX_NANOUSD:
        raise _too_expensive(price.model, amount)
    return Bound(
        model=price.model,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        prompt_nanousd_per_mtok=prompt_price,
        completion_nanousd_per_mtok=completion_price,
        request_nanousd=price.request_nanousd,
        amount_nanousd=amount,
        endpoint_nanousd_per_mtok=endpoint_price,
        image_nanousd=-(-media.image_tokens * prompt_price // TOKENS_PER_MTOK)
        + (price.image_nanousd if media.images else 0),
        fee_nanousd=fee,
        covers_reading_files=price.file_nanousd > 0,
        surcharges=media.surcharges,
        prompt_basis="context_length" if is_context_length else _basis(messages, count),
        source=price.source,
    )


def _basis(messages: Sequence[Message], count: Counter | None) -> Literal["text", "tokenizer"]:
    """Return "tokenizer" if the tokenizer counted any text."""
    if count is None:
        return "text"
    texts = (message.texts for message in messages)
    return "tokenizer" if any(len(each) == 1 and is_countable(each[0]) for each in texts) else "text"


def _search_tokens_at_most(model: str, limits: ModelRule, context_length: int | None) -> int:
    """Return how many tokens the results of web searches add to a prompt at most. Errors: PriceUnknown."""
    tokens = context_length if limits.web_search_tokens is None else limits.web_search_tokens
    if tokens is None:
        raise PriceUnknown(
            f"a web search by {model} has no upper bound: set its web_search_tokens in the policy's [models]",
            {"model": model},
        )
    return tokens


def bound_embeddings(
    inputs: Sequence[str], price: ModelPrice, *, facts: ModelFacts | None = None, count: Counter | None = None
) -> Bound:
    """Bound the cost of one request for embeddings: all its tokens are prompt tokens.

    If `facts` has the context length, no input counts with more tokens.
    Errors: PriceUnknown if there is no input, or the bound is above 1,000,000 USD.
    """
    if not inputs:
        raise PriceUnknown("embeddings need at least one input")
    counts = [TOKENS_PER_MESSAGE + text_tokens_at_most(text, count) for text in inputs]
    is_counted = count is not None and any(map(is_countable, inputs))
    prompt_tokens = TOKENS_PER_REQUEST + sum(counts)
    context_length = facts.context_length if facts is not None else None
    is_context_length = context_length is not None and context_length < max(counts)
    if is_context_length:
        assert context_length is not None
        prompt_tokens = sum(min(tokens, context_length) for tokens in counts)
    prompt_price, _ = price.max_prices(prompt_tokens)
    amount = -(-prompt_tokens * prompt_price // TOKENS_PER_MTOK) + price.request_nanousd
    if amount > MAX_NANOUSD:
        raise _too_expensive(price.model, amount)
    return Bound(
        model=price.model,
        prompt_tokens=prompt_tokens,
        completion_tokens=0,
        prompt_nanousd_per_mtok=prompt_price,
        completion_nanousd_per_mtok=0,
        request_nanousd=price.request_nanousd,
        amount_nanousd=amount,
        endpoint_nanousd_per_mtok=price.max_prompt_price(prompt_tokens),
        prompt_basis="context_length" if is_context_length else "tokenizer" if is_counted else "text",
        source=price.source,
    )


def _too_expensive(model: str, amount: int) -> PriceUnknown:
    return PriceUnknown(f"a call of {model} could cost {amount} nano-dollars, more than 1,000,000 USD")


def _cache_percent(messages: Sequence[Message], parameters: Mapping[str, Any]) -> int:
    """Return the highest price of a prompt token, in percent of its listed price: writing to the cache costs more."""
    marks: list[Mapping[str, Any]] = [
        mark.model_dump(exclude_none=True) for message in messages for mark in message.cache_marks
    ]
    marks += [tool["cache_control"] for tool in parameters.get("tools", ()) if "cache_control" in tool]
    marks += [parameters["cache_control"]] if "cache_control" in parameters else []
    if not marks:
        return 100
    is_long = any(mark.get("ttl") == "1h" for mark in marks)
    return _LONG_CACHE_WRITE_PERCENT if is_long else _CACHE_WRITE_PERCENT
