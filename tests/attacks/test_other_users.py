"""Another user of the machine can neither ask the embedded server nor read or redirect what is in the data folder."""

import asyncio
import os
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from tollbook.ledger.private_files import make_private_folder, read_private, write_private
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.endpoint import EndpointError, read_endpoint

NOBODY = 65534


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


async def test_what_the_server_writes_can_be_read_by_its_owner_only(
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
    """Its owner may share it on purpose; what is made in it is private all the same."""
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
