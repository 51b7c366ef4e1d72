"""The live view as lines of text: a pure function of the figures, the size, and the order of the users.

Every line fits the width; what there is no room for is left out, users first. Red is for what needs a person, yellow
for what is worth a look, dim for what is not of now.
"""

import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Literal

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from tollbook.schemas.money import NANOUSD_PER_USD, format_usd
from tollbook.views.top.figures import (
    Figures,
    Problem,
    RateFigures,
    RedisFigures,
    SpendFigures,
    StreamFigures,
    UserFigures,
)

Order = Literal["spend", "use"]

PLAIN_WIDTH: Final = 120
"""Where there is no terminal."""

_WIDE: Final = 100
_TALL: Final = 32
_LEFT: Final = 41
_LINES_A_PROBLEM: Final = 2
_STALE_S: Final = 3.0
# The part of a cap from which on a user is worth a look.
_NEAR: Final = 0.9
_BARS: Final = " ▁▂▃▄▅▆▇█"
_GAUGE: Final = 16
_STYLES: Final = {"person": "bold red", "notice": "yellow"}


def draw(figures: Figures, *, width: int, height: int | None, order: Order = "spend", keys: str = "") -> list[Text]:
    """Return the lines, at most `height` of them, each at most `width` cells wide; `keys` says what to press."""
    airy = [Text()] if height is None or height >= _TALL else []
    lines = [
        _title(figures, width, keys),
        *_problems(figures.problems, width, height),
        Text(),
        *_side_by_side(_counts(figures), _streams(figures.redis, is_wide=width >= _WIDE), width),
        *airy,
        *_history(figures.rates, is_tall=bool(airy)),
        *airy,
        *_state(figures),
        Text(),
    ]
    foot = [*airy, _freshness(figures)]
    room = 20 if height is None else max(0, height - len(lines) - len(foot) - 1)
    lines += _users(figures.spend, order, width, room)
    if height is not None:
        lines += [Text()] * (height - len(lines) - len(foot))
        lines = lines[: max(0, height - len(foot))]
    lines += foot
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def count(number: int) -> str:
    """Write a number in seven characters at most, as far as numbers of events go."""
    return f"{number:,}" if abs(number) < 1_000_000 else f"{number / 1e6:,.2f}M"


def several(number: int, what: str, width: int = 0) -> str:
    """Write how many there are of something, the number to the right of its place."""
    return f"{count(number):>{width}} {what}{'' if number == 1 else 's'}"


def money(nanousd: int) -> str:
    """Write dollars without their sign, with as many places as eight or nine characters allow; rounded up."""
    dollars = abs(nanousd) // NANOUSD_PER_USD
    return format_usd(nanousd, places=4 if dollars < 1_000 else 2 if dollars < 100_000 else 0).replace("$", "")


def _cap(nanousd: int) -> str:
    return format_usd(nanousd, places=2 if nanousd < 100_000 * NANOUSD_PER_USD else 0).removeprefix("$")


def ago(seconds: float) -> str:
    """Write an age for people."""
    if seconds < 1:
        return "now"
    if seconds < 120:
        return f"{seconds:.0f} s ago"
    return f"{seconds / 60:,.0f} min ago" if seconds < 7200 else f"{seconds / 3600:,.0f} h ago"


def shorten(text: str, width: int) -> str:
    """Cut out the middle of a text that is wider than so many cells; both ends of an id say something."""
    text = _printable(text)
    if cell_len(text) <= width:
        return text
    if width < 3:
        return set_cell_size(text, max(0, width))
    right = (width - 1) // 2
    start = set_cell_size(text, width - 1 - right).rstrip()
    end = text[-right:]
    while cell_len(end) > right:
        end = end[1:]
    return f"{start}…{end}"


