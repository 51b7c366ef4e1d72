"""Line numbers in TOML text: the line of each table, key and list item, and of a syntax error.

tomllib does not report these. As in TOML, only a line feed ends a line; editors count in the same way. The running time
is linear in the length of the text, not quadratic.
"""

import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, cast

Place = tuple[str | int, ...]
"""Names of tables and keys, and positions in lists, outermost first."""
MAX_DEPTH: Final = 100
"""How deep tables and lists may be nested."""
# Strings and comments, which can hide brackets and line ends; brackets; line ends.
_TOKEN: Final = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}\n]', re.DOTALL
)


def read_toml(text: str) -> dict[str, Any]:
    """Read TOML text, with decimals for numbers with a point. Errors: tomllib.TOMLDecodeError."""
    try:
        return tomllib.loads(text, parse_float=Decimal)
    except RecursionError:
        raise tomllib.TOMLDecodeError("Nested too deep") from None
    except (ArithmeticError, ValueError) as exc:
        if isinstance(exc, tomllib.TOMLDecodeError):
            raise
        raise tomllib.TOMLDecodeError("Number of too many digits") from None


def lines_of(text: str) -> dict[Place, int]:
    """Return the line of each table, key and list item of TOML text: the first line of its statement.

    The text must not be nested deeper than MAX_DEPTH.
    """
    lines: dict[Place, int] = {}
    for place, line in _places_of(text):
        lines.setdefault(place, line)
    return lines


def places_in(value: object) -> Iterator[Place]:
    """Yield the place of everything inside a table or a list."""
    for name, inner in _items_of(value):
        yield (name,)
        for place in places_in(inner):
            yield (name, *place)


def syntax_problem(text: str, error: tomllib.TOMLDecodeError) -> tuple[int, str]:
    """Return the line of a syntax error, and what is wrong there."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
    if found is None:
        return _first_broken(text), _uncapitalized(str(error))
    line = int(found[2]) if found[2] else max(1, text.rstrip().count("\n") + 1)
    if found[1] == "Cannot overwrite a value":
        # tomllib reports the position after the value, which may be on a later line.
        return _first_broken(text), "this key or table is defined twice in the file"
    if found[1].startswith("Cannot declare"):
        return line, "this table is defined twice in the file"
    return line, _uncapitalized(found[1])


def line_of_depth(text: str, value: Mapping[str, Any]) -> int | None:
    """Return the line where a text is nested deeper than MAX_DEPTH, or None."""
    if not _is_deeper(value, MAX_DEPTH):
        return None
    # The depth is that of a header and a key together, so one of the two has more than half of it.
    deep = (line for line, statement, _ in _statements(text) if _is_deeper(read_toml(statement), MAX_DEPTH // 2))
    return next(deep, 1)


def _uncapitalized(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _is_deeper(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [inner for each in level for _, inner in _items_of(each)]
    return any(_items_of(each) for each in level)


def _first_broken(text: str) -> int:
    """Return the line of the first statement at whose end the text so far is no valid TOML."""
    found = list(_statements(text))
    place = bisect_left(found, True, key=lambda each: _is_broken(text[: each[2]]))
    return found[min(place, len(found) - 1)][0] if found else 1


def _is_broken(text: str) -> bool:
    try:
        read_toml(text)
    except tomllib.TOMLDecodeError:
        return True
    return False


def _statements(text: str) -> Iterator[tuple[int, str, int]]:
    """Yield the statements of TOML text: headers, and keys with their values.

    Each has the number of its first line, and the position at which it ends.
    """
    line, begin, depth = 1, 0, 0
    for token in _TOKEN.finditer(text + "\n"):
        depth = max(0, depth + {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0))
        if token[0] != "\n" or (depth and token.end() <= len(text)):
            continue
        statement = text[begin : token.end()]
        if statement.strip() and not statement.lstrip().startswith("#"):
            yield line, statement, token.end()
        line += statement.count("\n")
        begin = token.end()


def _places_of(text: str) -> Iterator[tuple[Place, int]]:
    table: Place = ()
    lengths: dict[Place, int] = {}
    for line, statement, _ in _statements(text):
        found = read_toml(statement)
        if statement.lstrip().startswith("["):
            names = _names_of_header(found)
            is_list = statement.lstrip().startswith("[[")
            table = _in_lists(names[:-1] if is_list else names, lengths)
            for length in range(1, len(table)):
                yield table[:length], line
            if is_list:
                table = (*table, names[-1])
                lengths[table] = lengths.get(table, 0) + 1
                yield table, line
                table = (*table, lengths[table] - 1)
            yield table, line
        else:
            for place in places_in(found):
                yield (*table, *place), line


def _names_of_header(found: Mapping[str, Any]) -> tuple[str, ...]:
    names: list[str] = []
    inner: object = found
    while inner:
        if isinstance(inner, list):
            inner = cast("list[object]", inner)[0]
        else:
            ((name, inner),) = cast("Mapping[str, object]", inner).items()
            names.append(name)
    return tuple(names)


def _in_lists(names: tuple[str, ...], lengths: Mapping[Place, int]) -> Place:
    """Return the place of a header: the name of a list of tables means the last table in it so far."""
    place: Place = ()
    for name in names:
        place = (*place, name)
        if place in lengths:
            place = (*place, lengths[place] - 1)
    return place


def _items_of(value: object) -> list[tuple[str | int, object]]:
    if isinstance(value, Mapping):
        return list(cast("Mapping[str | int, object]", value).items())
    return list(enumerate(cast("list[object]", value))) if isinstance(value, list) else []
