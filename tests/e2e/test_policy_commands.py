"""`tollbook policy` and the starts of processes, from a file to the ledger and back."""

import asyncio
import json
import signal
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.proxy import FaultyProxy
from tests.servers import wait_until
from tests.system import BackgroundCommand, GatedStandIn, command_environment, run_cli
from tollbook.ledger.server.connection import connect
from tollbook.schemas.money import NANOUSD_PER_USD

FILE: Final = "[plans.trial]\ncap_usd = 3\n"


async def starting(*arguments: str, until: str, cwd: Path, env: dict[str, str]) -> BackgroundCommand:
    command = await BackgroundCommand.start(*arguments, cwd=cwd, env=env)
    await wait_until(
        lambda: until in command.stdout + command.stderr or command.process.returncode is not None, what=until
    )
    assert until in command.stdout + command.stderr, command.stderr
    return command


@pytest.mark.slow
async def test_the_policy_goes_from_the_file_to_the_ledger_and_is_followed(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    assert await redis_client.ping()
    file = tmp_path / "tollbook.toml"
    file.write_text(FILE)
    async with GatedStandIn() as provider:
        env = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter", "REDIS_URL": server_url}

        async def policy(*arguments: str) -> Any:
            return await run_cli("policy", *arguments, cwd=tmp_path, env=env)

        up = await starting("up", until="Tollbook is up", cwd=tmp_path, env=env)
        shown = (await policy("show", "--json")).json()
        assert (shown["version"], shown["policy"]["plans"]["trial"]) == (1, {"cap_usd": "3"})
        assert (await policy("diff")).code == 0

        file.write_text(FILE.replace("3", "0.0001"))
        differs = await policy("diff")
        assert (differs.code, "plan trial: cap $3 -> $0.0001" in differs.stdout) == (1, True)
        dry = await policy("apply", "--dry-run")
        assert (dry.code, "nothing was changed" in dry.stdout) == (0, True)
        assert (await policy("apply")).code == 2, "a change wants a reason"
        applied = await policy("apply", "--reason", "smaller trials", "--author", "ops")
        assert (applied.code, "policy 2 is in force" in applied.stdout) == (0, True), applied.stderr
        again = await policy("apply", "--reason", "again")
        assert (again.code, "nothing to do" in again.stdout) == (0, True)

        # The worker in `up` was not restarted.
        refused = await run_cli(
            "publish", "generation", "generate_draft", "Write", "--user", "u1", "--json", "--wait", "20",
            cwd=tmp_path, env=env,
        )  # fmt: skip
        assert refused.json()["error_code"] == "PLAN_LIMIT_REACHED"

        history = (await policy("history", "--json")).json()
        assert [(each["version"], each["author"], each["changes"]) for each in history] == [
            (1, "tollbook up", ["plan trial: cap $5 -> $3"]),
            (2, "ops", ["plan trial: cap $3 -> $0.0001"]),
        ]
        for arguments in (("show",), ("history",), ("show", "--version", "1"), ("show", "--version", "0")):
            assert (await policy(*arguments)).code == 0
        assert (await policy("show", "--version", "9")).code == 2
        toml = await policy("show", "--toml")
        (tmp_path / "copy.toml").write_text(toml.stdout)
        assert (await policy("diff", "copy.toml")).code == 0
        what_if = await run_cli("what-if", "--policy", "tollbook.toml", "--json", cwd=tmp_path, env=env)
        assert what_if.json()["total"]["refused"] == {"recorded": 1, "what_if": 1}
        call_id = refused.json()["task_id"]
        explained = await run_cli("audit", "explain", call_id, cwd=tmp_path, env=env)
        assert "by policy 2" in explained.stdout
        verified = await run_cli("verify", cwd=tmp_path, env=env)
        assert verified.code == 0, verified.stdout
        await up.end()

        # Another file, while the ledger has what was applied from here last: the start applies it.
        file.write_text(FILE.replace("3", "6"))
        up = await starting("up", until="Tollbook is up", cwd=tmp_path, env=env)
        assert (await policy("show", "--json")).json()["version"] == 3
        await up.end()

        # Somebody else changes the policy, from elsewhere; the file here differs, so that no start goes on.
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "tollbook.toml").write_text(FILE.replace("3", "8"))
        other = await run_cli("policy", "apply", "--reason", "elsewhere", cwd=elsewhere, env=env)
        assert other.code == 0, other.stderr
        for command in (("up",), ("up", "--workers", "1"), ("worker",)):
            refused = await run_cli(*command, cwd=tmp_path, env=env)
            assert refused.code == 1, command
            assert "plan trial: cap $8 -> $6" in refused.stderr, command
            assert "tollbook policy apply" in refused.stderr
        # Without a file, the ledger's policy counts.
        file.unlink()
        up = await starting("up", until="Tollbook is up", cwd=tmp_path, env=env)
        await up.end()
    assert json.loads((tmp_path / "data" / "applied-policy.json").read_text())["version"] == 3
    assert command_environment({})


