"""The live view as lines of text: a pure function of the figures, the size, and the order of the users.

Every line fits the width; from 40 columns on, no line is cut. If there are too many lines, users are left out first.
Red needs a person, yellow is a notice, dim values are not current.
"""

from collections.abc import Sequence
from typing import Final

from rich.cells import set_cell_size
from rich.text import Text

from tollbook.schemas.identifiers import EVERYBODY
from tollbook.views.tables import percent_used, printable, utc, wrap
from tollbook.views.top.figures import (
    HISTORY_S,
    BudgetFigures,
    Figures,
    Problem,
    RateFigures,
    RedisFigures,
    StreamFigures,
)
from tollbook.views.top.formats import ago, count, money, several, shorten
from tollbook.views.top.users import Order, users_table

PLAIN_WIDTH: Final = 120
"""Where there is no terminal."""

_WIDE: Final = 100
_TALL: Final = 32
_LEFT: Final = 42
_LINES_A_PROBLEM: Final = 3
_STALE_S: Final = 3.0
_BARS: Final = " ▁▂▃▄▅▆▇█"
_STYLES: Final = {"person": "bold red", "notice": "yellow"}


def draw(figures: Figures, *, width: int, height: int | None, order: Order = "spend", keys: str = "") -> list[Text]:
    """Return at most `height` lines, each at most `width` cells wide; `keys` is the hint about keys."""
    airy = [Text()] if height is None or height >= _TALL else []
    lines = [
        _title(figures, width, keys),
        *_problems(figures.problems, width, height),
        Text(),
        *_side_by_side(_counts(figures, width), _streams(figures.redis, is_wide=width >= _WIDE), width),
        *airy,
        *_history(figures.rates, width, is_tall=bool(airy)),
        *airy,
        *(line for parts in _state(figures) for line in _flow(parts, width, hang=11)),
        Text(),
    ]
    foot = [*airy, *_flow(_freshness(figures), width)]
    room = 20 if height is None else max(0, height - len(lines) - len(foot) - 1)
    lines += users_table(figures.spend, order, width=width, room=room)
    if height is not None:
        lines += [Text()] * (height - len(lines) - len(foot))
        lines, foot = lines[: max(0, height - len(foot))], foot[:height]
    lines += foot
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def _title(figures: Figures, width: int, keys: str) -> Text:
    clock = f"{utc(figures.at_ms):%H:%M:%S} UTC"
    name = " tollbook top  "
    right = f"{keys}   {clock}" if keys else clock
    if len(name) + 2 + len(right) > width:
        right = keys or clock
    line = Text.assemble((name, "bold"))
    where = f"{figures.namespace} in {figures.data_dir}"
    room = max(0, width - len(name) - len(right) - 3)
    line.append(set_cell_size(shorten(where, room), room) + "  ", "dim")
    line.append(right, "dim")
    return line


