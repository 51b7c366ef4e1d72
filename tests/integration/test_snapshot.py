"""Queries of people, on a copy: of one moment, up to date, and able to do nothing but read the projection."""

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import duckdb
import pytest

from tests.ledger_maker import LedgerMaker
from tests.servers import PATIENCE_S
from tollbook.app.connect import query_projection
from tollbook.inference.settings import Settings
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.projection.snapshot import (
    QueryCutOff,
    QueryRefused,
    check_select,
    memory_bytes,
    open_snapshot,
    take_snapshot,
)
from tollbook.ledger.projection.store import Store
from tollbook.ledger.stream import Batch

COPIES: Final = 16
# Of one moment: every event up to the position and no other, and balances that are the sum of just these.
MOMENT: Final = """
SELECT
    seq,
    (SELECT count(*) FROM events) AS events,
    (SELECT max(e.seq) FROM events AS e) AS newest,
    (SELECT sum(settled_usd) FROM budgets WHERE name = 'user') AS settled,
    (SELECT sum(amount_usd) FROM events WHERE type IN ('cost-recorded', 'cost-adjusted')) AS spent,
    (SELECT sum(held_usd) FROM budgets WHERE name = 'user') AS held,
    (SELECT sum(CASE type WHEN 'budget-reserved' THEN amount_usd WHEN 'cost-recorded' THEN -coalesce(hold_usd, 0) END)
        FROM events) AS reserved
FROM position
"""


