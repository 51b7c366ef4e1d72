"""The live view as it is drawn, on fixed figures."""

from dataclasses import replace
from typing import Final

import pytest
from rich.cells import cell_len

from tollbook.views.top.figures import (
    BudgetFigures,
    Figures,
    Problem,
    RateFigures,
    RedisFigures,
    SpendFigures,
    StreamFigures,
    UserFigures,
    as_document,
)
from tollbook.views.top.formats import ago, cap_text, count, money, shorten
from tollbook.views.top.problems import find_problems
from tollbook.views.top.screen import draw

USD: Final = 1_000_000_000
LONG: Final = "customer-" + "x" * 180 + "-berlin-042"
WIDE: Final = "東京" * 40

USERS: Final = (
    UserFigures("u42", "growth", 38 * USD, USD // 2, 40 * USD, 1_204, 3, 2),
    UserFigures(LONG, "trial", 5 * USD, 0, 5 * USD, 88, 12, 0),
    UserFigures(WIDE, None, 1_234_567, 0, None, 1, 0, 0),
    UserFigures("rich", "starter", 999_999 * USD + 1, 0, 1_000_000 * USD, 9_876_543, 0, 0),
)
REDIS: Final = RedisFigures(
    url="redis://127.0.0.1:6379",
    age_s=0.2,
    ledger_id="ledger-1",
    seq=45_678,
    streams=(
        StreamFigures("scraping", 12, 0, 0, None),
        StreamFigures("analysis", 123_456, 1_200, 32, 4.56),
        StreamFigures("generation", 2_345_678, None, 0, None),
        StreamFigures("monitoring", 0, 0, 0, None),
    ),
    open_holds=32,
    budgets_waited_for=3,
    dead_letters=0,
    workers=4,
    projector="host at /data",
)
RATES: Final = RateFigures(
    age_s=0.2,
    window_s=60,
    finished=744,
    failed=1,
    denied=7,
    fallbacks=5,
    cost_nanousd=1_234_567_891,
    calls_per_s=12.4,
    nanousd_per_min=1_300_000_000,
    finished_by_second=(0,) * 58 + (1, 8),
    cost_by_second=(0,) * 59 + (USD,),
    newest_event_s=0.4,
)
SPEND: Final = SpendFigures(
    age_s=3.2,
    period="2026-11",
    ledger_id="ledger-1",
    seq=45_600,
    is_current=True,
    newer_events=78,
    users=204,
    spent_nanousd=1_042 * USD,
    held_nanousd=USD // 2,
    calls=98_765,
    denied=1_240,
    fallbacks=321,
    discrepancies=0,
    by_spend=USERS,
    by_use=USERS[::-1],
    lag_events=12,
    lag_s=0.13,
)
FIGURES: Final = Figures(1_795_000_000_000, "tollbook", "/srv/data", (), REDIS, RATES, SPEND)


def text(figures: Figures, width: int, height: int | None, **more: str) -> str:
    return "\n".join(line.plain.rstrip() for line in draw(figures, width=width, height=height, **more))  # pyright: ignore[reportArgumentType]


def test_all_parts_are_shown_at_80_by_24() -> None:
    shown = text(FIGURES, 80, 24, keys="q quit").splitlines()
    assert len(shown) == 24
    assert shown[0].startswith(" tollbook top  tollbook in /srv/data")
    assert shown[0].endswith("q quit   11:06:40 UTC")
    expected = """\
                  RATE     60 s    2026-11  STREAM        LENGTH WAITING PENDING
 calls          12.4/s      744     98,765  scraping          12       0       0
 money $    1.3000/min   1.2346   1,042.00  analysis     123,456   1,200      32
 failed                       1             generation     2.35M       ?       0
 denied                       7      1,240  monitoring         0       0       0
 fallbacks                    5        321  dead letters       0
 calls                                                             ▁█ most 8/s
 in flight      32 holds of $0.5000 · 32 tasks pending · 3 budgets waited for
 projector      12 events, 0.1 s behind · measured 3 s ago · workers 4

 USER  204, by spend           PLAN   SPENT $   HELD $     CAP $ USED %  DENIED
 u42                         growth   38.0000   0.5000     40.00   95.0       3
 customer-xxx…x-berlin-042    trial    5.0000   0.0000      5.00  100.0      12
 東京東京東京…東京東京東京        -    0.0013   0.0000         -      -       0
 rich                       starter 1,000,000   0.0000 1,000,000   99.9       0"""
    assert shown[2:17] == expected.splitlines()
    assert shown[-1] == " Redis now · last event now · spend now (copy 3 s + 78 events)"


def test_a_wider_screen_shows_more_of_each_and_more_users() -> None:
    many = tuple(UserFigures(f"u{n}", "trial", (99 - n) * USD // 10, 0, 10 * USD, n, 0, n % 3) for n in range(50))
    shown = text(replace(FIGURES, spend=replace(SPEND, by_spend=many)), 120, 40).splitlines()
    assert len(shown) == 40
    assert "OLDEST s" in shown[2]
    assert shown[4].endswith("  1,200      32       4.6")
    assert shown[10].startswith(" money $ ")
    assert shown[10].endswith("█ most 1.0000/s")
    users = [line for line in shown if line.startswith(" u")]
    assert len(users) == 22
    assert users[0].split() == ["u0", "trial", "9.9000", "0.0000", "10.00", "99.0", "0", "0", "0", "█" * 7 + "░"]
    assert users[10].split()[-1] == "█" * 7 + "░"


def test_the_other_order_is_by_the_part_of_the_cap() -> None:
    shown = text(FIGURES, 120, 40, order="use")
    assert "204, by part of cap" in shown
    assert shown.index(" rich ") < shown.index(" u42 ")


@pytest.mark.parametrize("figures", [FIGURES, replace(FIGURES, redis=None, rates=None, spend=None)])
def test_at_every_size_no_line_is_too_wide(figures: Figures) -> None:
    crowded = replace(figures, problems=(Problem("person", "x " * 300), Problem("notice", "y" * 500)) * 5)
    for width in (1, 2, 7, 20, 40, 79, 80, 99, 100, 120, 300):
        for height in (1, 2, 5, 12, 24, 40, 100):
            lines = draw(crowded, width=width, height=height, keys="q quit  s order")
            assert len(lines) == height
            assert max(cell_len(line.plain) for line in lines) <= width


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_whole_ids_and_amounts_are_shown_at_every_width(width: int) -> None:
    ids = [f"{number}00139e8-62f1-509b-a9c7-4345f78771c1" for number in range(4)]
    users = tuple(replace(user, user_id=user_id) for user, user_id in zip(USERS, ids, strict=True))
    shown = text(replace(FIGURES, spend=replace(SPEND, by_spend=users)), width, 60)
    for part in (*ids, "38.0000", "1,000,000", "95.0", "99.9", "1,042.00", "123,456", "measured 3 s ago"):
        assert part in shown
    assert "…" not in shown.partition("\n")[2]


@pytest.mark.parametrize("width", range(40, 60))
def test_keys_or_clock_are_whole_at_the_end_of_the_title(width: int) -> None:
    title = draw(FIGURES, width=width, height=24, keys="q quit  s order")[0].plain
    assert title.endswith(("UTC", "q quit  s order"))


def test_ids_that_would_look_the_same_without_their_middle_are_shown_whole() -> None:
    ids = ["x" * 60 + middle + "y" * 60 for middle in "ab"]
    users = tuple(replace(USERS[0], user_id=user_id) for user_id in ids)
    shown = text(replace(FIGURES, spend=replace(SPEND, by_spend=users)), 80, 40)
    for user_id in ids:
        assert f" {user_id[:79]}\n {user_id[79:]}\n" in shown


def test_red_needs_a_person_and_yellow_is_a_warning() -> None:
    redis = replace(REDIS, dead_letters=2, projector=None, workers=0)
    figures = replace(FIGURES, redis=redis, spend=replace(SPEND, discrepancies=1, lag_s=30.0))
    figures = replace(figures, problems=find_problems(figures, is_answered=True))
    assert [(problem.level, problem.text.partition(":")[0]) for problem in figures.problems] == [
        ("person", "no projector runs, so calls wait"),
        ("person", "no worker runs"),
        ("person", "2 tasks could not be executed"),
        ("person", "gate and fold disagree (1 event)"),
        ("notice", "the projector is 30 s behind the ledger"),
    ]
    lines = draw(figures, width=120, height=40)
    styles = {line.plain.strip(): str(line.style) for line in lines[1:6]}
    assert [style for line, style in styles.items() if line.startswith("!")] == ["bold red"] * 4 + ["yellow"]
    assert not any("red" in str(line.style) + str(line.spans) for line in draw(FIGURES, width=120, height=40))


def test_a_missing_part_is_named_and_dim() -> None:
    assert find_problems(replace(FIGURES, redis=replace(REDIS, projector=None)), is_answered=False) == ()


def test_a_server_that_may_lose_writes_is_worth_a_look_and_one_that_is_full_needs_a_person() -> None:
    redis = replace(REDIS, unsynced="a crash of the Redis server loses its last writes: set appendfsync to always")
    (problem,) = find_problems(replace(FIGURES, redis=redis), is_answered=True)
    assert problem == Problem("notice", "a crash of the Redis server loses its last writes: set appendfsync to always")
    # No lease and no heartbeat can be renewed there.
    redis = replace(redis, refusal="the Redis server is nearly full", projector=None, workers=0)
    (problem,) = find_problems(replace(FIGURES, redis=redis), is_answered=True)
    assert problem == Problem("person", "the Redis server is nearly full")


def test_only_the_reason_of_stopped_calls_is_shown() -> None:
    redis = replace(REDIS, projector=None, stopped="the projector has stopped: the ledger has only 9")
    (problem,) = find_problems(replace(FIGURES, redis=redis), is_answered=True)
    assert problem == Problem("person", "calls are stopped: the projector has stopped: the ledger has only 9")
    old = replace(
        FIGURES,
        problems=(Problem("person", "Redis did not answer"),),
        redis=replace(REDIS, age_s=42.0),
        rates=replace(RATES, age_s=42.0),
    )
    lines = draw(old, width=100, height=30)
    assert lines[1].plain == " ! Redis did not answer"
    assert lines[-1].plain == " Redis 42 s ago · last event 42 s ago · spend 42 s ago (copy 3 s + 78 events)"
    stream = next(line for line in lines if "analysis" in line.plain)
    assert any("dim" in str(span.style) for span in stream.spans)
    never = text(replace(FIGURES, redis=None, rates=None, spend=None), 80, 24)
    assert "Redis was not seen yet" in never
    assert "the projection was not read yet" in never


def test_different_ledgers_in_redis_and_duckdb_are_reported() -> None:
    figures = replace(FIGURES, redis=replace(REDIS, ledger_id="ledger-2"))
    (problem,) = find_problems(figures, is_answered=True)
    assert problem.text.startswith("Redis has another ledger than the one folded in /srv/data")


def test_text_of_others_cannot_control_the_live_view() -> None:
    nasty = "a\x1b[2Jb\x9b31mc"
    users = (UserFigures(nasty, nasty, 1, 0, 1, 0, 0, 0),)
    spend = replace(SPEND, by_spend=users)
    shown = text(replace(FIGURES, data_dir=nasty, spend=spend, problems=(Problem("person", nasty),)), 80, 24)
    assert shown.replace("\n", "").isprintable()
    assert "a\\x1b[2Jb\\x9b31mc" in shown


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_column_is_as_wide_as_its_widest_figure(width: int) -> None:
    uuid = "01000000-0000-0000-0000-000000001eef"
    user = UserFigures(uuid, "trial", 12_345_678_901_234, 0, 5 * USD, 1_234_567, 987_654, 1)
    figures = replace(FIGURES, spend=replace(SPEND, by_spend=(user,), by_use=(user,)))
    (line,) = (line for line in text(figures, width, 24).splitlines() if uuid in line)
    assert "…" not in line
    assert {uuid, "12,345.68", "5.00", "246,913.6"} <= {*line.split()}


def test_a_long_id_is_shortened_in_the_middle() -> None:
    assert shorten(LONG, 20) == "customer-x…erlin-042"
    assert shorten("u42", 20) == "u42"
    for width in range(12):
        assert cell_len(shorten(WIDE, width)) <= width


def test_numbers_keep_to_their_columns() -> None:
    assert [count(number) for number in (0, 999_999, 1_000_000, 123_456_789)] == ["0", "999,999", "1.00M", "123.46M"]
    amounts = (1, 999 * USD, 1_000 * USD, 99_999 * USD, 1_000_000 * USD, -USD // 2)
    assert [money(amount) for amount in amounts] == [
        "0.0001", "999.0000", "1,000.00", "99,999.00", "1,000,000", "-0.5000",
    ]  # fmt: skip
    caps = (USD // 1_000, 5 * USD, 12_345_670_000_000, 123_456_780_000_000, 1_000_000 * USD)
    assert [cap_text(cap) for cap in caps] == ["0.001", "5.00", "12,345.67", "123,457", "1,000,000"]
    assert [ago(seconds) for seconds in (0.4, 59.6, 600, 8_000)] == ["now", "60 s ago", "10 min ago", "2 h ago"]


def test_the_document_has_money_in_dollars_with_nine_places() -> None:
    document = as_document(FIGURES)
    assert document["rates"]["cost_usd"] == "1.234567891"
    assert document["rates"]["usd_per_min"] == "1.300000000"
    assert document["rates"]["usd_by_second"][-1] == "1.000000000"
    assert document["spend"]["by_spend"][0]["cap_usd"] == "40.000000000"
    assert document["spend"]["by_spend"][2]["cap_usd"] is None
    assert document["redis"]["streams"][1] == {
        "name": "analysis", "length": 123_456, "waiting": 1_200, "pending": 32, "oldest_pending_s": 4.56,
    }  # fmt: skip


def test_budgets_that_are_used_up_most_have_a_line() -> None:
    budgets = (BudgetFigures("team-week", "red", 20 * USD, 20 * USD), BudgetFigures("all-spend", "all", USD, 40 * USD))
    shown = text(replace(FIGURES, spend=replace(SPEND, budgets=budgets)), 80, 24)
    assert " budgets   team-week red 100% of $20.0000 · all-spend 2% of $40.0000\n" in shown
