"""Money commands as a person and as a script use them: shown first, asked when it is much, listed, taken back."""

import asyncio
import os
import pty
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.quick import first_quick
from tests.servers import wait_until
from tests.system import REPLIES, Finished, RunningSystem, command_environment, run_cli, running_system, tollbook
from tollbook.schemas.results import TaskStatus

Cli = Callable[..., Awaitable[Finished]]
REASON = ("--reason", "why")


@pytest.fixture
async def running(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[RunningSystem]:
    async with running_system(tmp_path / "data", server_url, retries=0) as running:
        yield running


@pytest.fixture
def variables(running: RunningSystem, tmp_path: Path) -> dict[str, str]:
    return {"REDIS_URL": running.system.redis_url, "TOLLBOOK_DATA_DIR": str(tmp_path / "data")}


@pytest.fixture
def cli(variables: dict[str, str], tmp_path: Path) -> Cli:
    async def run(*arguments: str, **settings: str) -> Finished:
        return await run_cli(*arguments, cwd=tmp_path, env={**variables, **settings})

    return run


async def appended(running: RunningSystem) -> int:
    """Return how many events of people are on the ledger: the policy of its start is none."""
    entries: Any = await running.redis.xrange(running.keys.ledger)
    return sum(fields[b"type"] != b"policy-applied" for _, fields in entries)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "shown"),
    first_quick(1, [
        ("credit grant u1 100.01", "credit of u1 in 2"),
        ("credit revoke u1 150", "$200.00 -> $50.00"),
        ("plan set u1 growth --cap 500", "plan starter with a cap of $300.00 -> plan growth with a cap of $500.00"),
        ("plan clear u1", "u1: plan starter with a cap of $300.00 -> the plan that tasks name"),
    ]),
)  # fmt: skip
async def test_a_large_amount_without_a_terminal_needs_yes(
    running: RunningSystem, cli: Cli, line: str, shown: str
) -> None:
    for prepare in ("credit grant u1 200", "plan set u1 starter --cap 300"):
        assert (await cli(*prepare.split(), *REASON, "--yes")).code == 0
    before = await appended(running)
    refused = await cli(*line.split(), *REASON)
    assert (refused.code, refused.stdout) == (2, "")
    assert len(refused.stderr.splitlines()) == 1
    for words in (shown, "more than $100.00 (TOLLBOOK_CONFIRM_USD)", "--yes"):
        assert words in refused.stderr
    assert await appended(running) == before
    done = await cli(*line.split(), *REASON, "--yes")
    assert done.code == 0, done
    assert await appended(running) == before + 1
    # Another limit than the default.
    assert (await cli("credit", "grant", "u1", "0.02", *REASON, TOLLBOOK_CONFIRM_USD="0")).code == 2


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "events"), first_quick(1, [("n\n", 0), ("y\n", 1)]))
async def test_a_person_at_a_terminal_is_asked(
    running: RunningSystem, variables: dict[str, str], tmp_path: Path, answer: str, events: int
) -> None:
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        tollbook(), "credit", "grant", "u1", "500", *REASON, cwd=tmp_path, env=command_environment(variables),
        stdin=slave, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(slave)
    os.write(master, answer.encode())
    _, stderr = await process.communicate()
    os.close(master)
    assert "$0.00 -> $500.00. Do it?" in stderr.decode()
    assert process.returncode == 1 - events
    assert await appended(running) == events


@pytest.mark.slow
async def test_credits_and_plans_are_listed_and_taken_back(running: RunningSystem, cli: Cli) -> None:
    assert (await cli("credit", "list")).stdout == "no credit was granted\n"
    assert "no plan is set for u1" in (await cli("plan", "show", "u1")).stdout
    for amount in ("2", "3"):
        await cli("credit", "grant", "u1", amount, *REASON, "--author", "ann")
    await cli("plan", "set", "u1", "growth", *REASON, "--author", "ann")
    first, second = (await cli("credit", "list", "u1", "--json")).json()
    assert (first["amount_usd"], first["left_usd"]) == ("2.000000000", "2.000000000")
    assert (first["user_id"], first["author"], first["reason"]) == ("u1", "ann", "why")
    taken = await cli("credit", "revoke", "u1", "--grant", first["id"], *REASON)
    assert "u1 has $2.00 less to spend in 2" in taken.stdout
    again = await cli("credit", "revoke", "u1", "--grant", first["id"], *REASON)
    assert (again.code, again.stdout) == (0, f"nothing to do: grant {first['id']} is already taken back\n")
    assert [each["left_usd"] for each in (await cli("credit", "list", "--json")).json()] == [
        "0.000000000",
        "3.000000000",
    ]
    assert second["id"] in (await cli("credit", "list")).stdout
    unknown = await cli("credit", "revoke", "u2", "--grant", first["id"], *REASON)
    assert (unknown.code, "u2 has no grant" in unknown.stderr) == (2, True)
    much = await cli("credit", "revoke", "u1", "9", *REASON)
    assert (much.code, "u1 has $3.00 of credit" in much.stderr) == (1, True)
    # An impossible amount is refused, even above the limit from which a terminal is needed.
    impossible = await cli("credit", "revoke", "u1", "5000", *REASON)
    assert (impossible.code, "u1 has $3.00 of credit" in impossible.stderr) == (1, True)
    assert "It would do this" not in impossible.stderr
    keyed = await cli("credit", "revoke", "u1", "5000", *REASON, "--key", "k5000")
    assert (keyed.code, "u1 has $3.00 of credit" in keyed.stderr) == (1, True)
    shown = (await cli("plan", "show", "u1", "--json")).json()
    assert (shown["plan"], shown["cap_usd"], shown["author"]) == ("growth", "40.000000000", "ann")
    assert (await cli("plan", "list", "--json")).json() == [shown]
    assert "growth" in (await cli("plan", "list")).stdout
    assert (await cli("plan", "clear", "u1", *REASON)).code == 0
    assert (await cli("plan", "list", "--json")).json() == []
    nothing = await cli("plan", "clear", "u1", *REASON)
    assert (nothing.code, "no plan is set for u1" in nothing.stderr) == (1, True)
    # The ledger that all of it left is sound.
    verified = await cli("verify")
    assert verified.code == 0, verified


