"""The table of users on the live view."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.text import Text

from tollbook.views.tables import percent_used, printable
from tollbook.views.top.figures import SpendFigures, UserFigures
from tollbook.views.top.formats import cap_text, count, money, shorten

Order = Literal["spend", "use"]

# From this part of the cap on, a user is highlighted.
_NEAR: Final = 0.9
_GAUGE: Final = 8
_MIN_NAME: Final = 20


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    width: int
    cell: Callable[[UserFigures], str]
    is_worth_a_look: Callable[[UserFigures], bool] = lambda _: False


def _is_near(user: UserFigures) -> bool:
    return user.used is not None and user.used >= _NEAR


def _used(user: UserFigures) -> str:
    if not user.cap_nanousd:
        return "-"
    return percent_used(user.spent_nanousd, user.cap_nanousd, places=1).removesuffix("%")


def _gauge(user: UserFigures) -> str:
    filled = min(_GAUGE, max(0, int((user.used or 0.0) * _GAUGE)))
    return "█" * filled + "░" * (_GAUGE - filled)


# The columns in the order of the screen. `_FIRST` is the order in which they get room.
_COLUMNS: Final = {
    "plan": _Column("PLAN", 8, lambda user: shorten(user.plan or "-", 7)),
    "spent": _Column("SPENT $", 10, lambda user: money(user.spent_nanousd)),
    "held": _Column("HELD $", 9, lambda user: money(user.held_nanousd)),
    "cap": _Column("CAP $", 10, lambda user: "-" if user.cap_nanousd is None else cap_text(user.cap_nanousd)),
    "used": _Column("USED %", 7, _used, _is_near),
    "denied": _Column("DENIED", 8, lambda user: count(user.denied), lambda user: bool(user.denied)),
    "calls": _Column("CALLS", 9, lambda user: count(user.calls)),
    "fallbacks": _Column("FALLBACKS", 10, lambda user: count(user.fallbacks)),
    "gauge": _Column("", _GAUGE + 2, _gauge, _is_near),
}
_FIRST: Final = ("spent", "used", "cap", "denied", "plan", "held", "calls", "gauge", "fallbacks")
_NEEDED: Final = 2


def users_table(spend: SpendFigures | None, order: Order, *, width: int, room: int) -> list[Text]:
    """Draw the table: its head, and as many users as fit below it in `room` lines.

    An id is shown whole, next to as many columns as fit, or on a line of its own above them. Ids that are wider than
    the screen lose their middle, unless two of them would then look the same.
    """
    if spend is None:
        return [_head("USER", _MIN_NAME, []), Text(" the projection was not read yet", "dim")][: room + 1]
    title = f"USER  {count(spend.users)}, by {'spend' if order == 'spend' else 'part of cap'}"
    users = (spend.by_spend if order == "spend" else spend.by_use)[:room]
    if not users:
        return [_head(title, cell_len(title), []), Text(" no spend yet", "dim")][: room + 1]
    ids = [printable(user.user_id) for user in users]
    longest = max(_MIN_NAME, cell_len(title), *(size for size in map(cell_len, ids) if size < width))
    table = _wide_enough(users)
    columns = _fitting(table, width - 2 - longest)
    name_width = width - 2 - sum(column.width for column in columns)
    names = [shorten(each, name_width - 1) for each in ids]
    if len(columns) <= _NEEDED or len(set(names)) < len(set(ids)):
        return _stacked(title, users, ids, _fitting(table, width - 2), width, room)[: room + 1]
    rows = [
        Text(f" {set_cell_size(name, name_width)}") + _figures(user, columns)
        for name, user in zip(names, users, strict=True)
    ]
    return [_head(title, name_width, columns), *rows][: room + 1]


def _stacked(
    title: str,
    users: Sequence[UserFigures],
    ids: Sequence[str],
    columns: Sequence[_Column],
    width: int,
    room: int,
) -> list[Text]:
    lines = [_head(title, width - 1, []), _head("", 0, columns)]
    for user, name in zip(users, ids, strict=True):
        parts = chop_cells(name, max(2, width - 1))
        if len(lines) + len(parts) > room:
            break
        lines += [*(Text(f" {part}") for part in parts), Text(" ") + _figures(user, columns)]
    return lines


def _wide_enough(users: Sequence[UserFigures]) -> dict[str, _Column]:
    """Return the columns, each as wide as its widest figure needs: with a space before it."""
    return {
        name: replace(column, width=max(column.width, 1 + max(cell_len(column.cell(user)) for user in users)))
        for name, column in _COLUMNS.items()
    }


def _fitting(columns: Mapping[str, _Column], room: int) -> list[_Column]:
    """Return the columns that fit, in the order of the screen."""
    chosen: list[str] = []
    for name in _FIRST:
        room -= columns[name].width
        if room < 0:
            break
        chosen.append(name)
    return [column for name, column in columns.items() if name in chosen]


def _head(title: str, name_width: int, columns: Sequence[_Column]) -> Text:
    heads = "".join(f"{column.head:>{column.width}}" for column in columns)
    return Text(f" {set_cell_size(shorten(title, name_width), name_width)}{heads}", "dim")


def _figures(user: UserFigures, columns: Sequence[_Column]) -> Text:
    line = Text()
    for column in columns:
        cell = column.cell(user)
        style = "yellow" if column.is_worth_a_look(user) else ""
        line.append(" " * max(0, column.width - cell_len(cell)) + cell, style)
    return line
