"""Redis users: the one of the documents can do everything; a refused announcement undoes and hides no booking."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.observability.pages import wait_for_problems, wait_until_ready
from tests.quick import first_quick
from tests.recovery.books import check_books
from tests.servers import CONTAINER, binary_of, server_kinds, wait_until
from tests.system import STREAMS, RunningSystem, running_system
from tollbook import Publisher
from tollbook.app.doctor import examine
from tollbook.consumers.alerts.queue import AlertQueue
from tollbook.inference.runtime import open_ledger
from tollbook.inference.settings import load_settings
from tollbook.ledger.errors import PermissionsMissing
from tollbook.ledger.gate.probe import acl_line
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.schemas.results import TaskStatus

DEPLOY = Path(__file__).parents[2] / "docs" / "operators" / "deploy.md"
RULES = acl_line().split()[3:]


async def make_user(server: EmbeddedServer, rules: Sequence[str]) -> str:
    """Make the user of the documents, or one with other rules; return the URL with which it connects."""
    async with connect(server.url) as redis:
        await redis.execute_command("ACL", "SETUSER", "tollbook", "reset", *rules)
    return f"redis://tollbook:PASSWORD@{server.url.rpartition('@')[2]}"


async def become_done(running: RunningSystem, task_ids: Sequence[str]) -> None:
    async def are_done() -> bool:
        results = [await running.system.handle.results.get(task_id) for task_id in task_ids]
        return all(result is not None and result.status is TaskStatus.DONE for result in results)

    await wait_until(are_done, what="a completion of every task")


async def nothing_pending(running: RunningSystem) -> bool:
    return await running.pending() == 0


async def has_no_receiver(running: RunningSystem) -> bool:
    return await AlertQueue(running.redis, "tollbook").states() == []


def test_the_documents_have_the_line() -> None:
    assert acl_line() in re.sub(r"\s*\\\n\s*", " ", DEPLOY.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", first_quick(1, [kind for kind in server_kinds() if kind != CONTAINER]))
async def test_the_documented_user_can_do_everything(kind: str, tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path / "server", binary=binary_of(kind)) as server:
        url = await make_user(server, RULES)
        async with connect(server.url) as redis:
            await AlertQueue(redis, "tollbook").add_receiver("gone")  # The policy has it no more.
        async with running_system(
            tmp_path / "data", url, metrics_port=0, segment_events=5, stream_keep_events=0
        ) as running:
            settings = running.system.runtime.settings
            async with Publisher(settings) as publisher:
                task_ids = [
                    await publisher.publish(STREAMS[0], "score_post", "a post", user_id=f"u{number}")
                    for number in range(5)
                ]
                result = await publisher.publish_and_wait(
                    STREAMS[1], "score_post", "a post", user_id="u1", timeout_s=60
                )
                assert result.status is TaskStatus.DONE
                assert (await publisher.publish_and_wait("monitoring", "ping", timeout_s=60)).content == "pong"
                await publisher.publish(STREAMS[0], "ping")
            await become_done(running, task_ids)
            await wait_until(lambda: has_no_receiver(running), what="the receiver forgotten")
            await check_books(running, tmp_path / "books")
            assert running.system.state.url is not None
            await wait_until_ready(running.system.state.url)
            failed = [each for each in await examine(settings) if each.state not in ("ok", "warning")]
            assert failed == []
            async with connect(server.url) as redis:
                log = await redis.acl_log()
                refused = {str(entry["object"]) for entry in log if entry["username"] == "tollbook"}
                assert refused <= {"client|setinfo", "client"}, "nothing that Tollbook does is refused"


@pytest.mark.slow
async def test_a_refused_announcement_undoes_no_booking(private_server: EmbeddedServer, tmp_path: Path) -> None:
    """G3: the channels are taken from the user while the system runs."""
    url = await make_user(private_server, RULES)
    async with running_system(tmp_path / "data", url, metrics_port=0) as running:
        await make_user(private_server, [rule for rule in RULES if not rule.startswith("&")])
        pipe = running.redis
        task_ids = [f"t{number}" for number in range(3)]
        for task_id in task_ids:
            await pipe.xadd(STREAMS[0], {"task": "score_post", "task_id": task_id, "user_id": "u1", "prompt": "p"})
        await pipe.xadd(STREAMS[0], {"task": "ping", "task_id": "ping-1"})
        await become_done(running, [*task_ids, "ping-1"])
        await wait_until(lambda: nothing_pending(running), what="every task acknowledged")
        await check_books(running, tmp_path / "books")
        assert running.workers[0].claims.taken == 0, "no task crashed and was taken over"
        # Whoever looks is told.
        assert running.system.state.url is not None
        await wait_for_problems(running.system.state.url, redis="the channels &{tollbook:*")


async def test_a_user_without_a_permission_is_refused_at_the_start(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    for gone, words in (
        ("+zadd", "the command ZADD"),
        ("&{tollbook:*", "the channels &{tollbook:*"),
        ("~{tollbook:*", "the keys ~{tollbook:*"),
    ):
        url = await make_user(private_server, [rule for rule in RULES if rule != gone])
        settings = load_settings(env_file=None, redis_url=url, data_dir=tmp_path)
        with pytest.raises(PermissionsMissing, match=re.escape(words)):
            async with open_ledger(settings, url):
                pass
