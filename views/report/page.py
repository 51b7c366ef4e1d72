"""The report as one self-contained HTML file, with charts, their library, tables and style.

Its content policy forbids every request, so the file can be opened anywhere. Publishers choose the names in the ledger,
so names are escaped everywhere, also in the data of charts.
"""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from html import escape
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any, cast

import altair as alt
import pyarrow as pa
import vl_convert

from tollbook.views.files import replacing
from tollbook.views.report.figures import Figure, figures
from tollbook.views.report.queries import Answers
from tollbook.views.report.reading import Freshness
from tollbook.views.report.tables import Sheet, sheets, tiles_html
from tollbook.views.report.texts import cell


def render_page(answers: Answers, freshness: Freshness) -> str:
    """Return the report of a selection as HTML."""
    drawn = figures(answers)
    specs = {figure.name: figure.chart.to_dict() for figure in drawn if figure.chart is not None}
    return Template(_part("page.html")).substitute(
        style=style() + _part("page.css"),
        header=header_html(freshness),
        selection=escape(answers.selection.sentence),
        tiles=tiles_html(answers),
        figures="\n".join(_figure_html(figure) for figure in drawn),
        sheets="\n".join(_sheet_html(sheet) for sheet in sheets(answers)),
        # A name must not be able to close the script element.
        specs=json.dumps(specs).replace("<", "\\u003c"),
        library=_library(),
        script=_part("page.js"),
    )


def style() -> str:
    """Return the style of everything inside `.report`."""
    return _part("style.css")


def header_html(freshness: Freshness) -> str:
    """Return the title, the source of the data, and how fresh it is."""
    kind, sentence = escape(freshness.kind.value), escape(freshness.sentence)
    return (
        '<header class="report"><div class="headline" role="heading" aria-level="1">Spend report</div>'
        f'<p class="freshness"><span class="badge">{kind}</span>{sentence}</p></header>'
    )


def figure_html(figure: Figure, chart: str) -> str:
    """Return a figure's frame around its chart, or around the text of an empty figure."""
    inside = chart if figure.chart is not None else f'<div class="empty">{escape(figure.empty)}</div>'
    return (
        f'<section class="figure{" wide" if figure.is_wide else ""}" id="figure-{figure.name}">'
        f'<div class="title" role="heading" aria-level="2">{escape(figure.title)}</div>'
        f'<p class="caption">{escape(figure.caption)}</p>{inside}</section>'
    )


def _figure_html(figure: Figure) -> str:
    return figure_html(figure, f'<div class="chart" id="chart-{figure.name}"></div>')


def _sheet_html(sheet: Sheet) -> str:
    count = f"{sheet.rows.num_rows:,} row{'' if sheet.rows.num_rows == 1 else 's'}"
    inside = (
        f'<div class="tools"><input type="search" placeholder="Search" aria-label="Search {escape(sheet.title)}">'
        f'<span class="found">{count}</span><button type="button">Export CSV</button></div>'
        f'<div class="rows">{_table_html(sheet.rows)}</div>'
    )
    if sheet.rows.num_rows == 0:
        inside = f'<div class="empty">{escape(sheet.empty)}</div>'
    return f'<details class="sheet" id="{sheet.name}"><summary>{escape(sheet.title)}</summary>{inside}</details>'


def _table_html(rows: pa.Table) -> str:
    fields = cast("Iterable[Any]", rows.schema)
    marks = [
        ' class="number"' if pa.types.is_integer(field.type) or pa.types.is_decimal(field.type) else ""
        for field in fields
    ]
    heads = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(rows.column_names, marks, strict=True))
    lines = (
        "<tr>"
        + "".join(f"<td{mark}>{escape(cell(value))}</td>" for value, mark in zip(row.values(), marks, strict=True))
        + "</tr>"
        for row in rows.to_pylist()
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _library() -> str:
    """Return the charts' library. Building it takes a second or more, so it is cached between runs."""
    version = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = caches / "tollbook" / f"vega-embed-{metadata.version('vl-convert-python')}-{version}.js"
    try:
        return _checked(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        library = _checked(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version))
    with suppress(OSError):  # Without a writable home, the next run builds it again.
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as part:
            part.write_text(library, encoding="utf-8")
    return library


def _checked(library: str) -> str:
    if re.search("</script|<!--", library, re.IGNORECASE):
        raise ValueError("the charts' library would close its script element")
    return library


def _part(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
