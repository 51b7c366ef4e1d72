"""Upper bounds of what a call can cost, known before it is sent.

Invariant (G1): the bound is at least the true cost for every tokenizer that makes at most as many tokens as the text,
or its NFKC form, has bytes in UTF-8, plus the constants below. That is so for byte-level BPE, and for SentencePiece
after normalisation (where one character can become eighteen). Messages hold text only: no images, files or tools.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tollbook.inference.errors import PriceUnknown
from tollbook.inference.prices.model_price import TOKENS_PER_MTOK, ModelPrice
from tollbook.schemas.events import BoundPrice
from tollbook.schemas.messages import Message
from tollbook.schemas.money import MAX_NANOUSD

# Chat templates add a role and a few markers to a message: 3 to 5 tokens in OpenAI's and Anthropic's, up to 10 in
# Llama's. A request adds the start of the reply and, in some templates, a default system message (November 2026). Both
# constants are several times that.
TOKENS_PER_MESSAGE: Final = 32
TOKENS_PER_REQUEST: Final = 128
MAX_COMPLETION_TOKENS: Final = 1_000_000
# CPython sorts combining marks by insertion: a megabyte of them in bad order takes minutes (3.11, November 2026).
# Longer texts are normalised character by character; the bound is then wider by the accents in them.
MAX_NORMALISED_CHARACTERS: Final = 4_096


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that a call can cost, in nano-dollars, and how that was computed."""

    model: str
    prompt_tokens: int
    completion_tokens: int
    prompt_nanousd_per_mtok: int
    completion_nanousd_per_mtok: int
    request_nanousd: int
    amount_nanousd: int

    def as_price(self) -> BoundPrice:
        """Return the part that is written into the ledger."""
        return BoundPrice(
            model=self.model,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            prompt_nanousd_per_mtok=self.prompt_nanousd_per_mtok,
            completion_nanousd_per_mtok=self.completion_nanousd_per_mtok,
            request_nanousd=self.request_nanousd,
        )


def text_tokens_at_most(text: str) -> int:
    """Return how many tokens a text can have at most."""
    if text.isascii():
        return len(text)
    if len(text) <= MAX_NORMALISED_CHARACTERS:
        return max(_bytes(text), _bytes(unicodedata.normalize("NFKC", text)))
    return _bytes_of_parts(text)


def _bytes(text: str) -> int:
    # Lone surrogates cannot be sent as they are; what replaces one, U+FFFD, has three bytes like itself.
    return len(text.encode("utf-8", "surrogatepass"))


def _bytes_of_parts(text: str) -> int:
    """Sum the bytes of each character, decomposed: at least those of NFKC, since composing never adds a byte."""
    return sum(
        count * max(_bytes(character), _bytes(unicodedata.normalize("NFKD", character)))
        for character, count in Counter(text).items()
    )


def prompt_tokens_at_most(messages: Sequence[Message]) -> int:
    """Return how many prompt tokens a conversation can have at most."""
    texts = sum(text_tokens_at_most(message.content) for message in messages)
    return TOKENS_PER_REQUEST + TOKENS_PER_MESSAGE * len(messages) + texts


def bound(messages: Sequence[Message], max_tokens: int, price: ModelPrice, *, parameters: str = "") -> Bound:
    """Bound the cost of one attempt: every token at the highest price that it can have.

    `parameters` is the JSON of further request fields, which may become part of the prompt (`response_format`).
    Units: `max_tokens` completion tokens, reasoning included, as it is sent to the provider.
    Errors: PriceUnknown where there is no message, `max_tokens` limits nothing, or the bound passes 1,000,000 USD.
    """
    if type(max_tokens) is not int or not 1 <= max_tokens <= MAX_COMPLETION_TOKENS:
        raise PriceUnknown(f"max_tokens must be an integer from 1 to {MAX_COMPLETION_TOKENS}, got {max_tokens!r}")
    if not messages:
        raise PriceUnknown("a call needs at least one message")
    prompt_tokens = prompt_tokens_at_most(messages) + text_tokens_at_most(parameters)
    prompt_price, completion_price = price.max_prices(prompt_tokens)
    tokens_nanousd = prompt_tokens * prompt_price + max_tokens * completion_price
    amount = -(-tokens_nanousd // TOKENS_PER_MTOK) + price.request_nanousd
    if amount > MAX_NANOUSD:
        raise PriceUnknown(f"a call of {price.model} could cost {amount} nano-dollars, more than 1,000,000 USD")
    return Bound(
        model=price.model,
        prompt_tokens=prompt_tokens,
        completion_tokens=max_tokens,
        prompt_nanousd_per_mtok=prompt_price,
        completion_nanousd_per_mtok=completion_price,
        request_nanousd=price.request_nanousd,
        amount_nanousd=amount,
    )
