"""The figures of a report: which charts, in which order, with which titles and captions; charts.py draws them."""

from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt

from tollbook.views.report.charts import (
    PLANS,
    REFUSALS,
    TOP,
    cap_classes,
    cap_use,
    fallback_routes,
    latency_ranges,
    over_time,
    spend_bars,
)
from tollbook.views.report.queries import NOT_NAMED, Answers
from tollbook.views.report.texts import percent, span


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with title and caption. `chart` is None if there is nothing to draw, and `empty` says why."""

    name: str
    title: str
    caption: str
    chart: alt.TopLevelMixin | None
    empty: str
    is_wide: bool = False


def figures(answers: Answers) -> list[Figure]:
    """Return all figures, in reading order."""
    a, per = answers, span(answers.step_s)
    spend, denials = a.spend_over_time.to_pylist(), a.denials_over_time.to_pylist()
    times = [row[end] for row in (*spend, *denials) for end in ("from_at", "to_at")]
    use = [row for row in a.cap_use.to_pylist() if row["used_percent"] is not None]
    campaign = a.selection.campaign is not None
    return [
        Figure(
            "spend",
            f"Spend over time, US dollars per {per}",
            "By plan, at the time of settlement; corrections are included.",
            over_time(spend, "spent_usd", "plan", PLANS, times, step_s=a.step_s, unit="US dollars") if spend else None,
            "Nothing was settled in this selection.",
            is_wide=True,
        ),
        Figure(
            "cap_use",
            "Cap use, percent of the cap",
            f"{_top(use, 'users' if a.selection.period else 'users and periods')}, highest use first."
            + (" A cap is not for one campaign: this is all spend of these users." if campaign else ""),
            cap_use(use[:TOP], with_period=a.selection.period is None) if use else None,
            "No user in this selection has a cap yet.",
        ),
        Figure(
            "cap_classes",
            "Cap use of all users, number of users",
            "By share of the cap that is used"
            + ("." if a.selection.period else "; each period of a user counts once."),
            cap_classes(a.cap_classes.to_pylist()) if use else None,
            "No user in this selection has a cap yet.",
        ),
        _models(a),
        _latencies(a),
        _campaigns(a),
        _fallback_routes(a),
        Figure(
            "denials",
            f"Denials over time, refused calls per {per}",
            "By reason: cap (it is used up), or wait_timeout (open holds left no room for too long).",
            over_time(denials, "denied", "reason", REFUSALS, times, step_s=a.step_s, unit="refused calls")
            if denials
            else None,
            "No call was denied in this selection.",
            is_wide=True,
        ),
    ]


def _models(a: Answers) -> Figure:
    rows = a.models.to_pylist()
    return Figure(
        "models",
        "Spend by model, US dollars",
        f"{_top(rows, 'models')}; a correction counts for the last model of its call.",
        spend_bars(rows[:TOP], "model") if rows else None,
        "No model was called in this selection.",
    )


def _latencies(a: Answers) -> Figure:
    rows = [row for row in a.attempts.to_pylist() if row["p50_ms"] is not None]
    return Figure(
        "latency",
        "Latency by model, milliseconds",
        "Answered attempts, logarithmic scale; 95 of 100 took at most p95.",
        latency_ranges(rows[:TOP]) if rows else None,
        "No attempt was answered in this selection.",
    )


def _campaigns(a: Answers) -> Figure:
    rows = a.campaigns.to_pylist()
    unnamed = any(row["campaign_id"] == NOT_NAMED for row in rows)
    return Figure(
        "campaigns",
        "Spend by campaign, US dollars",
        f"{_top(rows, 'campaigns')}" + (f"; “{NOT_NAMED}” is spend without a campaign." if unnamed else "."),
        spend_bars(rows[:TOP], "campaign_id") if rows else None,
        "Nothing was settled in this selection.",
    )


def _fallback_routes(a: Answers) -> Figure:
    rows, total, attempts = a.fallbacks.to_pylist(), a.totals["fallbacks"], a.totals["attempts"]
    return Figure(
        "fallbacks",
        "Fallbacks, number by reason",
        f"{total:,} after {attempts:,} attempts ({percent(total, attempts)}).",
        fallback_routes(rows) if rows else None,
        "No fallback was needed in this selection.",
    )


def _top(rows: Sequence[object], noun: str) -> str:
    return f"All {len(rows)} {noun}" if len(rows) <= TOP else f"{TOP} of {len(rows):,} {noun}"
