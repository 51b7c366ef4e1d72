"""The report's numbers are those of the documented views, whatever is chosen; it says what it reads, and how fresh."""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.ledger_maker import LedgerMaker
from tests.quick import first_quick
from tests.report_data import HOSTILE, LEDGER, load, make_archive, make_data_dir, renamed
from tollbook.inference.settings import Settings
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import create_ledger
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.snapshot import QueryCutOff
from tollbook.ledger.server.endpoint import Endpoint, write_endpoint
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.views.report.charts import TOP
from tollbook.views.report.figures import figures
from tollbook.views.report.page import render_page
from tollbook.views.report.queries import NOT_NAMED, Answers, Selection, ask, step_of
from tollbook.views.report.reading import Kind, NothingToReport, Reading, Source, find_source
from tollbook.views.report.tables import sheets, tiles

# Every kind of event in odd orders: takeovers, overages, corrections, charges from elsewhere, open holds.
ODD = LedgerMaker(3, users=6).run(1_500).entries


def settings_for(data_dir: Path, **values: Any) -> Settings:
    return Settings(_env_file=None, **{"data_dir": data_dir, "redis_url": None, **values})  # pyright: ignore[reportCallIssue]


def source_of(data_dir: Path, **values: Any) -> Source:
    return Source(str(data_dir), data_dir / "tollbook.duckdb", **values)


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reading]:
    opened = asyncio.run(source_of(make_data_dir(tmp_path_factory.mktemp("odd"), ODD)).read())
    yield opened
    opened.close()


def one(reading: Reading, sql: str) -> Any:
    row = reading.connection.execute(sql).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


def total(answers: Answers, table: str, column: str) -> Any:
    return sum((row[column] for row in getattr(answers, table).to_pylist()), Decimal())


# --- The numbers


def test_a_report_of_everything_agrees_with_the_documented_views(reading: Reading) -> None:
    a = ask(reading.connection, Selection())
    spent, calls, denied, fallbacks, held = one(
        reading,
        "SELECT sum(spent_usd), sum(calls), sum(denied), sum(fallbacks), sum(reserved_usd) FROM spend",
    )
    assert spent > 0
    assert (a.totals["spent_usd"], a.totals["held_usd"]) == (spent, held)
    assert (a.totals["denied"], a.totals["fallbacks"]) == (denied, fallbacks)
    assert a.totals["calls"] == one(reading, "SELECT sum(calls) FROM spend_by_plan") >= calls
    for table in ("spend_over_time", "users", "campaigns", "models"):
        assert total(a, table, "spent_usd") == spent, table
    assert a.step_s == 60
    days = reading.connection.execute("SELECT day, spent_usd FROM spend_by_day ORDER BY day").fetchall()
    found: dict[Any, Decimal] = {}
    for row in a.spend_over_time.to_pylist():
        found[row["from_at"].date()] = found.get(row["from_at"].date(), Decimal()) + row["spent_usd"]
    assert sorted(found.items()) == days
    for table, view, columns in (
        ("models", "spend_by_model", "model, sum(spent_usd), sum(attempts)::BIGINT"),
        ("campaigns", "spend_by_campaign", "campaign_id, sum(spent_usd), sum(calls)::BIGINT"),
    ):
        names = [column.split("(")[-1].split(")")[0] for column in columns.split(", ")]
        expected = reading.connection.execute(f"SELECT {columns} FROM {view} GROUP BY 1").fetchall()  # noqa: S608
        rows = {(row[names[0]], row[names[1]], row[names[2]]) for row in getattr(a, table).to_pylist()}
        assert rows == {(name or NOT_NAMED, money, count) for name, money, count in expected}, table
    assert {(row["model"], row["p50_ms"], row["p99_ms"]) for row in a.attempts.to_pylist() if row["p50_ms"]} == set(
        reading.connection.execute("SELECT model, p50_ms, p99_ms FROM latency_by_model").fetchall()
    )
    assert total(a, "denials_over_time", "denied") == denied


