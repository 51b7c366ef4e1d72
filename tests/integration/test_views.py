"""The views over a small ledger worked out by hand: every number is arithmetic from the events below."""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest

from tests.ledger_maker import LedgerMaker
from tests.quick import first_quick
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch
from tollbook.schemas.events import ENVELOPE_FIELDS

USD: Final = 1_000_000_000
LARGE, SMALL = "m/large", "m/small"
START: Final = datetime(2026, 11, 1, tzinfo=UTC)


class Book:
    """Writes raw entries at given moments of November 2026."""

    def __init__(self) -> None:
        self.entries: list[list[Any]] = []

    def append(self, at: datetime, kind: str, user: str, call: str, amount: int, payload: dict[str, Any]) -> None:
        values = (kind, 1, len(self.entries) + 1, user, "2026-11", call, 1, amount, "", json.dumps(payload))
        flat = [str(part).encode() for pair in zip(ENVELOPE_FIELDS, values, strict=True) for part in pair]
        self.entries.append([f"{round(at.timestamp() * 1000)}-{len(self.entries)}".encode(), flat])

    def reserve(self, at: datetime, user: str, call: str, amount: int, **more: Any) -> None:
        payload = {"hold": 1, "cap_nanousd": 10 * USD, "deadline_ms": ms(at) + 60_000, "plan": "trial", "worker": "w-1"}
        bound = {"bound": {"model": LARGE, "prompt_tokens": 10, "completion_tokens": 20}}
        self.append(at, "budget-reserved", user, call, amount, {**payload, "task_type": "score_post", **bound, **more})

    def called(self, at: datetime, user: str, call: str, model: str, latency_ms: int, **more: Any) -> None:
        payload = {"hold": 1, "model": model, "outcome": "ok", "latency_ms": latency_ms, "charge_basis": "reported"}
        self.append(at, "model-called", user, call, 0, {**payload, "charge_nanousd": 0, **more})

    def fall_back(self, at: datetime, user: str, call: str, **more: Any) -> None:
        payload = {"hold": 1, "from_model": LARGE, "to_model": SMALL, **more}
        self.append(at, "fallback-used", user, call, 0, payload)

    def settle(self, at: datetime, user: str, call: str, cost: int, hold: int, **more: Any) -> None:
        payload = {"hold": 1, "hold_nanousd": hold, "basis": "reported", "outcome": "done", **more}
        self.append(at, "cost-recorded", user, call, cost, payload)


def ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)


def on(day: int, hour: int = 0, minute: int = 0) -> datetime:
    return START + timedelta(days=day - 1, hours=hour, minutes=minute)


