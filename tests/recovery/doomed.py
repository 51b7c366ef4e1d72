"""A worker as a process of its own, forked from a process that has everything imported already: quick to start."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forking import fork
from tests.recovery.border import Border
from tests.system import STREAMS, RunningSystem
from tollbook.app.processes import run_remote_worker
from tollbook.inference.settings import Settings
from tollbook.ledger.keys import GROUP


class DoomedWorker:
    """A worker process that a test ends. It is beside the system's own, and behind a border."""

    def __init__(self, process: BaseProcess, running: RunningSystem) -> None:
        self._process = process
        self._running = running

    async def kill(self) -> None:
        """Kill it as the kernel does when memory runs out: it can do nothing more."""
        os.kill(self.pid, signal.SIGKILL)
        await asyncio.to_thread(self._process.join, 10)

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    async def fall_silent(self) -> None:
        """Age its last heartbeat, so that no test needs to wait for its expiry."""
        redis, namespace = self._running.redis, self._running.system.runtime.settings.namespace
        async for key in redis.scan_iter(match=f"{namespace}:worker:*-{self.pid}-*"):
            await redis.delete(key)
        for stream in STREAMS:
            rows: Any = await redis.xpending_range(stream, GROUP, min="-", max="+", count=100)
            for row in rows:
                if f"-{self.pid}-" in row["consumer"].decode():
                    await redis.xclaim(
                        stream, GROUP, row["consumer"], 0, [row["message_id"]], idle=600_000, justid=True
                    )


@asynccontextmanager
async def doomed_worker(running: RunningSystem, behind: Border) -> AsyncIterator[DoomedWorker]:
    """Run a worker of the same settings behind a border; it is killed at the end, if it lives."""
    settings = running.system.runtime.settings.model_copy(
        update={"openrouter_base_url": behind.provider_url, "redis_url": None}
    )
    log = settings.data_dir.with_name("doomed.log")
    process = fork(_work, settings, behind.redis_url, log)
    try:
        yield DoomedWorker(process, running)
    finally:
        process.kill()
        await asyncio.to_thread(process.join, 10)


def _work(settings: Settings, redis_url: str, log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    asyncio.run(run_remote_worker(settings, STREAMS, asyncio.Event(), redis_url=redis_url))
