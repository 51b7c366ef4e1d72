"""Windows: when the balance of a budget is reset, in the time zone of the policy.

Each moment is in exactly one day, week and month of a calendar. A window's label is part of its budgets' keys, so two
windows of one kind never share a label.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from tollbook.schemas.identifiers import Window
from tollbook.schemas.problems import did_you_mean, shown

WindowKind = Literal["day", "week", "month", "total"]
WeekStart = Literal["monday", "sunday"]
ALWAYS: Final = Window("total", 0, 2**52)
"""The window of a budget whose balance is never reset."""
_DAY: Final = timedelta(days=1)


def find_zone(name: str) -> tzinfo:
    """Return a time zone by its name, such as Europe/Berlin. Errors: ValueError, without the name of the field."""
    if name == "UTC":
        return UTC  # Also where the system has no time zone database.
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        hint = did_you_mean(name, available_timezones())
        raise ValueError(
            f"{shown(name)} is not a known time zone such as 'Europe/Berlin' (systems without a time zone database "
            f"need the package tzdata){hint}"
        ) from None


@dataclass(frozen=True, slots=True)
class Calendar:
    """The time zone in which windows begin, the first day of months (1 to 28), and that of weeks."""

    zone: tzinfo = UTC
    month_starts_on: int = 1
    week_starts_on: WeekStart = "monday"

    def window_at(self, kind: WindowKind, now_ms: int) -> Window:
        """Return the window that contains a moment, in milliseconds since the epoch."""
        match kind:
            case "day":
                return self.day_at(now_ms)
            case "week":
                return self.week_at(now_ms)
            case "month":
                return self.month_at(now_ms)
            case "total":
                return ALWAYS

    def day_at(self, now_ms: int) -> Window:
        """Return the day that contains a moment, named `YYYY-MM-DD`."""
        day = self._date(now_ms)
        return self._window(f"{day:%Y-%m-%d}", day, day + _DAY)

    def week_at(self, now_ms: int) -> Window:
        """Return the week that contains a moment, named `YYYY-Www` as ISO 8601 counts them.

        A week that begins on Sunday has the name of the ISO week that begins on the Monday after.
        """
        day = self._date(now_ms)
        shift = _DAY if self.week_starts_on == "sunday" else timedelta(0)
        monday = day + shift - timedelta(days=(day + shift).weekday())
        year, week, _ = monday.isocalendar()
        return self._window(f"{year:04}-W{week:02}", monday - shift, monday - shift + timedelta(days=7))

    def month_at(self, now_ms: int) -> Window:
        """Return the month that contains a moment, named `YYYY-MM` after its first day."""
        day = self._date(now_ms)
        first = day.replace(day=self.month_starts_on)
        if first > day:
            first = _months_later(first, -1)
        return self._window(f"{first:%Y-%m}", first, _months_later(first, 1))

    def _date(self, now_ms: int) -> date:
        return datetime.fromtimestamp(now_ms / 1000, self.zone).date()

    def _window(self, name: str, first: date, after: date) -> Window:
        return Window(name=name, start_ms=self._begin_ms(first), end_ms=self._begin_ms(after))

    def _begin_ms(self, day: date) -> int:
        """Return when a day begins. Where the clocks skip midnight, it begins when they do."""
        return round(datetime(day.year, day.month, day.day, tzinfo=self.zone).timestamp()) * 1000


def end_of_window(label: str, calendar: Calendar, now_ms: int) -> int | None:
    """Return when the window with this label ends, in milliseconds since the epoch.

    None if it is not the day, week or month that contains `now_ms`.
    """
    kinds: tuple[WindowKind, ...] = ("day", "week", "month")
    windows = (calendar.window_at(kind, now_ms) for kind in kinds)
    return next((window.end_ms for window in windows if window.name == label), None)


def intersection(name: str, windows: "list[Window]") -> Window:
    """Return the time that all windows have in common, as a window named `name`. It must not be empty."""
    return Window(name, max(each.start_ms for each in windows), min(each.end_ms for each in windows))


def _months_later(first: date, months: int) -> date:
    year, month = divmod(12 * first.year + first.month - 1 + months, 12)
    return first.replace(year=year, month=month + 1)
