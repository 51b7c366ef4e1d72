"""JSON that people and programs write: read strictly, so that two readers never take it for two things.

A key that an object has twice is refused: each reader takes the value that it likes, one the first, another the last.
NaN and infinities are no JSON, unless the caller reads them.
"""

import json
from collections.abc import Callable
from typing import Any, Final

_MAX_SHOWN_CHARACTERS: Final = 100


class RepeatedKey(ValueError):
    """An object has a key twice. The text names the key, and follows the name of what was read."""

    def __init__(self, key: str) -> None:
        # A key with spaces, or a long one, may be a sentence of somebody's prompt (G10).
        is_name = len(key) <= _MAX_SHOWN_CHARACTERS and key.isprintable() and not any(map(str.isspace, key))
        super().__init__(f"has the key {key!r} twice" if is_name else f"has a key of {len(key)} characters twice")
        self.key = key


class NotJson(ValueError):
    """The text is not JSON. The message follows the name of what was read, and quotes nothing."""


def parse_json(
    text: str | bytes,
    *,
    parse_float: Callable[[str], Any] | None = None,
    parse_int: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] = lambda name: _refuse_constant(name),
) -> Any:
    """Return what a JSON text says.

    Errors: RepeatedKey; NotJson; ValueError for a number of thousands of digits; RecursionError; what the given
        functions raise.
    """
    try:
        return json.loads(
            text,
            parse_float=parse_float,
            parse_int=parse_int,
            parse_constant=parse_constant,
            object_pairs_hook=without_repeats,
        )
    except json.JSONDecodeError as exc:
        raise NotJson(f"is not JSON (character {exc.pos + 1})") from None
    except UnicodeDecodeError:
        raise NotJson("is not JSON (no UTF-8)") from None


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of an object as a dictionary. Errors: RepeatedKey."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        raise RepeatedKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return table


def _refuse_constant(constant: str) -> None:
    raise NotJson(f"is not JSON ({constant})")
