"""Ready means that a budget decision can be taken; the answer names what is missing, in time, whatever hangs."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.observability.pages import health, problems, scrape, wait_for_problems, wait_until_ready
from tests.proxy import faulty_proxy
from tests.servers import wait_until
from tests.system import STREAMS, BackgroundCommand, running_system
from tollbook.consumers.service import build_worker
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.observability.process_state import ProcessState


def url_of(state: ProcessState) -> str:
    assert state.url is not None
    return state.url


async def test_a_system_is_ready_while_redis_answers(private_server: EmbeddedServer, tmp_path: Path) -> None:
    async with running_system(tmp_path / "system", private_server.url, metrics_port=0) as running:
        url = url_of(running.system.state)
        await wait_until_ready(url)
        await private_server.stop()
        await wait_for_problems(url, redis="")
        # To start the process again would not help, so it is not called dead.
        assert (await health(url, "live"))[0] == 200
        await private_server.start()
        await wait_until_ready(url)


async def test_an_accepted_risk_of_loss_is_a_warning(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    """The server of these tests does not sync every write."""
    async with running_system(tmp_path / "data", server_url, metrics_port=0) as running:
        document = await wait_for_problems(url_of(running.system.state))
        found = {check["check"]: check["found"] for check in document["checks"]}
        assert (
            "accepted by TOLLBOOK_ALLOW_UNSYNCED: a crash of the Redis server loses its last writes" in found["redis"]
        )


@pytest.mark.slow
async def test_a_hanging_redis_is_reported_in_time(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with (
        faulty_proxy(server_url) as proxy,
        running_system(tmp_path / "data", proxy.url, metrics_port=0, stop_grace_s=0.0) as running,
    ):
        url = url_of(running.system.state)
        await wait_until_ready(url)
        proxy.hold_replies()
        try:
            # It is answered while Redis hangs, and the answer says after how long Redis was given up.
            await wait_for_problems(url, redis="no answer within 0.6 s")
            # Unknown values are left out of the metrics, never shown as zero.
            page = await scrape(url)
            assert page.get("tollbook_ready") == 0
            assert "tollbook_stream_entries" not in page.text
            assert "tollbook_projector_lag" not in page.text
        finally:
            proxy.let_replies_pass()
        await wait_until_ready(url)


async def test_a_redis_that_was_emptied_or_replaced_is_not_ready(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(tmp_path / "data", server_url, metrics_port=0, workers=0) as running:
        url = url_of(running.system.state)
        await wait_until_ready(url)
        # Functions alone come back by themselves, as they do for a call.
        await redis_client.function_flush()
        await wait_until_ready(url)
        await redis_client.rename(running.keys.meta, "meta-put-aside")
        await wait_for_problems(url, ledger="Redis holds no ledger")
        await redis_client.rename("meta-put-aside", running.keys.meta)


async def test_a_route_without_a_price_is_not_ready(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    routes = {"score_post": {"model": "nobody/knows-this"}}
    async with running_system(tmp_path / "data", server_url, metrics_port=0, workers=0, routes=routes) as running:
        await wait_for_problems(url_of(running.system.state), prices="nobody/knows-this")


@pytest.mark.slow
async def test_a_process_with_an_ended_background_task_is_not_alive(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(tmp_path / "data", server_url, metrics_port=0, workers=0) as running:
        url, state = url_of(running.system.state), running.system.state
        worker = build_worker(running.system.runtime, STREAMS, "worker-9")
        ended = asyncio.create_task(asyncio.sleep(0))
        await ended
        assert (await health(url, "live"))[0] == 200
        # A real worker ends with its sweeper, and the process soon after it.
        with state.working(worker, {"sweeper": ended}):
            status, document = await health(url, "live")
        assert (status, list(problems(document))) == (503, ["sweeper of worker-9"])


@pytest.mark.slow
async def test_a_worker_is_ready_once_there_is_a_projection_and_as_long_as_a_kept_baseline_serves(
    private_server: EmbeddedServer, tmp_path: Path
) -> None:
    environment = {
        "REDIS_URL": private_server.url,
        "TOLLBOOK_DATA_DIR": str(tmp_path / "shared"),
        "OPENROUTER_BASE_URL": "http://127.0.0.1:9/api/v1",
        "TOLLBOOK_METRICS_PORT": "0",
        # A baseline is kept for a third of it.
        "TOLLBOOK_TAIL_KEEP_S": "1",
    }
    worker = await BackgroundCommand.start("worker", cwd=tmp_path, env=environment)
    projector: BackgroundCommand | None = None
    try:
        url = await address(tmp_path / "shared", "worker")
        await wait_for_problems(url, process="there is no ledger")
        assert (await health(url, "live"))[0] == 200
        projector = await BackgroundCommand.start("projector", cwd=tmp_path, env=environment)
        await wait_until_ready(url)
        await wait_until_ready(await address(tmp_path / "shared", "projector"))
        projector.process.kill()
        await projector.wait()

        async def is_kept() -> bool:
            status, document = await health(url, "ready")
            found = next(check["found"] for check in document["checks"] if check["check"] == "baseline")
            return status == 200 and found.startswith("only cached ones")

        await wait_until(is_kept, what="word of the kept baseline")
    finally:
        await worker.end()
        if projector is not None:
            await projector.end()


async def address(data_dir: Path, part: str) -> str:
    """Return the address that a process has left, as Prometheus reads it."""
    from tests.observability.test_server import targets

    found = await wait_until(lambda: targets(data_dir, part), what=f"the address of the {part}")
    return f"http://{found[0]}"


@pytest.mark.slow
async def test_a_server_that_takes_no_write_is_not_ready(private_server: EmbeddedServer, tmp_path: Path) -> None:
    """It answers, and every read is right; no hold could be written."""
    async with running_system(tmp_path / "data", private_server.url, metrics_port=0, workers=0) as running:
        url = url_of(running.system.state)
        for setting, bad, good, words in (
            ("maxmemory", 1, 0, "its memory is used up: raise maxmemory"),
            ("min-replicas-to-write", 1, 0, "too few of its replicas answer"),
        ):
            await wait_until_ready(url)
            await running.redis.config_set(setting, bad)
            await wait_for_problems(url, redis=words)
            await running.redis.config_set(setting, good)
        await running.redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        await wait_for_problems(url, redis="replica")
        await running.redis.execute_command("REPLICAOF", "NO", "ONE")
        await wait_until_ready(url)
