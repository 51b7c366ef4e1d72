"""Processes for benchmarks of whole systems: the stand-in, and commands of Tollbook."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

_START_TIMEOUT_S = 60.0


@asynccontextmanager
async def stand_in(directory: Path, *options: str) -> AsyncIterator[str]:
    """Run the stand-in in a separate process and yield its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tollbook.standin", *options, cwd=directory, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        ready = await asyncio.wait_for(process.stdout.readline(), _START_TIMEOUT_S)
        yield json.loads(ready)["base_url"]
    finally:
        await end(process)


@asynccontextmanager
async def command(
    *arguments: str, environment: Mapping[str, str], directory: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a command of Tollbook during the block, in a directory without a `.env`; it writes its log there."""
    with (directory / f"{arguments[0]}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("tollbook"),
            *arguments,
            cwd=directory,
            env={**clean_environment(), **environment},
            stderr=log,
        )
    try:
        yield process
        if process.returncode is not None:
            raise RuntimeError(f"tollbook {arguments[0]} ended with {process.returncode}")
    finally:
        await end(process)


async def output_of(*arguments: str, environment: Mapping[str, str], directory: Path) -> str:
    """Run a command of Tollbook to its end and return its output. Errors: RuntimeError if it fails."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("tollbook"),
        *arguments,
        cwd=directory,
        env={**clean_environment(), **environment},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"tollbook {arguments[0]} ended with {process.returncode}")
    return output.decode()


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of Tollbook."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("TOLLBOOK_", "OPENROUTER_"))}


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


async def end(process: asyncio.subprocess.Process) -> None:
    """End a process and wait for it."""
    if process.returncode is None:
        process.terminate()
        await process.wait()
