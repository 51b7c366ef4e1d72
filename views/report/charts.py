"""The charts: Altair over the results of queries.py. Money becomes a float only here, for drawing.

Texts (tooltips, labels at bars) come from the exact decimals. A name has the same colour in every chart.
"""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

import altair as alt

from tollbook.views.report.chart_parts import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    SKY,
    VERMILION,
    Row,
    bar_ends,
    colour,
    count_axis,
    data,
    dollar_axis,
    finished,
    height_of,
    names_axis,
    ordered,
    scale_with_room,
    tooltips,
)
from tollbook.views.report.queries import NOT_NAMED
from tollbook.views.report.texts import thousands
from tollbook.views.tables import dollars, percent_used

TOP: Final = 15
PLANS: Final = {"trial": SKY, "starter": BLUE, "growth": ORANGE, NOT_NAMED: GREY}
REFUSALS: Final = {"cap": VERMILION, "wait_timeout": ORANGE}
_FAILURES: Final = {
    "timeout": VERMILION,
    "http_error": BLUE,
    "invalid_response": ORANGE,
    "connection_error": GREEN,
}
_PERCENTILES: Final = {"p50": BLUE, "p95": ORANGE, "p99": VERMILION}
_TWO_LINES: Final = "[split(datum.label, ' → ')[0], '→ ' + split(datum.label, ' → ')[1]]"
# The width of the text after a bar: a percentage and a cap, or an amount.
_CAP_WORDS_PX, _AMOUNT_PX = 130, 75
_MINUTE_S, _HOUR_S = 60, 3_600
# The width of the widest label of an amount.
_LEFT_PX: Final = 58


def over_time(
    rows: Sequence[Row],
    value: str,
    name: str,
    colours: dict[str, str],
    times: Sequence[datetime],
    *,
    step_s: int,
    unit: str,
) -> alt.TopLevelMixin:
    """Draw stacked bars, each from the beginning to the end of its bucket; negative amounts are below zero."""
    names = ordered({row[name] for row in rows}, colours)
    stacked: list[Row] = []
    reached: dict[tuple[datetime, bool], Decimal] = defaultdict(Decimal)
    for row in sorted(rows, key=lambda row: names.index(row[name])):
        amount = Decimal(row[value])
        place = (row["from_at"], amount < 0)
        base = reached[place]
        reached[place] = base + amount
        text = dollars(amount, 9) if value.endswith("_usd") else thousands(row[value])
        stacked.append({
            "from": _utc_ms(row["from_at"]), "to": _utc_ms(row["to_at"]),
            "base": float(base), "top": float(base + amount),
            name: row[name], "text": text, "when": f"{row['from_at']:%Y-%m-%d %H:%M:%S}",
        })  # fmt: skip
    chart = alt.Chart(data(stacked)).mark_bar(stroke="white", strokeWidth=0.5)
    # The same room at the left aligns the time axes of charts that are below one another.
    room = {"minExtent": _LEFT_PX, "maxExtent": _LEFT_PX}
    most = max(abs(row["top"]) for row in stacked)
    axis = dollar_axis(most, **room) if value.endswith("_usd") else count_axis(**room)
    return finished(
        chart.encode(
            x=alt.X(
                "from:T",
                title=_time_title(times),
                scale=alt.Scale(type="utc", nice=False, domainMin=_utc_ms(min(times)), domainMax=_utc_ms(max(times))),
                axis=alt.Axis(
                    grid=False, format=_time_format(step_s), labelOverlap="greedy", labelFlush=True, tickCount=10
                ),
            ),
            x2="to:T",
            y=alt.Y("base:Q", title=unit, axis=axis),
            y2="top:Q",
            color=colour(name, names, colours),
            tooltip=tooltips({"when": "from (UTC)", name: name, "text": unit}),
        ),
        height=230,
    )


