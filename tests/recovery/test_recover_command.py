"""`tollbook recover` beside a running system: after an older append-only file, and after a failover (G1, G3, G4)."""

import asyncio
import shutil
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.recovery.apart import Apart, running_apart
from tests.recovery.test_going_back import STREAM, finish, refusal_of_a_call
from tests.servers import wait_until
from tests.system import REPLIES, Finished, run_cli
from tollbook.ledger.projection.database import set_aside
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.schemas.results import TaskStatus

WHY = ("--yes", "--reason", "an older backup was restored", "--author", "ops")


async def recover(apart: Apart, url: str, *options: str) -> Finished:
    env = {"REDIS_URL": url, "TOLLBOOK_DATA_DIR": str(apart.settings.data_dir), "COLUMNS": "80"}
    return await run_cli("recover", *options, cwd=apart.settings.data_dir.parent, env=env)


async def take_back(server: EmbeddedServer, kept: Path, data: Path) -> None:
    """Restart the server with an older append-only file."""
    await server.stop()
    await asyncio.to_thread(_replace, kept, data)
    await server.start()


def _replace(kept: Path, data: Path) -> None:
    for path in data.glob("appendonlydir*"):
        shutil.rmtree(path)
    for path in kept.glob("appendonlydir*"):
        shutil.copytree(path, data / path.name)


async def projector_ends(apart: Apart) -> None:
    await wait_until(lambda: apart.projector.process.returncode is not None, what="the end of the projector")


async def task_events(redis: Redis, apart: Apart) -> list[tuple[bytes, bytes]]:
    entries: Any = await redis.xrange(apart.running.system.handle.keys[0].ledger)
    return [(fields[b"type"], fields[b"call_id"]) for _, fields in entries]


@pytest.mark.slow
async def test_after_an_older_append_only_file_workers_go_on_and_pay_nothing_twice(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    data = tmp_path / "data" / "valkey"
    async with running_apart(tmp_path / "apart", private_server.url) as apart:
        await finish(apart, "before")
        await private_server.stop()
        shutil.copytree(data, tmp_path / "kept")
        await private_server.start()
        await apart.running.redis.connection_pool.disconnect()
        await finish(apart, "lost")
        paid = apart.running.provider.arrived.total()
        events = await task_events(apart.running.redis, apart)
        await take_back(private_server, tmp_path / "kept", data)
        await apart.running.redis.connection_pool.disconnect()
        assert await refusal_of_a_call(apart)
        await projector_ends(apart)

        looked = await recover(apart, private_server.url)
        assert looked.code == 1, looked.stderr
        assert "Nothing was written" in looked.stdout
        assert max(len(line) for line in looked.stdout.splitlines()) <= 80
        elsewhere = {
            "REDIS_URL": private_server.url,
            "TOLLBOOK_DATA_DIR": str(tmp_path / "elsewhere"),
            "COLUMNS": "400",
        }
        wrong_place = await run_cli("recover", *WHY, cwd=tmp_path, env=elsewhere)
        assert wrong_place.code == 1, wrong_place.stdout
        assert "so nothing can be compared" in wrong_place.stdout
        assert "Nothing is lost" not in wrong_place.stdout
        assert "is lost. The projector that stopped calls had folded it" in wrong_place.stdout
        document = (await recover(apart, private_server.url, "--json")).json()
        assert document["partitions"][0]["way"] == "restore"
        refused = await recover(apart, private_server.url, "--yes")
        assert (refused.code, "--reason: give a reason" in refused.stderr) == (2, True)
        done = await recover(apart, private_server.url, *WHY)
        assert done.code == 0, done.stderr
        assert "are back as they were" in done.stdout

        assert (await task_events(apart.running.redis, apart))[: len(events)] == events
        await apart.restart_projector()
        # The worker was not restarted. Redis has lost the tasks and their results, and the tasks come again.
        tasks = [
            {"task": "score_post", "task_id": f"lost-{n}", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
            for n in range(3)
        ]
        apart.running._answers.clear()
        await apart.running.publish(STREAM, tasks)
        answers = await apart.running.answers([task["task_id"] for task in tasks])
        outcomes = {(answer.status, answer.content, answer.error) for answer in answers}
        assert outcomes == {(TaskStatus.DONE, None, "the call was settled before, its stored result has expired")}
        assert apart.running.provider.arrived.total() == paid
        await finish(apart, "after")
        assert apart.running.provider.arrived.total() == paid + 3
        assert (await recover(apart, private_server.url)).code == 0
        await apart.check_projection()


@pytest.mark.slow
async def test_after_a_failover_that_lost_a_suffix_charges_are_entered_beside_newer_calls(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    replica = EmbeddedServer(tmp_path / "replica", fsync="always")
    await replica.start()
    try:
        async with connect(replica.url) as promoted:
            async with running_apart(tmp_path / "apart", private_server.url) as apart:
                await finish(apart, "before")
                await follow(promoted, private_server.url)
                await promoted.execute_command("REPLICAOF", "NO", "ONE")
                await finish(apart, "lost")
                spent = apart.running.provider.book.totals()["u1"]
                await apart.projector.end()
                assert apart.projector.process.returncode == 0, apart.projector.stderr
                assert await promoted.xlen(apart.running.keys.ledger) < await apart.running.redis.xlen(
                    apart.running.keys.ledger
                )
            # Every process is started anew, on the promoted replica; without DuckDB, nobody knows what is missing.
            known = set_aside(apart.path, datetime.now(UTC))
            async with running_apart(tmp_path / "apart", replica.url) as apart:
                await finish(apart, "newer", 2)
                await apart.projector.end()

                done = await recover(apart, replica.url, "--projection", str(known), *WHY, "--json")

                assert done.code == 0, done.stderr
                (part,) = done.json()["partitions"]
                assert (part["way"], part["entered_events"]) == ("enter_again", 3)
                await apart.restart_projector()
                await finish(apart, "after")
                paid = spent + apart.running.provider.book.totals()["u1"]
                env = {"REDIS_URL": replica.url, "TOLLBOOK_DATA_DIR": str(apart.settings.data_dir)}

                async def is_folded() -> bool:
                    rows = (await run_cli("spend", "u1", "--json", cwd=tmp_path, env=env)).json()
                    return [Decimal(str(row["spent_usd"])) * 10**9 for row in rows] == [paid]

                await wait_until(is_folded, what="all charges in the projection")
                sound = await run_cli("verify", cwd=tmp_path, env=env)
                assert sound.code == 0, sound.stdout
    finally:
        await replica.stop()


async def follow(replica: Redis, url: str) -> None:
    """Let a server become a replica that has all that the primary has."""
    async with connect(url) as primary:
        options = primary.connection_pool.connection_kwargs
        await replica.config_set("primaryauth", options["password"])
        await replica.execute_command("REPLICAOF", options["host"], options["port"])

        async def has_all() -> bool:
            info: Any = await replica.info("replication")
            same = await replica.dbsize() == await primary.dbsize()
            return info["master_link_status"] == "up" and not info["master_sync_in_progress"] and same

        await wait_until(has_all, what="the replica's copy")
