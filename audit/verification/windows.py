"""Verifies windows (G11): a hold must count in the windows that its time is in, by the policy in force there.

With the label of another month or week, a call would bypass the present cap. Boundaries that a policy changes
count from its event on, as in the gate's decision. Only moments at which something was held are looked at, by the hour:
no window is shorter than that.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import duckdb

from tollbook.audit.verification.policies import AppliedPolicy
from tollbook.inference.budgets import calendar_of
from tollbook.schemas.identifiers import definition_name
from tollbook.schemas.policy import OWN_BUDGET
from tollbook.schemas.windows import Calendar, WindowKind

_HOUR_MS: Final = 3_600_000
SLACK_MS: Final = 60_000
"""How far a clock may be set back: ids of entries never go back, so an event may bear a later moment than its own."""
_HOURS: Final = """
    SELECT DISTINCT p.partition, p.seq, epoch_ms(e.recorded_at) // 3600000
    FROM (SELECT partition, seq, recorded_at FROM events WHERE type IN ('budget-reserved', 'budget-denied')) AS e
    ASOF JOIN policies AS p ON p.partition = e.partition AND p.seq < e.seq
"""

_Place = tuple[int, int]
"""Partition and number of a policy's event."""


def fill_windows(cursor: duckdb.DuckDBPyConnection, policies: Sequence[AppliedPolicy]) -> None:
    """Fill the tables that `verify_windows` needs: kinds of windows by budget, and windows. Errors: duckdb.Error."""
    readable = {(each.partition, each.seq): each for each in policies if each.policy is not None}
    hours: dict[_Place, list[int]] = {}
    for partition, seq, hour in cursor.execute(_HOURS).fetchall():
        hours.setdefault((partition, seq), []).append(hour)
    for place, each in readable.items():
        kinds = dict(_kinds(each))
        rows = [(*place, name, kind) for name, kind in kinds.items()]
        cursor.executemany("INSERT INTO verify_kinds VALUES (?, ?, ?, ?)", rows)
        assert each.policy is not None
        calendar = calendar_of(each.policy)
        found = {
            (*place, kind, *window)
            for kind in set(kinds.values())
            for window in _windows(calendar, kind, hours.get(place, ()))
        }
        if found:
            cursor.executemany("INSERT INTO verify_windows VALUES (?, ?, ?, ?, ?, ?)", sorted(found))


def _kinds(each: AppliedPolicy) -> Iterator[tuple[str, WindowKind]]:
    assert each.policy is not None
    yield OWN_BUDGET, "month"
    for rule in each.policy.budgets:
        yield definition_name(rule.name, each.definitions.get(rule.name, 1)), rule.window


def _windows(calendar: Calendar, kind: WindowKind, hours: Iterable[int]) -> set[tuple[str, int, int]]:
    """Return the windows of a kind that these hours since the epoch are in: at most two an hour."""
    found = set[tuple[str, int, int]]()
    for hour in hours:
        for ms in (hour * _HOUR_MS - SLACK_MS, (hour + 1) * _HOUR_MS - 1):
            try:
                window = calendar.window_at(kind, ms)
            except (ValueError, OverflowError, OSError):
                continue  # A moment that no calendar has: nothing held there is in a window.
            found.add((window.name, window.start_ms, window.end_ms))
    return found
