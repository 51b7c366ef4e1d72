"""DuckDB is checked and not trusted: changes by hand in the file are found; an unchanged file has no finding."""

import shutil
from pathlib import Path

import duckdb
import pytest
from redis.asyncio import Redis

from tests.ledger_maker import LedgerMaker
from tests.quick import first_quick
from tests.servers import wait_until
from tests.system import REPLIES, STREAMS, running_system
from tollbook.inference.runtime import now_ms
from tollbook.inference.setting_tables import CapTable
from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreChanged
from tollbook.ledger.stream import Batch
from tollbook.schemas.identifiers import month_at
from tollbook.schemas.results import TaskStatus

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


@pytest.mark.slow
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 7, 1_000])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_file_that_the_fold_wrote_has_no_problem(tmp_path: Path, seed: int, batch: int) -> None:
    """Wherever batches end, and after the file was opened again."""
    store = folded(tmp_path / "t.duckdb", seed=seed, batch=batch, steps=300 if batch == 1_000 else 100)
    store.check()
    store.close()
    store = Store.open(tmp_path / "t.duckdb", "ledger-1")
    store.check()
    store.close()


def test_an_empty_file_has_no_problem(tmp_path: Path) -> None:
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
        "INSERT INTO budgets VALUES ('user:x:2026-11', 0, 'user', 'x', '2026-11', 1, 0, 5, '1-1', 1, 0)",
        r"user x, period 2026-11: \$1\.00 settled and \$0\.00 held, the events give \$0\.00 and \$0\.00",
    ),
    "a budget's checksum": (
        "UPDATE budgets SET checksum = 1 WHERE budget = 'user:user:1:2026-11'",
        "user user:1, period",
    ),
    "a number of budgets": ("UPDATE position SET budgets = budgets + 1", "rows of budgets, the positions count"),
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


@pytest.mark.slow
@pytest.mark.parametrize(("change", "problem"), first_quick(6, CHANGES.values()), ids=CHANGES.keys())
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


def test_a_balance_changed_while_the_file_is_open_decides_nothing(tmp_path: Path) -> None:
    """Not even when more was folded into it; the other budgets are read as before."""
    store, other = folded(tmp_path / "t.duckdb", steps=40), "user:user:2:2026-11"
    entries = LedgerMaker(7).run(80).entries
    assert store.baselines([BUDGET, other]).changed == frozenset()
    with store.connection.cursor() as cursor:
        cursor.execute("UPDATE budgets SET settled_usd = settled_usd - 1 WHERE budget = ?", [BUDGET])
    for _ in range(2):
        page = store.baselines([BUDGET, other])
        assert (page.changed, BUDGET in page.balances, other in page.balances) == ({BUDGET}, False, True)
        store.fold(Batch(0, entries[store.position().seq :]))
    assert store.position().seq == len(entries)
    assert store.has_changed
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM budgets WHERE budget = 'user:user:1:2026-11'",
        "INSERT INTO budgets SELECT * REPLACE ('user:x:1' AS budget) FROM budgets LIMIT 1",
    ],
)
def test_a_balance_dropped_or_added_while_the_file_is_open_decides_nothing(tmp_path: Path, change: str) -> None:
    store = folded(tmp_path / "t.duckdb", steps=40)
    with store.connection.cursor() as cursor:
        cursor.execute(change)
    with pytest.raises(BaselineUnavailable, match="other budgets than the fold wrote"):
        store.baselines([BUDGET])
    store.close()


@pytest.mark.slow
async def test_a_changed_balance_is_rebuilt_before_it_decides(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """The file is open, nothing else moves, and the budget's tail is empty."""
    prompt = {"task": "score_post", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
    caps = CapTable(users={"u1": 700_000})
    async with running_system(tmp_path / "data", server_url, caps=caps, tail_keep_s=1.0) as running:
        await running.publish(STREAMS[0], [{**prompt, "task_id": "first"}])
        (first,) = await running.answers(["first"])
        await running.fold_all()
        keys, budget = running.keys, f"user:u1:{month_at(now_ms()).name}"

        async def is_trimmed() -> bool:
            return not await redis_client.exists(keys.tail(budget))

        await wait_until(is_trimmed, what="an empty tail")
        spent = running.system.projection.store.baselines([budget]).balances[budget]
        with running.system.projection.store.connection.cursor() as cursor:
            cursor.execute("UPDATE budgets SET settled_usd = 0")
        await running.publish(STREAMS[0], [{**prompt, "task_id": "second"}])
        (second,) = await running.answers(["second"])
        assert (first.status, second.status) == (TaskStatus.DONE, TaskStatus.DENIED)
        assert running.system.projection.store.baselines([budget]).balances[budget] == spent
    assert list((tmp_path / "data").glob("tollbook.duckdb.*.bad")), "the changed file was set aside"
