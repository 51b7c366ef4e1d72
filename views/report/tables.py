"""The tables of a report and the numbers at its top. Dollars are exact: decimals, or text from decimals."""

from dataclasses import dataclass
from html import escape

import pyarrow as pa

from tollbook.views.report.queries import Answers
from tollbook.views.report.texts import percent, thousands
from tollbook.views.tables import dollars


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table with its title; the columns are named as in docs/reference/tables.md."""

    name: str
    title: str
    rows: pa.Table
    empty: str


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the top: its label, its value as text, and a detail."""

    name: str
    label: str
    value: str
    detail: str


def sheets(answers: Answers) -> list[Sheet]:
    """Return all tables, in the order in which they are read."""
    a = answers
    nothing = "Nothing was settled in this selection."
    total, shown = a.totals["denied"], a.denials.num_rows
    newest = f", the newest {shown:,} of {total:,}" if shown < total else ""
    return [
        Sheet("users", "Users", a.users, "There are no calls in this selection."),
        Sheet("cap_use", "Caps", a.cap_use, "No user in this selection has a cap yet."),
        Sheet("budgets", "Further budgets", a.budgets, "No call in this selection was held against a further budget."),
        Sheet("spend_over_time", "Spend over time", a.spend_over_time, nothing),
        Sheet("campaigns", "Campaigns", a.campaigns, nothing),
        Sheet("models", "Models", a.models, "No model was called in this selection."),
        Sheet("attempts", "Attempts and latency", a.attempts, "No model was called in this selection."),
        Sheet("fallbacks", "Fallbacks", a.fallbacks, "No fallback was needed in this selection."),
        Sheet("denials", f"Denials{newest}", a.denials, "No call was denied in this selection."),
    ]


def tiles(answers: Answers) -> list[Tile]:
    """Return the numbers at the top."""
    t = answers.totals
    return [
        Tile("spent", "Spend, US dollars", dollars(t["spent_usd"], 2), f"exactly {dollars(t['spent_usd'], 9)}"),
        Tile("calls", "Calls", thousands(t["calls"]), f"of {_count(t['users'], 'user')}"),
        Tile("denied", "Denied calls", thousands(t["denied"]), f"of {_count(t['denied_users'], 'user')}"),
        Tile(
            "fallbacks",
            "Fallbacks",
            thousands(t["fallbacks"]),
            f"{percent(t['fallbacks'], t['attempts'])} of {_count(t['attempts'], 'attempt')}",
        ),
        Tile(
            "assumed",
            "Assumed, US dollars",
            dollars(t["assumed_usd"], 2),
            f"{percent(t['assumed_usd'], t['spent_usd'])} of the spend is not confirmed",
        ),
        Tile("held", "Held now, US dollars", dollars(t["held_usd"], 2), "by calls that are not settled yet"),
    ]


def tiles_html(answers: Answers) -> str:
    """Return the tiles as HTML."""
    cells = (
        f'<div class="tile" id="tile-{tile.name}"><div class="label">{escape(tile.label)}</div>'
        f'<div class="value">{escape(tile.value)}</div><div class="detail">{escape(tile.detail)}</div></div>'
        for tile in tiles(answers)
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
