"""Budget checks from another process: the same answers, and nothing else is answered."""

import asyncio
import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import structlog

from tests.ledger_maker import LedgerMaker
from tollbook.ledger.errors import BaselineUnavailable
from tollbook.ledger.projection.quack import ADDRESS_FILE, TOKEN_FILE, QuackServer, RemoteStore, load_extensions
from tollbook.ledger.projection.store import Store, baselines_sql
from tollbook.ledger.stream import Batch

READ_ELSEWHERE = """
import json, sys
from pathlib import Path
from tollbook.ledger.projection.quack import RemoteStore
remote = RemoteStore.open(Path(sys.argv[1]))
page = remote.baselines(json.loads(sys.argv[2]))
print(json.dumps([page.positions[0].seq, str(page.positions[0].entry), dict(page.balances)]))
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(tmp_path / "t.duckdb", "ledger-1")
    made.fold(Batch(0, LedgerMaker(5).run(200).entries))
    yield made
    made.close()


@pytest.fixture
def server(store: Store, tmp_path: Path) -> Iterator[QuackServer]:
    started = QuackServer.start(store, tmp_path)
    yield started
    started.stop()


@pytest.fixture
def remote(server: QuackServer, tmp_path: Path) -> Iterator[RemoteStore]:
    opened = RemoteStore.open(tmp_path)
    yield opened
    opened.close()


def test_remote_baselines_equal_local_ones(store: Store, remote: RemoteStore) -> None:
    names = [row["budget"] for row in store.query("SELECT budget FROM budgets")]
    assert len(names) > 5
    assert remote.baselines([*names, "user:it's:2026-11"]) == store.baselines(names)
    assert remote.position() == store.position()


def test_another_process_reads_exact_integers(server: QuackServer, store: Store, tmp_path: Path) -> None:
    names = [row["budget"] for row in store.query("SELECT budget FROM budgets LIMIT 3")]
    arguments = [sys.executable, "-c", READ_ELSEWHERE, str(tmp_path), json.dumps(names)]
    output = subprocess.run(arguments, check=True, capture_output=True).stdout
    page = store.baselines(names)
    position = page.positions[0]
    assert json.loads(output) == [
        position.seq,
        str(position.entry),
        {name: list(balance) for name, balance in page.balances.items()},
    ]


def test_remote_sees_what_is_folded_meanwhile(store: Store, remote: RemoteStore) -> None:
    before = remote.position().seq
    entries = LedgerMaker(5).run(260).entries
    store.fold(Batch(0, entries[before:]))
    assert remote.position().seq == len(entries) > before


class Served:
    """A projection that is served, and a client that has the token and sends what it likes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store.open(folder / "t.duckdb", "ledger-1")
        self.store.fold(Batch(0, LedgerMaker(5).run(200).entries))
        self.server = QuackServer.start(self.store, folder)
        self.remote = RemoteStore.open(folder)
        self.client = duckdb.connect()
        load_extensions(self.client)
        token = (folder / TOKEN_FILE).read_text()
        self.client.execute(f"ATTACH '{self.server.uri}' AS ledger (TYPE quack, TOKEN '{token}')")

    def ask(self, sql: str) -> list[Any]:
        return self.client.execute("FROM quack_query_by_name('ledger', ?)", [sql]).fetchall()

    def close(self) -> None:
        self.client.close()
        self.remote.close()
        self.server.stop()
        self.store.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"))
    (made.folder / "secret.csv").write_text("a,b\n1,2\n")
    yield made
    made.close()


@pytest.mark.parametrize(
    "names",
    [[], ["user:u:2026-11"], ["user:it's:2026-11", "a, b", "NULL", "x') OR true --", "\n", "''"], ["'" * 9, "u" * 200]],
)
def test_the_read_of_a_budget_check_is_answered_whatever_the_names(served: Served, names: list[str]) -> None:
    assert served.remote.baselines(names).balances == {}


