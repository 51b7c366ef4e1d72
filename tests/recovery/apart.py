"""A system whose projector is a process of its own, beside workers in this one."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tests.servers import wait_until
from tests.system import BackgroundCommand, GatedStandIn, RunningSystem, make_settings, serving
from tollbook.app.processes import System
from tollbook.inference.runtime import open_ledger, open_runtime
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.observability.process_state import ProcessState


@dataclass
class Apart:
    """`running` has no projection in this process; what needs one must not be asked of it."""

    running: RunningSystem
    settings: Settings
    projector: BackgroundCommand

    @property
    def path(self) -> Path:
        """The projector's file."""
        return self.settings.data_dir / "tollbook.duckdb"

    async def restart_projector(self) -> None:
        """Start it again after its end."""
        self.projector = await start_projector(self.settings, self.running.system.redis_url)

    async def check_projection(self) -> None:
        """G5: once the projector has stopped, its file equals one that is rebuilt from nothing."""
        await self.projector.end()
        assert self.projector.process.returncode == 0, self.projector.stderr
        handle = self.running.system.handle
        again = self.path.with_name("again.duckdb")
        rebuilt = await rebuild(self.running.redis, handle.keys, handle.ledger_id, again)
        kept = Store.open(self.path, handle.ledger_id, len(handle.keys))
        try:
            assert await asyncio.to_thread(compare, kept, rebuilt) == []
        finally:
            rebuilt.close()
            kept.close()


async def start_projector(
    settings: Settings,
    redis_url: str,
    *options: str,
    data_dir: Path | None = None,
    waits_for: str = "projector.started",
    **environment: str,
) -> BackgroundCommand:
    """Run `tollbook projector`; return once it says so in its log. `environment` are further variables."""
    directory = settings.data_dir.parent
    command = await BackgroundCommand.start(
        "projector",
        *options,
        cwd=directory,
        env={"REDIS_URL": redis_url, "TOLLBOOK_DATA_DIR": str(data_dir or settings.data_dir), **environment},
    )
    try:
        await wait_until(lambda: waits_for in command.stderr or command.process.returncode is not None, what=waits_for)
        assert command.process.returncode is None, command.stderr
    except BaseException:
        await kill(command)
        raise
    return command


async def kill(command: BackgroundCommand) -> None:
    """End a command at once, also one that is stopped."""
    if command.process.returncode is None:
        os.kill(command.process.pid, signal.SIGKILL)
        await command.process.wait()


@asynccontextmanager
async def running_apart(data_dir: Path, redis_url: str, *, workers: int = 1, **values: Any) -> AsyncIterator[Apart]:
    """Run stand-in, projector process and workers on a server that is there."""
    async with GatedStandIn() as provider, connect(redis_url) as redis:
        settings = make_settings(data_dir, provider, redis_url=redis_url, **values)
        projector = await start_projector(settings, redis_url)
        async with (
            open_ledger(settings, redis_url, may_create=False) as handle,
            open_runtime(settings, handle) as runtime,
        ):
            nothing = asyncio.create_task(asyncio.Event().wait())
            system = System(
                redis_url, handle, cast("Any", None), runtime, cast("Any", nothing), ProcessState("worker", settings)
            )
            apart = Apart(RunningSystem(system, provider, [], redis), settings, projector)
            try:
                async with serving(apart.running, workers):
                    yield apart
            finally:
                nothing.cancel()
                await kill(apart.projector)
