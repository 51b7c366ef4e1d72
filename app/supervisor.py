"""Runs projector, workers and gateway as child processes, and restarts each one that dies.

A child stops by itself when this process ends for any reason, because the pipe to its standard input closes.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

_FIRST_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 15.0
# After a run this long, the backoff starts from its first pause again.
_STABLE_S: Final = 30.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Child:
    """One child: a name for the log, the arguments of its `tollbook` command, and its own settings."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


class Supervisor:
    """Keeps a set of children running."""

    def __init__(self, children: Sequence[Child], environment: Mapping[str, str], *, stop_timeout_s: float) -> None:
        self.running: dict[str, asyncio.subprocess.Process] = {}
        self._children = tuple(children)
        self._environment = dict(environment)
        self._stop_timeout_s = stop_timeout_s

    async def run(self, stop: asyncio.Event) -> None:
        """Keep the children running until `stop`, then terminate them; those that do not stop in time are killed."""
        restarters = [asyncio.create_task(self._keep_running(child, stop)) for child in self._children]
        try:
            await stop.wait()
        finally:
            await self._terminate()
            for restarter in restarters:
                restarter.cancel()
            await asyncio.gather(*restarters, return_exceptions=True)

    async def _keep_running(self, child: Child, stop: asyncio.Event) -> None:
        pause_s = _FIRST_PAUSE_S
        while not stop.is_set():
            started = time.monotonic()
            process = await self._spawn(child)
            code = await process.wait()
            if stop.is_set():
                return
            if time.monotonic() - started > _STABLE_S:
                pause_s = _FIRST_PAUSE_S
            _log.error("process.died", name=child.name, pid=process.pid, code=code, restart_in_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    async def _spawn(self, child: Child) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tollbook", *child.arguments, "--supervised"),
            stdin=asyncio.subprocess.PIPE,
            env=self._environment | dict(child.environment),
            # Ctrl-C in a terminal goes to the whole foreground group, but only this process must stop the children.
            start_new_session=True,
        )
        self.running[child.name] = process
        _log.info("process.started", name=child.name, pid=process.pid)
        return process

    async def _terminate(self) -> None:
        alive = [process for process in self.running.values() if process.returncode is None]
        for process in alive:
            process.send_signal(signal.SIGTERM)
        if not alive:
            return
        _, late = await asyncio.wait(
            [asyncio.create_task(process.wait()) for process in alive], timeout=self._stop_timeout_s
        )
        if late:
            _log.warning("processes.killed", number=len(late))
            for process in alive:
                if process.returncode is None:
                    process.kill()
            await asyncio.wait(late)
