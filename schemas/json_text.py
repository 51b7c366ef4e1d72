"""Strict parsing of JSON, so that two programs never read the same text differently.

An object with a repeated key is refused: some programs read the first value, others the last.
NaN and infinities are refused, unless the caller parses them.
"""

import json
from collections.abc import Callable, Collection
from typing import Any, Final, cast

_MAX_SHOWN_CHARACTERS: Final = 100


class RepeatedKey(ValueError):
    """An object has a key twice. The text names the key; the caller puts the name of the input before it."""

    def __init__(self, key: str) -> None:
        # A key with spaces, or a long one, may be a sentence of somebody's prompt (G10).
        is_name = len(key) <= _MAX_SHOWN_CHARACTERS and key.isprintable() and not any(map(str.isspace, key))
        super().__init__(f"has the key {key!r} twice" if is_name else f"has a key of {len(key)} characters twice")
        self.key = key


class NotJson(ValueError):
    """The text is not JSON. The message quotes nothing; the caller puts the name of the input before it."""


def parse_json(
    text: str | bytes,
    *,
    parse_float: Callable[[str], Any] | None = None,
    parse_int: Callable[[str], Any] | None = None,
    parse_constant: Callable[[str], Any] = lambda name: _refuse_constant(name),
) -> Any:
    """Return the value of a JSON text.

    Errors: RepeatedKey; NotJson; ValueError for a number with thousands of digits; RecursionError; errors of the given
        functions.
    """
    try:
        return json.loads(
            text,
            parse_float=parse_float,
            parse_int=parse_int,
            parse_constant=parse_constant,
            object_pairs_hook=refuse_repeated_keys,
        )
    except json.JSONDecodeError as exc:
        raise NotJson(f"is not JSON (character {exc.pos + 1})") from None
    except UnicodeDecodeError:
        raise NotJson("is not JSON (not UTF-8)") from None


def json_children(value: object) -> Collection[object]:
    """Return the values directly in a list or an object; of any other value, none."""
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list | tuple) else ()


def is_deeper(value: object, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit` levels. Deeper levels are not visited."""
    depth, level = 0, [value]
    while level and depth <= limit:
        depth += any(isinstance(item, dict | list | tuple) for item in level)
        level = [child for item in level for child in json_children(item)]
    return depth > limit


def replace_surrogates(text: str) -> str:
    """Return text that UTF-8 can encode: half of a surrogate pair, which JSON can escape, is replaced."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def replace_surrogates_in(value: Any) -> Any:
    """Return a JSON value with `replace_surrogates` applied to every text in it, names included."""
    match value:
        case str():
            return replace_surrogates(value)
        case dict():
            fields = cast("dict[Any, Any]", value).items()
            return {replace_surrogates_in(name): replace_surrogates_in(each) for name, each in fields}
        case list() | tuple():
            return [replace_surrogates_in(each) for each in cast("list[Any]", value)]
        case _:
            return value


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dictionary. Errors: RepeatedKey."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        raise RepeatedKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return table


def _refuse_constant(constant: str) -> None:
    raise NotJson(f"is not JSON ({constant})")
