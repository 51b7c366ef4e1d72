"""The Redis servers that the suite runs against, and the one way to wait for something.

One suite, several servers: the embedded Valkey always, a `redis-server` if it is on the PATH, and a
container if a Docker daemon answers. The kinds are decided once, and passed to the worker processes
in TEST_SERVERS. Set that variable (as CI does) to demand kinds: if a demanded server does not start,
the tests fail; they are never skipped.
"""

import asyncio
import inspect
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

from redis.asyncio import Redis

from tests.chromium import is_ci
from tollbook.ledger.server.connection import as_map
from tollbook.ledger.server.embedded import EmbeddedServer, Fsync

EMBEDDED: Final = "embedded"
LOCAL: Final = "redis-server"
CONTAINER: Final = "container"

# Not called TOLLBOOK_*: tests load the settings and commands inherit them, and they refuse unknown TOLLBOOK_* names.
_KINDS_VARIABLE: Final = "TEST_SERVERS"
# "everysec" spares the disk; a test of durability starts a server of its own (private_server).
_FSYNC_VARIABLE: Final = "TEST_FSYNC"
_IMAGE_VARIABLE: Final = "TEST_REDIS_IMAGE"
_IMAGE: Final = "redis:8"
_OLDEST_VERSION: Final = 7
# How long a test waits for something that must happen. Long, because a busy machine is slow: it only ends a hang.
PATIENCE_S: Final = 60.0
_T = TypeVar("_T")


class ServerMissing(Exception):
    """A server that the suite must run against is not available."""


def server_kinds() -> tuple[str, ...]:
    """The kinds of server to run against; the embedded one first."""
    demanded = os.environ.get(_KINDS_VARIABLE)
    if demanded is None:
        # In CI a redis-server is demanded: without one, the tests that need it fail.
        needed = {LOCAL} if is_ci() else set[str]()
        kinds = [EMBEDDED, *(kind for kind, reason in _missing().items() if reason is None or kind in needed)]
        os.environ[_KINDS_VARIABLE] = demanded = ",".join(kinds)
    kinds = [kind.strip() for kind in demanded.split(",") if kind.strip()]
    unknown = set(kinds) - {EMBEDDED, LOCAL, CONTAINER}
    if unknown:
        raise ServerMissing(f"{_KINDS_VARIABLE} names unknown kinds: {', '.join(sorted(unknown))}")
    return tuple(dict.fromkeys([EMBEDDED, *kinds]))


def describe_servers() -> str:
    """One line for the report: which kinds are run against, and why not the others."""
    kinds = server_kinds()
    absent = [f"{kind}: {reason or 'not asked for'}" for kind, reason in _missing().items() if kind not in kinds]
    return f"servers: {', '.join(kinds)}" + (f" (without {'; '.join(absent)})" if absent else "")


class TestServers:
    """Servers that are started when they are first asked for and run until `stop`."""

    __test__ = False

    def __init__(self, new_directory: Callable[[str], Path]) -> None:
        self._new_directory = new_directory
        self._urls: dict[str, str] = {}
        self._stops: list[Callable[[], object]] = []

    def url(self, kind: str) -> str:
        """The URL of the one server of a kind."""
        if kind not in self._urls:
            self._urls[kind] = self._start_container() if kind == CONTAINER else self._start_process(kind)
        return self._urls[kind]

    def stop(self) -> None:
        """End all servers."""
        while self._stops:
            self._stops.pop()()

    def _start_process(self, kind: str) -> str:
        fsync = cast("Fsync", os.environ.get(_FSYNC_VARIABLE, "everysec"))
        server = EmbeddedServer(self._new_directory(kind), fsync=fsync, binary=binary_of(kind))
        run_in_new_loop(server.start())
        self._stops.append(lambda: run_in_new_loop(server.stop()))
        return server.url

    def _start_container(self) -> str:
        # Imported here, since the import takes long and few runs need it.
        from docker.errors import DockerException
        from testcontainers.community.redis import RedisContainer

        try:
            # The constructor already talks to the daemon.
            container = RedisContainer(os.environ.get(_IMAGE_VARIABLE, _IMAGE))
            container.with_command("redis-server --appendonly yes --appendfsync everysec --save ''")
            container.start()
        except DockerException as exc:
            raise ServerMissing(f"the Redis container did not start: {exc}") from exc
        self._stops.append(container.stop)
        return f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"


def binary_of(kind: str) -> Path | None:
    """Return the program of a kind of server that runs as a process, None for the embedded one's own."""
    if kind != LOCAL:
        return None
    found = shutil.which(LOCAL)
    if found is None:
        raise ServerMissing(f"there is no {LOCAL} on the PATH")
    return Path(found)


async def wait_until(
    condition: Callable[[], Awaitable[_T] | _T], timeout_s: float = PATIENCE_S, *, what: str = "the condition"
) -> _T:
    """Call `condition`, plain or async, until it returns a true value; return that value.

    The only place in the suite that polls. It is for effects without a signal: another process that ends or
    dies, or a change that only a query shows. If there is a signal (a reply, an event, a future), a test waits for
    that.
    """
    began = time.monotonic()
    while True:
        answer = condition()
        value = cast("_T", await answer) if inspect.isawaitable(answer) else answer
        if value:
            return value
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise AssertionError(f"{what} did not come true within {timeout_s} s; last answer: {value!r}")
        # The longer it takes, the less often it is asked: asking takes processor time from the processes under test.
        await asyncio.sleep(min(max(0.005, waited_s / 20), 0.1))


async def drop_functions(client: Redis) -> None:
    """Remove every library of functions.

    Not by FUNCTION FLUSH: once a function has passed nil to redis.call, that command ends Redis 8.0.6 with a
    segmentation fault (seen on 2026-11-30 with Debian's build). Tests with too few keys make the gate's functions pass
    nil.
    """
    for library in await client.function_list():
        await client.function_delete(as_map(library)[b"library_name"])


def run_in_new_loop(work: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine to its end, for a fixture that is not async."""
    # In a loop of its own: unlike asyncio.run, this leaves the current loop of pytest-asyncio alone.
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()


@cache
def _missing() -> dict[str, str | None]:
    """The optional kinds, each with the reason why it is not available, or None if it is."""
    return {LOCAL: _why_no_local_server(), CONTAINER: _why_no_container()}


def _why_no_local_server() -> str | None:
    path = shutil.which(LOCAL)
    if path is None:
        return "not on the PATH"
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    version = re.search(r"v=(\d+)", output)
    if version is None or int(version[1]) < _OLDEST_VERSION:
        return f"older than {_OLDEST_VERSION}.0"
    return None


def _why_no_container() -> str | None:
    """Connect to the daemon's socket, which is much faster than asking with the Docker client."""
    host = urlsplit(os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")
    try:
        match host.scheme:
            case "unix":
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.settimeout(1)
                    connection.connect(host.path)
            case "tcp" | "http" | "https":
                socket.create_connection((host.hostname or "localhost", host.port or 2375), timeout=1).close()
            case _:
                return f"DOCKER_HOST has the unknown scheme {host.scheme}"
    except OSError:
        return "no Docker daemon answers"
    return None
