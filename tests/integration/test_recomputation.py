"""DuckDB is checked, not believed: what a hand changed in the file is found; a file of the fold alone never is."""

import shutil
from pathlib import Path

import duckdb
import pytest

from tests.ledger_maker import LedgerMaker
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreChanged
from tollbook.ledger.stream import Batch

BUDGET = "user:user:1:2026-11"


def folded(path: Path, *, seed: int = 7, steps: int = 300, batch: int = 1_000) -> Store:
    store = Store.open(path, "ledger-1")
    entries = LedgerMaker(seed).run(steps).entries
    for start in range(0, len(entries), batch):
        store.fold(Batch(0, entries[start : start + batch]))
    return store


@pytest.fixture(scope="module")
def in_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the fold has left it, to be copied."""
    path = tmp_path_factory.mktemp("in-order") / "t.duckdb"
    folded(path).close()
    return path


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 7, 1_000])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_what_the_fold_wrote_is_in_order(tmp_path: Path, seed: int, batch: int) -> None:
    """Wherever batches end, and after the file was opened again."""
    store = folded(tmp_path / "t.duckdb", seed=seed, batch=batch, steps=300 if batch == 1_000 else 100)
    store.check()
    store.close()
    store = Store.open(tmp_path / "t.duckdb", "ledger-1")
    store.check()
    store.close()


def test_an_empty_file_is_in_order(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "t.duckdb", "ledger-1", 3)
    store.check()
    store.close()


CHANGES = {
    "spend forgotten": (
        "UPDATE budgets SET settled_usd = 0 WHERE budget = 'user:user:1:2026-11'",
        r"user user:1, period 2026-11: \$0\.00 settled .* the events give \$",
    ),
    "a hold dropped": (
        "UPDATE budgets SET held_usd = held_usd - 1 WHERE budget = 'user:user:1:2026-11'",
        "user user:1, period",
    ),
    "a cap raised": (
        "UPDATE budgets SET cap_usd = 900000 WHERE budget = 'user:user:1:2026-11'",
        "user user:1, period 2026-11",
    ),
    "a budget dropped": (
        "DELETE FROM budgets WHERE budget = 'user:user:1:2026-11'",
        r"period 2026-11: \$0\.00 settled",
    ),
    "a budget added": (
        "INSERT INTO budgets VALUES ('user:x:2026-11', 0, 'user', 'x', '2026-11', 1, 0, 5, '1-1', 1)",
        r"user x, period 2026-11: \$1\.00 settled and \$0\.00 held, the events give \$0\.00 and \$0\.00",
    ),
    "all budgets dropped": ("DELETE FROM budgets", "and .* more"),
    "an event's amount": (
        "UPDATE events SET amount_usd = amount_usd / 2 WHERE seq = 5",
        "events 1 to .* not those that",
    ),
    "a payload": ("UPDATE events SET payload = payload || ' ' WHERE seq = 9", "events 1 to .* not those"),
    "a model": ("UPDATE events SET model = 'other' WHERE seq = 9", "events 1 to .* not those"),
    "an event dropped": ("DELETE FROM events WHERE seq = 5", "events 1 to .* not those"),
    "an event added": ("INSERT INTO events SELECT * REPLACE (seq + 9999 AS seq) FROM events LIMIT 1", "not those"),
    "counters": (
        "UPDATE counters SET calls = calls + 1 WHERE budget LIKE 'user:user:1%'",
        "other counters",
    ),
    "counters added": (
        "INSERT INTO counters SELECT * REPLACE ('user:x:1' AS budget) FROM counters LIMIT 1",
        "rows of",
    ),
    "the position back": ("UPDATE position SET seq = seq - 1", "by the position, up to event"),
    "the position's id": ("UPDATE position SET id = '1-1'", "by the position"),
    "a checksum": ("UPDATE checksums SET checksum = 1", "not those that were folded"),
}


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_by_hand_is_found(in_order: Path, tmp_path: Path, change: str, problem: str) -> None:
    path = tmp_path / "t.duckdb"
    shutil.copy(in_order, path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(change)
    store = Store.open(path, "ledger-1")
    with pytest.raises(StoreChanged, match=problem):
        store.check()
    store.close()


def test_a_function_of_the_file_decides_nothing(in_order: Path, tmp_path: Path) -> None:
    """The macros that decisions use are made again."""
    path = tmp_path / "t.duckdb"
    shutil.copy(in_order, path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE OR REPLACE MACRO nanousd(dollars) AS 0::BIGINT")
    store = Store.open(path, "ledger-1")
    settled = store.baselines([BUDGET]).balances[BUDGET][0]
    assert settled > 0
    store.close()
