"""The fold into DuckDB: the same rows wherever batches end, and the same as a fold in plain Python."""

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fold_model import TOKENS, FoldModel, usd
from tests.ledger_maker import CAP, LedgerMaker
from tests.quick import first_quick
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.fold import LedgerGap
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch
from tollbook.schemas.events import EVENT_VERSION
from tollbook.schemas.identifiers import budget_name
from tollbook.schemas.money import MAX_NANOUSD, usd_from_nanousd
from tollbook.schemas.upcasters import UPCASTERS, UnreadableEvent

Entries = list[list[Any]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(tmp_path / "tollbook.duckdb", "ledger-1")
    yield made
    made.close()


def fold_in(store: Store, entries: Entries, cuts: Sequence[int] = ()) -> None:
    edges = [0, *sorted(cuts), len(entries)]
    for start, end in itertools.pairwise(edges):
        store.fold(Batch(0, entries[start:end]))


def entry(seq: int, kind: str, amount: int, committed: int, payload: dict[str, Any], *, user: str = "u1") -> list[Any]:
    values = (kind, EVENT_VERSION, seq, user, "2026-11", f"call-{user}", 1, amount, committed, json.dumps(payload))
    names = ("type", "v", "seq", "user_id", "period", "call_id", "attempt", "amount", "committed", "payload")
    return [
        f"{1_795_000_000_000 + seq}-0".encode(),
        [str(x).encode() for pair in zip(names, values, strict=True) for x in pair],
    ]


def reserved(seq: int, amount: int, committed: int, *, cap: int = CAP, **more: Any) -> list[Any]:
    payload = {"hold": 1, "cap_nanousd": cap, "task_type": "score_post", "plan": "trial", "worker": "w", **more}
    return entry(seq, "budget-reserved", amount, committed, payload)


def settled(seq: int, cost: int, held: int, committed: int) -> list[Any]:
    payload = {"hold": 1, "hold_nanousd": held, "basis": "reported", "outcome": "done"}
    return entry(seq, "cost-recorded", cost, committed, payload)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 120), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fold_does_not_depend_on_where_batches_end(
    tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int, data: st.DataObject
) -> None:
    entries = LedgerMaker(seed).run(steps).entries
    cuts = data.draw(st.lists(st.integers(0, len(entries)), max_size=6))
    folder = tmp_path_factory.mktemp("fold")
    whole, pieces = Store.open(folder / "whole.duckdb", "l"), Store.open(folder / "pieces.duckdb", "l")
    try:
        fold_in(whole, entries)
        fold_in(pieces, entries, cuts)
        assert compare(whole, pieces) == []
    finally:
        whole.close()
        pieces.close()


def test_compare_sees_a_single_nano_dollar(tmp_path: Path) -> None:
    first, second = Store.open(tmp_path / "a.duckdb", "l"), Store.open(tmp_path / "b.duckdb", "l")
    fold_in(first, [reserved(1, 5, 5)])
    fold_in(second, [reserved(1, 6, 6)])
    assert {difference.table for difference in compare(first, second)} == {"events", "budgets", "calls", "spend"}
    first.close()
    second.close()


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_sql_fold_equals_the_fold_in_plain_python(store: Store, seed: int) -> None:
    entries = LedgerMaker(seed).run(250).entries
    picks = random.Random(seed)
    fold_in(store, entries, [picks.randrange(len(entries)) for _ in range(5)])
    model = FoldModel().fold(entries)

    budgets = {row.pop("budget"): row for row in store.query("SELECT * EXCLUDE (partition, checksum) FROM budgets")}
    assert budgets == model.budgets
    page = store.baselines(sorted(model.budgets))
    assert page.balances == {name: tuple(model.balances[name]) for name in model.budgets}
    assert page.positions[0].seq == model.seq == len(entries)
    assert store.query("SELECT * FROM discrepancies") == []
    assert_spend_equals(store, model)
    assert_calls_equal(store, model)


def assert_spend_equals(store: Store, model: FoldModel) -> None:
    rows = store.query("SELECT * FROM spend")
    assert {(row["user_id"], row["period"]) for row in rows} == set(model.spend)
    for row in rows:
        expected = model.spend[row["user_id"], row["period"]]
        balance = model.balances[f"user:{row['user_id']}:{row['period']}"]
        assert (row["spent_usd"], row["reserved_usd"]) == (usd(balance[0]), usd(balance[1]))
        cap = None if expected["base"] is None else usd(min(expected["base"] + expected["credit"], MAX_NANOUSD))
        assert (row["plan"], row["cap_usd"], row["credit_usd"]) == (expected["plan"], cap, usd(expected["credit"]))
        for name in ("calls", "denied", "fallbacks", "attempts", "last_seq", *TOKENS):
            assert row[name] == expected[name], name
        for name in ("adjusted", "assumed", "overage"):
            assert row[f"{name}_usd"] == usd(expected[name]), name