@pytest.mark.slow
async def test_a_budget_begins_with_what_was_spent_before_if_a_person_says_so(tmp_path: Path) -> None:
    async def run(*arguments: str) -> Any:
        done = await run_cli(*arguments, cwd=tmp_path, env={})
        assert done.code == 0, done.stderr
        return done

    up = await starting("up", "--stand-in", until="Tollbook is up", cwd=tmp_path, env={})
    try:
        done = await run(
            "publish", "generation", "generate_draft", "Write", "--user", "u1", "--tags", '{"team": "red"}', "--json",
            "--wait", "50",
        )  # fmt: skip
        cost = done.json()["cost_usd"]
        (tmp_path / "teams.toml").write_text(
            '[[budgets]]\nname = "team-week"\nby = ["team"]\nwindow = "week"\ncap_usd = 20\n'
        )
        applied = await run("policy", "apply", "teams.toml", "--reason", "teams", "--backfill")
        assert "budget team-week is new: it begins at what was spent in its window before" in applied.stdout

        async def spent() -> Any:
            rows = (await run("spend", "--budgets", "--json")).json()
            return [row for row in rows if row["name"].startswith("team-week")]

        (row,) = await wait_until(spent, what="the team's spend")
        assert (row["value"], Decimal(row["spent_usd"]), float(row["cap_usd"])) == ("red", Decimal(cost), 20)
        assert "team-week: with earlier spend of the window" in (await run("policy", "show")).stdout
        assert (await run("policy", "history", "--json")).json()[-1]["backfilled"] == ["team-week"]
        assert "backfilled with earlier spend: budget team-week" in (await run("policy", "history")).stdout
        found = (await run("audit", "find", "--type", "budget-opened", "--json")).stdout
        assert '"budget-opened"' in found
        await run("verify")
    finally:
        await up.end()
    await run("replay", "--compare")


@pytest.mark.slow
async def test_a_running_worker_reads_a_stream_that_a_later_policy_adds(tmp_path: Path) -> None:
    """Stream and task type are new; neither the worker, a process of its own, nor anything else is started again."""
    up = await starting("up", "--stand-in", "--workers", "1", until="Tollbook is up", cwd=tmp_path, env={})
    try:
        await wait_until(lambda: "worker.started" in up.stdout + up.stderr, what="the worker")
        (tmp_path / "shop.toml").write_text(
            '[streams.shop]\nconcurrency = 2\n[tasks.describe]\nmodel = "openai/gpt-4o-mini"\nmax_tokens = 50\n'
        )
        for arguments in (
            ("policy", "apply", "shop.toml", "--reason", "a shop"),
            ("publish", "shop", "describe", "A chair", "--user", "u1", "--wait", "30"),
            ("publish", "generation", "describe", "A table", "--user", "u1", "--wait", "30"),
        ):
            done = await run_cli(*arguments, cwd=tmp_path, env={}, timeout_s=60)
            assert done.code == 0, done.stderr
        assert "worker.streams_added" in up.stdout + up.stderr
    finally:
        await up.end()


BURST: Final = """
import asyncio, sys
from tollbook import AppError, InferenceClient, PlanLimitReached, connect_runtime

async def burst():
    async def call(number):
        try:
            result = await InferenceClient("score_post").call("a post", user_id="u1", task_id=f"{sys.argv[1]}-{number}")
        except PlanLimitReached:
            return "denied"
        except AppError as exc:
            return type(exc).__name__
        return result.status.value

    async with connect_runtime():
        print(sorted(set(await asyncio.gather(*map(call, range(20))))))

asyncio.run(burst())
"""


