"""Values that a JSON Schema of the gateway's OpenAPI document allows, drawn by hypothesis.

It knows the keywords that the document uses; any other fails, so that none is ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from hypothesis import strategies as st

ANYTHING: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
_TOLD: Final = frozenset({"title", "description", "default", "examples", "discriminator"})
_MAX_ITEMS: Final = 3
_MAX_CHARACTERS: Final = 40
# Below this depth, optional fields are left out: messages hold parts, and parts hold objects.
_DEEP: Final = 6
Schema = Mapping[str, Any]


def values(schema: Schema, schemas: Mapping[str, Schema], depth: int = 0) -> st.SearchStrategy[Any]:
    """Return what a schema allows; `schemas` are those that it may refer to. Errors: KeyError for an unknown word."""
    words = {name: value for name, value in schema.items() if name not in _TOLD}
    if "$ref" in words:
        return values(schemas[words["$ref"].rpartition("/")[2]], schemas, depth)
    if "const" in words:
        return st.just(words["const"])
    if "enum" in words:
        return st.sampled_from(words["enum"])
    for name in ("anyOf", "oneOf"):
        if name in words:
            return st.one_of([values(each, schemas, depth) for each in words[name]])
    kind = words.pop("type", None)
    if kind is None:
        return ANYTHING
    if isinstance(kind, list):
        return st.one_of([values({**words, "type": each}, schemas, depth) for each in kind])
    return _KINDS[kind](words, schemas, depth)


def _objects(words: dict[str, Any], schemas: Mapping[str, Schema], depth: int) -> st.SearchStrategy[Any]:
    properties, required = words.pop("properties", None), set(words.pop("required", ()))
    further = words.pop("additionalProperties", True)
    _refuse(words, "minProperties", "maxProperties")
    if properties is None:
        inner = values(further, schemas, depth + 1) if isinstance(further, Mapping) else ANYTHING
        return st.dictionaries(st.text(max_size=10), inner, max_size=_MAX_ITEMS)
    wanted = properties if depth < _DEEP else required & properties.keys()
    drawn = {name: values(properties[name], schemas, depth + 1) for name in wanted}
    optional = {name: each for name, each in drawn.items() if name not in required}
    return st.fixed_dictionaries({name: drawn[name] for name in required}, optional=optional)


def _lists(words: dict[str, Any], schemas: Mapping[str, Schema], depth: int) -> st.SearchStrategy[Any]:
    items, least = words.pop("items", {}), words.pop("minItems", 0)
    most = min(words.pop("maxItems", _MAX_ITEMS), max(_MAX_ITEMS, least))
    _refuse(words)
    return st.lists(values(items, schemas, depth + 1), min_size=least, max_size=most)


def _texts(words: dict[str, Any], _schemas: Mapping[str, Schema], _depth: int) -> st.SearchStrategy[Any]:
    least, most = words.pop("minLength", 0), words.pop("maxLength", _MAX_CHARACTERS)
    pattern = words.pop("pattern", None)
    _refuse(words)
    if pattern is not None:
        return st.from_regex(pattern, fullmatch=True).filter(lambda text: least <= len(text) <= most)
    return st.text(min_size=least, max_size=min(most, max(least, _MAX_CHARACTERS)))


def _numbers(words: dict[str, Any], *, is_whole: bool) -> st.SearchStrategy[Any]:
    least, most = words.pop("minimum", None), words.pop("maximum", None)
    above, below = words.pop("exclusiveMinimum", None), words.pop("exclusiveMaximum", None)
    _refuse(words)
    if is_whole:
        return st.integers(least if above is None else above + 1, most if below is None else below - 1)
    return st.floats(
        least if above is None else above, most if below is None else below,
        exclude_min=above is not None, exclude_max=below is not None, allow_nan=False, allow_infinity=False,
    )  # fmt: skip


def _refuse(words: Mapping[str, Any], *passed_over: str) -> None:
    if unknown := words.keys() - set(passed_over):
        raise KeyError(f"words of a schema that are not drawn by: {', '.join(sorted(unknown))}")


_KINDS: Final[dict[str, Callable[[dict[str, Any], Mapping[str, Schema], int], st.SearchStrategy[Any]]]] = {
    "object": _objects,
    "array": _lists,
    "string": _texts,
    "integer": lambda words, _schemas, _depth: _numbers(words, is_whole=True),
    "number": lambda words, _schemas, _depth: _numbers(words, is_whole=False),
    "boolean": lambda _words, _schemas, _depth: st.booleans(),
    "null": lambda _words, _schemas, _depth: st.none(),
}