@pytest.mark.parametrize("narrowed", first_quick(1, ["period", "plan", "user", "campaign"]))
def test_the_parts_of_a_selection_add_up_to_the_whole(reading: Reading, narrowed: str) -> None:
    choices = reading.choices
    whole = ask(reading.connection, Selection())
    parts = [ask(reading.connection, Selection(**{narrowed: value})) for value in getattr(choices, f"{narrowed}s")]
    assert len(parts) > 1
    for name in ("spent_usd", "assumed_usd", "held_usd", "calls", "attempts", "failed", "fallbacks", "denied"):
        assert sum(part.totals[name] for part in parts) == whole.totals[name], name
    for part, table in product(parts, ("spend_over_time", "users", "campaigns", "models")):
        assert total(part, table, "spent_usd") == part.totals["spent_usd"], (part.selection, table)


@pytest.mark.slow
def test_cap_use_is_that_of_the_view_and_narrowed_by_who_calls(reading: Reading) -> None:
    def users(**chosen: str) -> list[tuple[Any, ...]]:
        rows = ask(reading.connection, Selection(**chosen)).cap_use.to_pylist()
        return sorted((row["user_id"], row["period"], row["used_percent"]) for row in rows)

    def expected(condition: str) -> list[tuple[Any, ...]]:
        sql = f"SELECT user_id, period, used_percent FROM cap_use AS use WHERE {condition} ORDER BY ALL"  # noqa: S608
        return reading.connection.execute(sql).fetchall()

    assert users() == expected("true")
    assert users(period="2026-10") == expected("period = '2026-10'")
    called = (
        "EXISTS (FROM calls c WHERE c.user_id = use.user_id AND c.period = use.period AND c.campaign_id = 'autumn')"
    )
    assert users(campaign="autumn") == expected(called)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["' OR 1=1 --", "%", "not named or another"])
def test_a_selection_is_a_parameter_and_never_part_of_the_statement(reading: Reading, value: str) -> None:
    for name in ("period", "plan", "user", "campaign"):
        answers = ask(reading.connection, Selection(**{name: value}))
        assert (answers.totals["spent_usd"], answers.totals["calls"], answers.totals["denied"]) == (0, 0, 0)
        with pytest.raises(ValueError, match=f"no events of {name}"):
            reading.choices.select({name: value})


@pytest.mark.parametrize(
    ("span", "step_s"),
    [
        (timedelta(0), 1),
        (timedelta(seconds=62), 1),
        (timedelta(seconds=63), 2),
        (timedelta(days=31), 12 * 3_600),
        (timedelta(days=32), 86_400),
        (timedelta(days=40_000), 364 * 86_400),
    ],
)
def test_bars_are_as_short_as_sixty_of_them_allow(span: timedelta, step_s: int) -> None:
    start = datetime(2026, 11, 1, tzinfo=UTC)
    assert step_of(start, start + span) == step_s
    assert step_of(None, None) == 1


# --- What is drawn and written


def test_an_empty_selection_says_so_everywhere(reading: Reading) -> None:
    answers = ask(reading.connection, Selection(user="nobody"))
    drawn = figures(answers)
    assert [figure.name for figure in drawn if figure.chart is not None] == []
    assert all(figure.empty for figure in drawn)
    assert all(sheet.empty and not sheet.rows.num_rows for sheet in sheets(answers))
    assert {tile.value for tile in tiles(answers)} == {"$0.00", "0"}


@pytest.mark.slow
def test_bars_are_stacked_and_corrections_are_below_zero(reading: Reading) -> None:
    answers = ask(reading.connection, Selection())
    figure = next(figure for figure in figures(answers) if figure.name == "spend")
    assert figure.chart is not None
    values = figure.chart.to_dict()["data"]["values"]
    assert sum(row["top"] - row["base"] for row in values) == pytest.approx(float(answers.totals["spent_usd"]))
    for start in {row["from"] for row in values}:
        for sign in (1, -1):
            here = [row for row in values if row["from"] == start and (row["top"] - row["base"]) * sign > 0]
            edges = sorted((abs(row["base"]), abs(row["top"])) for row in here)
            assert [low for low, _ in edges] == pytest.approx([0, *(high for _, high in edges[:-1])][: len(edges)])