class Writer:
    """Folds small batches without a pause, and checkpoints after every third, until it is stopped."""

    def __init__(self, store: Store) -> None:
        self.folded = 0
        self._store = store
        self._begun, self._stop = threading.Event(), threading.Event()
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> "Writer":
        self._thread.start()
        assert self._begun.wait(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for_more(self, than: int) -> int:
        """Wait until more than so many events are folded; return their number."""
        with self._progress:
            assert self._progress.wait_for(lambda: self.folded > than, PATIENCE_S)
            return self.folded

    def _write(self) -> None:
        ledger, turns = LedgerMaker(7), 0
        while not self._stop.is_set():
            before, turns = len(ledger.entries), turns + 1
            self._store.fold(Batch(0, ledger.run(40).entries[before:]))
            with self._progress:
                self.folded = len(ledger.entries)
                self._progress.notify_all()
            if turns % 3 == 0:
                self._store.checkpoint()
                self._begun.set()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A projection that is open for writing, with a part of its events in the log alone."""
    folder = tmp_path_factory.mktemp("snapshot")
    store = Store.open(folder / "t.duckdb", "ledger")
    entries = LedgerMaker(5).run(400).entries
    store.fold(Batch(0, entries[:200]))
    store.checkpoint()
    store.fold(Batch(0, entries[200:]))
    (folder / "secret.csv").write_text("a,b\n1,2\n")
    yield store.path
    store.close()


@pytest.fixture(scope="module")
def copy(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with open_snapshot(path) as connection:
        yield connection


@pytest.mark.slow
def test_a_copy_is_of_one_moment_while_folds_and_checkpoints_go_on(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "t.duckdb", "ledger")
    seen: list[int] = []
    with Writer(store) as writer:
        for number in range(COPIES):
            committed = writer.wait_for_more(seen[-1] if seen else 0)
            if number % 2:
                with open_snapshot(store.path) as connection:
                    row = connection.execute(MOMENT).fetchall()[0]
            else:
                take_snapshot(store.path, tmp_path / "copy.duckdb")
                with duckdb.connect(str(tmp_path / "copy.duckdb"), read_only=True) as connection:
                    row = connection.execute(MOMENT).fetchall()[0]
            seq, events, newest, settled, spent, held, reserved = row
            assert (seq, seq, settled, held) == (events, newest, spent, reserved)
            assert seq >= committed, "what was committed before is in the copy"
            seen.append(seq)
    store.close()
    assert seen == sorted(set(seen)), "it was written to meanwhile"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["copy.duckdb", "t.duckdb"]


def test_what_was_committed_last_is_shown_though_no_checkpoint_was_made(path: Path) -> None:
    assert path.with_name("t.duckdb.wal").stat().st_size > 0
    before = path.read_bytes()
    with open_snapshot(path) as connection:
        assert connection.execute("SELECT seq = 200, (SELECT count(*) FROM events) = seq FROM position").fetchall() == [
            (False, True)
        ]
        assert [found.name for found in path.parent.glob(".*")] == [], "the copy has no name any more"
    assert path.read_bytes() == before


def test_a_commit_that_was_being_written_is_left_out(path: Path, tmp_path: Path) -> None:
    """A log that ends within its first commit, as one that is copied at that moment."""
    take_snapshot(path, tmp_path / "t.duckdb")
    (tmp_path / "t.duckdb.wal").write_bytes(path.with_name("t.duckdb.wal").read_bytes()[:4_096])
    with open_snapshot(path) as whole:
        expected = whole.execute(MOMENT).fetchall()
    take_snapshot(tmp_path / "t.duckdb", tmp_path / "copy.duckdb")
    assert not (tmp_path / "copy.duckdb.wal").exists()
    for copy in (tmp_path / "t.duckdb", tmp_path / "copy.duckdb"):
        with open_snapshot(copy) as connection:
            assert connection.execute(MOMENT).fetchall() == expected


def test_a_missing_or_damaged_projection_is_reported_by_a_copy(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match=r"there is no projection at .*start `tollbook up`"):
        take_snapshot(tmp_path / "none" / "t.duckdb", tmp_path / "copy.duckdb")
    (tmp_path / "t.duckdb").write_bytes(b"no database" * 2_000)
    with (
        pytest.raises(LedgerUnavailable, match=r"t.duckdb is empty or not a projection: move it away"),
        open_snapshot(tmp_path / "t.duckdb"),
    ):
        pass
    assert [found.name for found in tmp_path.iterdir()] == ["t.duckdb"]


COPY_WITHOUT_ROOM: Final = """
import resource, signal, sys
from pathlib import Path
from tollbook.ledger.projection.snapshot import open_snapshot
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with open_snapshot(Path(sys.argv[1])):
    pass
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit of file sizes here")
def test_a_copy_without_room_on_the_disk_fails_at_once_and_leaves_nothing(path: Path) -> None:
    before = sorted(path.parent.iterdir())
    done = subprocess.run([sys.executable, "-c", COPY_WITHOUT_ROOM, path], capture_output=True, text=True, check=False)
    assert "could not be copied: [Errno 27] File too large" in done.stderr.splitlines()[-1]
    assert sorted(path.parent.iterdir()) == before


# What reads or writes a file, a setting or another database, wherever it stands in the statement.
REACHES_OUT: Final = [
    "FROM read_csv('{folder}/secret.csv')",
    "FROM '{folder}/secret.csv'",
    'FROM "{folder}/secret.csv"',
    "FROM secret.csv",
    "FROM main.read_text('{folder}/secret.csv')",
    "FROM READ_TEXT('{folder}/secret.csv')",
    "FROM read_blob('{folder}/secret.csv')",
    "FROM read_json('{folder}/secret.csv')",
    "FROM parquet_scan('{folder}/secret.csv')",
    "FROM parquet_metadata('{folder}/secret.csv')",
    "FROM sniff_csv('{folder}/secret.csv')",
    "FROM read_duckdb('{folder}/t.duckdb')",
    "FROM glob('{folder}/*')",
    "FROM 'http://127.0.0.1:1/a.csv'",
    "FROM 's3://bucket/a.parquet'",
    "SELECT (SELECT max(content) FROM read_text('{folder}/secret.csv'))",
    "SELECT 1 LIMIT (SELECT count(*) FROM read_text('{folder}/secret.csv'))",
    "SELECT 1 OFFSET (SELECT count(*) FROM glob('{folder}/*'))",
    "SELECT 1 GROUP BY ALL HAVING (SELECT count(*) FROM glob('{folder}/*')) > 0",
    "SELECT CASE WHEN (SELECT true FROM glob('{folder}/*')) THEN 1 END",
    "SELECT count(*) FILTER (WHERE EXISTS (FROM glob('{folder}/*'))) FROM spend",
    "SELECT user_id FROM spend QUALIFY row_number() OVER (ORDER BY (SELECT count(*) FROM glob('{folder}/*'))) = 1",
    "SELECT list_transform(['{folder}/secret.csv'], lambda x: (SELECT max(content) FROM read_text(x)))",
    "WITH a AS (WITH b AS (FROM read_text('{folder}/secret.csv')) FROM b) FROM a",
    "WITH a AS MATERIALIZED (FROM read_text('{folder}/secret.csv')) FROM a",
    "WITH RECURSIVE t(n) AS (SELECT content FROM read_text('{folder}/secret.csv') UNION ALL FROM t) FROM t",
    "FROM spend, LATERAL (FROM read_text('{folder}/secret.csv'))",
    "FROM spend SEMI JOIN read_text('{folder}/secret.csv') AS t ON true",
    "FROM (VALUES ((SELECT max(content) FROM read_text('{folder}/secret.csv'))))",
    "PIVOT (FROM read_text('{folder}/secret.csv')) ON content USING count(*)",
    "UNPIVOT (FROM read_text('{folder}/secret.csv')) ON content INTO NAME n VALUE v",
    "COPY spend TO '{folder}/stolen.csv'",
    "COPY (SELECT 1) TO '{folder}/stolen.parquet'",
    "COPY events FROM '{folder}/secret.csv'",
    "EXPORT DATABASE '{folder}/stolen'",
    "IMPORT DATABASE '{folder}/stolen'",
    "ATTACH '{folder}/other.duckdb'",
    "ATTACH '{folder}/t.duckdb' AS other (READ_WRITE)",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{folder}/secret.csv'",
    "SET enable_external_access = true",
    "SET memory_limit = '99GB'",
    "RESET memory_limit",
    "PRAGMA memory_limit = '99GB'",
    "SET python_enable_replacements = true",
    "SELECT getenv('HOME')",
    "SELECT ('HOME').getenv()",
    "SELECT \"getenv\"('HOME')",
    "SELECT list_transform([1], lambda x: getenv('HOME'))",
    "SELECT COLUMNS(x -> getenv(x)) FROM spend",
    "VALUES (getenv('HOME'))",
    "FROM duckdb_secrets()",
    "FROM duckdb_extensions()",
    "FROM sqlite_scan('{folder}/a', 'b')",
    "DELETE FROM events",
    "UPDATE budgets SET settled_usd = 0",
    "INSERT INTO position FROM position",
    "WITH a AS (SELECT 1) DELETE FROM events",
    "WITH a AS (DELETE FROM events RETURNING *) FROM a",
    "MERGE INTO budgets USING (SELECT 1) AS s ON true WHEN MATCHED THEN DELETE",
    "TRUNCATE events",
    "DROP VIEW spend",
    "ALTER TABLE events RENAME TO gone",
    "CREATE TABLE more (a INTEGER)",
    "CREATE OR REPLACE VIEW spend AS SELECT 1",
    "/* SELECT */ DELETE FROM events",
    "SELECT 1; DELETE FROM events",
    "FROM rows_of_this_process",
]
# Harmless on a copy, but no question to the projection.
BESIDE_THE_POINT: Final = [
    "",
    "nonsense",
    "SELECT 1; SELECT 2",
    "SELECT current_setting('memory_limit')",
    "FROM duckdb_settings()",
    "FROM pragma_storage_info('events')",
    "FROM query('SELECT 1')",
    "FROM query_table('spend')",
    "FROM json_execute_serialized_sql('x')",
    "FROM duckdb_logs()",
    "FROM pg_catalog.pg_tables",
    "SELECT write_log('x')",
    "SELECT sleep_ms(1)",
    "SELECT error('x')",
    "SELECT nextval('s')",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "CREATE TEMP MACRO m(a) AS TABLE FROM read_text(a)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
]


@pytest.mark.parametrize("sql", [sql for sql in REACHES_OUT if sql != "FROM rows_of_this_process"] + BESIDE_THE_POINT)
def test_what_is_not_one_select_over_the_projection_is_refused(path: Path, sql: str) -> None:
    with pytest.raises(QueryRefused, match="only one SELECT over the projection's tables and views"):
        check_select(sql.replace("{folder}", str(path.parent)))


@pytest.mark.parametrize("sql", REACHES_OUT)
def test_a_query_that_the_guard_overlooks_can_still_change_nothing(
    path: Path, copy: duckdb.DuckDBPyConnection, sql: str
) -> None:
    rows_of_this_process = [1]  # noqa: F841 - DuckDB would find it by its name.
    before = sorted(path.parent.iterdir())
    with pytest.raises(duckdb.Error):
        copy.execute(sql.replace("{folder}", str(path.parent))).fetchall()
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize(
    "sql",
    [
        "FROM spend",
        "TABLE calls",
        "DESCRIBE spend",
        "SHOW TABLES",
        "SUMMARIZE budgets",
        "SELECT usd(1), nanousd(1.0), round(2.5), now() - max(recorded_at) FROM events",
        "WITH a AS (FROM spend) SELECT user_id, rank() OVER (ORDER BY spent_usd) FROM a",
        "SELECT payload->>'$.hold', unnest(range(3)) FROM events WHERE regexp_matches(user_id, 'user:[12]')",
        "SELECT s.user_id, x.n FROM spend AS s, LATERAL (SELECT count(*) AS n FROM calls WHERE plan = s.plan) AS x",
        "SELECT date_trunc('week', recorded_at), sum(amount_usd) FILTER (type <> 'x') FROM events GROUP BY ALL",
        "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE NOT internal",
        "SELECT * FROM information_schema.tables",
    ],
)
def test_a_question_is_answered(copy: duckdb.DuckDBPyConnection, sql: str) -> None:
    check_select(sql)
    assert copy.execute(sql).to_arrow_table().num_rows > 0


def test_the_memory_of_a_query_is_limited(path: Path) -> None:
    with open_snapshot(path, memory_limit="64MB") as connection, pytest.raises(duckdb.OutOfMemoryException):
        connection.execute("SELECT list(x) FROM range(100000000) AS t(x)").fetchall()


@pytest.mark.parametrize("limit", ["1MB", "64MB"])
def test_a_question_of_a_command_without_memory_names_limit_and_setting(path: Path, tmp_path: Path, limit: str) -> None:
    take_snapshot(path, tmp_path / "tollbook.duckdb")
    settings = Settings(data_dir=tmp_path).model_copy(update={"report_memory": limit})
    said = f"its limit is {limit}: raise TOLLBOOK_REPORT_MEMORY, or give this machine more free memory"
    with pytest.raises(QueryCutOff, match=said):
        query_projection(settings, "SELECT list(x) FROM range(100000000) AS t(x)")


@pytest.mark.parametrize("text", ["", "0MB", "512", "1 TB", "-1GB", "1.5GB", "512MB; SET threads = 8"])
def test_a_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size must be written like 512MB or 2GB"):
        memory_bytes(text)


def test_sizes_are_in_bytes() -> None:
    assert [memory_bytes(text) for text in ("512MB", "2 gb")] == [512 * 10**6, 2 * 10**9]