def assert_calls_equal(store: Store, model: FoldModel) -> None:
    rows = store.query("SELECT * FROM calls")
    assert {row["call_id"] for row in rows} == set(model.calls)
    for row in rows:
        for name, value in model.calls[row["call_id"]].items():
            found = row[f"{name}_usd"] if name in ("held", "cost", "adjusted", "assumed", "overage") else row[name]
            expected = usd(value) if f"{name}_usd" in row else value
            assert found == expected, (row["call_id"], name)


def test_a_tampered_stamp_is_a_discrepancy_and_changes_no_balance(store: Store) -> None:
    folded = store.fold(Batch(0, [reserved(1, 500, 500), settled(2, 200, 500, 199)]))
    assert folded is not None
    assert folded.discrepancies == 1
    assert store.query("SELECT seq, budget, kind, stamped_usd, recomputed_usd FROM discrepancies") == [
        {
            "seq": 2,
            "budget": "user:u1:2026-11",
            "kind": "committed",
            "stamped_usd": usd_from_nanousd(199),
            "recomputed_usd": usd_from_nanousd(200),
        }
    ]
    assert store.baselines(["user:u1:2026-11"]).balances == {"user:u1:2026-11": (200, 0)}


def test_a_tampered_stamp_of_a_further_budget_is_a_discrepancy(store: Store) -> None:
    further = [{"budget": "campaign:c:1:2026-11", "cap_nanousd": 900, "committed_nanousd": 501}]
    store.fold(Batch(0, [reserved(1, 500, 500, budgets=further)]))
    assert [row["budget"] for row in store.query("SELECT budget FROM discrepancies")] == ["campaign:c:1:2026-11"]
    assert store.query("SELECT name, value, \"window\" FROM budgets WHERE name <> 'user'") == [
        {"name": "campaign", "value": "c:1", "window": "2026-11"}
    ]


@pytest.mark.parametrize(("cap", "kinds"), [(500, []), (499, ["cap"])])
def test_a_hold_beyond_the_cap_is_a_discrepancy(store: Store, cap: int, kinds: list[str]) -> None:
    store.fold(Batch(0, [reserved(1, 500, 500, cap=cap)]))
    assert [row["kind"] for row in store.query("SELECT kind FROM discrepancies")] == kinds


@pytest.mark.parametrize("amount", first_quick(1, [MAX_NANOUSD, 1, 999_999_999, 1_000_000_001, MAX_NANOUSD - 1]))
def test_money_is_exact_at_its_bounds(store: Store, amount: int) -> None:
    store.fold(Batch(0, [reserved(1, amount, amount, cap=MAX_NANOUSD)]))
    name = "user:u1:2026-11"
    assert store.baselines([name]).balances == {name: (0, amount)}
    store.fold(Batch(0, [settled(2, amount, amount, amount)]))
    assert store.baselines([name]).balances == {name: (amount, 0)}
    row = store.query("SELECT spent_usd, cost_usd, amount_usd FROM spend, calls, events WHERE seq = 2")[0]
    assert set(row.values()) == {Decimal(amount) / 1_000_000_000}


@pytest.mark.slow
def test_sums_beyond_the_bound_of_an_amount_stay_exact(store: Store) -> None:
    for n in range(8):
        store.fold(
            Batch(
                0,
                [
                    entry(
                        n + 1,
                        "cost-recorded",
                        MAX_NANOUSD,
                        (n + 1) * MAX_NANOUSD,
                        {"basis": "reported", "outcome": "recorded"},
                    )
                ],
            )
        )
    assert store.baselines(["user:u1:2026-11"]).balances["user:u1:2026-11"] == (8 * MAX_NANOUSD, 0)
    assert store.query("SELECT * FROM discrepancies") == []


@pytest.mark.parametrize(
    ("seqs", "next_seq"), [((2,), 2), ((1, 3), 3), ((1, 1), 1)], ids=["starts late", "gap inside", "repeat"]
)
def test_a_gap_or_a_repeat_is_refused_and_folds_nothing(store: Store, seqs: tuple[int, ...], next_seq: int) -> None:
    with pytest.raises(LedgerGap) as caught:
        store.fold(Batch(0, [reserved(seq, 1, 1) for seq in seqs]))
    assert caught.value.next_seq == next_seq
    assert store.position().seq == 0
    assert store.query("SELECT * FROM events") == []


