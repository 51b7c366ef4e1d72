"""Starts processes fast: forks them from one process that has imported everything and done nothing else.

A new interpreter takes half a second to import what a command needs, and the suite runs hundreds of commands.
A forked process has its own environment, directory and standard streams, as any other has.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(
    [
        "tollbook.app.processes",
        "tollbook.cli.app",
        "tollbook.cli.serve",
        "tollbook.app.connect",
        "tollbook.views.tables",
        "tollbook.standin",
        "tollbook.observability.server",
        "anyio._backends._asyncio",
        "httpcore",
        "uvicorn.protocols.http.h11_impl",
        "uvloop",
    ]
)


def fork(target: Callable[..., Any], *arguments: Any, **named: Any) -> BaseProcess:
    """Start a process that calls `target`, which must be a module's function."""
    process = _forking.Process(target=target, args=arguments, kwargs=named, daemon=True)
    process.start()
    return process


class ForkedProcess:
    """A forked process, with the interface of asyncio's `Process`."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid: int = process.pid
        self._process = process

    @property
    def returncode(self) -> int | None:
        """The exit code, the signal below zero, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end; return the exit code."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        self._process.join()
        assert self.returncode is not None
        return self.returncode


def run_command(
    arguments: tuple[str, ...],
    cwd: Path,
    environment: Mapping[str, str],
    files: tuple[Path, Path, Path],
    *,
    has_session: bool = False,
) -> None:
    """Run `tollbook ...` in this process and exit; `files` are standard input, output and errors."""
    from tests.empty_projections import copy_empty_projections
    from tollbook.cli.app import run

    copy_empty_projections()
    if has_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files):
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # multiprocessing has put an empty one in its place.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it is there already, and stays to the end.
    raise SystemExit(run(arguments))
