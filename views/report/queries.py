"""The queries of a report over a copy of the projection; the statements are in sql/.

The selection is passed as parameters, never as part of a statement. Money is DECIMAL(18,9) dollars, times are
timestamps in UTC.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from tollbook.schemas.policy import default_policy

ALL: Final = "all"
"""The value that selects every period."""
NOT_NAMED: Final = "not named"
"""The value for calls without a campaign, and for spend without a plan."""
# The default plans, the smallest first; further plans follow by name.
_PLANS: Final = list(default_policy().plans)
_MAX_DENIALS: Final = 1_000
_MAX_BARS: Final = 62
_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400
_STEPS_S: Final = (
    *(1, 2, 5, 15, 30),
    *(number * _MINUTE for number in (1, 2, 5, 15, 30)),
    *(number * _HOUR for number in (1, 3, 6, 12)),
    *(number * _DAY for number in (1, 7, 28, 364)),
)


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of the ledger that a report shows; None does not restrict."""

    period: str | None = None
    plan: str | None = None
    user: str | None = None
    campaign: str | None = None

    @property
    def sentence(self) -> str:
        """The selection in words."""
        parts = [f"period {self.period}" if self.period else "all periods"]
        parts += [f"{name} {value}" for name, value in list(asdict(self).items())[1:] if value is not None]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Choices:
    """The values that can be selected: periods, the oldest first; the others by name."""

    periods: list[str]
    plans: list[str]
    users: list[str]
    campaigns: list[str]

    @property
    def newest_period(self) -> str | None:
        """The period that is shown first."""
        return self.periods[-1] if self.periods else None

    def select(self, chosen: Mapping[str, str]) -> Selection:
        """Return the selection; without a period, the newest. Errors: ValueError for a value that does not occur."""
        fields: dict[str, str | None] = {"period": self.newest_period, **chosen}
        if fields["period"] == ALL:
            fields["period"] = None
        selection = Selection(**fields)
        for name, value in asdict(selection).items():
            offered: list[str] = getattr(self, f"{name}s")
            if value is not None and value not in offered:
                raise ValueError(f"there are no events of {name} {value}{_hint(offered)}")
        return selection


@dataclass(frozen=True, slots=True)
class Answers:
    """All query results of a selection."""

    selection: Selection
    totals: dict[str, Any]
    step_s: int
    spend_over_time: pa.Table
    cap_use: pa.Table
    cap_classes: pa.Table
    budgets: pa.Table
    users: pa.Table
    campaigns: pa.Table
    models: pa.Table
    attempts: pa.Table
    fallbacks: pa.Table
    denials_over_time: pa.Table
    denials: pa.Table


def prepare(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the temporary tables for the queries. Blocks: a second for two million events."""
    connection.execute(_statement("prepare"))


def read_choices(connection: duckdb.DuckDBPyConnection) -> Choices:
    """Return the values that can be selected."""
    rows: list[tuple[str, str]] = connection.execute(_statement("choices")).fetchall()
    by_kind = ([value for kind, value in rows if kind == each] for each in ("period", "plan", "user", "campaign"))
    periods, plans, users, campaigns = by_kind
    plans.sort(key=lambda plan: (_PLANS.index(plan) if plan in _PLANS else len(_PLANS), plan))
    return Choices(periods, plans, sorted(users, key=_natural), sorted(campaigns, key=_natural))


def _natural(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sort numbers in names by value: u9 before u10."""
    parts = re.split(r"(\d+)", name)
    return name == NOT_NAMED, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def ask(connection: duckdb.DuckDBPyConnection, selection: Selection) -> Answers:
    """Run every query for a selection. Blocks."""

    def table(name: str, **more: object) -> pa.Table:
        return connection.execute(_statement(name), {**asdict(selection), **more}).to_arrow_table()

    (totals,) = table("totals").to_pylist()
    step_s = step_of(totals["first_at"], totals["last_at"])
    return Answers(
        selection,
        totals,
        step_s,
        spend_over_time=table("spend_over_time", step_s=step_s),
        cap_use=table("cap_use"),
        cap_classes=table("cap_classes"),
        budgets=table("budgets"),
        users=table("users"),
        campaigns=table("campaigns"),
        models=table("models"),
        attempts=table("attempts"),
        fallbacks=table("fallbacks"),
        denials_over_time=table("denials_over_time", step_s=step_s),
        denials=table("denials", rows=_MAX_DENIALS),
    )


def step_of(first: datetime | None, last: datetime | None) -> int:
    """Return the width of a bar in seconds: the shortest step that divides the span into at most 62 bars."""
    span = last - first if first and last else timedelta()
    return next((step for step in _STEPS_S if span.total_seconds() <= step * _MAX_BARS), _STEPS_S[-1])


def _hint(offered: list[str]) -> str:
    if not offered:
        return ""
    shown = ", ".join(offered[:5])
    return f"; there is {shown}" + (f" and {len(offered) - 5} more" if len(offered) > 5 else "")


@cache
def _statement(name: str) -> str:
    return (Path(__file__).parent / "sql" / f"{name}.sql").read_text(encoding="utf-8")