def test_an_event_folded_before_is_refused(store: Store) -> None:
    store.fold(Batch(0, [reserved(1, 5, 5)]))
    with pytest.raises(LedgerGap, match="is repeated"):
        store.fold(Batch(0, [reserved(1, 5, 5)]))


def spoil(raw: list[Any], name: bytes, value: bytes | None) -> list[Any]:
    fields = list(raw[1])
    at = fields.index(name)
    return [raw[0], fields[:at] + ([] if value is None else [name, value]) + fields[at + 2 :]]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    first_quick(
        4,
        [
            (b"committed", None, "it has no committed"),
            (b"user_id", b"\xff\xfe", "utf-8"),
            (b"v", str(EVENT_VERSION + 1).encode(), "install a newer one"),
            (b"v", b"0", "its version is 0"),
            (b"type", b"budget-forgotten", "type is unknown"),
            (b"amount", b"1.5", "1.5"),
            (b"amount", b"1000000000000001", "must be a whole number"),
            (b"payload", b'{"hold":', "not JSON"),
            (b"payload", b"[]", "lacks a member"),
            (b"payload", b'{"hold":1}', "lacks a member"),
        ],
    ),
)
def test_an_unreadable_entry_stops_the_fold_and_is_named(
    store: Store, name: bytes, value: bytes | None, problem: str
) -> None:
    entries = [reserved(1, 5, 5), spoil(reserved(2, 5, 10), name, value), reserved(3, 5, 15)]
    with pytest.raises(UnreadableEvent, match=problem) as caught:
        store.fold(Batch(0, entries))
    assert caught.value.entry_id == entries[1][0].decode()
    assert store.position().seq == 0
    assert store.query("SELECT * FROM events") == []
    fold_in(store, [reserved(1, 5, 5)])
    assert store.position().seq == 1


def test_an_older_version_is_upcast(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old = EVENT_VERSION - 1
    monkeypatch.setitem(UPCASTERS, ("budget-reserved", old), lambda payload: {**payload, "plan": "growth"})
    call = settled(3, 5, 5, 10)
    entries = [reserved(1, 5, 5), *(spoil(raw, b"v", b"%d" % old) for raw in (reserved(2, 5, 10), call))]
    store.fold(Batch(0, entries))
    rows = store.query("SELECT v, plan, payload::VARCHAR AS payload FROM events ORDER BY seq")
    assert [(row["v"], row["plan"]) for row in rows] == [(EVENT_VERSION, "trial"), (old, "growth"), (old, None)]
    assert rows[2]["payload"].encode() == call[1][-1]


def undescribed(store: Store) -> list[str]:
    rows = store.query(
        "SELECT table_name || '.' || column_name AS name FROM duckdb_columns() WHERE comment IS NULL AND NOT internal "
        "UNION ALL SELECT table_name FROM duckdb_tables() WHERE comment IS NULL AND NOT internal "
        "UNION ALL SELECT view_name FROM duckdb_views() WHERE comment IS NULL AND NOT internal ORDER BY name"
    )
    return [row["name"] for row in rows]


def test_every_table_view_and_column_is_described(store: Store) -> None:
    assert undescribed(store) == []


def test_a_view_or_column_without_a_description_is_found(store: Store) -> None:
    with store.reading() as cursor:
        cursor.execute("CREATE VIEW bare AS SELECT 1 AS a")
        cursor.execute("COMMENT ON COLUMN spend.plan IS NULL")
    assert undescribed(store) == ["bare", "bare.a", "spend.plan"]


def test_every_money_column_is_an_exact_decimal(store: Store) -> None:
    types = store.query(
        "SELECT DISTINCT data_type FROM duckdb_columns() WHERE column_name LIKE '%_usd' AND NOT internal"
    )
    assert types == [{"data_type": "DECIMAL(18,9)"}]
    floats = store.query("SELECT * FROM duckdb_columns() WHERE data_type IN ('DOUBLE', 'FLOAT') AND NOT internal")
    assert floats == []


def test_sql_names_a_user_s_budget_as_the_gate_s_callers_do(store: Store) -> None:
    named = store.query("SELECT user_budget('team:7', '2026-11') AS name")
    assert named == [{"name": budget_name("user", "team:7", "2026-11")}]