def tokens(prompt: int, completion: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def written() -> list[list[Any]]:
    """Two users; a cap of 10 dollars each. Holds are 4 dollars."""
    book = Book()
    # ann, on the 1st at 23:50: one attempt by the large model, 2 dollars, settled after midnight.
    book.reserve(on(1, 23, 50), "ann", "a1", 4 * USD, campaign_id="autumn")
    book.called(on(1, 23, 55), "ann", "a1", LARGE, 1_000, charge_nanousd=2 * USD, **tokens(600, 400))
    book.settle(on(2, 0, 5), "ann", "a1", 2 * USD, 4 * USD)
    # ann, on the 2nd: the large model fails for 1 dollar (assumed), the small one answers for half a dollar.
    book.reserve(on(2, 0, 10), "ann", "a2", 4 * USD, task_type="generate_draft")
    failed = {"outcome": "timeout", "charge_nanousd": USD, "charge_basis": "assumed"}
    book.called(on(2, 0, 11), "ann", "a2", LARGE, 60_000, **failed)
    book.fall_back(on(2, 0, 11), "ann", "a2", reason="timeout")
    book.called(on(2, 0, 12), "ann", "a2", SMALL, 300, charge_nanousd=USD // 2, **tokens(900, 100))
    book.settle(on(2, 0, 13), "ann", "a2", USD + USD // 2, 4 * USD, assumed_nanousd=USD, basis="assumed")
    # bob, on the 2nd: refused, 1 of 10 dollars spent and 4 held, for 6.
    book.reserve(on(2, 1), "bob", "b1", 4 * USD, plan="starter")
    denied = {"budget": "user:bob:2026-11", "cap_nanousd": 10 * USD, "settled_nanousd": USD, "held_nanousd": 4 * USD}
    order = {"reason": "wait_timeout", "task_type": "score_post", "plan": "starter", "worker": "w-1", "bound": {}}
    book.append(on(2, 1, 1), "budget-denied", "bob", "b2", 6 * USD, {**denied, **order})
    # bob's worker dies: the hold is settled in full, and corrected to 3 dollars on the 3rd, now confirmed.
    dead = {"basis": "assumed", "assumed_nanousd": 4 * USD, "outcome": "expired", "reason": "expired"}
    book.settle(on(2, 2), "bob", "b1", 4 * USD, 4 * USD, **dead)
    correction = {"hold": 1, "basis": "reported", "reason": "reconciled", "author": "r", "assumed_nanousd": -4 * USD}
    book.append(on(3, 5), "cost-adjusted", "bob", "b1", -USD, correction)
    # ann, on the 6th: a hold that is still open at the newest event, 90 seconds later; extended by a dollar.
    book.reserve(on(6), "ann", "a3", 4 * USD, campaign_id="autumn")
    book.called(on(6, 0, 1), "ann", "a3", LARGE, 3_000, outcome="http_error", http_status=429, charge_basis="released")
    book.fall_back(on(6, 0, 1), "ann", "a3", reason="http_error", http_status=429)
    book.reserve(on(6) + timedelta(seconds=90), "ann", "a3", USD, kind="extension", campaign_id="autumn")
    return book.entries


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store.open(tmp_path_factory.mktemp("views") / "t.duckdb", "ledger")
    made.fold(Batch(0, written()))
    yield made
    made.close()


def usd(nanousd: int) -> Decimal:
    return Decimal(nanousd) / USD


def percent(part: int, whole: int) -> Decimal:
    return round(100 * Decimal(part) / whole, 2)


def rows(store: Store, view: str, *columns: str) -> list[tuple[Any, ...]]:
    found = store.query(f"SELECT {', '.join(columns)} FROM {view} ORDER BY ALL")  # noqa: S608 - the names below.
    return [tuple(row[column] for column in columns) for row in found]


def answers(folder: Path, book: Book, view: str, *columns: str) -> list[tuple[Any, ...]]:
    """Return the rows of a view over a book of its own."""
    store = Store.open(folder / "t.duckdb", "ledger")
    try:
        store.fold(Batch(0, book.entries))
        return rows(store, view, *columns)
    finally:
        store.close()


ANN, BOB = 2 * USD + USD + USD // 2, 4 * USD - USD


def test_spend_by_user_adds_up_all_periods(store: Store) -> None:
    columns = ("user_id", "periods", "calls", "denied", "spent_usd", "assumed_usd", "reserved_usd")
    assert rows(store, "spend_by_user", *columns) == [
        ("ann", 1, 3, 0, usd(ANN), usd(USD), usd(5 * USD)),
        ("bob", 1, 1, 1, usd(BOB), usd(4 * USD - 4 * USD), usd(0)),
    ]


@pytest.mark.parametrize(
    ("view", "key", "expected"),
    [
        ("spend_by_plan", "plan", [("starter", 1, 1, BOB, 0), ("trial", 3, 1, ANN, USD)]),
        ("spend_by_campaign", "campaign_id", [("autumn", 2, 1, 2 * USD, 0), (None, 2, 2, ANN - 2 * USD + BOB, USD)]),
        (
            "spend_by_task_type",
            "task_type",
            [("generate_draft", 1, 1, USD + USD // 2, USD), ("score_post", 3, 2, 2 * USD + BOB, 0)],
        ),
    ],
)
def test_spend_by_what_a_call_is_for(store: Store, view: str, key: str, expected: list[tuple[Any, ...]]) -> None:
    found = rows(store, view, "period", key, "calls", "users", "spent_usd", "assumed_usd")
    assert found == [("2026-11", *row[:3], usd(row[3]), usd(row[4])) for row in expected]


def test_spend_by_model_books_each_attempt_at_its_model_and_the_rest_at_the_last(store: Store) -> None:
    # The large model: 2 and 1 dollars, and bob's call, which no attempt tells of. The open hold is not spend yet.
    columns = ("period", "model", "attempts", "spent_usd", "prompt_tokens", "completion_tokens")
    assert rows(store, "spend_by_model", *columns) == [
        ("2026-11", LARGE, 2, usd(2 * USD + USD + BOB), 600, 400),
        ("2026-11", SMALL, 1, usd(USD // 2), 900, 100),
    ]


def test_spend_by_day_goes_by_the_moment_of_settlement_in_utc(store: Store) -> None:
    columns = ("day", "calls", "users", "spent_usd", "assumed_usd")
    expected = [
        (date(2026, 11, 2), 3, 2, usd(ANN + 4 * USD), usd(USD + 4 * USD)),
        (date(2026, 11, 3), 1, 1, usd(-USD), usd(-4 * USD)),
    ]
    assert rows(store, "spend_by_day", *columns) == expected
    with store.reading() as cursor:
        cursor.execute("SET TimeZone = 'Pacific/Kiritimati'")  # UTC+14: its days are others.
        cursor.execute("SELECT * FROM spend_by_day ORDER BY day")
        assert [tuple(row.values()) for row in cursor.to_arrow_table().to_pylist()] == expected
        cursor.execute("SET TimeZone = 'Asia/Kolkata'")  # UTC+5:30: its hours are others.
        cursor.execute("SELECT epoch(hour)::BIGINT % 3600 AS rest, count(*) AS hours FROM spend_by_hour GROUP BY rest")
        assert cursor.fetchall() == [(0, 3)]
        cursor.execute("RESET TimeZone")


def test_spend_by_hour_goes_by_the_hour_of_settlement(store: Store) -> None:
    found = rows(store, "spend_by_hour", "hour", "calls", "spent_usd")
    assert [(hour.astimezone(UTC), *rest) for hour, *rest in found] == [
        (on(2, 0), 2, usd(ANN)),
        (on(2, 2), 1, usd(4 * USD)),
        (on(3, 5), 1, usd(-USD)),
    ]


def test_cap_use_predicts_the_day_from_the_mean_daily_spend(store: Store) -> None:
    # From the first event of each user to the newest of all.
    newest = on(6) + timedelta(seconds=90)
    days = {"ann": newest - on(1, 23, 50), "bob": newest - on(2, 1)}
    found = {row["user_id"]: row for row in store.query("SELECT * FROM cap_use")}
    for user, spent in (("ann", ANN), ("bob", BOB)):
        row, mean = found[user], usd(spent) / (Decimal(days[user] // timedelta(seconds=1)) / 86_400)
        assert abs(row["mean_day_usd"] - mean) <= Decimal("0.000000001")
        assert row["left_usd"] == usd(10 * USD - spent)
        assert row["runs_out_on"] == (newest + timedelta(days=float(row["left_usd"] / mean))).date()
    assert [found[user]["used_percent"] for user in ("ann", "bob")] == [35, 30]
    # 6.5 dollars at 3.5 in 4.01 days, 7 dollars at 3 in 3.96 days.
    assert [found[user]["runs_out_on"] for user in ("ann", "bob")] == [date(2026, 11, 13), date(2026, 11, 15)]


def test_the_mean_daily_spend_begins_with_the_users_first_day(tmp_path: Path) -> None:
    # 6 of 10 dollars in a day and a half: 4 a day, so the other 4 last a day more. From the 1st on it would be
    # 0.24 a day, and the cap would seem to outlive the month.
    book = Book()
    book.reserve(on(25), "u", "c", 6 * USD)
    book.settle(on(26, 12), "u", "c", 6 * USD, 6 * USD)
    assert answers(tmp_path, book, "cap_use", "mean_day_usd", "runs_out_on") == [(usd(4 * USD), date(2026, 11, 27))]


def test_credit_counts_for_the_cap_that_runs_out(tmp_path: Path) -> None:
    book = Book()
    book.reserve(on(1), "u", "c", 10 * USD)
    book.append(on(2), "credit-granted", "u", "", 5 * USD, {"author": "ops", "reason": "outage"})
    book.settle(on(5), "u", "c", 10 * USD, 10 * USD)
    # 10 dollars in 4 days; 5 of 15 are left for two days more. Without the credit nothing would be.
    columns = ("cap_usd", "left_usd", "used_percent", "runs_out_on")
    expected = [(usd(15 * USD), usd(5 * USD), percent(10, 15), date(2026, 11, 7))]
    assert answers(tmp_path, book, "cap_use", *columns) == expected


def test_a_cap_of_nothing_is_used_up_and_has_no_percentage(tmp_path: Path) -> None:
    book = Book()
    book.append(on(3), "plan-assigned", "u", "", 0, {"plan": "none", "cap_nanousd": 0, "author": "a", "reason": "r"})
    assert answers(tmp_path, book, "cap_use", "used_percent", "runs_out_on") == [(None, date(2026, 11, 3))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spent", "newest", "expected"),
    [
        # Of 10 dollars, spent at noon of the 1st, which counts as a whole day: 4 a day, 1.5 days more.
        (4 * USD, on(1, 12), date(2026, 11, 3)),
        (10 * USD, on(20), date(2026, 11, 20)),  # Used up by now.
        (11 * USD, on(20), date(2026, 11, 20)),
        (5 * USD, on(16), None),  # A third of a dollar a day: exactly the end of the month, and not before it.
        (5 * USD + 1_000_000, on(16), date(2026, 11, 30)),
        (1, on(16), None),  # Twice 10**10 days: past every calendar.
        (0, on(16), None),
        (9 * USD, on(31, 1), None),  # The month is over.
    ],
)
def test_the_day_a_cap_runs_out_is_within_the_period_or_null(
    tmp_path: Path, spent: int, newest: datetime, expected: date | None
) -> None:
    book = Book()
    book.reserve(on(1), "u", "c", 10 * USD)
    book.settle(on(1, 1), "u", "c", spent, 10 * USD)
    book.append(newest, "segment-sealed", "", "", 0, {"segment": "s", "first_id": "1-0", "last_id": "2-0", "events": 2})
    assert answers(tmp_path, book, "cap_use", "runs_out_on") == [(expected,)]


def test_denials_have_the_refusing_balance_and_the_missing_amount(store: Store) -> None:
    columns = ("user_id", "call_id", "reason", "budget", "asked_usd", "settled_usd", "held_usd", "cap_usd", "short_usd")
    money = [usd(each * USD) for each in (6, 1, 4, 10, 1 + 4 + 6 - 10)]
    assert rows(store, "denials", *columns) == [("bob", "b2", "wait_timeout", "user:bob:2026-11", *money)]


def test_fallback_rates_and_reasons(store: Store) -> None:
    columns = ("model", "attempts", "failed", "fallbacks", "fallback_percent")
    assert rows(store, "fallback_rates", *columns) == [
        (LARGE, 3, 2, 2, percent(2, 3)),
        (SMALL, 1, 0, 0, 0),
    ]
    assert rows(store, "fallback_reasons", "model", "to_model", "reason", "http_status", "fallbacks", "percent") == [
        (LARGE, SMALL, "http_error", 429, 1, 50),
        (LARGE, SMALL, "timeout", None, 1, 50),
    ]


def test_latency_percentiles_are_latencies_that_were_measured(tmp_path: Path) -> None:
    book = Book()
    for number in range(100, 0, -1):
        book.called(on(1), "u", f"c{number}", LARGE, 10 * number)
    book.called(on(1), "u", "c0", LARGE, 99_999, outcome="timeout", charge_basis="assumed")  # It has no answer.
    book.called(on(1), "u", "d1", SMALL, 7)  # One alone is every percentile.
    columns = ("model", "answered", "min_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms")
    assert answers(tmp_path, book, "latency_by_model", *columns) == [
        (LARGE, 100, 10, 500, 900, 950, 990, 1_000),
        (SMALL, 1, 7, 7, 7, 7, 7, 7),
    ]


def test_token_prices_are_of_attempts_that_report_tokens(store: Store) -> None:
    columns = (
        "period",
        "model",
        "attempts",
        "prompt_tokens",
        "completion_tokens",
        "charged_usd",
        "usd_per_1000_tokens",
    )
    assert rows(store, "token_prices", *columns) == [
        ("2026-11", LARGE, 1, 600, 400, usd(2 * USD), usd(2 * USD) * 1000 / (600 + 400)),
        ("2026-11", SMALL, 1, 900, 100, usd(USD // 2), usd(USD // 2) * 1000 / (900 + 100)),
    ]


def test_a_token_price_is_what_was_really_paid(tmp_path: Path) -> None:
    book = Book()
    # Three dollars for 1,000 tokens, corrected to two; a count of zero is not written.
    book.called(on(1), "u", "c1", LARGE, 1, charge_nanousd=3 * USD, usage={"prompt_tokens": 1_000})
    book.append(on(2), "cost-adjusted", "u", "c1", -USD, {"hold": 1, "basis": "reported", "reason": "r", "author": "a"})
    book.called(on(1), "u", "c2", LARGE, 1, charge_nanousd=USD, usage={"completion_tokens": 500})
    # Unknown: which of two attempts was corrected. An assumed cost is not a price; without tokens there is no price.
    for _ in range(2):
        book.called(on(1), "u", "c3", LARGE, 1, charge_nanousd=9 * USD, **tokens(1, 1))
    book.append(on(2), "cost-adjusted", "u", "c3", -USD, {"hold": 1, "basis": "reported", "reason": "r", "author": "a"})
    book.called(on(1), "u", "c4", LARGE, 1, charge_nanousd=9 * USD, charge_basis="assumed", **tokens(1, 1))
    book.called(on(1), "u", "c5", SMALL, 1, charge_nanousd=USD, **tokens(0, 0))
    columns = ("model", "attempts", "prompt_tokens", "completion_tokens", "charged_usd", "usd_per_1000_tokens")
    assert answers(tmp_path, book, "token_prices", *columns) == [
        (LARGE, 2, 1_000, 500, usd(2 * USD + USD), usd((2 + 1) * USD) * 1000 / (1_000 + 500)),
        (SMALL, 1, 0, 0, usd(USD), None),
    ]


def test_no_view_divides_by_zero(tmp_path: Path) -> None:
    book = Book()
    book.reserve(on(1), "u", "c", USD)
    book.fall_back(on(1), "u", "c", reason="timeout")  # Its attempt is on the ledger before it; here there is none.
    book.settle(on(1), "u", "c", 0, USD, basis="released")
    assert answers(tmp_path, book, "fallback_rates", "model", "attempts", "fallback_percent") == [(LARGE, 0, None)]
    # Nothing more is folded into the same file.
    assert answers(tmp_path, Book(), "cost_certainty", "spent_usd", "assumed_percent") == [(0, None)]


def test_calls_of_two_partitions_are_two_though_their_ids_are_one(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "t.duckdb", "ledger", 2)
    try:
        for partition, user, cost in ((0, "ann", USD), (1, "bob", 2 * USD)):
            book = Book()
            book.reserve(on(4, 23), user, "same", 4 * USD)
            book.settle(on(4, 23, 59), user, "same", cost, 4 * USD)
            book.reserve(on(5) + timedelta(hours=partition), user, "open", 3 * USD)
            store.fold(Batch(partition, book.entries))
        for view, when in (("spend_by_day", date(2026, 11, 4)), ("spend_by_hour", on(4, 23))):
            key = view.removeprefix("spend_by_")
            assert rows(store, view, key, "calls", "users", "spent_usd") == [(when, 2, 2, usd((1 + 2) * USD))]
        assert rows(store, "spend_by_task_type", "calls", "spent_usd") == [(4, usd((1 + 2) * USD))]
        assert rows(store, "spend_by_user", "user_id", "spent_usd") == [("ann", usd(USD)), ("bob", usd(2 * USD))]
        # The newest event is of partition 1, whichever partition a hold is of.
        assert rows(store, "open_holds", "partition", "user_id", "open_s") == [(0, "ann", 3_600), (1, "bob", 0)]
    finally:
        store.close()


def test_cost_certainty_splits_the_spend(store: Store) -> None:
    columns = ("period", "calls", "assumed_calls", "spent_usd", "confirmed_usd", "assumed_usd", "adjusted_usd")
    assert rows(store, "cost_certainty", *columns) == [
        ("2026-11", 3, 1, usd(ANN + BOB), usd(ANN + BOB - USD), usd(USD), usd(-USD))
    ]
    assert rows(store, "cost_certainty", "assumed_percent") == [(percent(USD, ANN + BOB),)]


def test_open_holds_are_measured_against_the_newest_event(store: Store) -> None:
    columns = ("user_id", "call_id", "hold", "model", "campaign_id", "held_usd", "open_s", "opened_at", "expires_at")
    assert rows(store, "open_holds", *columns) == [
        ("ann", "a3", 1, LARGE, "autumn", usd(4 * USD + USD), 90, on(6), on(6) + timedelta(seconds=60))
    ]
    assert rows(store, "newest_event", "recorded_at") == [(on(6) + timedelta(seconds=90),)]


TOTALS = {
    "spend_by_user": "spent_usd",
    "spend_by_plan": "spent_usd",
    "spend_by_campaign": "spent_usd",
    "spend_by_task_type": "spent_usd",
    "spend_by_model": "spent_usd",
    "spend_by_day": "spent_usd",
    "spend_by_hour": "spent_usd",
    "cost_certainty": "spent_usd",
}


@pytest.mark.parametrize("seed", first_quick(1, range(4)))
def test_every_view_of_spend_adds_up_to_the_settled_spend(tmp_path: Path, seed: int) -> None:
    """Whatever stands on the ledger: takeovers, overages, corrections, charges from elsewhere, open holds."""
    store = Store.open(tmp_path / "t.duckdb", "ledger")
    try:
        store.fold(Batch(0, LedgerMaker(seed).run(600).entries))
        settled = store.query("SELECT sum(settled_usd) AS n, sum(held_usd) AS held FROM budgets WHERE name = 'user'")[0]
        for view, column in TOTALS.items():
            assert store.query(f"SELECT sum({column}) AS n FROM {view}")[0]["n"] == settled["n"], view  # noqa: S608
        assert store.query("SELECT sum(held_usd) AS n FROM open_holds")[0]["n"] == settled["held"]
    finally:
        store.close()


def test_views_of_an_empty_ledger_answer(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "t.duckdb", "ledger")
    try:
        for view in (
            row["view_name"] for row in store.query("SELECT view_name FROM duckdb_views() WHERE NOT internal")
        ):
            clock = {
                "newest_event": [{"recorded_at": None}],
                "policy_calendar": [{"timezone": "UTC", "month_starts_on": 1}],
            }
            assert store.query(f"FROM {view}") == clock.get(view, []), view
    finally:
        store.close()


def test_a_file_made_before_the_views_gets_them_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "t.duckdb"
    store = Store.open(path, "ledger")
    store.fold(Batch(0, written()))
    expected = store.query("FROM cap_use ORDER BY ALL")
    with store.reading() as cursor:
        cursor.execute("DROP VIEW cap_use; DROP MACRO digest_of_views")
        cursor.execute("CREATE OR REPLACE VIEW newest_event AS SELECT 1 AS old")
    store.close()
    store = Store.open(path, "ledger")
    try:
        assert store.query("FROM cap_use ORDER BY ALL") == expected
        assert store.position().seq == len(written())
    finally:
        store.close()
