"""Another user of the machine can neither ask the embedded server nor read or redirect what is in the data folder."""

import asyncio
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from tests.servers import wait_until
from tests.system import BackgroundCommand, run_cli
from tollbook.ledger.private_files import make_private_folder, read_private, write_private
from tollbook.ledger.projection.snapshot import take_snapshot
from tollbook.ledger.projection.store import Store
from tollbook.ledger.projection.store_errors import StoreFailed
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.endpoint import EndpointError, read_endpoint
from tollbook.observability.address import AddressError, announced_address
from tollbook.standin import StandIn

NOBODY = 65534
PRIVATE = ("environ", "mem", "maps", "fd/0")


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, user=NOBODY, capture_output=True, text=True, errors="replace", check=False)


@pytest.mark.slow
async def test_the_embedded_server_asks_for_a_password(private_server: EmbeddedServer) -> None:
    host, _, port = private_server.url.rpartition("@")[2].removesuffix("/0").partition(":")
    async with Redis(host=host, port=int(port)) as stranger:
        with pytest.raises(AuthenticationError):
            await stranger.execute_command("XADD", "generation", "*", "task", "ping")
    async with connect(private_server.url) as owner:
        assert await owner.ping()


async def test_the_password_is_made_once_and_stands_on_no_command_line(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    password = (tmp_path / "data/valkey/password").read_text("ascii").strip()
    assert len(password) >= 32
    assert password in private_server.url
    for name in ("cmdline", "environ"):
        shown = await asyncio.to_thread(Path(f"/proc/{private_server.pid}/{name}").read_bytes)
        assert password.encode() not in shown
    before = private_server.url
    await private_server.stop()
    await private_server.start()
    assert private_server.url == before


async def test_files_of_the_server_are_readable_by_their_owner_only(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    async with connect(private_server.url) as client:
        await client.set("a", "b")
    for path in (tmp_path / "data", *(tmp_path / "data").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_reads_nothing() -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        data = Path(place) / "data"
        make_private_folder(data)
        write_private(data / "password", "secret")
        tried = subprocess.run(
            ["/bin/cat", data / "password"], user=NOBODY, capture_output=True, text=True, check=False
        )
    assert tried.returncode != 0
    assert "Permission denied" in tried.stderr


def test_a_folder_that_exists_stays_as_it_is(tmp_path: Path) -> None:
    """Its owner may share it on purpose; files that are made in it are still private."""
    folder = tmp_path / "data"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    make_private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    link = tmp_path / "endpoint.json"
    link.symlink_to(target)
    write_private(link, "new")
    assert target.read_text() == "precious"
    assert not link.is_symlink()
    assert (read_private(link), stat.S_IMODE(link.stat().st_mode)) == ("new", 0o600)


def test_a_planted_link_is_not_read_through(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.json"
    target.write_text('{"redis_url": "redis://attacker", "namespace": "tollbook", "pid": 1}')
    (tmp_path / "endpoint.json").symlink_to(target)
    with pytest.raises(EndpointError):
        read_endpoint(tmp_path)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user of the machine can look into."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "folder"
        folder.mkdir(mode=0o755)
        yield folder


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
async def test_another_user_can_read_nothing_of_a_running_system(public: Path) -> None:
    """Each file, each process, each port: no prompt, no key, no password, no token."""
    secret, key = "the-prompt-of-somebody-else", "sk-the-key"
    data = public / "data"
    async with StandIn() as provider:
        env = {
            "OPENROUTER_BASE_URL": provider.base_url,
            "OPENROUTER_API_KEY": key,
            "TOLLBOOK_DATA_DIR": str(data),
            "TOLLBOOK_ALLOW_UNSYNCED": "1",
        }
        command = await BackgroundCommand.start("up", cwd=public, env=env, is_installed=True)
        try:
            await wait_until(lambda: "Metrics:" in command.stdout, what="the start")
            pids = [command.process.pid, int((data / "valkey" / "valkey.pid").read_text())]
            url = (await run_cli("url", cwd=public, env=env)).stdout.strip()
            async with connect(url) as redis:
                task = {"task": "score_post", "user_id": "u1", "prompt": secret, "task_id": "t1"}
                await redis.xadd("analysis", task)  # pyright: ignore[reportArgumentType]
            done = await run_cli("result", "t1", "--wait", "50", cwd=public, env=env)
            assert "done" in done.stdout
            files = [path for path in data.rglob("*") if path.is_file()]
            assert {"tollbook.duckdb", "endpoint.json", "password"} <= {path.name for path in files}
            for path in (*files, *(Path(f"/proc/{pid}/{name}") for pid in pids for name in PRIVATE)):
                tried = await asyncio.to_thread(as_nobody, "/bin/cat", str(path))
                assert tried.returncode != 0, path
            shown = [(await asyncio.to_thread(as_nobody, "/bin/cat", f"/proc/{pid}/cmdline")).stdout for pid in pids]
            password = url.partition("@")[0].rpartition(":")[2]
            metrics = re.search(r"http://\S+/metrics", command.stdout)
            assert metrics is not None
            async with httpx.AsyncClient() as client:
                base = metrics[0].removesuffix("/metrics")
                shown += [(await client.get(base + path)).text for path in ("/metrics", "/health/ready", "/")]
            for text in shown:
                assert not [each for each in (secret, key, password) if each in text]
        finally:
            await command.end()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_file_of_another_user_is_not_trusted() -> None:
    """Otherwise a user who makes a folder `data` where others work would get their prompts."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "endpoint.json"
        write_private(path, "{}")
        Path(place).chmod(0o755)
        path.chmod(0o644)
        os.chown(path, NOBODY - 1, -1)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(PermissionError, match="belongs to another user"):
                read_private(path)
        finally:
            os.seteuid(0)
        assert read_private(path) == "{}", "root looks after everybody's"
        os.chown(path, 0, -1)
        os.seteuid(NOBODY)
        try:
            assert read_private(path) == "{}"
        finally:
            os.seteuid(0)


def test_nothing_is_written_through_a_link_that_is_planted_for_the_projector(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tollbook.duckdb", "tollbook.duckdb.wal"):
        (data / name).symlink_to(target)
        with pytest.raises(StoreFailed, match="is a symbolic link"):
            Store.open(data / "tollbook.duckdb", "ledger-1")
        (data / name).unlink()
    (data / "metrics").mkdir()
    (data / "metrics" / f".w.{os.getpid()}").symlink_to(target)
    with pytest.raises(AddressError), announced_address(data, "w", "127.0.0.1:1", part="worker"):
        pass
    assert target.read_text() == "precious"


def test_a_copy_of_the_projection_is_private(tmp_path: Path) -> None:
    Store.open(tmp_path / "tollbook.duckdb", "ledger-1").close()
    take_snapshot(tmp_path / "tollbook.duckdb", tmp_path / "copy.duckdb")
    assert stat.S_IMODE((tmp_path / "copy.duckdb").stat().st_mode) == 0o600
