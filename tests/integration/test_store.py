"""The DuckDB file: one writer, consistent readers, and how an unusable file is handled."""

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import duckdb
import pytest

from tests.ledger_maker import LedgerMaker
from tests.quick import first_quick
from tollbook.ledger.errors import BaselineUnavailable, WrongPartitions
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.fold import LedgerMismatch
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreClosed, StoreFailed, StoreLocked, StoreOutOfMemory
from tollbook.ledger.stream import Batch

pytestmark = pytest.mark.usefixtures("projections_made_anew")

HELD_BY_ANOTHER = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def now() -> datetime:
    return datetime(2026, 11, 24, 12, 30, tzinfo=UTC)


def filled(path: Path, *, steps: int = 100) -> Store:
    store = Store.open(path, "ledger-1", now=now)
    store.fold(Batch(0, LedgerMaker(7).run(steps).entries))
    return store


def test_a_new_store_begins_at_position_zero(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "deep" / "t.duckdb", "ledger-1", 3)
    assert [store.position(partition).seq for partition in range(3)] == [0, 0, 0]
    assert store.baselines(["user:u:2026-11", "it's"]).balances == {}
    store.close()


def test_a_reopened_store_goes_on_where_it_stopped(tmp_path: Path) -> None:
    entries = LedgerMaker(3).run(80).entries
    store = Store.open(tmp_path / "t.duckdb", "ledger-1")
    store.fold(Batch(0, entries[:30]))
    store.close()
    store = Store.open(tmp_path / "t.duckdb", "ledger-1")
    assert store.position().seq == 30
    store.fold(Batch(0, entries[30:]))
    whole = Store.open(tmp_path / "whole.duckdb", "ledger-1")
    whole.fold(Batch(0, entries))
    assert compare(store, whole) == []
    store.close()
    whole.close()


@pytest.mark.slow
def test_what_was_folded_survives_a_crash_before_the_checkpoint(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom tests.integration.test_store import filled\n"
        "filled(Path(sys.argv[1]))\nos._exit(1)\n"
    )
    path = tmp_path / "t.duckdb"
    subprocess.run([sys.executable, "-c", program, str(path)], check=False, cwd=Path.cwd())
    reopened = Store.open(path, "ledger-1")
    whole = filled(tmp_path / "whole.duckdb")
    assert reopened.position().seq > 0
    assert compare(reopened, whole) == []
    reopened.close()
    whole.close()


@pytest.mark.slow
def test_a_file_of_another_ledger_is_refused_and_left_alone(tmp_path: Path) -> None:
    filled(tmp_path / "t.duckdb").close()
    with pytest.raises(LedgerMismatch, match=r"ledger-1.*ledger-2"):
        Store.open(tmp_path / "t.duckdb", "ledger-2")
    with pytest.raises(WrongPartitions):
        Store.open(tmp_path / "t.duckdb", "ledger-1", 2)
    store = Store.open(tmp_path / "t.duckdb", "ledger-1")
    assert store.position().seq > 0
    store.close()