BASELINES = baselines_sql(["user:u:2026-11"])
REFUSED = [
    # Heavy or not, a query of one's own is for a copy of the projection: here it would hold up budget checks.
    "SELECT 1",
    "FROM spend",
    "SELECT count(*) FROM events AS a, events AS b, events AS c",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    "SELECT string_agg(payload, ',') OVER () FROM events",
    BASELINES + " OR true",
    BASELINES + "; SELECT 1",
    BASELINES[:-1] + ", (SELECT 'x'))",
    BASELINES[:-1] + ", 'a' || 'b')",
    BASELINES[:-1] + ", 'a)",
    BASELINES.replace("FROM budgets", "FROM budgets, events"),
    " " + BASELINES,
    "",
    "DELETE FROM events",
    "UPDATE budgets SET settled_usd = 0",
    "INSERT INTO position SELECT 9, 'l', '0-0', 0, 0, 1",
    "WITH t AS (SELECT 1) INSERT INTO position SELECT 9, 'l', '0-0', 0, 0, 1 RETURNING *",
    "SELECT 1; DELETE FROM events",
    "/* SELECT */ DELETE FROM events",
    "MERGE INTO budgets USING (SELECT 1) AS s ON true WHEN MATCHED THEN DELETE",
    "TRUNCATE events",
    "DROP TABLE events",
    "ALTER TABLE events RENAME TO gone",
    "CREATE TABLE more (a INTEGER)",
    "CREATE OR REPLACE MACRO usd(n) AS 0",
    "CREATE OR REPLACE MACRO quack_guard.main.only_baselines(a, b) AS b",
    "INSERT INTO quack_guard.main.answered VALUES ('', '')",
    "EXPLAIN ANALYZE DELETE FROM events",
    "PREPARE p AS DELETE FROM events",
    "BEGIN",
    "CHECKPOINT",
    "SELECT * FROM checkpoint()",
    "VACUUM",
    "SET GLOBAL quack_authorization_function = 'quack_nop_authorization'",
    "RESET GLOBAL quack_authorization_function",
    "CALL quack_stop('quack:127.0.0.1:1')",
    "SELECT * FROM quack_stop('quack:127.0.0.1:1')",
    "SELECT * FROM quack_serve('quack:127.0.0.1:1', token => 'abcdefgh')",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('events')",
    "SELECT * FROM json_execute_serialized_sql('x')",
    "COPY events TO '{folder}/stolen.csv'",
    "COPY (SELECT 1) TO '{folder}/stolen.csv'",
    "COPY events FROM '{folder}/secret.csv'",
    "EXPORT DATABASE '{folder}/stolen'",
    "ATTACH '{folder}/other.duckdb'",
    "SELECT * FROM '{folder}/secret.csv'",
    'SELECT * FROM "{folder}/secret.csv"',
    "SELECT * FROM secret.csv",
    "SELECT * FROM read_csv('{folder}/secret.csv')",
    "SELECT * FROM read_text('{folder}/secret.csv')",
    "SELECT (SELECT max(content) FROM read_text('{folder}/secret.csv'))",
    "SELECT * FROM main.read_text('{folder}/secret.csv')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM quack_guard.main.answered",
    "SELECT write_log('x')",
    "SELECT sleep_ms(1)",
    "INSTALL httpfs",
    "LOAD httpfs",
    "nonsense",
]


@pytest.mark.parametrize("sql", REFUSED)
def test_whatever_is_not_a_budget_check_is_refused(served: Served, sql: str) -> None:
    files = {path.name for path in served.folder.iterdir()}
    rows = served.store.query("SELECT * FROM events ORDER BY seq")
    with pytest.raises(duckdb.Error, match=r"budget checks only: ask with tollbook sql|Authorization failed"):
        served.ask(sql.replace("{folder}", str(served.folder)))
    assert served.store.query("SELECT * FROM events ORDER BY seq") == rows
    assert {path.name for path in served.folder.iterdir()} <= files | {"t.duckdb.wal"}
    assert served.remote.position() == served.store.position()


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO ledger.position VALUES (9, 'l', '0-0', 0, 0, 1)",
        "CREATE TABLE ledger.more (a INTEGER)",
        "DROP TABLE ledger.events",
        "DELETE FROM ledger.events",
        "UPDATE ledger.position SET seq = 0",
    ],
)
def test_an_attached_catalog_cannot_be_written(served: Served, sql: str) -> None:
    with pytest.raises(duckdb.Error):
        served.client.execute(sql)
    store = served.store
    assert store.query("SELECT count(*) AS n, max(seq) AS seq FROM position") == [{"n": 1, "seq": store.position().seq}]
    assert store.query("SELECT count(*) AS n FROM events") == [{"n": store.position().seq}]


@pytest.mark.parametrize("sql", ["SELECT 1", "from spend", " with t as (select 1) from t", "DESCRIBE spend"])
def test_another_select_is_told_where_to_ask(served: Served, sql: str) -> None:
    with pytest.raises(duckdb.Error, match="the projector answers budget checks only: ask with tollbook sql"):
        served.ask(sql)


def test_without_the_token_nothing_is_answered(server: QuackServer, tmp_path: Path) -> None:
    with duckdb.connect() as client:
        load_extensions(client)
        with pytest.raises(duckdb.Error, match="Authentication failed"):
            client.execute("SELECT * FROM quack_query(?, 'SELECT 1', token => 'guessed')", [server.uri]).fetchall()


def test_the_token_is_made_once_and_only_its_owner_reads_it(store: Store, tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        first = QuackServer.start(store, tmp_path)
        token = (tmp_path / TOKEN_FILE).read_text()
        first.stop()
        second = QuackServer.start(store, tmp_path)
    assert [line["event"] for line in logs] == ["quack.started"] * 2
    assert token not in str(logs)
    assert (tmp_path / TOKEN_FILE).read_text() == token
    assert len(token) >= 40
    assert stat.S_IMODE((tmp_path / TOKEN_FILE).stat().st_mode) == 0o600
    second.stop()
    assert not (tmp_path / ADDRESS_FILE).exists()


def test_no_projector_is_an_unavailable_baseline(tmp_path: Path) -> None:
    with pytest.raises(BaselineUnavailable, match="no projector runs"):
        RemoteStore.open(tmp_path).baselines([])


def test_a_client_outlives_a_restart_of_the_server(store: Store, tmp_path: Path) -> None:
    first = QuackServer.start(store, tmp_path)
    remote = RemoteStore.open(tmp_path)
    assert remote.position() == store.position()
    first.stop()
    with pytest.raises(BaselineUnavailable):
        remote.position()
    second = QuackServer.start(store, tmp_path)
    assert remote.position() == store.position()
    second.stop()
    remote.close()


async def test_many_threads_read_at_once(store: Store, remote: RemoteStore) -> None:
    names = [row["budget"] for row in store.query("SELECT budget FROM budgets")]
    pages = await asyncio.gather(*(asyncio.to_thread(remote.baselines, names) for _ in range(30)))
    assert all(page == store.baselines(names) for page in pages)