def _problems(problems: Sequence[Problem], width: int, height: int | None) -> list[Text]:
    # However many problems there are, some figures stay on the screen.
    most = None if height is None else max(1, height // 4)
    lines: list[Text] = []
    for problem in problems:
        wrapped = wrap(printable(problem.text), max(10, width - 4))
        if len(wrapped) > _LINES_A_PROBLEM:
            wrapped = [*wrapped[: _LINES_A_PROBLEM - 1], wrapped[_LINES_A_PROBLEM - 1] + " …"]
        style = _STYLES[problem.level]
        lines += [Text((" ! " if at == 0 else "   ") + part, style) for at, part in enumerate(wrapped)]
    return lines[:most]


def _side_by_side(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    """Put two tables side by side, or one below the other on a narrow screen."""
    if width < _LEFT + 2 + max(line.cell_len for line in right):
        return [*left, *(Text(" ") + line for line in right if line)]
    gap = 2 if width < _WIDE else 6
    return [
        Text.assemble(one, " " * (_LEFT + gap - one.cell_len), other) for one, other in zip(left, right, strict=True)
    ]


def _flow(parts: Sequence[Text], width: int, *, hang: int = 1) -> list[Text]:
    """Put parts on one line with dots between them, or on more lines if they do not fit."""
    lines = [Text(" ") + parts[0]]
    for part in parts[1:]:
        if lines[-1].cell_len + 3 + part.cell_len <= width:
            lines[-1] = lines[-1] + " · " + part
        else:
            lines.append(Text(" " * hang) + part)
    return lines


def _counts(figures: Figures, width: int) -> list[Text]:
    """Draw the counts: a rate, the sum over the window, the sum over the billing period."""
    rate_width, total_width = (12, 11) if width > _LEFT else (11, 10)
    rates, spend = figures.rates, figures.spend
    window = "60 s" if rates is None else f"{rates.window_s} s"
    period = "PERIOD" if spend is None else spend.period
    is_old = rates is None or rates.age_s > _STALE_S
    base = "dim" if is_old else ""

    def row(name: str, rate: str, latest: str, total: str, style: str = "") -> Text:
        cells = Text(f" {name:<9}")
        cells.append(f"{rate:>{rate_width}}{latest:>9}", "dim" if is_old else style)
        return cells.append(f"{total:>{total_width}}")

    def number(value: int | None) -> str:
        return "-" if value is None else count(value)

    head = Text(f" {'':<9}{'RATE':>{rate_width}}{window:>9}{period:>{total_width}}", "dim")
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


def _history(rates: RateFigures | None, width: int, *, is_tall: bool) -> list[Text]:
    """Draw the last minute, one column per second, the newest at the right; fewer seconds on a narrow screen."""
    if rates is None:
        return [Text()] * (2 if is_tall else 1)
    calls, costs = rates.finished_by_second, rates.cost_by_second
    lines = [_spark("calls", calls, f"most {count(max(calls))}/s", width)]
    if is_tall:
        lines.append(_spark("money $", costs, f"most {money(max(costs))}/s", width))
    return lines


def _spark(name: str, values: Sequence[int], most: str, width: int) -> Text:
    highest = max(1, *values)
    seconds = max(1, min(HISTORY_S, width - 10 - len(most)))
    # Rounded up, so that any value above zero is visible.
    marks = "".join(_BARS[-(-max(0, value) * (len(_BARS) - 1) // highest)] for value in values[-seconds:])
    return Text.assemble(f" {name:<8}", (f"{marks:>{seconds}}", "cyan"), f" {most}")


def _state(figures: Figures) -> list[list[Text]]:
    """Return the calls in flight, the projector's progress and the budgets, each as parts of a line."""
    redis, spend = figures.redis, figures.spend
    flight, fold = [Text("in flight ")], [Text("projector ")]
    if redis is not None:
        held = "" if spend is None else f" of ${money(spend.held_nanousd)}"
        waited = several(redis.budgets_waited_for, "budget")
        flight[0].append(f"{several(redis.open_holds, 'hold', 7)}{held}")
        flight.append(Text(f"{several(redis.pending, 'task')} pending"))
        flight.append(Text(f"{waited} waited for", "" if redis.budgets_waited_for else "dim"))
        if redis.age_s > _STALE_S:
            for part in flight:
                part.stylize("dim")
    if spend is not None and spend.lag_events is not None:
        seconds = "" if spend.lag_s is None else f", {spend.lag_s:,.1f} s"
        fold[0].append(f"{several(spend.lag_events, 'event', 7)}{seconds} behind")
        fold.append(Text(f"measured {ago(spend.age_s)}", "dim"))
    elif spend is not None:
        fold[0].append(f"{several(spend.seq, 'event', 7)} folded")
    if redis is not None:
        workers = "?" if redis.workers is None else count(redis.workers)
        fold.append(Text(f"workers {workers}", "yellow" if redis.workers == 0 else ""))
    budgets = [] if spend is None else [_budget(each) for each in spend.budgets]
    if budgets:
        budgets[0] = Text("budgets   ") + budgets[0]
    return [flight, fold, *([budgets] if budgets else [])]


def _budget(budget: BudgetFigures) -> Text:
    used = percent_used(budget.spent_nanousd, budget.cap_nanousd)
    style = "yellow" if budget.spent_nanousd >= budget.cap_nanousd else ""
    value = "" if budget.value == EVERYBODY else f" {printable(budget.value)}"
    return Text(f"{printable(budget.name)}{value} {used} of ${money(budget.cap_nanousd)}", style)


def _freshness(figures: Figures) -> list[Text]:
    redis, rates, spend = figures.redis, figures.rates, figures.spend
    if redis is None or rates is None:
        parts = [Text("Redis not seen", "dim")]
    else:
        newest = rates.newest_event_s
        last_event = "none" if newest is None else ago(newest + redis.age_s)
        parts = [
            Text(f"Redis {ago(redis.age_s)}", "yellow" if redis.age_s > _STALE_S else "dim"),
            Text(f"last event {last_event}", "dim"),
        ]
    if spend is None:
        parts.append(Text("spend not read", "dim"))
    elif spend.is_current and redis is not None:
        events = several(spend.newer_events, "event")
        copy = f"copy {ago(spend.age_s).removesuffix(' ago')} + {events}"
        parts.append(Text(f"spend {ago(redis.age_s)} ({copy})", "dim"))
    else:
        parts.append(Text(f"spend {ago(spend.age_s)}", "dim" if spend.age_s <= _STALE_S else "yellow"))
    return parts