@pytest.mark.slow
async def test_a_server_that_takes_no_writes_is_reported_in_one_line(running: RunningSystem, cli: Cli) -> None:
    """Here the disk cannot be written. A replica and a full memory are recognised by their own INFO."""
    replicas: Any = await running.redis.config_get("min-replicas-to-write")
    await running.redis.config_set("min-replicas-to-write", 1)
    refused = await cli("credit", "grant", "u1", "1", *REASON)
    await running.redis.config_set("min-replicas-to-write", replicas["min-replicas-to-write"])
    assert refused.code == 1
    (line,) = refused.stderr.splitlines()
    assert "too few of its replicas answer" in line


@pytest.mark.slow
async def test_a_large_correction_needs_yes(running: RunningSystem, cli: Cli) -> None:
    await running.publish(
        "analysis", [{"task": "score_post", "user_id": "u1", "task_id": "t1", "prompt": "a post", "reply_to": REPLIES}]
    )
    assert (await running.answers(["t1"]))[0].status is TaskStatus.DONE
    refused = await cli("cost", "adjust", "t1", "250", *REASON)
    assert (refused.code, "-> $250.00" in refused.stderr) == (2, True)
    assert (await cli("cost", "adjust", "t1", "250", *REASON, "--yes")).code == 0
    assert (await cli("cost", "adjust", "t1", "200", *REASON)).code == 0


@pytest.mark.slow
async def test_assumed_charges_are_shown_first_and_given_back_with_yes(running: RunningSystem, cli: Cli) -> None:
    tasks = [
        {
            "task": "score_post", "user_id": f"u{number % 2}", "task_id": f"t{number}", "reply_to": REPLIES,
            "prompt": "a post [[fault=reset_before_charge]]",
        }
        for number in range(4)
    ]  # fmt: skip
    await running.publish("analysis", tasks)
    await running.answers(task["task_id"] for task in tasks)
    release = ("cost", "release", "--outcome", "connection_error", "--since", "2026-01-01", "--until", "2100-01-01")
    before = await appended(running)
    shown = await cli(*release, *REASON)
    assert shown.code == 0, shown
    assert "nothing was changed; to give them back, add --yes" in shown.stdout
    assert "assumed charges of 2 users" in shown.stdout
    assert await appended(running) == before
    document = (await cli(*release, *REASON, "--json")).json()
    assert document["is_dry_run"]
    number = document["charges"]
    assert number >= 4
    of_one = (await cli(*release, *REASON, "--user", "u1", "--json")).json()
    assert (of_one["users"], of_one["charges"]) == (1, number // 2)
    done = await cli(*release, *REASON, "--yes", "--author", "ann")
    assert f"given back: {number} charges" in done.stdout
    assert await appended(running) == before + number
    again = await cli(*release, *REASON, "--yes")
    assert "0 assumed charges" in again.stdout
    assert await appended(running) == before + number

    async def is_spent_nothing() -> bool:
        return all(row["spent_usd"] == 0 for row in await running.query("SELECT spent_usd FROM spend"))

    assert await wait_until(is_spent_nothing, what="spend of zero")
    wrong = await cli("cost", "release", "--outcome", "http_eror", *release[4:], *REASON)
    assert (wrong.code, "http_error" in wrong.stderr) == (2, True)
    swapped = await cli(*release[:4], "--since", "2026-02-01", "--until", "2026-01-01", *REASON)
    assert (swapped.code, "is before" in swapped.stderr) == (2, True)
