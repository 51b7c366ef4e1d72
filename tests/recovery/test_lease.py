"""One projector per ledger: others are refused or wait, and a replaced one stops by itself."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis

from tests.recovery.apart import kill, start_projector
from tests.servers import wait_until
from tests.system import BackgroundCommand, make_settings, run_cli
from tollbook.inference.settings import Settings
from tollbook.ledger.keys import Keys, projector_lease
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.standin import StandIn

LEASE: Final = projector_lease("tollbook")


class Projectors:
    """Starts projectors of one ledger; they are killed at the end."""

    def __init__(self, settings: Settings, redis_url: str, redis: Redis) -> None:
        self.redis = redis
        self.redis_url = redis_url
        self.directory = settings.data_dir.parent
        self._settings = settings
        self._ends = AsyncExitStack()

    async def start(
        self, *options: str, place: str = "data", waits_for: str = "projector.started"
    ) -> BackgroundCommand:
        command = await start_projector(
            self._settings, self.redis_url, *options, data_dir=self.directory / place, waits_for=waits_for
        )
        self._ends.push_async_callback(kill, command)
        return command

    async def lapse(self) -> None:
        """Let the lease end now, as it does ten seconds after its owner's last sign of life."""
        await self.redis.pexpire(LEASE, 1)

    async def answering(self) -> int:
        """Return how many of them hear requests for baselines."""
        ((_, listeners),) = await self.redis.pubsub_numsub(Keys().baseline_requests)
        return listeners

    async def aclose(self) -> None:
        await self._ends.aclose()


async def _is_none(projectors: Projectors) -> bool:
    return await projectors.answering() == 0


@pytest.fixture
async def projectors(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Projectors]:
    async with StandIn() as provider:
        settings = make_settings(tmp_path / "data", provider, redis_url=server_url)
        projectors = Projectors(settings, server_url, redis_client)
        yield projectors
        await projectors.aclose()


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("data", "is open in another process: stop the other projector"),
        ("elsewhere", "works on this ledger: stop it first, or start this one with --standby"),
    ],
)
async def test_a_second_projector_is_refused_with_the_reason(projectors: Projectors, place: str, says: str) -> None:
    first = await projectors.start()
    refused = await run_cli(
        "projector",
        cwd=projectors.directory,
        env={"REDIS_URL": projectors.redis_url, "TOLLBOOK_DATA_DIR": str(projectors.directory / place)},
    )
    assert refused.code != 0
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
    assert first.process.returncode is None


async def test_a_projector_that_stops_leaves_its_place_to_the_next_at_once(projectors: Projectors) -> None:
    first = await projectors.start()
    await first.end()
    assert first.process.returncode == 0, first.stderr
    assert not await projectors.redis.exists(LEASE)
    await projectors.start(place="elsewhere")


@pytest.mark.slow
async def test_a_killed_projector_is_started_again_at_its_place_without_waiting(projectors: Projectors) -> None:
    first = await projectors.start()
    await kill(first)
    # A process that waits for this lease to expire waits for ever.
    assert await projectors.redis.persist(LEASE)
    await projectors.start()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data", "elsewhere"])
async def test_a_standby_takes_over_from_a_killed_projector(projectors: Projectors, place: str) -> None:
    first = await projectors.start()
    standby = await projectors.start("--standby", place=place, waits_for="projector.standing_by")
    assert "projector.started" not in standby.stderr
    assert await projectors.answering() == 1, "who stands by answers no requests for baselines"
    await kill(first)
    await wait_until(lambda: _is_none(projectors), what="the end of its answers")
    await projectors.lapse()
    await wait_until(lambda: "projector.started" in standby.stderr, what="the standby's start")
    assert await projectors.answering() == 1


@pytest.mark.slow
async def test_a_standby_elsewhere_follows_with_a_file_of_its_own(projectors: Projectors) -> None:
    """So it takes over with everything folded; until then it writes nothing."""
    first = await projectors.start()
    standby = await projectors.start("--standby", place="elsewhere", waits_for="standby.following")
    elsewhere = {"REDIS_URL": projectors.redis_url, "TOLLBOOK_DATA_DIR": str(projectors.directory / "elsewhere")}

    async def folded() -> int:
        finished = await run_cli(
            "sql", "SELECT count(*) AS n FROM events", "--json", cwd=projectors.directory, env=elsewhere
        )
        return json.loads(finished.stdout)[0]["n"] if finished.code == 0 else 0

    for user in ("u1", "u2", "u3"):
        granted = await run_cli(
            "credit", "grant", user, "5", "--reason", "a test", cwd=projectors.directory, env=elsewhere
        )
        assert granted.code == 0, granted.stderr
    written = await projectors.redis.xlen(Keys().ledger)

    async def is_in_step() -> bool:
        return await folded() == written

    await wait_until(is_in_step, what="the standby's fold")
    assert await projectors.redis.xlen(Keys().ledger) == written
    await kill(first)
    await projectors.lapse()
    await wait_until(lambda: "projector.started" in standby.stderr, what="the standby's start")
    assert await folded() == written


@pytest.mark.slow
async def test_a_standby_waits_out_an_outage_of_redis_and_takes_over_afterwards(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    async with StandIn() as provider, connect(private_server.url) as redis:
        settings = make_settings(tmp_path / "processes" / "data", provider, redis_url=private_server.url)
        settings.data_dir.parent.mkdir()
        projectors = Projectors(settings, private_server.url, redis)
        try:
            first = await projectors.start()
            standby = await projectors.start("--standby", place="elsewhere", waits_for="standby.in_step")
            await private_server.kill()
            await wait_until(lambda: "lease.not_reached" in standby.stderr, what="the standby's first try in vain")
            await private_server.start()
            await kill(first)
            await wait_until(lambda: "projector.started" in standby.stderr, what="the standby's start")
        finally:
            await projectors.aclose()


@pytest.mark.slow
async def test_a_projector_that_was_replaced_while_paused_stops_by_itself(projectors: Projectors) -> None:
    first = await projectors.start()
    standby = await projectors.start("--standby", place="elsewhere", waits_for="projector.standing_by")
    first.process.send_signal(signal.SIGSTOP)
    await projectors.lapse()
    await wait_until(lambda: "projector.started" in standby.stderr, what="the standby's start")
    first.process.send_signal(signal.SIGCONT)
    assert await first.wait() != 0
    assert "works on this ledger" in first.stderr
    assert standby.process.returncode is None


@pytest.mark.slow
async def test_a_standby_that_finds_the_file_in_use_gives_the_lease_back(projectors: Projectors) -> None:
    """Where the first only slept, it goes on."""
    first = await projectors.start()
    standby = await projectors.start("--standby", waits_for="projector.standing_by")
    first.process.send_signal(signal.SIGSTOP)
    await projectors.lapse()
    assert await standby.wait() != 0
    assert "is open in another process" in standby.stderr
    first.process.send_signal(signal.SIGCONT)
    await wait_until(lambda: projectors.redis.exists(LEASE), what="the first one's renewal")
    assert first.process.returncode is None
