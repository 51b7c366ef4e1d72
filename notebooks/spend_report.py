# /// script
# [tool.marimo.display]
# theme = "light"
# ///
"""The spend report as a marimo notebook: `tollbook report` opens it as an app, `marimo edit` opens it to change it.

    marimo edit notebooks/spend_report.py
    marimo edit notebooks/spend_report.py -- --archive /backup/archive

This file only arranges the page. Reading, queries and charts are in views/report/.
"""

import marimo

app = marimo.App(width="full", app_title="Tollbook spend report")


@app.cell
def _():
    from html import escape

    import marimo as mo

    from tollbook.views.report.app import opened_source, read
    from tollbook.views.report.figures import figures
    from tollbook.views.report.page import figure_html, header_html, style
    from tollbook.views.report.queries import Selection
    from tollbook.views.report.reading import find_source
    from tollbook.views.report.tables import sheets, tiles_html
    from tollbook.views.report.texts import cell
    from tollbook.views.rows import Format, table_as_bytes

    # The latest selection. A refresh makes new selectors, and this keeps their values.
    chosen = {name: mo.query_params().get(name) for name in ("period", "plan", "user", "campaign")}
    opened = []
    return (
        Format,
        Selection,
        cell,
        chosen,
        escape,
        figure_html,
        figures,
        find_source,
        header_html,
        mo,
        opened,
        opened_source,
        read,
        sheets,
        style,
        table_as_bytes,
        tiles_html,
    )


@app.cell
async def _(find_source, mo, opened_source):
    # The command has opened a source already; a notebook on its own finds one.
    _archive = mo.cli_args().get("archive")
    source = opened_source() or await find_source(_archive or None)
    return (source,)


@app.cell
def _(mo):
    refresh = mo.ui.refresh(options=["10s", "1m", "5m"], label="Refresh")
    return (refresh,)


@app.cell
async def _(opened, read, refresh, source):
    refresh.value  # A new value means: read again.
    reading = await read(source)
    while opened:
        opened.pop().close()
    opened.append(reading)
    return (reading,)


@app.cell
def _(chosen, mo, reading):
    _choices = reading.choices

    def _dropdown(name, label, everything, offered, *, begins_with=None):
        wanted = chosen[name] or begins_with
        value = wanted if wanted in offered else everything
        return mo.ui.dropdown(
            {everything: None, **{each: each for each in offered}},
            value=value,
            label=label,
            searchable=len(offered) > 8,
        )

    selectors = mo.ui.dictionary(
        {
            "period": _dropdown(
                "period", "Period", "all", [*reversed(_choices.periods)], begins_with=_choices.newest_period
            ),
            "plan": _dropdown("plan", "Plan", "all", _choices.plans),
            "user": _dropdown("user", "User", "all", _choices.users),
            "campaign": _dropdown("campaign", "Campaign", "all", _choices.campaigns),
        }
    )
    return (selectors,)


@app.cell
def _(Selection, chosen, reading, selectors):
    selection = Selection(**selectors.value)
    chosen.update({name: value or "all" for name, value in selectors.value.items()})
    answers = reading.ask(selection)
    return (answers,)


@app.cell
def _(header_html, mo, reading, refresh, selectors, style):
    mo.vstack(
        [
            # Marimo's own margins take a quarter of a small window.
            mo.Html(
                f"<style>{style()} [class*='xl:px-24'] {{ padding-inline: clamp(8px, 2vw, 40px); }}</style>"
                f"{header_html(reading.freshness)}"
            ),
            mo.hstack([*selectors.elements.values(), refresh], justify="start", wrap=True, gap=1.25),
        ]
    )
    return


@app.cell
def _(answers, figure_html, figures, mo, tiles_html):
    _drawn = "".join(
        figure_html(figure, "" if figure.chart is None else mo.as_html(figure.chart).text)
        for figure in figures(answers)
    )
    mo.Html(f'<div class="report">{tiles_html(answers)}<div class="figures">{_drawn}</div></div>')
    return


@app.cell
def _(Format, answers, cell, escape, mo, sheets, table_as_bytes):
    def _download(sheet, form):
        return mo.download(
            lambda: table_as_bytes(sheet.rows, form), filename=f"{sheet.name}.{form.value}", label=form.value.upper()
        )

    def _shown(sheet):
        if sheet.rows.num_rows == 0:
            return mo.Html(f'<div class="report"><div class="empty">{escape(sheet.empty)}</div></div>')
        table = mo.ui.table(
            sheet.rows,
            format_mapping=dict.fromkeys(sheet.rows.column_names, cell),
            selection=None,
            page_size=10,
            show_column_summaries=False,
            show_data_types=False,
            show_download=False,
        )
        forms = (Format.CSV, Format.JSON, Format.PARQUET)
        return mo.vstack([table, mo.hstack([_download(sheet, form) for form in forms], justify="start")])

    mo.ui.tabs({sheet.title: _shown(sheet) for sheet in sheets(answers)})
    return


if __name__ == "__main__":
    app.run()
