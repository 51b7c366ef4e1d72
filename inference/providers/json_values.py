"""Reading JSON values of unknown servers: a value of the wrong type counts as an empty object or list."""

from decimal import Decimal
from typing import Any, Final, cast

MAX_DEPTH: Final = 32
"""Values that are nested deeper are left out."""
_ERROR_FIELDS: Final = ("message", "msg", "detail", "code", "type", "status", "error", "reason")
_NO_ERROR: Final = frozenset({"", "0", "200", "ok", "success", "none", "null", "false"})


def as_table(value: object) -> dict[str, Any]:
    """Return an object; an empty one for anything else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[object]:
    """Return a list; an empty one for anything else."""
    return cast(list[object], value) if isinstance(value, list) else []


def tables_of(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list, without its other values."""
    return [cast(dict[str, Any], each) for each in as_list(value) if isinstance(each, dict)]


def one_or_more(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list; a single object counts as a list of one."""
    table = as_table(value)
    return [table] if table else tables_of(value)


def first_table(value: object) -> dict[str, Any]:
    """Return an object, or the first of a list of them."""
    listed = as_list(value)
    return as_table(listed[0] if listed else value)


def single(value: object) -> dict[str, Any]:
    """Return an object, or the only item of a list; an empty object for anything else."""
    listed = as_list(value)
    return as_table(listed[0] if len(listed) == 1 else value)


def says_error(value: object, depth: int = 0) -> bool:
    """Whether the value of a field such as `error` really reports an error.

    Some gateways send this field in each reply (November 2026): an object of empty fields, code zero, a word for
    success.
    """
    if depth > MAX_DEPTH:
        return True
    if isinstance(value, dict):
        table = cast(dict[str, object], value)
        known = [table[name] for name in _ERROR_FIELDS if name in table]
        return any(says_error(each, depth + 1) for each in known or table.values())
    if isinstance(value, list):
        return any(says_error(each, depth + 1) for each in cast(list[object], value))
    if isinstance(value, str):
        return value.strip().lower() not in _NO_ERROR
    return bool(value) and value != 200


def storable(text: str) -> str:
    """Return text that UTF-8 can encode: half of a surrogate pair, which JSON can escape, is replaced."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(value: object, depth: int = 0) -> Any:
    """Return JSON values that can be stored: without Decimals, half surrogate pairs and too deep nesting."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        return int(value) if value == value.to_integral_value() and abs(value) < 10**18 else float(value)
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {storable(name): plain(each, depth + 1) for name, each in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [plain(each, depth + 1) for each in cast(list[object], value)]
    return value
