"""Writing a policy as the text of a policy file."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, cast

from tollbook.schemas.policy import Policy

_MONEY: Final = frozenset(
    {"cap_usd", "caps", "users", "prompt", "completion", "cached", "cache_write", "request", "alerts"}
)
_BARE: Final = re.compile(r"^[A-Za-z0-9_-]+$")
_LISTS: Final = ("budgets",)


def policy_toml(policy: Policy) -> str:
    """Return a policy as text of a policy file. Reading it gives the same policy, without the receivers of alerts."""
    content = policy.content()
    lines = [f"{_key(name)} = {_value(name, value)}" for name, value in content.items() if _is_plain(name, value)]
    for name, value in content.items():
        if _is_plain(name, value):
            continue
        if name in _LISTS:
            for rule in value:
                lines += ["", f"[[{name}]]", *_entries(rule)]
        elif all(isinstance(each, Mapping) for each in value.values()) and value:
            for entry, table in value.items():
                lines += ["", f"[{name}.{_key(entry)}]", *_entries(table, keeps_empty=name == "plans")]
        elif value:
            lines += ["", f"[{name}]", *(f"{_key(entry)} = {_value(name, each)}" for entry, each in value.items())]
    return "\n".join(lines).lstrip() + "\n"


def _is_plain(name: str, value: object) -> bool:
    return not isinstance(value, Mapping) and name not in _LISTS


def _entries(table: Mapping[str, Any], *, keeps_empty: bool = False) -> list[str]:
    """Return the lines of a table. Empty lists are left out, since they are the default, except in plans."""
    found = [(name, value) for name, value in table.items() if keeps_empty or value not in ([], {})]
    return [f"{_key(name)} = {_value(name, value)}" for name, value in found]


def _key(name: str) -> str:
    return name if _BARE.match(name) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML needs it escaped, JSON does not.


def _value(field: str, value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str() if field in _MONEY:
            return value  # Amounts and fractions are numbers in the file, read as exact decimals.
        case str():
            return _text(value)
        case Mapping():
            pairs = [
                f"{_key(name)} = {_value(_inner(field, name), each)}"
                for name, each in _items(cast("Mapping[Any, Any]", value))
            ]
            return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
        case list():
            return f"[{', '.join(_value(field, each) for each in cast('list[object]', value))}]"
        case _:
            return str(value)


def _inner(field: str, name: str) -> str:
    # The entries of `params` are the provider's, so their names have no meaning here.
    return field if field in ("caps", "users", "params") else name


def _items(value: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    return list(cast("Mapping[str, Any]", value).items())
