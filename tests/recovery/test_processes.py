"""`tollbook up --workers N`: its processes are killed or stopped one at a time, and the system goes on (G3, G6, G8)."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.servers import wait_until
from tests.system import BackgroundCommand, GatedStandIn
from tollbook.ledger.keys import GROUP, Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.endpoint import read_endpoint
from tollbook.schemas.events import CostAdjusted, CostRecorded
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.upcasters import event_from_entry

pytestmark = pytest.mark.slow

STREAM: Final = "analysis"
KEYS: Final = Keys("tollbook", 0)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A directory to work in; what commands print is kept beside it."""
    directory = tmp_path / "here"
    directory.mkdir()
    return directory


@dataclass
class Up:
    """A running `tollbook up`, and all processes that it ever started."""

    command: BackgroundCommand
    provider: GatedStandIn
    redis: Redis
    server_pid: int
    _task_ids: list[str] = field(default_factory=list[str])

    def log(self) -> list[dict[str, Any]]:
        """Return what the supervisor and its children have logged."""
        # The last line may be half written.
        lines = self.command.stderr.splitlines(keepends=True)
        # Several processes write to one file: now and then two lines come before the end of the first.
        whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
        return [json.loads(part) for line in whole for part in line.strip().replace("}{", "}\n{").split("\n")]

    def pids(self, name: str = "") -> list[int]:
        """Return the processes that were started under a name, the latest last; or all."""
        started = [line for line in self.log() if line["event"] == "process.started"]
        return [line["pid"] for line in started if name in ("", line["name"])]

    async def publish(self, name: str, *users: str, number: int = 1) -> list[str]:
        """Publish tasks; return their ids."""
        made = [(f"{name}-{user}-{n}", user) for user in users for n in range(number)]
        for task_id, user in made:
            task = {"task": "score_post", "task_id": task_id, "user_id": user, "prompt": "a post"}
            await self.redis.xadd(STREAM, task)  # pyright: ignore[reportArgumentType]
        self._task_ids += [task_id for task_id, _ in made]
        return [task_id for task_id, _ in made]

    async def are_done(self, task_ids: Iterable[str]) -> bool:
        """Whether all these tasks have a completion."""
        with suppress(RedisConnectionError):
            texts = await self.redis.mget([KEYS.result(task_id) for task_id in task_ids])
            results = [InferenceResult.model_validate_json(text) for text in texts if text]
            assert {result.status for result in results} <= {TaskStatus.DONE}
            return len(results) == len(texts)
        return False

    async def become_done(self, task_ids: list[str]) -> None:
        """Return once all these tasks have a completion."""
        await wait_until(lambda: self.are_done(task_ids), what=f"completions of {task_ids}")

    async def pending_of(self, pid: int) -> int:
        """Return how many tasks a worker process has in hand."""
        consumers: Any = await self.redis.xinfo_consumers(STREAM, GROUP)
        return sum(consumer["pending"] for consumer in consumers if f"-{pid}-" in consumer["name"].decode())

    async def check_books(self) -> None:
        """Assert that every task was settled, and that the ledger has what the provider took (G2, G3)."""

        async def is_at_rest() -> bool:
            pending: Any = await self.redis.xpending(STREAM, GROUP)
            return pending["pending"] == 0 and await self.redis.zcard(KEYS.holds) == 0

        await wait_until(is_at_rest, what="every task acknowledged and every hold settled")
        spent, assumed = Counter[str](), Counter[str]()
        entries: Any = await self.redis.xrange(KEYS.ledger)
        for entry_id, fields in entries:
            event = event_from_entry(entry_id.decode(), {name.decode(): text.decode() for name, text in fields.items()})
            if isinstance(event.payload, CostRecorded | CostAdjusted):
                spent[event.user_id] += event.amount
                assumed[event.user_id] += event.payload.assumed_nanousd
        for user, booked in self.provider.book.totals().items():
            assert spent[user] >= booked >= spent[user] - assumed[user]


