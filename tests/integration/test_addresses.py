"""Every form of REDIS_URL, against a real server: it works, or is refused with a sentence that says what is wrong."""

import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers import CONTAINER, binary_of, run_in_new_loop, server_kinds, wait_until
from tollbook.consumers.app import build_app
from tollbook.inference.errors import SettingsError
from tollbook.inference.settings import load_settings
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.address import check_address, database_of, hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import bundled_binary
from tollbook.ledger.server.pipeline import CommandPipeline

PASSWORD = "p/a?s#s@w:o%rd"
QUOTED = "p%2Fa%3Fs%23s%40w%3Ao%25rd"


@dataclass(frozen=True, slots=True)
class Server:
    """A server with users, a socket and, where it can, TLS."""

    port: int
    tls_port: int | None
    directory: Path

    def url(self, form: str) -> str:
        return form.format(
            port=self.port, tls=self.tls_port, dir=self.directory, password=QUOTED, ca=self.directory / "cert.pem"
        )


def has_begun(process: "subprocess.Popen[bytes]", directory: Path) -> bool:
    return process.poll() is not None or (directory / "r.sock").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_certificate(directory: Path) -> bool:
    openssl = shutil.which("openssl")
    if openssl is None:
        return False
    subprocess.run(
        [
            openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem",
        ],
        cwd=directory, check=True, capture_output=True,
    )  # fmt: skip
    return True


@pytest.fixture(scope="module", params=[kind for kind in server_kinds() if kind != CONTAINER])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("s")
    (directory / "users.acl").write_text(
        f"user default on nopass ~* &* +@all\nuser quoted on >{PASSWORD} ~* &* +@all\nuser open on nopass ~* &* +@all\n"
    )
    port, tls_port = free_port(), free_port()
    options = [
        "--port", str(port), "--bind", "127.0.0.1", "::1", "--unixsocket", str(directory / "r.sock"), "--save", "",
        "--aclfile", str(directory / "users.acl"), "--dir", str(directory),
    ]  # fmt: skip
    tls = [
        "--tls-port", str(tls_port), "--tls-cert-file", str(directory / "cert.pem"),
        "--tls-key-file", str(directory / "key.pem"), "--tls-ca-cert-file", str(directory / "cert.pem"),
        "--tls-auth-clients", "no",
    ]  # fmt: skip
    binary = str(binary_of(request.param) or bundled_binary())
    process, with_tls = None, False
    for with_tls in (True, False) if make_certificate(directory) else (False,):
        process = subprocess.Popen([binary, *options, *(tls if with_tls else [])], stdout=subprocess.DEVNULL)
        run_in_new_loop(wait_until(lambda running=process: has_begun(running, directory), what="the server's socket"))
        if process.poll() is None:
            break
    assert process is not None
    yield Server(port, tls_port if with_tls else None, directory)
    process.terminate()
    process.wait()


