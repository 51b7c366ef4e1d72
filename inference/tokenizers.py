"""Counting tokens offline with OpenAI's published tokenizers: the extra `tollbook[tokenizers]`.

Invariant (G1): a count is exact, or there is none. Tokenizers split a text by the classes of its characters, and their
Unicode tables differ. So a text is counted only if each of its characters has had the same class since Unicode 3.2. For
other texts, and for models whose tokenizer is not public, the number of bytes is the bound (`bounds`).
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Final, cast

Counter = Callable[[str], int | None]
"""Counts the tokens of a text; returns None if the number is not certain."""
_SINCE: Final = unicodedata.ucd_3_2_0
_O200K: Final = "o200k_base"
_CL100K: Final = "cl100k_base"
# The models of tiktoken's table (0.12, November 2026), with or without a date at the end of the name.
_ENCODINGS: Final[tuple[tuple[str, str], ...]] = (
    (
        r"(chat)?gpt-4o(-mini)?|gpt-4\.1(-mini|-nano)?|gpt-4\.5|gpt-5(-mini|-nano)?|o1(-mini)?|o3(-mini)?|o4-mini",
        _O200K,
    ),
    (r"gpt-4(-turbo)?|gpt-3\.5-turbo|text-embedding-(3-(small|large)|ada-002)", _CL100K),
)
_PATTERNS: Final = tuple(
    (re.compile(rf"({names})(-latest|-preview|-\d{{4}}-\d{{2}}-\d{{2}})?(:(nitro|floor|exacto))?"), encoding)
    for names, encoding in _ENCODINGS
)

_loaded: Final[dict[str, Counter]] = {}


def counter_of(model: str) -> Counter | None:
    """Return the token counter of a model of OpenAI; None if its tokenizer is not public, or not loaded."""
    return _loaded.get(_encoding_of(model) or "") if _loaded else None


@lru_cache(maxsize=1_024)
def _encoding_of(model: str) -> str | None:
    return next((encoding for pattern, encoding in _PATTERNS if pattern.fullmatch(model.lower())), None)


def load_tokenizers() -> None:
    """Load the tokenizers for this process, if they are installed; takes about two seconds."""
    try:
        import quicktok  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        return
    for encoding in (_O200K, _CL100K):
        if encoding not in _loaded:
            _loaded[encoding] = _certain(cast("Any", quicktok).get_encoding(encoding).count)


def _certain(count: Callable[[str], int]) -> Counter:
    def count_certain(text: str) -> int | None:
        return count(text) if is_countable(text) else None

    return count_certain


def is_countable(text: str) -> bool:
    """Whether every tokenizer splits a text in the same way, independent of its Unicode table."""
    return text.isascii() or all(map(_has_one_class, set(text)))


@cache
def _has_one_class(character: str) -> bool:
    now, then = unicodedata.category(character), _SINCE.category(character)
    return now not in ("Cn", "Cs") and _class(now) == _class(then)


def _class(category: str) -> str:
    """Return the class that tokenizers distinguish: a kind of letter, mark, number or space, or `other`."""
    return category if category[0] in "LMNZ" else "other"
