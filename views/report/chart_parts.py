"""Parts that the charts share: colours, axes, scales, legends and their style.

Colours are those of Okabe and Ito, which people with any kind of colour vision can distinguish.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

import altair as alt

BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"),
    "#8c8c8c",
)
_SPARE: Final = (PURPLE, GREEN, GREY, SKY, BLUE, ORANGE, VERMILION)
INK, _FAINT, _LINE = "#1f2933", "#52606d", "#e4e7eb"
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"
_BAR_PX: Final = 22
_TWO_LINES_PX: Final = 34
_LONG_NAME: Final = 28
_HALVES: Final = (
    f"length(datum.label) > {_LONG_NAME} ? [slice(datum.label, 0, ceil(length(datum.label) / 2)), "
    "slice(datum.label, ceil(length(datum.label) / 2))] : datum.label"
)
_DOLLAR_FORMS: Final = ((0.001, "$,.6f"), (0.1, "$,.4f"), (20, "$,.2f"))

_STYLE: Final[dict[str, Any]] = {
    "font": _FONT,
    "autosize": {"type": "fit-x", "contains": "padding"},
    "padding": 4,
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK,
        "titleColor": _FAINT,
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titlePadding": 8,
        "gridColor": _LINE,
        "domainColor": "#9aa5b1",
        "tickColor": "#9aa5b1",
    },
    "legend": {
        "orient": "top",
        "labelColor": INK,
        "labelFontSize": 12,
        "symbolSize": 110,
        "symbolType": "square",
        "offset": 6,
        "padding": 0,
    },
    "text": {"fontSize": 12},
}

Row = dict[str, Any]


def bar_ends(shown: Sequence[Row], y: alt.Y) -> alt.Chart:
    """Write each row's text to the right of its `end`."""
    return alt.Chart(data(shown)).mark_text(align="left", dx=5, color=INK).encode(x="end:Q", y=y, text="text:N")


def finished(chart: alt.Chart | alt.LayerChart, *, height: int) -> alt.TopLevelMixin:
    """Give a chart its height, in pixels, and the common style."""
    return chart.properties(width="container", height=height, background="transparent", config=_STYLE)


def data(rows: Iterable[Row]) -> alt.Data:
    """Return rows as data of a chart."""
    return alt.Data(values=list(rows))


def colour(name: str, names: Sequence[str], colours: dict[str, str], *, columns: int = 6) -> alt.Color:
    """Colour by a column; names without a colour of their own get a spare one."""
    spare = iter(_SPARE * (1 + len(names) // len(_SPARE)))
    return alt.Color(
        f"{name}:N",
        scale=alt.Scale(domain=list(names), range=[colours.get(each) or next(spare) for each in names]),
        legend=alt.Legend(title=None, columns=columns),
    )


def ordered(names: Iterable[str], known: dict[str, str]) -> list[str]:
    """Return the names in the order of the palette, then unknown ones by name."""
    found = set(names)
    return [name for name in known if name in found] + sorted(found - known.keys())


def dollar_axis(most: float, **more: Any) -> alt.Axis:
    """An axis in dollars, with more decimal places if the largest amount is small."""
    form = next((form for limit, form in _DOLLAR_FORMS if most < limit), "$,.0f")
    return alt.Axis(format=form, tickCount=5, labelOverlap="greedy", labelSeparation=8, **more)


def count_axis(**more: Any) -> alt.Axis:
    """An axis of whole numbers."""
    return alt.Axis(format=",d", tickCount=5, tickMinStep=1, labelOverlap="greedy", labelSeparation=8, **more)


def names_axis(**more: Any) -> alt.Axis:
    """An axis of names; a long one, such as a UUID, takes two lines."""
    more = {"labelExpr": _HALVES, **more}
    return alt.Axis(labelLimit=190, ticks=False, domain=False, labelPadding=6, **more)


def scale_with_room(least: float, most: float, room_px: int) -> alt.Scale:
    """A scale with room for the text after the longest bar, however narrow the chart is."""
    end = f"{least} + {(most - least) or 1} * width / max(width / 8, width - {room_px})"
    return alt.Scale(domainMin=least, domainMax=alt.ExprRef(end), nice=False)


def tooltips(titles: dict[str, str]) -> list[alt.Tooltip]:
    """Show these columns under these titles."""
    return [alt.Tooltip(f"{name}:N", title=title) for name, title in titles.items()]


def height_of(rows: Sequence[object], names: Iterable[str] = ()) -> int:
    """Return the pixels that a bar for each row takes, with room for these names beside them."""
    bar_px = _BAR_PX if all(len(name) <= _LONG_NAME for name in names) else _TWO_LINES_PX
    return max(3, len(rows)) * bar_px
