"""The address moves to a promoted replica while the demoted primary lives on: no connection stays with it."""

from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.proxy import faulty_proxy
from tests.recovery.books import check_books, is_at_rest
from tests.servers import CONTAINER, binary_of, server_kinds, wait_until
from tests.system import REPLIES, STREAMS, running_system
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.schemas.results import TaskStatus

_TASK = {"task": "score_post", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}


def tasks(name: str) -> list[dict[str, str]]:
    return [{**_TASK, "task_id": f"{name}-{number}"} for number in range(5)]


async def replicate(replica: Redis, primary_url: str) -> None:
    """Make a server a replica, and wait until it has everything."""
    address, _, port = primary_url.rpartition("@")[2].removesuffix("/0").partition(":")
    await replica.config_set("repl-diskless-sync-delay", 0)
    await replica.config_set("masterauth", primary_url.partition("default:")[2].partition("@")[0])
    await replica.execute_command("REPLICAOF", address, port)

    async def is_linked() -> bool:
        info: dict[str, Any] = await replica.info("replication")
        return info["role"] == "slave" and info.get("master_link_status") == "up"

    await wait_until(is_linked, what="the replica's link")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in server_kinds() if kind != CONTAINER])
async def test_all_connections_to_a_demoted_server_are_closed(kind: str, tmp_path: Path) -> None:
    """G8: writers, the projector, the readers of the task streams and those that listen follow the address."""
    binary = binary_of(kind)
    async with (
        EmbeddedServer(tmp_path / "one", binary=binary) as first,
        EmbeddedServer(tmp_path / "two", binary=binary) as second,
        connect(first.url) as demoted,
        connect(second.url) as promoted,
    ):
        await promoted.config_set("requirepass", first.url.partition("default:")[2].partition("@")[0])
        await replicate(promoted, first.url)
        promoted_url = f"{first.url.rpartition('@')[0]}@{second.url.rpartition('@')[2]}"
        async with (
            faulty_proxy(first.url) as proxy,
            running_system(tmp_path / "data", proxy.url, claim_after_s=2) as running,
            connect(promoted_url) as publisher,
        ):
            await running.publish(STREAMS[0], tasks("before"))
            await running.answers(task["task_id"] for task in tasks("before"))
            await is_at_rest(running)
            await running.fold_all()
            await demoted.wait(1, 0)
            await promoted.execute_command("REPLICAOF", "NO", "ONE")
            proxy.move_to(promoted_url)
            await replicate(demoted, promoted_url)

            running.redis = publisher
            await running.publish(STREAMS[0], tasks("after"))
            answers = await running.answers(task["task_id"] for task in tasks("after"))
            assert {answer.status for answer in answers} == {TaskStatus.DONE}
            await check_books(running, tmp_path / "books")
            await wait_until(lambda: has_nobody(demoted), what="the end of every connection to the demoted server")


async def has_nobody(server: Redis) -> bool:
    """Whether none of a system's connections is left on a server: those that read, listen, or call the gate."""
    clients: list[dict[str, str]] = await server.client_list()
    return {client["cmd"] for client in clients}.isdisjoint({"xreadgroup", "xread", "subscribe", "fcall", "set"})
