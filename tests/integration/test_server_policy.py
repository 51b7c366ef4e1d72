"""A server that may lose acknowledged writes takes no calls, at start and while it runs (G8)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from tests.servers import PATIENCE_S, wait_until
from tollbook.inference.administration import connect_administration
from tollbook.inference.runtime import build_ledger, open_ledger
from tollbook.inference.settings import Settings
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.requests import ReserveRequest
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.policy import ServerPolicy, ServerUnsafe, ServerWatch, read_policy


@pytest.fixture
async def redis(private_server: EmbeddedServer) -> AsyncIterator[Redis]:
    client = connect(private_server.url)
    yield client
    await client.aclose()


async def test_the_embedded_server_is_safe(redis: Redis) -> None:
    policy = await read_policy(redis)

    assert policy.refusal(allow_unsynced=False) is None
    assert (policy.eviction, policy.fsync, policy.role) == ("noeviction", "always", "master")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        *(
            ("maxmemory-policy", policy, f"now {policy}, to noeviction")
            for policy in ("allkeys-lru", "allkeys-lfu", "allkeys-random")
        ),
        *(
            ("maxmemory-policy", policy, f"now {policy}, to noeviction")
            for policy in ("volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl")
        ),
        ("appendfsync", "everysec", "set appendfsync, now everysec, to always"),
        ("appendfsync", "no", "set appendfsync, now no, to always"),
        ("maxmemory", "1mb", "is nearly full"),
    ],
)
async def test_a_setting_that_is_changed_while_it_runs_stops_calls_until_it_is_changed_back(
    redis: Redis, name: str, value: str, says: str
) -> None:
    watch = ServerWatch(redis, allow_unsynced=False)
    await watch.look()
    watch.check()
    before: Any = (await redis.config_get(name))[name]

    await redis.config_set(name, value)
    await watch.look()
    with pytest.raises(ServerUnsafe) as refused:
        watch.check()
    assert says in str(refused.value)

    await redis.config_set(name, before)
    await watch.look()
    watch.check()


async def test_a_server_that_hides_its_settings_is_refused_unless_allowed(
    redis: Redis, private_server: EmbeddedServer
) -> None:
    """Managed servers deny CONFIG."""
    await redis.execute_command("ACL", "SETUSER", "plain", "on", ">secret", "~*", "&*", "+@all", "-config")
    client = connect(f"redis://plain:secret@{private_server.url.rpartition('@')[2]}")
    try:
        strict, lenient = (ServerWatch(client, allow_unsynced=allowed) for allowed in (False, True))
        await strict.look()
        await lenient.look()
    finally:
        await client.aclose()

    with pytest.raises(ServerUnsafe, match="does not say whether it syncs its writes"):
        strict.check()
    lenient.check()
    assert not lenient.policy.is_synced


async def test_an_accepted_risk_of_loss_is_warned_of_once(redis: Redis) -> None:
    await redis.config_set("appendfsync", "everysec")
    watch = ServerWatch(redis, allow_unsynced=True)
    with capture_logs() as lines:
        for _ in range(3):
            await watch.look()
            watch.check()

    (warned,) = [line for line in lines if line["log_level"] == "warning"]
    assert (warned["event"], warned["accepted_by"]) == ("server.unsynced", "TOLLBOOK_ALLOW_UNSYNCED")
    assert "set appendfsync, now everysec, to always" in warned["problem"]


async def test_a_server_without_an_append_only_file_is_refused(redis: Redis) -> None:
    await redis.config_set("appendonly", "no")
    watch = ServerWatch(redis, allow_unsynced=False)
    await watch.look()

    with pytest.raises(ServerUnsafe, match="keeps no append-only file"):
        watch.check()


async def test_eviction_is_refused_whatever_is_allowed(redis: Redis) -> None:
    await redis.config_set("maxmemory-policy", "volatile-lru")
    watch = ServerWatch(redis, allow_unsynced=True)
    await watch.look()

    with pytest.raises(ServerUnsafe, match="now volatile-lru, to noeviction"):
        watch.check()


async def test_a_server_that_was_never_checked_takes_no_calls(redis: Redis, private_server: EmbeddedServer) -> None:
    watch = ServerWatch(redis, allow_unsynced=True)
    await private_server.stop()
    await watch.look()

    with pytest.raises(LedgerUnavailable, match="did not answer when asked"):
        watch.check()


async def test_a_server_that_does_not_answer_keeps_its_verdict(redis: Redis, private_server: EmbeddedServer) -> None:
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    watch = ServerWatch(redis, allow_unsynced=True)
    await watch.look()
    await private_server.stop()
    await watch.look()

    with pytest.raises(ServerUnsafe):
        watch.check()


class OddServer:
    """A server with unexpected answers, until the test lets it answer as a real one."""

    def __init__(self, redis: Redis) -> None:
        self.is_odd = True
        self.asked = asyncio.Event()
        self._redis = redis

    async def info(self) -> dict[str, Any]:
        self.asked.set()
        return {"used_memory": "a lot"} if self.is_odd else await self._redis.info()

    async def config_get(self, name: str) -> Any:
        return await self._redis.config_get(name)


async def test_an_unexpected_error_of_a_check_stops_calls_until_the_next_check(redis: Redis) -> None:
    server = OddServer(redis)
    server.is_odd = False
    watch = ServerWatch(cast("Redis", server), allow_unsynced=False, interval_s=0.01)
    await watch.look()
    watch.check()
    looking = asyncio.create_task(watch.run())
    try:
        server.is_odd = True
        with pytest.raises(LedgerUnavailable, match=r"could not be checked \(ValueError: "):
            await check_until_refused(watch)
        server.asked.clear()
        await asyncio.wait_for(server.asked.wait(), PATIENCE_S)
        server.is_odd = False
        await wait_until(lambda: is_accepted(watch), what="the next look that succeeds")
    finally:
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking


async def check_until_refused(watch: ServerWatch) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            watch.check()
            await asyncio.sleep(0)


def is_accepted(watch: ServerWatch) -> bool:
    try:
        watch.check()
    except LedgerUnavailable:
        return False
    return True


@pytest.mark.parametrize(
    ("used", "limit", "is_refused"), [(89, 100, False), (90, 100, True), (200, 100, True), (10**12, 0, False)]
)
def test_calls_stop_before_the_server_is_full(used: int, limit: int, is_refused: bool) -> None:
    policy = ServerPolicy("noeviction", used, limit, has_append_only_file=True, fsync="always", role="master")
    assert (policy.refusal(allow_unsynced=False) is not None) == is_refused


def test_a_replica_takes_no_calls() -> None:
    policy = ServerPolicy("noeviction", 1, 0, has_append_only_file=True, fsync="always", role="slave")
    assert "is a replica" in str(policy.refusal(allow_unsynced=True))


async def test_no_ledger_is_opened_on_a_server_that_may_lose_it(private_server: EmbeddedServer, redis: Redis) -> None:
    settings = Settings.model_validate({"redis_url": private_server.url, "allow_unsynced": False})
    await redis.config_set("appendfsync", "everysec")

    with pytest.raises(ServerUnsafe, match="TOLLBOOK_ALLOW_UNSYNCED=1"):
        async with open_ledger(settings, private_server.url):
            pytest.fail("it was opened")


async def test_no_call_begins_once_the_server_may_evict(private_server: EmbeddedServer, redis: Redis) -> None:
    settings = Settings.model_validate({"redis_url": private_server.url, "allow_unsynced": False})
    async with open_ledger(settings, private_server.url) as handle:
        ledger = build_ledger(handle, settings, lambda _: no_baselines)
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        await handle.server.look()

        with pytest.raises(ServerUnsafe, match="may evict keys"):
            await ledger.reserve(unused_request, 0)


def unused_request(_: int) -> ReserveRequest:
    raise AssertionError("refused before it is made")


async def no_baselines(_: Sequence[str], /) -> BaselinePage:
    raise AssertionError("refused before they are read")


async def test_nobody_changes_money_on_a_server_that_may_lose_it(
    private_server: EmbeddedServer, redis: Redis, tmp_path: Path
) -> None:
    settings = Settings(redis_url=private_server.url, data_dir=tmp_path)
    async with open_ledger(settings, private_server.url):
        pass
    await redis.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ServerUnsafe, match="may evict keys"):
        async with connect_administration(settings):
            pass
    await redis.config_set("maxmemory-policy", "noeviction")
    async with connect_administration(settings):
        pass