@asynccontextmanager
async def up(directory: Path, *, workers: int, claim_after_s: float = 5.0) -> AsyncIterator[Up]:
    """Run `tollbook up`; at the end it is told to stop, and no process of its may be left.

    One that was killed has no say in that: its processes must end by themselves.
    """
    async with GatedStandIn() as provider:
        variables = {
            "OPENROUTER_BASE_URL": provider.base_url,
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_CLAIM_AFTER_S": str(claim_after_s),
            "TOLLBOOK_TAIL_KEEP_S": "600",
            "TOLLBOOK_STOP_GRACE_S": "1",
            "TOLLBOOK_LOG_FORMAT": "json",
        }
        command = await BackgroundCommand.start("up", "--workers", str(workers), cwd=directory, env=variables)
        try:
            await wait_until(lambda: command.stderr.count("worker.started") == workers, what="the workers' start")
            endpoint = read_endpoint(directory / "data")
            assert endpoint is not None
            async with connect(endpoint.redis_url) as redis:
                server: Any = await redis.info("server")
                running = Up(command, provider, redis, server["process_id"])
                yield running
                await command.end()
                pids = [running.server_pid, *running.pids()]
        except BaseException:
            await command.end()
            raise
        await wait_until(lambda: not any(map(is_alive, pids)), what=f"the end of {pids}")
        assert command.process.returncode in (0, -signal.SIGKILL), command.stderr


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        # One whose parent has died is a zombie until whoever inherited it has looked.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return Path("/proc/self").exists() is False


async def test_a_killed_worker_is_replaced_and_its_tasks_are_taken_over_in_time(here: Path) -> None:
    """G3: within TOLLBOOK_CLAIM_AFTER_S, and what its requests may have cost is on the ledger."""
    # A tenth of it is left for the processes: enough seconds on a busy machine too.
    claim_after_s = 30.0
    async with up(here, workers=2, claim_after_s=claim_after_s) as running:
        await running.provider.shut()
        task_ids = await running.publish("t", "u1", number=6)
        await running.provider.wait_for_arrivals(6, user="u1")
        pids = {pid: await running.pending_of(pid) for pid in running.pids("worker 1") + running.pids("worker 2")}
        victim = max(pids, key=lambda pid: pids[pid])
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        await running.provider.wait_for_arrivals(6 + pids[victim], user="u1")
        assert time.monotonic() - killed_at <= claim_after_s
        await running.provider.open()
        await running.become_done(task_ids)
        await wait_until(lambda: len(running.pids()) == 5, what="the new worker, beside projector and gateway")
        await wait_until(lambda: running.command.stderr.count("worker.started") == 3, what="its start")
        await running.check_books()


async def test_a_killed_server_is_started_at_the_same_address_and_nothing_is_lost(here: Path) -> None:
    """G3, G4: replies that are lost with it are asked for again; no call is made twice, and every task has a result."""
    async with up(here, workers=2) as running:
        before = await running.publish("before", "u1", "u2", number=4)
        await running.become_done(before)
        await running.provider.shut()
        during = await running.publish("during", "u1", "u2", number=4)
        await running.provider.wait_for_arrivals(4 + 2, user="u1")
        os.kill(running.server_pid, signal.SIGKILL)
        await wait_until(lambda: "embedded_server.died" in running.command.stderr, what="its death being seen")
        await running.provider.open()
        await running.become_done(during)
        after = await running.publish("after", "u1", "u3", number=4)
        await running.become_done(before + during + after)
        await running.check_books()
        server: Any = await running.redis.info("server")
        assert server["process_id"] != running.server_pid
        running.server_pid = server["process_id"]


async def test_without_a_projector_known_users_go_on_and_new_ones_wait(here: Path) -> None:
    """G6, G8: one that hangs holds nobody up for longer than an answer may take; one that died is started again."""
    async with up(here, workers=1) as running:
        await running.become_done(await running.publish("before", "known"))
        projector = running.pids("projector")[-1]
        os.kill(projector, signal.SIGSTOP)
        new = await running.publish("hangs", "new")
        await running.become_done(await running.publish("hangs", "known", number=3))
        await wait_until(lambda: "did not answer within 5 s" in running.command.stderr, what="the limit")
        assert not await running.are_done(new)
        os.kill(projector, signal.SIGCONT)
        await running.become_done(new)

        os.kill(projector, signal.SIGKILL)
        known, newer = await running.publish("died", "known"), await running.publish("died", "newer")
        await running.become_done([*known, *newer])
        assert len(running.pids("projector")) == 2
        await running.check_books()


async def test_when_the_supervisor_is_killed_everything_ends(here: Path) -> None:
    """Also what waits for a server that ended with it; the next start goes on with the tasks that were left."""
    async with up(here, workers=1) as running:
        await running.provider.shut()
        left = await running.publish("left", "u1")
        await running.provider.wait_for_arrivals(1, user="u1")
        running.command.process.kill()
        await running.command.wait()
        book = running.provider.book
    async with up(here, workers=1) as running:
        running.provider.book = book
        await running.become_done(left)
        await running.check_books()