def cap_use(rows: Sequence[Row], *, with_period: bool) -> alt.TopLevelMixin:
    """Draw a bar for each user, up to what is used of the cap; the dashed line is the cap."""
    shown: list[Row] = [
        {
            "label": f"{row['user_id']} · {row['period']}" if with_period else row["user_id"],
            "used": float(row["used_percent"]),
            "plan": row["plan"] or NOT_NAMED,
            "text": f"{percent_used(row['spent_usd'], row['cap_usd'], places=1)} of {dollars(row['cap_usd'], None)}",
            "spent": dollars(row["spent_usd"], 9),
            "held": dollars(row["reserved_usd"], 9),
            "out": str(row["runs_out_on"] or "not in this period"),
            "period": row["period"],
        }
        for row in rows
    ]
    plans = ordered({row["plan"] for row in shown}, PLANS)
    most = max(100.0, *(row["used"] for row in shown))
    y = alt.Y("label:N", title=None, sort=[row["label"] for row in shown], axis=names_axis())
    bars = (
        alt.Chart(data(shown))
        .mark_bar(height={"band": 0.72})
        .encode(
            # Room for the text after the longest bar.
            x=alt.X("used:Q", title="percent of the cap", scale=scale_with_room(0, most, _CAP_WORDS_PX),
                    axis=alt.Axis(values=[0, 25, 50, 75, 100], labelOverlap="greedy")),
            y=y,
            color=colour("plan", plans, PLANS),
            tooltip=tooltips({"label": "user", "period": "period", "text": "used", "spent": "spent", "held": "held",
                           "out": "runs out on"}),
        )
    )  # fmt: skip
    ends = bar_ends([{**row, "end": max(row["used"], 100)} for row in shown], y)
    limit = alt.Chart(data([{"limit": 100}])).mark_rule(color=INK, strokeDash=[4, 3]).encode(x="limit:Q")
    return finished(alt.LayerChart(layer=[bars, limit, ends]), height=height_of(shown, (row["label"] for row in shown)))


def cap_classes(rows: Sequence[Row]) -> alt.TopLevelMixin:
    """Draw how many users have used how much of their cap; empty classes stay in their place."""
    counts = {row["from_percent"]: row["users"] for row in rows}
    shown: list[Row] = [
        {"class": f"{low}-{low + 10}" if low < 100 else "≥ 100", "users": counts.get(low, 0), "low": low}
        for low in range(0, 101, 10)
    ]
    base = alt.Chart(data(shown)).encode(
        x=alt.X(
            "class:N",
            sort=[row["class"] for row in shown],
            title="percent of the cap",
            axis=alt.Axis(labelAngle=0, labelOverlap=False, labelFontSize=10),
        ),
        y=alt.Y("users:Q", title="users", axis=count_axis()),
    )
    bars = base.mark_bar(color=BLUE).encode(tooltip=tooltips({"class": "percent of the cap", "users": "users"}))
    words = base.mark_text(dy=-7, color=INK).encode(
        text=alt.Text("users:Q", format=","), opacity=alt.condition("datum.users > 0", alt.value(1), alt.value(0))
    )
    return finished(alt.LayerChart(layer=[bars, words]), height=height_of(range(TOP)))


def spend_bars(rows: Sequence[Row], name: str) -> alt.TopLevelMixin:
    """Draw the spend of each model or campaign; `name` is the column that names it."""
    shown: list[Row] = [
        {
            "label": row[name],
            "spent": float(row["spent_usd"]),
            "text": dollars(row["spent_usd"], 2 if abs(row["spent_usd"]) >= 1 else 4),
            "exact": dollars(row["spent_usd"], 9),
        }
        for row in rows
    ]
    y = alt.Y("label:N", title=None, sort=[row["label"] for row in shown], axis=names_axis())
    most, least = max(0.0, *(row["spent"] for row in shown)), min(0.0, *(row["spent"] for row in shown))
    bars = (
        alt.Chart(data(shown))
        .mark_bar(color=BLUE, height={"band": 0.72})
        .encode(
            x=alt.X(
                "spent:Q",
                title="US dollars",
                scale=scale_with_room(least, most, _AMOUNT_PX),
                axis=dollar_axis(max(most, -least)),
            ),
            y=y,
            tooltip=tooltips({"label": name.removesuffix("_id"), "exact": "spent"}),
        )
    )
    ends = bar_ends([{**row, "end": max(row["spent"], 0)} for row in shown], y)
    return finished(alt.LayerChart(layer=[bars, ends]), height=height_of(shown, (row["label"] for row in shown)))


