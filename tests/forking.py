"""Processes that need not import anything: forked from one that has done so, and is otherwise untouched.

An interpreter that starts takes half a second to import what a command needs, and the suite runs commands
by the hundred. What is forked is a process like any other: with its own environment, directory and standard streams.
"""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["consumers.runtime", "consumers.cli.app", "consumers.cli.connect", "consumers.tables"])


def fork(target: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Start a process that calls `target`, which must be a module's function."""
    process = _forking.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def run_command(
    arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str], files: tuple[Path, Path, Path]
) -> None:
    """Be `tollbook ...` to the end; `files` are standard input, output and errors."""
    from consumers.cli.app import run

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(files):
        descriptor = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    raise SystemExit(run(arguments))