def _printable(text: str) -> str:
    """Keep what others wrote from steering the terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _right(text: str, width: int) -> str:
    return " " * max(0, width - cell_len(text)) + text


def _title(figures: Figures, width: int, keys: str) -> Text:
    clock = f"{datetime.fromtimestamp(figures.at_ms / 1000, UTC):%H:%M:%S} UTC"
    right = f"{keys}   {clock}" if keys else clock
    name = " tollbook top  "
    line = Text.assemble((name, "bold"))
    where = f"{figures.namespace} in {figures.data_dir}"
    room = max(0, width - len(name) - len(right) - 3)
    line.append(set_cell_size(shorten(where, room), room) + "  ", "dim")
    line.append(right, "dim")
    return line


def _problems(problems: Sequence[Problem], width: int, height: int | None) -> list[Text]:
    # However much is wrong, some of the figures stay on the screen.
    most = None if height is None else max(1, height // 4)
    lines: list[Text] = []
    for problem in problems:
        style = _STYLES[problem.level]
        wrapped = textwrap.wrap(
            _printable(problem.text),
            max(10, width - 4),
            max_lines=_LINES_A_PROBLEM,
            placeholder=" …",
            break_on_hyphens=False,
        )
        lines += [Text((" ! " if at == 0 else "   ") + part, style) for at, part in enumerate(wrapped)]
    return lines[:most]


def _side_by_side(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    gap = 2 if width < _WIDE else 6
    return [
        Text.assemble(one, " " * (_LEFT + 1 + gap - one.cell_len), other)
        for one, other in zip(left, right, strict=True)
    ]


def _counts(figures: Figures) -> list[Text]:
    """Draw what is counted: a rate, the sum over the window, the sum over the billing period."""
    rates, spend = figures.rates, figures.spend
    window = "60 s" if rates is None else f"{rates.window_s} s"
    period = "PERIOD" if spend is None else spend.period
    is_old = rates is None or rates.age_s > _STALE_S
    base = "dim" if is_old else ""

    def row(name: str, rate: str, latest: str, total: str, style: str = "") -> Text:
        cells = Text(f" {name:<9}")
        cells.append(f"{rate:>12}{latest:>9}", "dim" if is_old else style)
        return cells.append(f"{total:>11}")

    def number(value: int | None) -> str:
        return "-" if value is None else count(value)

    head = Text(f" {'':<9}{'RATE':>12}{window:>9}{period:>11}", "dim")
    if rates is None:
        rates_text = ("-", "-", "-", "-", "-", "-", "-")
    else:
        rates_text = (
            f"{rates.calls_per_s:,.1f}/s",
            count(rates.finished),
            f"{money(rates.nanousd_per_min)}/min",
            money(rates.cost_nanousd),
            count(rates.failed),
            count(rates.denied),
            count(rates.fallbacks),
        )
    calls_per_s, finished, per_min, cost, failed, denied, fallbacks = rates_text

    def worth_a_look(value: int | None) -> str:
        return "yellow" if value else base

    return [
        head,
        row("calls", calls_per_s, finished, number(spend and spend.calls), "bold"),
        row("money $", per_min, cost, "-" if spend is None else money(spend.spent_nanousd), "bold"),
        row("failed", "", failed, "", worth_a_look(rates and rates.failed)),
        row("denied", "", denied, number(spend and spend.denied), worth_a_look(rates and rates.denied)),
        row("fallbacks", "", fallbacks, number(spend and spend.fallbacks), worth_a_look(rates and rates.fallbacks)),
    ]


def _streams(redis: RedisFigures | None, *, is_wide: bool) -> list[Text]:
    head = Text(
        f"{'STREAM':<12}{'LENGTH':>8}{'WAITING':>8}{'PENDING':>8}{'OLDEST s' if is_wide else '':>10}".rstrip(), "dim"
    )
    if redis is None:
        return [head, Text("Redis was not seen yet", "dim"), *[Text()] * 4]
    base = "dim" if redis.age_s > _STALE_S else ""

    def row(stream: StreamFigures) -> Text:
        oldest = "-" if stream.oldest_pending_s is None else f"{stream.oldest_pending_s:,.1f}"
        waiting = "?" if stream.waiting is None else count(stream.waiting)
        text = f"{stream.name:<12}{count(stream.length):>8}{waiting:>8}{count(stream.pending):>8}"
        return Text(text + (f"{oldest:>10}" if is_wide else ""), base)

    letters = Text(f"{'dead letters':<12}{count(redis.dead_letters):>8}", "bold red" if redis.dead_letters else base)
    return [head, *map(row, redis.streams), letters]


def _history(rates: RateFigures | None, *, is_tall: bool) -> list[Text]:
    """Draw the last minute, a column a second, the newest to the right."""
    if rates is None:
        return [Text()] * (2 if is_tall else 1)
    calls, costs = rates.finished_by_second, rates.cost_by_second
    lines = [_spark("calls", calls, f"most {count(max(calls))}/s")]
    if is_tall:
        lines.append(_spark("money $", costs, f"most {money(max(costs))}/s"))
    return lines


def _spark(name: str, values: Sequence[int], most: str) -> Text:
    highest = max(1, *values)
    # Anything above zero is seen.
    marks = "".join(_BARS[-(-max(0, value) * (len(_BARS) - 1) // highest)] for value in values)
    return Text.assemble(f" {name:<8}", (f"{marks:>60}", "cyan"), f" {most}")


def _state(figures: Figures) -> list[Text]:
    redis, spend = figures.redis, figures.spend
    flight, fold = Text(" in flight "), Text(" projector ")
    if redis is not None:
        held = "" if spend is None else f" of ${money(spend.held_nanousd)}"
        flight.append(f"{several(redis.open_holds, 'hold', 7)}{held} · {several(redis.pending, 'task')} pending")
        waited = several(redis.budgets_waited_for, "budget")
        flight.append(f" · {waited} waited for", "" if redis.budgets_waited_for else "dim")
        if redis.age_s > _STALE_S:
            flight.stylize("dim")
    if spend is not None and spend.lag_events is not None:
        seconds = "" if spend.lag_s is None else f", {spend.lag_s:,.1f} s"
        fold.append(f"{several(spend.lag_events, 'event', 7)}{seconds} behind")
        fold.append(f", measured {ago(spend.age_s)}", "dim")
    elif spend is not None:
        fold.append(f"{several(spend.seq, 'event', 7)} folded")
    if redis is not None:
        workers = "?" if redis.workers is None else count(redis.workers)
        fold.append(f" · workers {workers}", "yellow" if redis.workers == 0 else "")
    return [flight, fold]


def _users(spend: SpendFigures | None, order: Order, width: int, room: int) -> list[Text]:
    """Draw the users' table: its head, and as many users as there is room for."""
    is_wide = width >= _WIDE
    columns = ["PLAN", "SPENT $", "HELD $", "CAP $", "USED %", "DENIED", *(["CALLS", "FALLBACKS"] if is_wide else [])]
    widths = [8, 10, 9, 10, 7, 8, *([9, 10] if is_wide else [])]
    gauge = _GAUGE + 2 if is_wide else 0
    name_width = max(8, width - 2 - sum(widths) - gauge)
    title = (
        "USER" if spend is None else f"USER  {count(spend.users)}, by {'spend' if order == 'spend' else 'part of cap'}"
    )
    heads = "".join(f"{name:>{size}}" for name, size in zip(columns, widths, strict=True))
    head = Text(f" {set_cell_size(shorten(title, name_width), name_width)}{heads}", "dim")
    users = () if spend is None else spend.by_spend if order == "spend" else spend.by_use
    if not users:
        return [head, Text(" no spend yet" if spend is not None else " the projection was not read yet", "dim")][
            : room + 1
        ]

    def row(user: UserFigures) -> Text:
        used = user.used
        near = "yellow" if used is not None and used >= _NEAR else ""
        cells = [
            (shorten(user.plan or "-", 7), ""),
            (money(user.spent_nanousd), ""),
            (money(user.held_nanousd), ""),
            ("-" if user.cap_nanousd is None else _cap(user.cap_nanousd), ""),
            ("-" if used is None else f"{100 * used:,.1f}", near),
            (count(user.denied), "yellow" if user.denied else ""),
            *([(count(user.calls), ""), (count(user.fallbacks), "")] if is_wide else []),
        ]
        line = Text(f" {set_cell_size(shorten(user.user_id, name_width - 1), name_width)}")
        for (cell, style), size in zip(cells, widths, strict=True):
            line.append(_right(cell, size), style)
        if gauge:
            line.append("  ").append_text(_gauge(used or 0.0, near or "cyan"))
        return line

    return [head, *map(row, users[:room])]


def _gauge(used: float, style: str) -> Text:
    filled = min(_GAUGE, max(0, round(used * _GAUGE)))
    return Text.assemble(("█" * filled, style), ("░" * (_GAUGE - filled), "dim"))


def _freshness(figures: Figures) -> Text:
    redis, rates, spend = figures.redis, figures.rates, figures.spend
    line = Text(" ")
    if redis is None or rates is None:
        line.append("Redis not seen", "dim")
    else:
        line.append(f"Redis {ago(redis.age_s)}", "yellow" if redis.age_s > _STALE_S else "dim")
        newest = rates.newest_event_s
        line.append(" · last event " + ("none" if newest is None else ago(newest + redis.age_s)), "dim")
    if spend is None:
        line.append(" · spend not read", "dim")
    elif spend.is_current and redis is not None:
        events = several(spend.newer_events, "event")
        line.append(f" · spend {ago(redis.age_s)} (copy {ago(spend.age_s).removesuffix(' ago')} + {events})", "dim")
    else:
        line.append(f" · spend {ago(spend.age_s)}", "dim" if spend.age_s <= _STALE_S else "yellow")
    return line
