"""The embedded server: durable, alone on its directory, found again after any death."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.servers import wait_until
from tollbook.ledger.server import embedded
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer, EmbeddedServerError

_ROOT = Path(__file__).parents[2]

# A process with a server: it stores one value, says where the server is, and runs until it is ended.
# With "thread", the server is started as one that no death signal reaches, as on macOS.
_OWNER = """
import asyncio, sys
from pathlib import Path
import structlog
from redis.asyncio import Redis
from tollbook.ledger.server.embedded import EmbeddedServer

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def start(server):
    await server.start()
    async with Redis.from_url(server.url) as client:
        await client.set("survives", "yes")

async def answers(server):
    async with Redis.from_url(server.url) as client:
        return await client.ping()

async def main():
    server = EmbeddedServer(Path(sys.argv[2]))
    if sys.argv[1] == "thread":
        await asyncio.to_thread(asyncio.run, start(server))
    else:
        await start(server)
    print(server.pid, server.url, flush=True)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        print("interrupted, server answers:", await answers(server), flush=True)
        await server.stop()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def owner_process(how: str, data_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _OWNER, how, str(data_dir), cwd=_ROOT, stdout=asyncio.subprocess.PIPE, process_group=0
    )
    assert process.stdout is not None
    try:
        pid, url = (await process.stdout.readline()).decode().split()
        yield process, int(pid), url
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        # Whatever the test has left behind on the directory is ended by a start and a stop.
        async with EmbeddedServer(data_dir):
            pass


