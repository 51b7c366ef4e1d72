"""The `tollbook` command as its users have it: real processes that find each other by the data directory."""

import json
import os
import re
import signal
import stat
import sys
from collections.abc import AsyncIterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import duckdb
import pytest
import pytest_asyncio

from tests.quick import first_quick
from tests.servers import wait_until
from tests.system import STREAMS, BackgroundCommand, Finished, GatedStandIn, run_cli, run_installed
from tollbook.cli.commands import COMMANDS, load_command
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.comparison import TABLES
from tollbook.ledger.server.connection import connect
from tollbook.schemas.results import InferenceResult
from tollbook.standin import StandInConfig

# One running system for the commands that only use it.
pytestmark = pytest.mark.asyncio(loop_scope="module")

IS_UP: Final = "Tollbook is up"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """A directory, empty before, in which `tollbook up --stand-in` runs."""
    directory = tmp_path_factory.mktemp("commands") / "here"
    directory.mkdir()
    command = await started("up", "--stand-in", cwd=directory)
    yield directory
    await command.end()
    assert command.process.returncode == 0, command.stderr
    assert names_in(directory) == ["data"], "nothing is left outside the data directory"


async def started(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> BackgroundCommand:
    command = await BackgroundCommand.start(*arguments, cwd=cwd, env=env, is_installed=True)

    def is_up() -> bool:
        assert command.process.returncode is None, command.stderr
        return IS_UP in command.stdout or "system.started" in command.stderr

    try:
        await wait_until(is_up, what="`tollbook up`")
    except BaseException:
        await command.end()
        raise
    return command


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_only_data(finished: Finished) -> Any:
    """Exit code 0, one JSON document on standard output, nothing on standard error."""
    assert (finished.code, finished.stderr) == (0, "")
    return finished.json()


@pytest.mark.slow
async def test_publish_waits_for_the_result(here: Path) -> None:
    command = ("publish", "generation", "generate_draft", "Write a haiku.", "--user", "u42", "--wait", "50")
    result = assert_only_data(await run_cli(*command, "--json", cwd=here))
    assert (result["status"], result["model_used"]) == ("done", "anthropic/claude-sonnet-4")
    assert Decimal(result["cost_usd"]) > 0
    shown = await run_cli(*command, cwd=here)
    assert shown.code == 0
    assert "done" in shown.stdout
    assert "[stand-in]" in shown.stdout, "the completion is shown as it is, brackets included"


async def test_result_finds_what_another_process_published(here: Path) -> None:
    published = await run_cli(
        "publish", "analysis", "score_post", "-", "--user", "u7", "--json", cwd=here, stdin="a post from a pipe"
    )
    answer = assert_only_data(published)
    assert answer["stream"] == "analysis"
    result = assert_only_data(await run_cli("result", answer["task_id"], "--wait", "50", "--json", cwd=here))
    assert (result["task_id"], result["status"], result["user_id"]) == (answer["task_id"], "done", "u7")
    shown = await run_cli("result", answer["task_id"], cwd=here)
    assert shown.code == 0
    assert answer["task_id"] in shown.stdout


async def test_ping_answers_pong(here: Path) -> None:
    assert assert_only_data(await run_installed("ping", "--json", cwd=here))["content"] == "pong"
    shown = await run_installed("ping", cwd=here)
    assert shown.code == 0
    assert "pong" in shown.stdout


async def test_spend_shows_what_was_spent_to_the_nano_dollar(here: Path) -> None:
    command = ("publish", "analysis", "score_post", "a post", "--user", "spender", "--wait", "50", "--json")
    results = [assert_only_data(await run_cli(*command, cwd=here)) for _ in range(2)]
    spent = sum(Decimal(result["cost_usd"]) for result in results)

    async def is_folded() -> Any:
        # Until then, it says on standard error that the projection is behind.
        rows = (await run_cli("spend", "spender", "--json", cwd=here)).json()
        return rows if rows and Decimal(rows[0]["spent_usd"]) == spent else None

    rows: Any = await wait_until(is_folded, what="the projection")
    assert (rows[0]["user_id"], rows[0]["calls"], rows[0]["plan"]) == ("spender", 2, "trial")
    assert (Decimal(rows[0]["cap_usd"]), Decimal(rows[0]["reserved_usd"])) == (5, 0)
    shown = await run_cli("spend", cwd=here)
    assert shown.code == 0
    assert "spender" in shown.stdout
    assert assert_only_data(await run_cli("spend", "nobody", "--json", cwd=here)) == []


@pytest.mark.slow
async def test_sql_shows_committed_data_in_every_format_while_the_system_runs(here: Path) -> None:
    publish = ("publish", "analysis", "score_post", "a post", "--user", "asker", "--wait", "50", "--json")
    cost = Decimal(assert_only_data(await run_cli(*publish, cwd=here))["cost_usd"])
    query = "SELECT user_id, spent_usd, calls FROM spend WHERE user_id = 'asker'"

    async def is_folded() -> bool:
        rows = assert_only_data(await run_cli("sql", query, "--json", cwd=here))
        return rows == [{"user_id": "asker", "spent_usd": f"{cost:.9f}", "calls": 1}]

    await wait_until(is_folded, what="the projection")
    for form in ("table", "csv", "parquet"):
        file = here / "data" / f"rows.{form}"
        finished = await run_cli("sql", "-", "--format", form, "--output", str(file), cwd=here, stdin=query)
        assert (finished.code, finished.stdout, finished.stderr) == (0, "", "")
    assert (here / "data" / "rows.csv").read_text() == f"user_id,spent_usd,calls\nasker,{cost:.9f},1\n"
    assert f"{cost:.9f}" in (here / "data" / "rows.table").read_text()
    parquet = duckdb.sql("FROM read_parquet(?)", params=[str(here / "data" / "rows.parquet")])
    assert parquet.fetchall() == [("asker", cost, 1)]


@pytest.mark.slow
async def test_a_users_own_client_opens_a_copy_in_two_lines(here: Path) -> None:
    file = here / "data" / "ledger.duckdb"
    assert (await run_cli("sql", "--snapshot", str(file), cwd=here)).code == 0
    with duckdb.connect(str(file), read_only=True) as connection:
        assert connection.execute("SELECT (SELECT sum(seq) FROM position) = count(*) FROM events").fetchall() == [
            (True,)
        ]
    assert [path.name for path in (here / "data").glob(".*")] == [], "no copy is left behind"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "limits", "says"),
    [
        ("SELECT count(*) FROM range(1000000) AS a, range(1000000) AS b", ("--timeout", "0.5"), "after 0.5 s"),
        # Looks for an interrupt only at its end, so that the process must end itself.
        ("SELECT levenshtein(repeat('ab', 1000000), repeat('ba', 1000000))", ("--timeout", "0.5"), "after 0.5 s"),
        # Streamed, so that it is cut off while its rows are written.
        ("SELECT * FROM range(1000000) AS a, range(1000000) AS b", ("--timeout", "0.5"), "after 0.5 s"),
        ("SELECT string_agg(repeat('x', 1000), '') FROM range(100000000)", ("--memory", "64MB"), "at 64MB of memory"),
        # DuckDB's own limit does not count what this takes.
        ("SELECT printf('%2000000000d', 1)", ("--memory", "64MB"), "at 64MB of memory"),
    ],
)
async def test_a_heavy_query_is_cut_off(here: Path, query: str, limits: tuple[str, ...], says: str) -> None:
    finished = await run_cli("sql", query, *limits, "--format", "csv", "--output", "data/heavy.csv", cwd=here)
    assert finished.code == 1
    assert finished.stderr.startswith(f"tollbook: the query was cut off {says}: narrow it, or allow more with --")
    assert len(finished.stderr.splitlines()) == 1
    assert not [path for path in (here / "data").iterdir() if "heavy" in path.name or path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the scheduler's idle class and /proc are Linux's")
async def test_a_heavy_query_yields_its_processor(here: Path) -> None:
    query = "SELECT count(*) FROM range(1000000) AS a, range(1000000) AS b"
    command = await BackgroundCommand.start("sql", query, cwd=here, is_installed=True)
    status = Path(f"/proc/{command.process.pid}/status")

    def gives_way() -> bool:
        caught = next(int(line.split()[1], 16) for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        is_idle = os.sched_getscheduler(command.process.pid) == os.SCHED_IDLE
        return is_idle and bool(caught >> (signal.SIGALRM - 1) & 1)

    try:
        await wait_until(gives_way, what="a query that gives way")
        assert command.process.returncode is None, command.stderr
    finally:
        await command.end()


def shown_by_processes() -> dict[Path, bytes]:
    """What a process list shows of this user's processes: their arguments and variables."""
    shown: dict[Path, bytes] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == os.getuid():
                shown[process] = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue  # It has ended meanwhile.
    return shown


@pytest.mark.slow
async def test_the_password_is_only_in_its_files(here: Path) -> None:
    password = (here / "data" / "valkey" / "password").read_text().strip()
    assert [process for process, text in shown_by_processes().items() if password.encode() in text] == []
    rows = (await run_cli("sql", "SELECT * FROM events", "--format", "csv", cwd=here)).stdout
    assert password not in rows


async def test_doctor_finds_the_running_system_well(here: Path) -> None:
    async with GatedStandIn() as provider:
        variables = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter"}
        finished = await run_cli("doctor", "--json", cwd=here, env=variables)
        findings = assert_only_data(finished)
        assert {finding["check"]: finding["state"] for finding in findings if finding["state"] != "ok"} == {}
        assert {"settings", "redis", "persistence", "duckdb", "provider"} <= {finding["check"] for finding in findings}
        shown = await run_cli("doctor", cwd=here, env=variables)
        assert shown.code == 0
        assert "append-only file, synced on every write" in shown.stdout


@pytest.mark.slow
async def test_doctor_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    finished = await run_cli("doctor", "--json", cwd=tmp_path)
    findings = {finding["check"]: finding for finding in finished.json()}
    assert finished.code == 1
    assert findings["provider"]["state"] == "failed"
    assert "OPENROUTER_API_KEY" in findings["provider"]["found"]
    assert "tollbook up" in findings["redis"]["advice"]
    assert names_in(tmp_path) == [], "looking changes nothing"


async def test_up_without_a_provider_refuses_and_names_the_stand_in(tmp_path: Path) -> None:
    for command in ("up", "worker"):
        finished = await run_cli(command, cwd=tmp_path)
        assert finished.code == 1
        assert finished.stdout == ""
        assert "OPENROUTER_API_KEY" in finished.stderr
        assert "tollbook up --stand-in" in finished.stderr
    assert names_in(tmp_path) == []


PUBLISH: Final = ("publish", "generation", "generate_draft")
# Command line, environment, exit code, words of the message.
BAD_COMMANDS: Final[dict[str, tuple[tuple[str, ...], dict[str, str], int, str]]] = {
    "unknown command": (("frobnicate",), {}, 2, "frobnicate"),
    "unknown option": (("spend", "--frobnicate"), {}, 2, "--frobnicate"),
    "unknown stream": (("publish", "nowhere", "ping"), {}, 2, "nowhere"),
    "unknown task type": (("publish", "generation", "write_novel", "x", "-u", "u1"), {}, 2, "write_novel"),
    "no prompt": ((*PUBLISH, "-u", "u1"), {}, 2, "prompt"),
    "no user": ((*PUBLISH, "Write"), {}, 2, "user_id"),
    "prompt and messages": ((*PUBLISH, "Write", "-u", "u1", "--messages", "[]"), {}, 2, "prompt"),
    "messages are not JSON": ((*PUBLISH, "-u", "u1", "--messages", "{"), {}, 2, "messages"),
    "unknown plan": ((*PUBLISH, "Write", "-u", "u1", "--plan", "gold"), {}, 2, "plan"),
    "max_tokens is no number": ((*PUBLISH, "Write", "-u", "u1", "--max-tokens", "many"), {}, 2, "--max-tokens"),
    "negative max_tokens": ((*PUBLISH, "Write", "-u", "u1", "--max-tokens", "-1"), {}, 2, "max_tokens"),
    "temperature is no number": ((*PUBLISH, "Write", "-u", "u1", "--temperature", "nan"), {}, 2, "temperature"),
    "parameters that are no object": ((*PUBLISH, "Write", "-u", "u1", "--parameters", "[1]"), {}, 2, "JSON object"),
    "an unknown parameter": ((*PUBLISH, "Write", "-u", "u1", "--parameters", '{"top_q": 1}'), {}, 2, "top_p"),
    "a tag of a list": ((*PUBLISH, "Write", "-u", "u1", "--tags", '{"team": [1]}'), {}, 2, "under 'team'"),
    "user id with a quote": ((*PUBLISH, "Write", "-u", 'u"1'), {}, 2, "user_id"),
    "negative wait": (("result", "x", "--wait", "-1"), {}, 2, "--wait"),
    "result of nothing": (("result",), {}, 2, "task_id"),
    "spend of a bad id": (("spend", 'u1"; DROP TABLE events'), {}, 2, "quotes"),
    "spend of a bad period": (("spend", "--period", "last month"), {}, 2, "YYYY-MM"),
    "spend of no users": (("spend", "--top", "0"), {}, 2, "--top"),
    "up with a bad stream": (("up", "--streams", "generation,nope"), {}, 2, "nope"),
    "worker with no concurrency": (("worker", "--concurrency", "0"), {}, 2, "--concurrency"),
    "demo of nothing": (("demo", "--tasks", "0"), {}, 2, "--tasks"),
    "misspelt setting": (("ping",), {"TOLLBOOK_CONCURENCY": "3"}, 1, "TOLLBOOK_CONCURRENCY"),
    "bad setting": (("ping",), {"TOLLBOOK_CLAIM_AFTER_S": "soon"}, 1, "TOLLBOOK_CLAIM_AFTER_S"),
    "bad Redis URL": (("ping",), {"REDIS_URL": "localhost"}, 1, "REDIS_URL"),
    "no Redis there": (("ping",), {"REDIS_URL": "redis://127.0.0.1:1"}, 1, "127.0.0.1:1"),
    "nothing runs, publish": ((*PUBLISH, "Write", "-u", "u1"), {}, 1, "tollbook up"),
    "nothing runs, result": (("result", "x"), {}, 1, "tollbook up"),
    "nothing runs, spend": (("spend",), {}, 1, "tollbook up"),
}


@pytest.mark.parametrize("case", first_quick(10, BAD_COMMANDS))
async def test_a_bad_command_is_refused_with_a_clear_message(tmp_path: Path, case: str) -> None:
    arguments, variables, code, words = BAD_COMMANDS[case]
    finished = await run_cli(*arguments, cwd=tmp_path, env=variables)
    assert finished.code == code, finished
    assert finished.stdout == ""
    assert words in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "unexpected" not in finished.stderr
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert names_in(tmp_path) == [], "a command that fails leaves nothing behind"


async def test_result_of_an_unknown_task_has_an_exit_code_of_its_own(here: Path) -> None:
    finished = await run_cli("result", "never-published", "--json", cwd=here)
    assert (finished.code, finished.stdout) == (4, "")
    assert "never-published" in finished.stderr


async def test_publish_with_wait_fails_where_the_task_was_refused(here: Path) -> None:
    # 200,000 tokens of claude-sonnet-4 at $15 a million, and a prompt so long that the call passes the trial plan's $5.
    finished = await run_cli(
        *PUBLISH,
        "-",
        "--user",
        "greedy",
        "--max-tokens",
        "200000",
        "--wait",
        "20",
        "--json",
        cwd=here,
        stdin="x" * 900_000,
    )
    assert finished.code == 1
    assert finished.json()["error_code"] == "PLAN_LIMIT_REACHED"


@pytest.mark.slow
async def test_a_second_up_on_the_same_directory_is_refused(here: Path) -> None:
    finished = await run_cli("up", "--stand-in", cwd=here)
    assert finished.code == 1
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert "Traceback" not in finished.stderr
    assert assert_only_data(await run_cli("ping", "--json", cwd=here))["content"] == "pong", "the first is unharmed"


@pytest.mark.slow
async def test_every_command_has_help_with_an_example(tmp_path: Path) -> None:
    shown = await run_installed("--help", cwd=tmp_path)
    assert shown.code == 0
    for name, entry in COMMANDS.items():
        assert f"  {name} " in shown.stdout
        assert entry.summary.split()[0] in shown.stdout
        command = load_command(name)
        names = [(name, child) for child in command.commands] if hasattr(command, "commands") else [(name,)]
        for arguments in names:
            finished = await run_cli(*arguments, "--help", cwd=tmp_path)
            assert finished.code == 0
            assert re.search(rf"^  Examples?:\n    .*tollbook {' '.join(arguments)}", finished.stdout, re.MULTILINE), (
                arguments
            )


@pytest.mark.slow
async def test_the_demo_proves_its_books(tmp_path: Path) -> None:
    """G1, G2, G3, G5 over 300 tasks with faults; exit code 0 only where every claim holds. Some are refused."""
    finished = await run_cli("demo", "--tasks", "300", "--json", cwd=tmp_path, timeout_s=60)
    assert finished.code == 0, finished.stderr
    report = finished.json()
    assert len(report["proof"]) >= 6
    assert report["statuses"]["denied"] > 0
    assert [check for check in report["proof"] if not check["is_true"]] == []
    assert names_in(tmp_path) == [], "without --keep, nothing is left"


@pytest.mark.slow
async def test_the_demo_runs_the_product_of_a_policy_file(tmp_path: Path) -> None:
    """Plans, task types, tags and prepaid credit are the file's; its model is served, no provider or receiver asked."""
    (tmp_path / "tollbook.toml").write_text("[plans.trial]\ncap_usd = 3\n")  # Not the demo's.
    (tmp_path / "shop.toml").write_text(
        """default_plan = "pro"
[plans.pro]
cap_usd = 5
[tasks.describe]
provider = "elsewhere"
model = "my/model"
max_tokens = 200
[providers.elsewhere]
base_url = "http://127.0.0.1:9/v1"
dialect = "openai"
[streams.shop]
[[budgets]]
name = "client"
by = ["client"]
window = "total"
cap_usd = 0
alerts = [1]
[prices."my/model"]
prompt = 2
completion = 4
request = 0.0001
[alerts]
webhook_env = "ALERT_WEBHOOK"
"""
    )
    arguments = ("demo", "--tasks", "150", "--policy", "shop.toml", "--keep", "--json")
    finished = await run_cli(*arguments, cwd=tmp_path, env={"ALERT_WEBHOOK": "http://127.0.0.1:9"}, timeout_s=60)
    assert finished.code == 0, finished.stderr
    report = finished.json()
    assert [check for check in report["proof"] if not check["is_true"]] == []
    assert [row["plan"] for row in report["by_plan"]] == ["pro"]
    assert [row["model"] for row in report["latencies"]] == ["my/model"]
    assert report["statuses"]["done"] > 0
    assert report["statuses"]["denied"] > 0, "some clients have no credit, or use theirs up"
    assert "receiver" not in finished.stderr
    kept = {"TOLLBOOK_DATA_DIR": "tollbook-demo", "TOLLBOOK_POLICY": "tollbook-demo/tollbook.toml"}
    spent = (await run_cli("spend", "--budgets", "--json", cwd=tmp_path, env=kept)).json()
    assert {row["value"] for row in spent} == {"client-1", "client-2"}, "the third has nothing"


@pytest.mark.slow
async def test_a_graceful_stop_finishes_and_settles_what_is_in_flight(server_url: str, tmp_path: Path) -> None:
    """SIGTERM: no hold, no pending task and no unanswered publisher is left behind (G2)."""
    tasks = [{"task": "score_post", "task_id": f"t{n}", "user_id": "u1", "prompt": "a post"} for n in range(8)]
    async with GatedStandIn() as provider, connect(server_url) as redis_client:
        await redis_client.flushall()
        await redis_client.function_flush()
        await provider.shut()
        variables = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter"}
        command = await started("up", cwd=tmp_path, env=variables | {"REDIS_URL": server_url})
        try:
            for task in tasks:
                await redis_client.xadd("generation", task)  # pyright: ignore[reportArgumentType]
            await provider.wait_for_arrivals(len(tasks), user="u1")
            command.terminate()
            await wait_until(lambda: "worker.stopping" in command.stderr, what="the stop")
            assert command.process.returncode is None
            # Too late for this worker: it stays on the stream for the next.
            await redis_client.xadd("generation", tasks[0] | {"task_id": "late"})  # pyright: ignore[reportArgumentType]
            await provider.open()
            assert await command.wait() == 0
        finally:
            await command.end()
        keys = Keys()
        for task in tasks:
            stored: Any = await redis_client.get(keys.result(task["task_id"]))
            assert InferenceResult.model_validate_json(stored).status.value == "done"
        assert await redis_client.zcard(keys.holds) == 0
        pending: list[Any] = [await redis_client.xpending(stream, "tollbook") for stream in STREAMS]
        assert sum(reply["pending"] for reply in pending) == 0
        assert provider.requests == len(tasks)
        assert rows_at_rest(tmp_path)["spent"] * 10**9 == provider.book.totals()["u1"]
        assert "Traceback" not in command.stderr

        # The task that came too late is left for the next worker.
        command = await started("up", cwd=tmp_path, env=variables | {"REDIS_URL": server_url})
        try:
            late = await run_cli("result", "late", "--wait", "50", "--json", cwd=tmp_path)
            assert assert_only_data(late)["status"] == "done"
        finally:
            await command.end()


@pytest.mark.slow
async def test_ctrl_c_reaches_the_whole_process_group_and_harms_nothing(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the embedded server too; calls in flight must still be settled there."""
    directory = tmp_path / "here"
    directory.mkdir()
    async with GatedStandIn() as provider:
        await provider.shut()
        variables = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter"}
        command = await started("up", cwd=directory, env=variables)
        try:
            await run_cli("publish", "analysis", "score_post", "a post", "-u", "u1", cwd=directory)
            await provider.wait_for_arrivals(1, user="u1")
            os.killpg(command.process.pid, signal.SIGINT)
            await wait_until(lambda: "worker.stopping" in command.stderr, what="the stop")
            await provider.open()
            assert await command.wait() == 0
        finally:
            await command.end()
        rest = rows_at_rest(directory)
        assert (rest["spent"] * 10**9, rest["held"]) == (provider.book.totals()["u1"], 0)
        assert "Traceback" not in command.stderr
        assert command.stdout.count(IS_UP) == 1


@pytest.mark.slow
async def test_logs_are_json_on_standard_error_and_hold_no_secret(tmp_path: Path) -> None:
    """G10: neither prompts nor completions nor the key are in logs, in the projection or in what commands say."""
    key, secret = "sk-zzkeyzz", "zzpromptzz"
    directory = tmp_path / "here"
    directory.mkdir()
    async with GatedStandIn(StandInConfig(api_key=key)) as provider:
        variables = {
            "OPENROUTER_BASE_URL": provider.base_url, "OPENROUTER_API_KEY": key, "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_LOG_FORMAT": "json", "TOLLBOOK_LOG_LEVEL": "DEBUG", "TOLLBOOK_BACKOFF_BASE_S": "0.01",
        }  # fmt: skip
        command = await started("up", cwd=directory, env=variables)
        outputs: list[str] = []
        try:
            assert "redis://default:***@" in command.stderr
            url = (await run_cli("url", cwd=directory, env=variables)).stdout.strip()
            async with connect(url) as redis:
                malformed = {"task": "score_post", "user_id": "u1", "prompt": secret, "task_id": "bad", "plan": secret}
                await redis.xadd("analysis", malformed)  # pyright: ignore[reportArgumentType]
                for fault in ("", "[[fault=http_400]]", "[[fault=broken_json]]", "[[fault=error_finish]]"):
                    publish = ("publish", "analysis", "score_post", f"{secret} {fault}", "-u", "u1", "--wait", "50")
                    finished = await run_cli(*publish, cwd=directory, env=variables)
                    outputs += [finished.stdout, finished.stderr]
                ledger = str(await redis.xrange(Keys().ledger))
            for arguments in (("doctor",), ("spend",), ("result", "bad")):
                finished = await run_cli(*arguments, cwd=directory, env=variables)
                outputs += [finished.stdout, finished.stderr]
        finally:
            await command.end()
    password = (directory / "data" / "valkey" / "password").read_text()
    data = [directory / "data", *(directory / "data").rglob("*")]
    assert [path for path in data if stat.S_IMODE(path.stat().st_mode) & 0o077] == [], "closed to other users"
    assert not [text for text in (command.stdout, command.stderr, *outputs) if password in text]
    assert any(entry.fault is None for entry in provider.book.entries.values()), "the key was taken"
    lines = [json.loads(line) for line in command.stderr.splitlines()]
    events = {line["event"] for line in lines}
    assert {"worker.started", "worker.stopped", "task.dead_lettered", "task.finished"} <= events
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)
    assert "system.started" in events
    assert command.stdout == "", "where machines read the log, there are no plain lines"
    for output in (command.stdout, command.stderr, ledger, all_rows_at_rest(directory), *outputs):
        assert key not in output
        assert secret not in output
    for output in (command.stdout, command.stderr, ledger, all_rows_at_rest(directory)):
        assert "tokens of nothing" not in output, "no completion either"


def rows_at_rest(directory: Path) -> dict[str, Any]:
    with duckdb.connect(str(directory / "data" / "tollbook.duckdb"), read_only=True) as connection:
        row = connection.execute("SELECT sum(spent_usd), sum(reserved_usd) FROM spend").fetchone()
    assert row is not None
    return {"spent": row[0], "held": row[1]}


def all_rows_at_rest(directory: Path) -> str:
    with duckdb.connect(str(directory / "data" / "tollbook.duckdb"), read_only=True) as connection:
        return str([connection.table(name).to_arrow_table().to_pylist() for name in TABLES])
