"""A data directory at rest: `verify`, `doctor` and `audit` read it with a server of their own, and change nothing."""

import asyncio
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import pytest_asyncio
from redis.exceptions import ReadOnlyError

from tests.quick import first_quick
from tests.servers import wait_until
from tests.system import REPLIES, STREAMS, BackgroundCommand, GatedStandIn, run_cli, running_system
from tollbook.ledger.server.at_rest import is_at_rest, server_at_rest
from tollbook.ledger.server.connection import connect

TASK = {"task": "score_post", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
COMMANDS = (("verify",), ("audit", "user", "u1"), ("audit", "call", "t1"), ("doctor", "--json"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a system with an embedded server has run and has ended."""
    directory = tmp_path_factory.mktemp("kept")
    async with running_system(directory / "data", None) as running:
        tasks = [{**TASK, "task_id": f"t{number}"} for number in range(3)]
        await running.publish(STREAMS[0], tasks)
        await running.answers(task["task_id"] for task in tasks)
        # It has expired by the time it is read: to expire a key is to write.
        await running.redis.set("soon", "gone", px=50)
    assert is_at_rest(directory / "data")
    return directory


@pytest.fixture
def here(kept: Path, tmp_path: Path) -> Path:
    """A copy of that directory, of the test's own."""
    return shutil.copytree(kept, tmp_path / "here")


def contents(data_dir: Path) -> dict[str, str]:
    """Return the digests of all that belongs to ledger, projection and archive."""
    files = [data_dir / "tollbook.duckdb", *(data_dir / "valkey" / "appendonlydir").iterdir()]
    files += (data_dir / "archive").rglob("*.*")
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


@pytest.mark.slow
async def test_commands_read_data_at_rest_and_change_nothing(here: Path) -> None:
    before = contents(here / "data")
    async with GatedStandIn() as provider:
        environment = {"OPENROUTER_BASE_URL": provider.base_url}
        for command in COMMANDS:
            finished = await run_cli(*command, cwd=here, env=environment)
            assert finished.code == 0, (command, finished)
            assert finished.stderr == "" or command == ("verify",), (command, finished.stderr)
            assert "reading the archive alone" not in finished.stderr
            assert is_at_rest(here / "data")
            if command[0] == "verify":
                assert "balances compared" in finished.stdout
                assert "nothing was found" in finished.stdout
            if command[0] == "doctor":
                findings = {each["check"]: each for each in json.loads(finished.stdout)}
                assert findings["running system"]["state"] == "skipped"
                assert "Tollbook does not run on data" in findings["running system"]["found"]
                assert {"redis", "duckdb", "ledger", "archive"} <= findings.keys()
                assert not {"projector", "writes", "persistence"} & findings.keys()
    assert contents(here / "data") == before


@pytest.mark.parametrize(
    "command",
    first_quick(
        1,
        [
            (("credit", "list"),),
            (("plan", "list"),),
            (("dead-letters", "list"),),
            (("audit", "find", "--type", "cost-recorded"),),
            (("audit", "find", "--user", "u1"),),
        ],
    ),
)
async def test_standard_output_holds_the_answer_alone(here: Path, command: tuple[str, ...]) -> None:
    finished = await run_cli(*command, "--json", cwd=here)
    assert (finished.code, finished.stderr) == (0, ""), finished
    assert isinstance(json.loads(finished.stdout), list)


@pytest.mark.slow
async def test_a_kept_demo_is_read_where_there_is_nothing_else(here: Path) -> None:
    (here / "data").rename(here / "tollbook-demo")
    for command, answer in (
        (("dead-letters", "list"), "no dead letters"),
        (("recover",), "Nothing is lost"),
        (("audit", "find", "--user", "u1"), "u1"),
    ):
        finished = await run_cli(*command, cwd=here)
        assert (finished.code, "reading the demo's data in tollbook-demo/" in finished.stderr) == (0, True), finished
        assert answer in finished.stdout


async def test_recover_makes_no_server_where_there_is_no_data(tmp_path: Path) -> None:
    refused = await run_cli("recover", cwd=tmp_path)
    assert refused.code == 1
    assert "data has no data of an embedded server" in refused.stderr
    assert not (tmp_path / "data").exists()


async def test_two_commands_at_once_both_answer(here: Path) -> None:
    finished = await asyncio.gather(*(run_cli("audit", "user", "u1", "--json", cwd=here) for _ in range(3)))
    assert [each.code for each in finished] == [0, 0, 0], finished
    assert len({each.stdout for each in finished}) == 1
    assert {each.stderr for each in finished} <= {"", "tollbook: waiting for another command that reads this data\n"}


@pytest.mark.slow
async def test_a_running_system_is_used_instead(here: Path) -> None:
    async with GatedStandIn() as provider:
        environment = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter"}
        command = await BackgroundCommand.start("up", cwd=here, env=environment)
        try:
            await wait_until((here / "data" / "endpoint.json").exists, what="the running system")
            shown = await run_cli("doctor", "--json", cwd=here, env=environment)
            findings = {each["check"]: each for each in json.loads(shown.stdout)}
            assert "running system" not in findings
            assert findings["writes"]["state"] == "ok"
        finally:
            await command.end()


async def test_a_server_over_data_at_rest_takes_no_write(here: Path) -> None:
    async with server_at_rest(here / "data") as url, connect(url) as redis:
        assert await redis.xlen("{tollbook:0}:ledger") == 10
        with pytest.raises(ReadOnlyError):
            await redis.set("a", "b")