@pytest.mark.slow
def test_many_users_are_cut_to_the_fullest_and_the_rest_can_be_searched(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    entries = load(2_000)
    folder = make_data_dir(tmp_path_factory.mktemp("many"), entries)
    opened = asyncio.run(source_of(folder).read())
    answers = ask(opened.connection, Selection())
    opened.close()
    figure = next(figure for figure in figures(answers) if figure.name == "cap_use")
    assert figure.chart is not None
    assert len(figure.chart.to_dict()["layer"][0]["data"]["values"]) == TOP < answers.cap_use.num_rows
    assert figure.caption.startswith(f"{TOP} of {answers.cap_use.num_rows} users")
    used = [row["used_percent"] for row in answers.cap_use.to_pylist()]
    assert used == sorted(used, reverse=True)


class Text(HTMLParser):
    """Collects the elements and the texts of a page."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_a_name_cannot_break_out_of_it(tmp_path: Path) -> None:
    entries = renamed(load(300, users=3), {"user-0001": HOSTILE, "autumn": HOSTILE})
    reading = asyncio.run(source_of(make_data_dir(tmp_path, entries)).read())
    answers = ask(reading.connection, Selection())
    page = render_page(answers, reading.freshness)
    reading.close()
    seen = Text(page)
    assert HOSTILE in answers.users["user_id"].to_pylist()
    assert HOSTILE in seen.texts  # In the tables, as text.
    assert [tag for tag, _ in seen.tags].count("script") == 3
    assert not [tag for tag, _ in seen.tags if tag in ("img", "link", "iframe", "base", "object")]
    assert not [attributes for _, attributes in seen.tags if {"src", "href"} & attributes.keys()]
    assert not re.search(r"@import|url\(", page.partition("<script")[0])
    policy = next(attributes["content"] for _, attributes in seen.tags if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    specs = json.loads(next(text for text in seen.texts if text.startswith('{"')))
    assert HOSTILE in json.dumps(specs)
    exact = {f"{row['spent_usd']:f}" for row in answers.users.to_pylist()}
    assert exact <= set(seen.texts)


@pytest.mark.slow
def test_the_charts_library_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reading = asyncio.run(source_of(make_data_dir(tmp_path, load(30, users=3))).read())
    answers = ask(reading.connection, Selection())
    page = render_page(answers, reading.freshness)
    (kept,) = (tmp_path / "cache" / "tollbook").iterdir()
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda *_: pytest.fail("it is kept"))
    assert render_page(answers, reading.freshness) == page
    # Text that could end the element is refused, wherever it comes from.
    kept.write_text("</script>", encoding="utf-8")
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda *_: "made anew")
    assert "<script>made anew</script>" in render_page(answers, reading.freshness)
    reading.close()


# --- What is read


@pytest.fixture(scope="module")
def entries() -> list[list[Any]]:
    return load(1_000)


@pytest.mark.slow
async def test_a_data_directory_at_rest_and_its_archive_give_the_same_report(
    tmp_path: Path, entries: list[Any]
) -> None:
    make_data_dir(tmp_path / "data", entries)
    make_archive(tmp_path / "elsewhere", entries)
    seen: list[int] = []
    sources = (
        await find_source(settings=settings_for(tmp_path / "data")),
        await find_source(
            tmp_path / "elsewhere", settings=settings_for(tmp_path / "none"), progress=lambda done, _: seen.append(done)
        ),
    )
    answers: list[Answers] = []
    for source, kind in zip(sources, (Kind.AT_REST, Kind.ARCHIVE), strict=True):
        reading = await source.read()
        fresh = reading.freshness
        assert (fresh.kind, fresh.events, fresh.behind_events) == (kind, len(entries), None)
        assert fresh.newest_at == datetime.fromtimestamp(int(entries[-1][0].split(b"-")[0]) / 1000, UTC)
        assert f"number {len(entries):,}" in fresh.sentence
        assert f"{fresh.newest_at:%Y-%m-%d %H:%M:%S} UTC" in fresh.sentence
        answers.append(ask(reading.connection, Selection()))
        reading.close()
    assert seen[-1] == len(entries)
    for each in fields(Answers):
        first, second = (getattr(answer, each.name) for answer in answers)
        assert first == second, each.name
    folder = sources[1].projection.parent
    assert folder.exists()
    sources[1].close()
    assert not folder.exists()


@pytest.mark.slow
async def test_beside_a_ledger_that_answers_it_says_how_far_behind_it_is(
    tmp_path: Path, redis_client: Redis, server_url: str, entries: list[Any]
) -> None:
    folded = len(entries) - 7
    make_data_dir(tmp_path, entries[:folded])
    keys, pipeline = Keys(), CommandPipeline(redis_client)
    await load_library(redis_client)
    await create_ledger(pipeline, keys, ledger_id=LEDGER, partitions=1)
    pipe = redis_client.pipeline(transaction=False)
    for entry_id, row in entries:
        pipe.execute_command("XADD", keys.ledger, entry_id, *row)
    await pipe.execute()
    # Events that are archived and trimmed still belong to the ledger.
    await redis_client.execute_command("XTRIM", keys.ledger, "MAXLEN", "=", 100)
    await redis_client.execute_command("HSET", keys.meta, "removed", len(entries) - 100)

    async def freshness(source: Source) -> Any:
        reading = await source.read()
        reading.close()
        return reading.freshness

    source = source_of(tmp_path, redis_url=server_url)
    fresh = await freshness(source)
    assert (fresh.kind, fresh.events, fresh.behind_events) == (Kind.LIVE, folded, 7)
    assert fresh.behind_s > 0
    assert "Behind the ledger: 7 events" in fresh.sentence
    make_data_dir(tmp_path, [])
    (tmp_path / "tollbook.duckdb").unlink()
    make_data_dir(tmp_path, entries)
    assert "Nothing is behind the ledger" in (await freshness(source)).sentence
    # The system is found as other commands find it, and it may start and end while the report is open.
    found = source_of(tmp_path)
    assert (await freshness(found)).kind is Kind.AT_REST
    write_endpoint(
        tmp_path, Endpoint(redis_url=server_url, namespace="tollbook", pid=os.getpid(), started_at=datetime.now(UTC))
    )
    assert (await freshness(found)).kind is Kind.LIVE
    # Another ledger's numbers say nothing about this one.
    await redis_client.execute_command("HSET", keys.meta, "ledger_id", "another")
    assert (await freshness(source)).kind is Kind.AT_REST
    await redis_client.flushall()
    assert (await freshness(source)).kind is Kind.AT_REST
    await pipeline.aclose()


@pytest.mark.slow
async def test_without_a_projection_the_data_directorys_own_archive_is_read(tmp_path: Path, entries: list[Any]) -> None:
    make_archive(tmp_path / "data" / "archive", entries[:500])
    source = await find_source(settings=settings_for(tmp_path / "data"))
    assert (source.place, source.folder is not None) == (str(tmp_path / "data" / "archive"), True)
    source.close()


@pytest.mark.slow
async def test_a_kept_demo_is_found_only_where_nothing_else_is_set_or_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    by_default = Settings(_env_file=None)  # pyright: ignore[reportCallIssue]
    with pytest.raises(NothingToReport, match="no data in data/ to report:"):
        await find_source(settings=by_default)
    make_data_dir(tmp_path / "tollbook-demo", entries[:100])
    assert (await find_source(settings=by_default)).place == "tollbook-demo"
    with pytest.raises(NothingToReport, match="no data in other/ to report:"):
        await find_source(settings=settings_for(Path("other")))
    make_data_dir(tmp_path / "data", entries[:100])
    assert (await find_source(settings=by_default)).place == "data"


def test_a_selection_describes_itself() -> None:
    assert asdict(Selection("2026-11", user="u")) == {
        "period": "2026-11", "plan": None, "user": "u", "campaign": None,
    }  # fmt: skip
    assert Selection("2026-11", user="u").sentence == "period 2026-11, user u"
    assert Selection().sentence == "all periods"


def test_calls_are_those_of_the_documented_view(reading: Reading) -> None:
    columns = "partition, call_id, user_id, period, plan, campaign_id"
    sql = (
        f"SELECT {columns}, reserved_at IS NOT NULL OR settled_at IS NOT NULL FROM calls "  # noqa: S608
        f"EXCEPT ALL SELECT {columns}, is_made FROM report_calls"
    )
    assert reading.connection.execute(sql).fetchall() == []
    assert one(reading, "SELECT (SELECT count(*) FROM calls) - (SELECT count(*) FROM report_calls)") == 0


async def test_a_report_without_memory_names_limit_and_setting(tmp_path: Path) -> None:
    folder = make_data_dir(tmp_path, load(300, users=3))
    for limit in ("1MB", "4MB"):
        with pytest.raises(QueryCutOff, match=f"its limit is {limit}: raise TOLLBOOK_REPORT_MEMORY"):
            (await source_of(folder, memory=limit).read()).ask(Selection(period="2026-11"))
    source = await find_source(settings=settings_for(folder, report_memory="512MB"))
    assert source.memory == "512MB"
