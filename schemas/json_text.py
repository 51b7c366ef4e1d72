"""JSON that people and programs write: read strictly, so that two readers never take it for two things.

A key that an object has twice is refused: each reader takes the value that it likes, one the first, another the last.
NaN and infinities are no JSON, unless the caller reads them.
"""

import json
from collections.abc import Callable, Collection
from typing import Any, Final, cast

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


def json_children(value: object) -> Collection[object]:
    """Return what stands in a list or an object."""
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list | tuple) else ()


def is_deeper(value: object, limit: int) -> bool:
    """Whether lists and objects are nested deeper than `limit` levels; counting stops just past it."""
    depth, level = 0, [value]
    while level and depth <= limit:
        depth += any(isinstance(item, dict | list | tuple) for item in level)
        level = [child for item in level for child in json_children(item)]
    return depth > limit


def whole_text(text: str) -> str:
    """Return text that UTF-8 can encode: JSON can escape half of a surrogate pair, which is replaced."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def with_whole_text(value: Any) -> Any:
    """Return a JSON value of which every text, names included, is one that UTF-8 can encode."""
    match value:
        case str():
            return whole_text(value)
        case dict():
            fields = cast("dict[Any, Any]", value).items()
            return {with_whole_text(name): with_whole_text(each) for name, each in fields}
        case list() | tuple():
            return [with_whole_text(each) for each in cast("list[Any]", value)]
        case _:
            return value


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of an object as a dictionary. Errors: RepeatedKey."""
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        raise RepeatedKey(next(key for key, _ in pairs if key in seen or seen.add(key)))
    return table


def _refuse_constant(constant: str) -> None:
    raise NotJson(f"is not JSON ({constant})")
