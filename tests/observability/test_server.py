"""The server of metrics and health: on loopback, where it can be found, and gone with its process."""

import asyncio
import json
import signal
import socket
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis

from tests.observability.pages import scrape
from tests.servers import PATIENCE_S, wait_until
from tests.system import BackgroundCommand, run_cli, running_system
from tollbook.inference.errors import SettingsError
from tollbook.inference.settings import Settings
from tollbook.observability.address import announced_address, remove_abandoned
from tollbook.observability.process import describe_ports, observe_process, ports_of_processes


def targets(data_dir: Path, part: str) -> list[str]:
    """The addresses that Prometheus's file_sd_configs would find."""
    groups = [group for path in (data_dir / "metrics").glob("*.json") for group in json.loads(path.read_text())]
    return [target for group in groups if group["labels"] == {"part": part} for target in group["targets"]]


def settings_of(tmp_path: Path, **values: object) -> Settings:
    return Settings(_env_file=None, data_dir=tmp_path / "data", **values)  # pyright: ignore[reportCallIssue]


async def test_only_loopback_is_listened_on_and_only_three_paths_are_served(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_system(tmp_path / "data", server_url, metrics_port=0, workers=0) as running:
        url = running.system.state.url
        assert url is not None
        port = httpx.URL(url).port
        assert httpx.URL(url).host == "127.0.0.1"
        # A server on all addresses would answer here too.
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection("127.0.0.2", port)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S) as client:
            for path in ("/", "/metrics", "/health/live", "/health/ready"):
                assert (await client.get(path)).status_code == 200, path
                assert (await client.head(path)).content == b""
            assert (await client.post("/metrics")).status_code == 405
            for path in ("/health", "/metrics/../etc/passwd", "/docs", "/%2e%2e/"):
                assert (await client.get(path)).status_code == 404, path
            found = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
            assert found.text.endswith("# EOF\n")


@pytest.mark.slow
async def test_a_process_is_found_by_its_file_and_leaves_nothing_behind_when_it_is_killed(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    async with running_system(data_dir, server_url, workers=0) as running:
        environment = {
            "REDIS_URL": server_url,
            "TOLLBOOK_DATA_DIR": str(data_dir),
            "OPENROUTER_BASE_URL": running.provider.base_url,
            "TOLLBOOK_METRICS_PORT": "0",
        }
        command = await BackgroundCommand.start("worker", cwd=tmp_path, env=environment)
        try:
            [address] = await wait_until(lambda: targets(data_dir, "worker"), what="the worker's address")
            remove_abandoned(data_dir)
            assert targets(data_dir, "worker") == [address], "the file of a process that lives stays"
            await scrape(f"http://{address}")
            command.process.send_signal(signal.SIGKILL)
            await command.wait()
        finally:
            await command.end()
        with pytest.raises(httpx.ConnectError):
            await scrape(f"http://{address}")
        remove_abandoned(data_dir)
        assert list((data_dir / "metrics").iterdir()) == []
        # The port is free at once, also for a server that wants this very one.
        async with observe_process(
            settings_of(tmp_path, metrics_port=int(address.rpartition(":")[2])), "worker"
        ) as state:
            assert state.url == f"http://{address}"
        assert targets(data_dir, "worker") == []


async def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = {"TOLLBOOK_METRICS_PORT": str(port), "REDIS_URL": "redis://127.0.0.1:9"}
        done = await run_cli("projector", cwd=tmp_path, env=environment)
    assert done.code == 1
    assert done.stderr.splitlines() == [
        f"tollbook: TOLLBOOK_METRICS_PORT: cannot listen on 127.0.0.1:{port}: Address already in use"
    ]


async def test_two_processes_of_one_name_do_not_remove_each_other_s_address(tmp_path: Path) -> None:
    with announced_address(tmp_path, "same", "127.0.0.1:1", part="worker"):
        with announced_address(tmp_path, "same", "127.0.0.1:2", part="worker"):
            assert targets(tmp_path, "worker") == ["127.0.0.1:2"]
        assert targets(tmp_path, "worker") == []


@pytest.mark.parametrize(
    ("setting", "ports", "described"),
    [
        (None, [0, 0, 0], "one address for each process in"),
        (9464, [9464, 9465, 9466], "http://127.0.0.1:9464 (projector), the same on port 9465 to 9466 (workers)"),
        ("off", [None, None, None], ""),
    ],
)
def test_each_process_of_up_gets_a_port_of_its_own(
    tmp_path: Path, setting: int | str | None, ports: list[int | None], described: str
) -> None:
    settings = settings_of(tmp_path, metrics_port=setting)
    assert ports_of_processes(settings, 3) == ports
    assert describe_ports(settings, ports).startswith(described)
    with pytest.raises(SettingsError, match="leaves no room"):
        ports_of_processes(settings_of(tmp_path, metrics_port=65_534), 3)
