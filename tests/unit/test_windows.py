"""Windows of budgets: days, weeks and months in a time zone."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tollbook.schemas.windows import ALWAYS, Calendar, WeekStart, WindowKind, find_zone, intersection

# With clocks that skip midnight (Beirut, Cairo), a day that never was (Apia), a change by half an hour (Lord Howe).
ZONES = (
    "UTC", "Europe/Berlin", "America/New_York", "Asia/Beirut", "Africa/Cairo", "Pacific/Apia", "Australia/Lord_Howe",
)  # fmt: skip
MOMENTS = st.integers(0, 4_102_444_800_000)  # From 1970 to 2100.
CALENDARS = st.builds(
    Calendar, st.sampled_from(ZONES).map(find_zone), st.integers(1, 28), st.sampled_from(["monday", "sunday"])
)


def _ms(zone: str, *date: int) -> int:
    return round(datetime(*date, tzinfo=find_zone(zone)).timestamp() * 1000)  # type: ignore[arg-type, misc]


@given(CALENDARS, st.sampled_from(["day", "week", "month"]), MOMENTS)
def test_windows_contain_their_moment_and_leave_no_gap(calendar: Calendar, kind: WindowKind, now_ms: int) -> None:
    window = calendar.window_at(kind, now_ms)
    assert window.start_ms <= now_ms < window.end_ms
    assert calendar.window_at(kind, window.start_ms) == window == calendar.window_at(kind, window.end_ms - 1)
    after = calendar.window_at(kind, window.end_ms)
    assert after.start_ms == window.end_ms
    assert after.name > window.name


@pytest.mark.parametrize(
    ("starts", "moment", "name", "start", "end"),
    [
        (1, (2026, 11, 24, 7), "2026-11", (2026, 11, 1), (2026, 12, 1)),
        (1, (2027, 1, 1), "2027-01", (2027, 1, 1), (2027, 2, 1)),
        (15, (2026, 11, 14, 23, 59), "2026-10", (2026, 10, 15), (2026, 11, 15)),
        (15, (2026, 11, 15), "2026-11", (2026, 11, 15), (2026, 12, 15)),
        (28, (2027, 1, 3), "2026-12", (2026, 12, 28), (2027, 1, 28)),
        (28, (2028, 2, 29), "2028-02", (2028, 2, 28), (2028, 3, 28)),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_a_month_has_the_name_of_its_first_day(
    zone: str, starts: int, moment: tuple[int, ...], name: str, start: tuple[int, ...], end: tuple[int, ...]
) -> None:
    month = Calendar(find_zone(zone), starts).month_at(_ms(zone, *moment))
    assert (month.name, month.start_ms, month.end_ms) == (name, _ms(zone, *start), _ms(zone, *end))


@pytest.mark.parametrize(
    ("starts", "moment", "name", "start"),
    [
        ("monday", (2026, 11, 29, 23), "2026-W48", (2026, 11, 23)),
        ("monday", (2027, 1, 1), "2026-W53", (2026, 12, 28)),
        ("sunday", (2026, 11, 28, 23), "2026-W48", (2026, 11, 22)),
        ("sunday", (2026, 11, 29), "2026-W49", (2026, 11, 29)),
    ],
)
def test_a_week_has_the_name_of_its_monday(
    starts: WeekStart, moment: tuple[int, ...], name: str, start: tuple[int, ...]
) -> None:
    week = Calendar(week_starts_on=starts).week_at(_ms("UTC", *moment))
    assert (week.name, week.start_ms) == (name, _ms("UTC", *start))


def test_a_day_is_as_long_as_the_clocks_make_it() -> None:
    calendar = Calendar(find_zone("Europe/Berlin"))
    hours = [
        (day.end_ms - day.start_ms) / 3_600_000
        for day in (calendar.day_at(_ms("Europe/Berlin", 2026, *date, 12)) for date in ((3, 29), (10, 25), (11, 5)))
    ]
    assert hours == [23, 25, 24]
    assert calendar.day_at(_ms("UTC", 2026, 11, 4, 23)).name == "2026-11-05"


def test_the_sum_of_all_time_is_one_window() -> None:
    assert Calendar().window_at("total", 0) == ALWAYS == Calendar().window_at("total", 4_102_444_800_000)


def test_a_call_is_valid_while_all_its_windows_are() -> None:
    calendar = Calendar(find_zone("Europe/Berlin"))
    now_ms = _ms("Europe/Berlin", 2026, 11, 30, 12)
    shared = intersection("2026-11", [calendar.window_at(kind, now_ms) for kind in ("month", "day", "week", "total")])
    assert (shared.name, shared.start_ms, shared.end_ms) == (
        "2026-11", _ms("Europe/Berlin", 2026, 11, 30), _ms("Europe/Berlin", 2026, 12, 1),
    )  # fmt: skip


def test_a_time_zone_is_found_by_its_name() -> None:
    assert find_zone("UTC") is UTC
    assert find_zone("Europe/Berlin") == ZoneInfo("Europe/Berlin")
    for name in ("Europe/Atlantis", "", "../passwd", "/etc/passwd", "Europe"):
        with pytest.raises(ValueError, match="not a known time zone"):
            find_zone(name)
