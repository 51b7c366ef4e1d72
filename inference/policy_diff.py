"""The differences between two policies in plain words, for `tollbook policy diff` and `apply`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, cast

from tollbook.schemas.policy import Policy, PriceRule

# The name of one entry of each table, in the order in which the changes are shown.
_TABLES: Final = {
    "plans": "plan",
    "users": "user",
    "budgets": "budget",
    "tasks": "task type",
    "streams": "stream",
    "prices": "price of",
    "models": "limits of",
    "providers": "provider",
}
_FIELDS: Final = {
    "cap_usd": "cap",
    "max_tokens": "max_tokens",
    "week_starts_on": "first day of a week",
    "month_starts_on": "first day of a billing period",
    "timezone": "time zone",
    "default_plan": "plan of tasks that name none",
    "user_ids": "users' ids",
}
_DOLLARS: Final = frozenset({"cap_usd", "users", "caps", *PriceRule.model_fields} - {"starts"})
_PARAMS: Final = "params"
"""Its entries are the provider's parameters, so none is an amount of money, whatever its name."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: its place, and the values before and after; None means absent."""

    path: tuple[str, ...]
    before: Any
    after: Any

    @property
    def text(self) -> str:
        """The difference as a line, such as `plan trial: cap $5 -> $3`."""
        table, *rest = self.path
        if table not in _TABLES:
            return f"{_name(table)}: {_shown(table, self.before)} -> {_shown(table, self.after)}"
        subject = f"{_TABLES[table]} {rest[0]}"
        if len(rest) == 1 and self.before is None:
            return f"{subject}: new, {_shown(table, self.after)}"
        if len(rest) == 1 and self.after is None:
            return f"{subject}: removed, was {_shown(table, self.before)}"
        if len(rest) == 1:
            return f"{subject}: {_shown(table, self.before)} -> {_shown(table, self.after)}"
        field = "cap_usd" if rest[1:-1] == ["caps"] else _PARAMS if _PARAMS in rest[1:] else rest[-1]
        if rest[1:-1] == ["prices"]:
            return f"{subject}: price of {rest[-1]} {_shown('prices', self.before)} -> {_shown('prices', self.after)}"
        names = " of ".join(_name(name) for name in reversed(rest[1:]))
        return f"{subject}: {names} {_shown(field, self.before)} -> {_shown(field, self.after)}"


def policy_changes(before: Policy, after: Policy) -> list[Change]:
    """Return the differences of `after` from `before`, the plans first."""
    old, new = _content(before), _content(after)
    names = dict.fromkeys((*_TABLES, *old, *new))
    return [change for name in names for change in _changes((name,), old.get(name), new.get(name))]


def _content(policy: Policy) -> dict[str, Any]:
    content = policy.content()
    content["budgets"] = {rule["name"]: _without_name(rule) for rule in content.get("budgets", ())}
    return content


def _without_name(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rule.items() if name != "name"}


def _changes(path: tuple[str, ...], before: Any, after: Any) -> Iterator[Change]:
    if before == after:
        return
    is_table = path[0] in _TABLES and len(path) == 1
    if (isinstance(before, Mapping) and isinstance(after, Mapping)) or is_table:
        old = cast("Mapping[str, Any]", before or {})
        new = cast("Mapping[str, Any]", after or {})
        for name in dict.fromkeys((*old, *new)):
            yield from _changes((*path, name), old.get(name), new.get(name))
        return
    yield Change(path, before, after)


def _name(field: str) -> str:
    return _FIELDS.get(field, field)


def _shown(field: str, value: Any) -> str:
    match value:
        case None:
            return "none"
        case {"provider": str(provider), "model": str(model), **others} if not others:
            return f"{model} at {provider}"
        case Mapping():
            entries = cast("Mapping[str, Any]", value)
            shown = [
                f"{_name(name)} {_shown(field if field in ('caps', _PARAMS) else name, each)}"
                for name, each in entries.items()
                if each not in ([], {})
            ]
            return ", ".join(shown) or "without settings of its own"
        case list():
            items = [_shown(field, each) for each in cast("list[Any]", value)]
            if field == "by":
                return " and ".join(items) or "all together"
            return "; ".join(items) if field == "prices" else ", ".join(items) or "none"
        case str() if field in _DOLLARS:
            return f"${Decimal(value):f}"
        case str() if not value.isprintable() or not value:
            return repr(value)
        case _:
            return str(value)