def fallback_routes(rows: Sequence[Row]) -> alt.TopLevelMixin:
    """Draw the fallbacks from each model to another, by reason."""
    routes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        routes[f"{_short(row['model'])} → {_short(row['to_model'])}"][row["reason"] or NOT_NAMED] += row["fallbacks"]
    order = sorted(routes, key=lambda route: -sum(routes[route].values()))[:TOP]
    reasons = ordered({reason for route in order for reason in routes[route]}, _FAILURES)
    shown: list[Row] = []
    for route in order:
        reached = 0
        for reason in reasons:
            count = routes[route].get(reason, 0)
            shown.append({"route": route, "reason": reason, "from": reached, "to": reached + count, "fallbacks": count})
            reached += count
    return finished(
        alt.Chart(data([row for row in shown if row["fallbacks"]]))
        .mark_bar(height={"band": 0.72})
        .encode(
            x=alt.X("from:Q", title="fallbacks", axis=count_axis()),
            x2="to:Q",
            y=alt.Y("route:N", title=None, sort=order, axis=names_axis(labelExpr=_TWO_LINES)),
            color=colour("reason", reasons, _FAILURES, columns=2),
            tooltip=tooltips({"route": "route", "reason": "reason", "fallbacks": "fallbacks"}),
        ),
        height=2 * height_of(order),
    )


def latency_ranges(rows: Sequence[Row]) -> alt.TopLevelMixin:
    """Draw each model's p50, p95 and p99 on a line, in milliseconds."""
    order = [row["model"] for row in rows]
    # A logarithmic axis has no zero, so less than a millisecond is drawn as one.
    shown: list[Row] = [
        {"model": row["model"], "share": name, "ms": max(1, row[f"{name}_ms"]), "text": f"{row[f'{name}_ms']:,} ms"}
        for row in rows
        for name in _PERCENTILES
    ]
    ranges = [{"model": row["model"], "from": max(1, row["p50_ms"]), "to": max(1, row["p99_ms"])} for row in rows]
    y = alt.Y("model:N", title=None, sort=order, axis=names_axis())
    x = alt.X("ms:Q", title="milliseconds", scale=alt.Scale(type="log", nice=True),
              axis=alt.Axis(tickCount=5, format=",", labelOverlap="greedy"))  # fmt: skip
    line = alt.Chart(data(ranges)).mark_rule(color="#9aa5b1", strokeWidth=3).encode(x="from:Q", x2="to:Q", y=y)
    points = (
        alt.Chart(data(shown))
        .mark_point(filled=True, size=90, opacity=1)
        .encode(
            x=x,
            y=y,
            color=colour("share", list(_PERCENTILES), _PERCENTILES),
            shape=alt.Shape(
                "share:N", scale=alt.Scale(domain=list(_PERCENTILES), range=["circle", "square", "triangle-right"])
            ),
            tooltip=tooltips({"model": "model", "share": "percentile", "text": "latency"}),
        )
    )
    return finished(alt.LayerChart(layer=[line, points]), height=height_of(order, order))


def _time_title(times: Sequence[datetime]) -> str:
    first, last = min(times), max(times)
    days = f"{first:%Y-%m-%d}" if first.date() == last.date() else f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
    return f"Time (UTC), {days}"


def _time_format(step_s: int) -> str:
    if step_s < _MINUTE_S:
        return "%H:%M:%S"
    if step_s < _HOUR_S:
        return "%H:%M"
    return "%d %b %H:%M" if step_s < _HOUR_S * 6 else "%d %b"


def _utc_ms(moment: datetime) -> int:
    return round(moment.replace(tzinfo=UTC).timestamp() * 1000)


def _short(model: str | None) -> str:
    return (model or NOT_NAMED).rpartition("/")[2]