def is_alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not: where pid 1 is no init, orphans stay zombies for good."""
    if sys.platform == "linux":
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def read(url: str, key: str) -> bytes | str | None:
    async with connect(url) as client:
        return await client.get(key)


async def test_data_survive_a_stop(private_server: EmbeddedServer) -> None:
    async with connect(private_server.url) as client:
        await client.set("key", "value")
    await private_server.stop()
    assert not private_server.is_running
    await private_server.start()
    assert await read(private_server.url, "key") == b"value"


async def test_every_acknowledged_write_survives_a_kill(private_server: EmbeddedServer) -> None:
    acknowledged: list[bytes | str] = []
    enough = asyncio.Event()

    async def write() -> None:
        async with Redis.from_url(private_server.url, max_connections=1) as client:
            while True:
                acknowledged.append(await client.xadd("stream", {"writes": "many"}))
                if len(acknowledged) == 500:
                    enough.set()

    writers = [asyncio.create_task(write()) for _ in range(8)]
    await enough.wait()
    await private_server.kill()
    outcomes = await asyncio.gather(*writers, return_exceptions=True)
    assert all(isinstance(outcome, RedisError | OSError) for outcome in outcomes)

    await private_server.start()
    async with connect(private_server.url) as client:
        stored = {entry_id for entry_id, _ in await client.xrange("stream") or ()}
    assert len(acknowledged) >= 500
    assert set(acknowledged) <= stored


async def test_functions_survive_a_kill(private_server: EmbeddedServer) -> None:
    async with connect(private_server.url) as client:
        await client.function_load(
            "#!lua name=mine\nredis.register_function('answer', function() return 42 end)", replace=True
        )
    await private_server.kill()
    await private_server.start()
    async with connect(private_server.url) as client:
        assert await client.fcall("answer", 0) == 42


@pytest.mark.slow
async def test_start_waits_until_everything_is_loaded(private_server: EmbeddedServer) -> None:
    async with connect(private_server.url) as client:
        await client.eval("for i = 1, 300000 do redis.call('SET', 'key:' .. i, i) end", 0)
    await private_server.kill()
    await private_server.start()
    async with connect(private_server.url) as client:
        assert await client.dbsize() == 300_000


async def test_a_write_cut_short_at_the_end_of_the_file_does_not_keep_the_server_from_starting(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    async with connect(private_server.url) as client:
        await client.set("whole", "1")
    await private_server.kill()
    (tail,) = (tmp_path / "data/valkey/appendonlydir").glob("*.incr.aof")
    with tail.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nhal")
    await private_server.start()
    async with connect(private_server.url) as client:
        assert await client.keys() == [b"whole"]


async def test_a_damaged_file_is_named_in_the_error(private_server: EmbeddedServer, tmp_path: Path) -> None:
    await private_server.kill()
    (tail,) = (tmp_path / "data/valkey/appendonlydir").glob("*.incr.aof")
    tail.write_bytes(b"what is this?\r\n" * 10)
    with pytest.raises(EmbeddedServerError, match="cannot read its append-only file"):
        await private_server.start()


async def test_the_settings_are_those_of_a_ledger(private_server: EmbeddedServer) -> None:
    async with Redis.from_url(private_server.url, decode_responses=True) as client:
        settings = await client.config_get()
    assert {name: settings[name] for name in ("appendonly", "appendfsync", "save", "aof-load-truncated")} == {
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "aof-load-truncated": "yes",
    }
    assert (settings["maxmemory-policy"], settings["bind"]) == ("noeviction", "127.0.0.1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["main", "thread"])
async def test_a_new_start_takes_over_after_the_owner_was_killed(tmp_path: Path, how: str) -> None:
    async with owner_process(how, tmp_path) as (owner, server_pid, url):
        owner.kill()
        await owner.wait()
        async with EmbeddedServer(tmp_path) as server:
            assert not is_alive(server_pid)
            assert server.pid != server_pid
            assert server.url == url
            assert await read(server.url, "survives") == b"yes"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a death signal")
async def test_the_server_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    async with owner_process("main", tmp_path) as (owner, server_pid, _):
        owner.kill()
        await owner.wait()
        await wait_until(lambda: not is_alive(server_pid), what="the end of the server")


@pytest.mark.slow
async def test_an_interrupt_in_the_terminal_leaves_the_server_to_its_owner(tmp_path: Path) -> None:
    async with owner_process("main", tmp_path) as (owner, server_pid, _):
        # As a terminal does: to the whole group of processes.
        os.killpg(owner.pid, signal.SIGINT)
        assert owner.stdout is not None
        assert await owner.stdout.readline() == b"interrupted, server answers: True\n"
        await owner.wait()
        assert not is_alive(server_pid)


async def test_a_second_start_on_one_directory_is_refused(private_server: EmbeddedServer, tmp_path: Path) -> None:
    second = EmbeddedServer(tmp_path / "data")
    with pytest.raises(EmbeddedServerError, match=rf"another Tollbook \(pid {os.getpid()}\)"):
        await second.start()
    await second.stop()
    async with connect(private_server.url) as client:
        assert await client.ping()


async def test_a_start_while_running_has_no_effect(private_server: EmbeddedServer) -> None:
    pid = private_server.pid
    await private_server.start()
    assert private_server.pid == pid


async def test_the_port_is_kept_while_it_is_free(private_server: EmbeddedServer, tmp_path: Path) -> None:
    url = private_server.url
    await private_server.stop()
    async with EmbeddedServer(tmp_path / "data") as server:
        assert server.url == url
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2].removesuffix("/0")))):
        async with EmbeddedServer(tmp_path / "data") as server:
            assert server.url != url


async def test_a_taken_port_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EmbeddedServerError, match=f"port {port} on 127.0.0.1 is taken"):
            await EmbeddedServer(tmp_path, port=port).start()


@pytest.mark.slow
async def test_a_port_taken_between_the_check_and_the_start_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_is_free", lambda _: True)
    (tmp_path / "valkey").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "valkey/port").write_text(str(port))
        async with EmbeddedServer(tmp_path) as server:
            assert str(port) not in server.url
            assert await read(server.url, "key") is None


async def test_a_directory_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(EmbeddedServerError, match="is not a directory: set TOLLBOOK_DATA_DIR"):
        await EmbeddedServer(tmp_path / "data").start()


async def test_a_directory_that_is_not_writable_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)  # noqa: ASYNC240 - One system call.
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(EmbeddedServerError, match="is not writable: set TOLLBOOK_DATA_DIR"):
        await EmbeddedServer(tmp_path).start()


async def test_a_binary_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError):
        await EmbeddedServer(tmp_path, binary=tmp_path / "no-such-server").start()


async def test_a_failed_start_leaves_the_directory_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(EmbeddedServerError):
        await EmbeddedServer(tmp_path, port=taken.getsockname()[1]).start()
    async with EmbeddedServer(tmp_path) as server:
        assert server.is_running


async def test_a_server_that_ended_on_its_own_says_so(private_server: EmbeddedServer) -> None:
    assert private_server.problem is None
    pid = private_server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: not private_server.is_running, what="the end of the server")
    assert "ended with code -9" in (private_server.problem or "")
    await private_server.start()
    assert private_server.problem is None