def test_a_file_open_in_another_process_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "t.duckdb"
    with subprocess.Popen(
        [sys.executable, "-c", HELD_BY_ANOTHER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(StoreLocked, match="another process"):
            Store.open(path, "ledger-1")
        other.communicate()
    Store.open(path, "ledger-1").close()
    assert list(tmp_path.glob("*.bad")) == []


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def truncated(path: Path) -> None:
    filled(path, steps=300).close()
    path.write_bytes(path.read_bytes()[:20_000])


def damaged_block(path: Path) -> None:
    filled(path, steps=300).close()
    content = bytearray(path.read_bytes())
    for at in range(12_288, len(content), 4096):
        content[at : at + 64] = b"\x5a" * 64
    path.write_bytes(content)


def older_layout(path: Path) -> None:
    filled(path).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE position SET schema_version = 0")


def something_else(path: Path) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE notes (text VARCHAR)")


@pytest.mark.parametrize("spoil", first_quick(2, [garbage, truncated, damaged_block, older_layout, something_else]))
def test_an_unusable_file_is_set_aside_and_begun_anew(tmp_path: Path, spoil: "object") -> None:
    path = tmp_path / "t.duckdb"
    assert callable(spoil)
    spoil(path)
    before = path.read_bytes()
    store = Store.open(path, "ledger-1", now=now)
    assert store.position().seq == 0
    bad = tmp_path / "t.duckdb.20261124T123000000000Z.bad"
    assert bad.read_bytes() == before
    store.fold(Batch(0, LedgerMaker(1).run(20).entries))
    store.close()


@pytest.mark.slow
def test_readers_see_rows_and_position_of_one_moment(tmp_path: Path) -> None:
    entries = LedgerMaker(11, users=1).run(400).entries
    names = [f"user:user:0:{period}" for period in ("2026-10", "2026-11")]
    expected: dict[int, dict[str, tuple[int, int]]] = {}
    control = Store.open(tmp_path / "control.duckdb", "l")
    steps = range(0, len(entries), 10)
    for start in steps:
        control.fold(Batch(0, entries[start : start + 10]))
        page = control.baselines(names)
        expected[page.positions[0].seq] = dict(page.balances)
    expected[0] = {}
    control.close()

    store = Store.open(tmp_path / "t.duckdb", "l")
    seen: list[tuple[int, dict[str, tuple[int, int]]]] = []
    is_done = threading.Event()

    def read() -> None:
        while not is_done.is_set():
            page = store.baselines(names)
            seen.append((page.positions[0].seq, dict(page.balances)))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for start in steps:
        store.fold(Batch(0, entries[start : start + 10]))
    is_done.set()
    for reader in readers:
        reader.join()
    store.close()
    assert len({seq for seq, _ in seen}) > 3
    assert all(balances == expected[seq] for seq, balances in seen)


def test_a_closed_store_reads_and_folds_no_more(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.duckdb")
    store.close()
    store.close()
    with pytest.raises(BaselineUnavailable):
        store.baselines([])
    with pytest.raises(StoreFailed):
        store.fold(Batch(0, []))


READS: Final[dict[str, Callable[[duckdb.DuckDBPyConnection], object]]] = {
    "execute": lambda cursor: cursor.execute("FROM position"),
    "fetchall": lambda cursor: cursor.fetchall(),
    "fetchmany": lambda cursor: cursor.fetchmany(10),
    "to_arrow_table": lambda cursor: cursor.to_arrow_table(),
}


@pytest.mark.slow
@pytest.mark.parametrize("read", READS)
def test_a_read_during_which_the_store_is_closed_says_so(tmp_path: Path, read: str) -> None:
    store = filled(tmp_path / "t.duckdb")
    is_reading, is_closed = threading.Event(), threading.Event()

    def fetch() -> None:
        with store.reading() as cursor:
            cursor.execute("FROM range(100_000)")
            assert cursor.fetchmany(1) == [(0,)]
            is_reading.set()
            assert is_closed.wait(30)
            READS[read](cursor)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(fetch)
        assert is_reading.wait(30)
        store.close()
        is_closed.set()
        with pytest.raises(StoreClosed, match=r"t\.duckdb is closed"):
            reading.result(30)


@pytest.mark.parametrize(
    "problem",
    first_quick(2, [
        duckdb.InvalidInputException, duckdb.ConnectionException, duckdb.FatalException, duckdb.InternalException,
        duckdb.InterruptException, duckdb.IOException, duckdb.TransactionException,
    ]),
)  # fmt: skip
def test_whatever_duckdb_raises_once_the_store_is_closed_is_one_error(
    tmp_path: Path, problem: type[duckdb.Error]
) -> None:
    store = filled(tmp_path / "t.duckdb")

    def read() -> None:
        with store.reading():
            store.close()
            raise problem("as DuckDB puts it")

    with pytest.raises(StoreClosed):
        read()


def test_a_failing_database_is_distinguished_from_a_wrong_query(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.duckdb")
    with pytest.raises(BaselineUnavailable, match="cannot read"), store.reading():
        raise duckdb.FatalException("the database was invalidated")
    with pytest.raises(duckdb.BinderException), store.reading() as cursor:
        cursor.execute("SELECT nothing FROM position")
    store.close()


@pytest.mark.slow
def test_no_connection_draws_a_progress_bar() -> None:
    """DuckDB draws one by default in a process without a main script, as a worker made by `multiprocessing` is."""
    program = (
        "from tollbook.ledger.projection.database import connect\nconnection = connect()\n"
        "for each in (connection, connection.cursor()):\n"
        "    print(each.execute(\"SELECT current_setting('enable_progress_bar')\").fetchall())\n"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output == "[(False,)]\n[(False,)]\n"


@pytest.mark.parametrize("room", ["ledger", "audit"])
def test_every_connection_is_made_in_one_place(room: str) -> None:
    sources = (Path(__file__).parents[2] / room).rglob("*.py")
    found = [path for path in sources if re.search(r"duckdb\.connect\(|from duckdb import", path.read_text("utf-8"))]
    assert [path.name for path in found] == (["database.py"] if room == "ledger" else [])


def test_a_wrong_query_does_not_spoil_the_next(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.duckdb")
    with pytest.raises(duckdb.Error):
        store.query("SELECT nothing FROM nowhere")
    assert store.query("SELECT count(*) AS n FROM position WHERE partition = ?", [0]) == [{"n": 1}]
    store.close()


@pytest.mark.slow
def test_a_reopened_store_can_be_checkpointed(tmp_path: Path) -> None:
    path = tmp_path / "t.duckdb"
    entries = LedgerMaker(3).run(80).entries
    store = Store.open(path, "ledger-1")
    store.fold(Batch(0, entries[:30]))
    store.close()
    store = Store.open(path, "ledger-1")
    store.fold(Batch(0, entries[30:]))
    log = path.with_name("t.duckdb.wal")
    assert log.stat().st_size > 0
    store.checkpoint()
    assert not log.exists() or log.stat().st_size == 0
    store.close()


MEMORY: Final = "raise TOLLBOOK_DUCKDB_MEMORY, or give this machine more free memory"


@pytest.mark.slow
def test_a_file_that_there_is_no_memory_to_open_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.duckdb"
    filled(path).close()
    with pytest.raises(StoreOutOfMemory, match=f"its limit is 1MB: {MEMORY}") as refused:
        Store.open(path, "ledger-1", memory_limit="1MB", now=now)
    assert refused.value.is_recoverable
    assert [each.name for each in tmp_path.iterdir()] == ["t.duckdb"], "nothing is set aside"
    store = Store.open(path, "ledger-1", now=now)
    assert store.position().seq > 0
    store.close()


@pytest.mark.slow
def test_a_fold_and_a_read_without_memory_say_so(tmp_path: Path) -> None:
    store = filled(tmp_path / "t.duckdb")
    before = store.position()
    store.close()
    # Enough to open the file, and for no more.
    store = Store.open(tmp_path / "t.duckdb", "ledger-1", memory_limit="4MB", now=now)
    more = LedgerMaker(7).run(20_000).entries[before.seq :]
    with pytest.raises(StoreOutOfMemory, match=f"its limit is 4MB: {MEMORY}") as refused:
        store.fold(Batch(0, more))
    assert refused.value.is_recoverable
    with pytest.raises(BaselineUnavailable, match=MEMORY):
        store.query("SELECT count(*) FROM (FROM range(1000000) AS t(i) ORDER BY hash(i))")
    store.connection.execute("SET memory_limit = '1GB'")
    assert store.position() == before
    store.fold(Batch(0, more))
    store.close()
