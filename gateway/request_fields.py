"""Reads the fields of a request's JSON. Each refusal names the field, and never quotes a prompt (G10)."""

from collections.abc import Collection, Mapping
from typing import Any, Final, cast

from tollbook.schemas.json_text import is_deeper
from tollbook.schemas.problems import shown
from tollbook.schemas.tasks import InvalidTask

# A schema may have 64 levels, and is nested in a tool, in a list, in the body.
_MAX_DEPTH: Final = 72
Table = dict[str, Any]


def refusal(path: str, why: str) -> InvalidTask:
    """Return the error that refuses a field."""
    return InvalidTask(f"'{path}' {why}")


def body_of(value: object) -> Table:
    """Return a request's body without its null fields. Errors: InvalidTask."""
    if not isinstance(value, Mapping):
        raise InvalidTask("the body must be a JSON object")
    body = _without_nulls(cast("Mapping[str, Any]", value))
    if is_deeper(body, _MAX_DEPTH):
        raise InvalidTask(f"the body must not be nested deeper than {_MAX_DEPTH} levels")
    return body


def table_at(value: object, path: str) -> Table:
    """Return a JSON object without its null fields. Errors: InvalidTask."""
    if not isinstance(value, Mapping):
        raise refusal(path, "must be a JSON object")
    return _without_nulls(cast("Mapping[str, Any]", value))


def list_at(value: object, path: str) -> list[object]:
    """Return a list. Errors: InvalidTask."""
    if not isinstance(value, list | tuple):
        raise refusal(path, "must be a list")
    return list(cast("list[object]", value))


def text_at(value: object, path: str) -> str:
    """Return a text. Errors: InvalidTask."""
    if not isinstance(value, str):
        raise refusal(path, "is missing" if value is None else "must be text")
    return value


def word_at(value: object, path: str, words: Collection[str]) -> str:
    """Return one of these words. Errors: InvalidTask."""
    if not isinstance(value, str) or value not in words:
        given = "is missing" if value is None else f"is {shown(value)}"
        raise refusal(path, f"{given}: it must be one of {', '.join(map(repr, sorted(words)))}")
    return value


def kind_of(table: Mapping[str, Any], path: str, default: str | None = None) -> str:
    """Return the `type` of an object. Errors: InvalidTask."""
    return text_at(table.get("type", default), f"{path}.type")


def refuse_fields(
    body: Mapping[str, Any], reasons: Mapping[str, str], neutral: Mapping[str, tuple[object, ...]]
) -> None:
    """Refuse fields that cannot be translated, unless their value changes nothing. Errors: InvalidTask."""
    for name, why in reasons.items():
        value = body.get(name)
        # In Python, False equals 0.
        is_neutral = any(type(value) is type(each) and value == each for each in neutral.get(name, ()))
        if value is not None and not is_neutral:
            raise refusal(name, f"cannot be set: {why}")


def _without_nulls(table: Mapping[str, Any]) -> Table:
    return {name: value for name, value in table.items() if value is not None}