# What is given -> the database that it leads to.
WORKING = {
    "redis://127.0.0.1:{port}": 0,
    "redis://127.0.0.1:{port}/": 0,
    "redis://127.0.0.1:{port}/3": 3,
    "redis://127.0.0.1:{port}?db=4": 4,
    "redis://127.0.0.1:{port}/?db=4&client_name=me": 4,
    "redis://localhost:{port}/1": 1,
    "redis://[::1]:{port}/2": 2,
    "REDIS://127.0.0.1:{port}/2": 2,
    "redis://open@127.0.0.1:{port}/1": 1,
    "redis://open:@127.0.0.1:{port}/1": 1,
    "redis://quoted:{password}@127.0.0.1:{port}/0": 0,
    "redis://127.0.0.1:{port}/0?username=quoted&password={password}": 0,
    "unix://{dir}/r.sock": 0,
    "unix://{dir}/r.sock?db=5": 5,
    "unix://quoted:{password}@{dir}/r.sock?db=1": 1,
    "rediss://localhost:{tls}/1?ssl_ca_certs={ca}": 1,
    "rediss://quoted:{password}@127.0.0.1:{tls}?ssl_ca_certs={ca}&ssl_check_hostname=true": 0,
    "rediss://localhost:{tls}/1?ssl_cert_reqs=none&ssl_check_hostname=false": 1,
}
# What is given -> words of the refusal.
REFUSED = {
    "": "must begin with redis://",
    "127.0.0.1:{port}": "must begin with redis://",
    "redis:127.0.0.1:{port}": "must begin with redis://",
    "redis:h:1": "must begin with redis://",
    "redis:/127.0.0.1": "must begin with redis://",
    "http://127.0.0.1:{port}": "must begin with redis://",
    "redis://": "names no host",
    "redis:///0": "names no host",
    "redis://:{port}/0": "names no host",
    "redis://127.0.0.1:0": "has no valid port",
    "redis://127.0.0.1:": "has no valid port",
    "redis://127.0.0.1:x": "has no valid port",
    "redis://127.0.0.1:70000": "has no valid port",
    "redis://::1:{port}/0": "has no valid port",
    "redis://[::1": "is not a URL",
    "redis://127.0.0.1:{port}/x": "/x is not a database",
    "redis://127.0.0.1:{port}/1/2": "/1/2 is not a database",
    "redis://127.0.0.1:{port}/1/": "/1/ is not a database",
    "redis://127.0.0.1:{port}/-1": "/-1 is not a database",
    "redis://127.0.0.1:{port}/%31x": "is not a database",
    "redis://127.0.0.1:{port}/1?db=2": "names the database twice",
    "redis://127.0.0.1:{port}?db=x": "'db' must be the number",
    "redis://127.0.0.1:{port}?db=1&db=2": "has 'db' twice",
    "redis://127.0.0.1:{port}?password=": "has no value for 'password'",
    "redis://127.0.0.1:{port}?decode_responses=1": "unknown parameter 'decode_responses'",
    "redis://127.0.0.1:{port}?ssl_cert_reqs=none": "unknown parameter 'ssl_cert_reqs'",
    "rediss://127.0.0.1:{port}?ssl_foo=1": "unknown parameter 'ssl_foo'",
    "redis://127.0.0.1:{port}/0#x": "must not have a #",
    "unix://": "must name the socket with its full path",
    "unix:///": "must name the socket with its full path",
    "unix://r.sock": "must name the socket with its full path",
    "unix://run/r.sock": "must name the socket with its full path",
    "redis-sentinel://127.0.0.1:{port}/mymaster": "must name Sentinels as redis+sentinel://",
    "sentinel://127.0.0.1:{port}": "must name Sentinels as redis+sentinel://",
    "redis+sentinel:127.0.0.1:{port}/books": "is not an address of Sentinels",
    "redis+sentinel://": "is not an address of Sentinels",
    "redis+sentinel:///books": "names no Sentinel in ''",
    "redis+sentinel://127.0.0.1:{port},/books": "names no Sentinel in ''",
    "redis+sentinel://127.0.0.1:0/books": "names no Sentinel in '127.0.0.1:0'",
    "redis+sentinel://127.0.0.1:70000/books": "names no Sentinel in '127.0.0.1:70000'",
    "redis+sentinel://::1:{port}/books": "names no Sentinel in '::1:6379'",
    "redis+sentinel://a b/books": "names no Sentinel in 'a b'",
    "redis+sentinel://127.0.0.1:{port}": "names no service",
    "redis+sentinel://127.0.0.1:{port}/": "names no service",
    "redis+sentinel://127.0.0.1:{port}/0": "names no service in '0'",
    "redis+sentinel://127.0.0.1:{port}/the books": "names no service in 'the books'",
    "redis+sentinel://127.0.0.1:{port}/books/x": "/x is not a database",
    "redis+sentinel://127.0.0.1:{port}/books/1/2": "/1/2 is not a database",
    "redis+sentinel://127.0.0.1:{port}/books/1?db=2": "names the database twice",
    "redis+sentinel://127.0.0.1:{port}/books#x": "must not have a #",
    "redis+sentinel://127.0.0.1:{port}/books?sentinel_password=": "has no value for 'sentinel_password'",
    "redis+sentinel://127.0.0.1:{port}/books?sentinel_username=a&sentinel_username=b": "'sentinel_username' twice",
    "redis+sentinel://127.0.0.1:{port}/books?sentinel_pasword=x": "unknown parameter 'sentinel_pasword'",
    "redis+sentinel://127.0.0.1:{port}/books?ssl_cert_reqs=none": "unknown parameter 'ssl_cert_reqs'",
    "redis+cluster://127.0.0.1:{port}": "a cluster is recognised automatically",
    "redis://127.0.0.1:{port},/0": "names no host",
    "redis://127.0.0.1:{port},127.0.0.1:0/0": "has no valid port",
    "redis://127.0.0.1:{port},127.0.0.1:{port}/x": "/x is not a database",
}


@pytest.mark.parametrize("form", WORKING)
async def test_an_address_leads_to_its_database(server: Server, form: str) -> None:
    if "{tls}" in form and server.tls_port is None:
        pytest.skip("this server was built without TLS")
    url = server.url(form)
    assert load_settings(env_file=None, redis_url=url).redis_url == url
    async with connect(url) as redis:
        pipeline = CommandPipeline(redis)
        client: bytes = await pipeline.execute("CLIENT", "INFO")
        assert f" db={WORKING[form]} " in client.decode()
        await pipeline.aclose()
    assert database_of(url) == WORKING[form]
    assert PASSWORD not in hide_password(url)
    assert QUOTED not in hide_password(url)
    # FastStream makes a client of its own.
    app = build_app(url, cast_worker(), [])
    await app.start()
    assert await app.broker.ping(timeout=5)  # pyright: ignore[reportOptionalMemberAccess]
    await app.stop()


def cast_worker() -> Any:
    return None


@pytest.mark.parametrize("form", REFUSED)
def test_an_address_with_an_unknown_part_is_refused(form: str) -> None:
    url = form.format(port=6379)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        check_address(url)
    assert REFUSED[form] in str(refused.value)
    with pytest.raises(LedgerUnavailable, match="cannot be used as REDIS_URL"):
        connect(url)
    if url:
        with pytest.raises(SettingsError) as failure:
            load_settings(env_file=None, redis_url=url)
        assert REFUSED[form] in failure.value.message


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hid/den@127.0.0.1:6379/0",
        "redis://:hid?den@127.0.0.1:6379/0",
        "redis://:hid#den@127.0.0.1:6379/0",
        "redis://u:12/den@127.0.0.1",
        "redis://h:12/hid?den@127.0.0.1",
        "redis://h:12/1?hid=den@127.0.0.1",
        "redis+sentinel://:hid/den@127.0.0.1:26379/books",
        "redis+sentinel://:hid?den@127.0.0.1:26379/books",
        "redis+sentinel://:hid#den@127.0.0.1:26379/books",
        "redis+sentinel://:hid@den@127.0.0.1:26379/books",
        "redis+sentinel://127.0.0.1:26379/books?sentinel_password=hid&sentinel_password=den",
    ],
)
def test_a_refusal_shows_no_part_of_a_password(url: str) -> None:
    """G10."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refused:
        check_address(url)
    assert "den" not in str(refused.value)
    assert "hid" not in str(refused.value)