@pytest.mark.slow
async def test_of_two_processes_with_different_policies_one_refuses(server_url: str, tmp_path: Path) -> None:
    """Both make a burst of calls at once: one by the ledger's policy, the other by a larger cap of its own."""
    async with connect(server_url) as redis:
        await redis.flushall()
    for name, cap in (("ours", "3"), ("theirs", "300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tollbook.toml").write_text(FILE.replace("3", cap))
    async with GatedStandIn() as provider:
        variables = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter"}
        env = variables | {"REDIS_URL": server_url, "TOLLBOOK_DATA_DIR": str(tmp_path / "data")}
        up = await starting("up", until="Tollbook is up", cwd=tmp_path / "ours", env=env)
        try:
            processes = [
                await asyncio.create_subprocess_exec(
                    sys.executable, "-c", BURST, name, cwd=tmp_path / name, env=command_environment(env),
                    stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                )
                for name in ("ours", "theirs")
            ]  # fmt: skip
            (ours, _), (theirs, problem) = await asyncio.gather(*(process.communicate() for process in processes))
            assert ours.decode().strip().endswith("\n['done']")
            assert "PolicyDiffers" in theirs.decode() + problem.decode()
            async with connect(server_url) as redis:
                entries: Any = await redis.xrange("{tollbook:0}:ledger")
            holds = [(fields[b"call_id"], json.loads(fields[b"payload"])["cap_nanousd"]) for _, fields in entries
                     if fields[b"type"] == b"budget-reserved"]  # fmt: skip
            assert {(call_id.split(b"-")[0], cap) for call_id, cap in holds} == {(b"ours", 3 * NANOUSD_PER_USD)}
            assert (await run_cli("verify", cwd=tmp_path / "ours", env=env)).code == 0
        finally:
            await up.end()


class SecondPartitionHeld(FaultyProxy):
    """Keeps back the command that would put a policy in force in the second partition."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.is_reached, self.is_over = asyncio.Event(), asyncio.Event()

    async def _forward_commands(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(2**20):
            if b"apply_policy" in chunk and b"{tollbook:1}:meta" in chunk:
                self.is_reached.set()
                await self.is_over.wait()
                return
            writer.write(chunk)


@pytest.mark.slow
async def test_an_apply_that_was_killed_between_two_partitions_is_completed_by_the_next(
    server_url: str, tmp_path: Path
) -> None:
    async with connect(server_url) as redis:
        await redis.flushall()
    async with GatedStandIn() as provider:
        variables = {"OPENROUTER_BASE_URL": provider.base_url, "TOLLBOOK_DIALECT": "openrouter"}
        env = variables | {"REDIS_URL": server_url, "TOLLBOOK_PARTITIONS": "2"}
        up = await starting("up", until="Tollbook is up", cwd=tmp_path, env=env)
        for name, cap in (("second", "4"), ("third", "5")):
            (tmp_path / f"{name}.toml").write_text(FILE.replace("3", cap))

        async def policy(*arguments: str) -> Any:
            done = await run_cli("policy", *arguments, cwd=tmp_path, env=env)
            assert done.code == 0, done.stderr
            return done

        proxy = SecondPartitionHeld(server_url)
        await proxy.start()
        try:
            apply = ("policy", "apply", "second.toml", "--reason", "second")
            killed = await BackgroundCommand.start(*apply, cwd=tmp_path, env=env | {"REDIS_URL": proxy.url})
            await asyncio.wait_for(proxy.is_reached.wait(), 60)
            killed.process.kill()
            assert await killed.wait() == -signal.SIGKILL
        finally:
            proxy.is_over.set()
            await proxy.stop()
        try:
            shown = (await policy("show")).stdout
            assert "half applied  in partition 0 of 2" in shown
            assert (await run_cli("verify", cwd=tmp_path, env=env)).code == 0, "between the two, both versions count"
            await policy("apply", "third.toml", "--reason", "third")
            history = (await policy("history", "--json")).json()
            assert [(each["version"], each["reason"], each["partitions"]) for each in history[1:]] == [
                (2, "second", [0, 1]),
                (3, "third", [0, 1]),
            ]
            assert (await run_cli("verify", cwd=tmp_path, env=env)).code == 0
        finally:
            await up.end()
