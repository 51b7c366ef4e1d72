"""An address of Sentinels: the clients that are made of it, and the messages if it leads nowhere."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from redis.exceptions import RedisError

from tests.quick import first_quick
from tests.replicated import PASSWORD, SENTINEL_PASSWORD, SERVICE, Replicated, follow, is_primary, port_of, replicated
from tests.servers import EMBEDDED, wait_until
from tollbook.consumers.app import build_app
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.server.address import check_address, database_of, hide_password
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.server.refusals import reason_of
from tollbook.ledger.server.sentinel_address import read_sentinel_address


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Replicated]:
    async with replicated(tmp_path, kind=EMBEDDED, has_sentinel=True) as servers:
        yield servers


async def port_seen_by(url: str) -> int:
    """Return the port of the server to which an address leads."""
    async with connect(url) as redis:
        found: Any = await redis.config_get("port")
        return int(found["port"])


async def problem_of(url: str) -> str:
    async with connect(url) as redis:
        pipeline = CommandPipeline(redis)
        with pytest.raises(LedgerUnavailable) as refused:
            await pipeline.execute("PING")
        await pipeline.aclose()
        return reason_of(refused.value)


def test_an_address_of_sentinels_is_parsed() -> None:
    url = "redis+sentinel://me:se%2Fcret@a.example:1,[::1]:2,c/books/3?sentinel_password=hid%26den&client_name=x%20y"
    address = read_sentinel_address(check_address(url))
    assert address.sentinels == (("a.example", 1), ("::1", 2), ("c", 26379))
    assert (address.service, address.username, address.password) == ("books", None, "hid&den")
    assert address.server_url == "redis://me:se%2Fcret@books/3?client_name=x%20y"
    assert database_of(url) == 3
    assert hide_password(url) == (
        "redis+sentinel://me:***@a.example:1,[::1]:2,c/books/3?sentinel_password=***&client_name=x%20y"
    )
    assert "cret" not in repr(address)
    assert "den" not in repr(address)


async def test_every_client_finds_the_primary(group: Replicated) -> None:
    assert await port_seen_by(group.url) == port_of(group.primary)
    # A Sentinel that is down is skipped.
    assert await port_seen_by(group.url.replace("127.0.0.1:", "127.0.0.1:1,127.0.0.1:", 1)) == port_of(group.primary)
    async with connect(group.url.replace(f"/{SERVICE}", f"/{SERVICE}/4")) as redis:
        assert b" db=4 " in cast("Any", await redis.execute_command("CLIENT", "INFO"))
    # FastStream makes a client of its own.
    app = build_app(group.url, cast("Any", None), [])
    await app.start()
    assert await app.broker.ping(timeout=5)  # pyright: ignore[reportOptionalMemberAccess]
    await app.stop()


@pytest.mark.slow
async def test_a_server_that_is_a_replica_is_not_taken_for_the_primary(group: Replicated) -> None:
    """The Sentinel does not know of the failover by hand yet, and names the demoted server."""
    (replica,) = group.replicas
    async with connect(replica.url) as promoted:
        await promoted.execute_command("REPLICAOF", "NO", "ONE")
        await wait_until(lambda: is_primary(promoted), what="the promotion")
        await follow(group.primary, port_of(replica))
    async with connect(group.url) as redis:
        with pytest.raises(RedisError, match="the server that the Sentinels name is a replica"):
            await redis.ping()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "instead", "says"),
    first_quick(
        1,
        [
            (f"/{SERVICE}", "/letters", "the Sentinels know no such service"),
            (PASSWORD, "wrong", "the user name or the password is wrong"),
            (SENTINEL_PASSWORD, "wrong", "the Sentinels require another user or password"),
            (f"sentinel_password={SENTINEL_PASSWORD}", "", "the Sentinels require another user or password"),
        ],
    ),
)
async def test_a_wrong_sentinel_address_is_reported_in_one_line(
    group: Replicated, given: str, instead: str, says: str
) -> None:
    assert says in await problem_of(group.url.replace(given, instead))


async def test_sentinels_that_are_all_down_are_named() -> None:
    async with connect("redis+sentinel://127.0.0.1:1,127.0.0.1:2/books") as redis:
        with pytest.raises(
            RedisError, match=r"no Sentinel leads to the primary of 'books' \(127.0.0.1:1: .*127.0.0.1:2: "
        ):
            await redis.ping()
