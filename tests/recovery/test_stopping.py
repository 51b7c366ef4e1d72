"""Stopping ends within its grace whatever Redis does: here it accepts connections and does not answer."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import httpx
import pytest
from structlog.testing import capture_logs

from tests.proxy import faulty_proxy
from tests.servers import wait_until
from tests.system import REPLIES, STREAMS, BackgroundCommand, GatedStandIn, run_cli, running_system
from tollbook.app.processes import run_projector, run_up
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer

TASK: Final = {"task": "score_post", "prompt": "a post", "reply_to": REPLIES}
GRACE_S: Final = 3.0
# Beyond the grace: for the process to be told, and to end; on a busy machine that takes its time.
SLACK_S: Final = 5.0
# What FastStream asks for first, a group from the stream's end on; Tollbook has made it from its beginning by then.
READING_BEGINS: Final = b"\r\n$\r\n"
BUSY: Final = [pytest.param(False, id="idle", marks=pytest.mark.slow), pytest.param(True, id="busy")]


@pytest.fixture
async def provider() -> AsyncIterator[GatedStandIn]:
    async with GatedStandIn() as provider:
        yield provider


def environment(provider: GatedStandIn, server: EmbeddedServer | None, data_dir: Path) -> dict[str, str]:
    return {
        "OPENROUTER_BASE_URL": provider.base_url,
        "TOLLBOOK_DIALECT": "openrouter",
        "TOLLBOOK_STOP_GRACE_S": str(GRACE_S),
        "TOLLBOOK_DATA_DIR": str(data_dir),
        **({"REDIS_URL": server.url} if server is not None else {}),
    }


async def stops_in_time(*commands: BackgroundCommand) -> None:
    began = time.monotonic()
    for command in commands:
        command.terminate()
    codes = await asyncio.gather(*(command.wait(GRACE_S + SLACK_S) for command in commands))
    # By themselves: what is not closed when the grace is over is cancelled, with exit code 1.
    assert codes == [0] * len(commands), [command.stderr for command in commands]
    assert time.monotonic() - began < GRACE_S + SLACK_S


async def has_begun(command: BackgroundCommand, event: str) -> None:
    await wait_until(lambda: event in command.stderr or event in command.stdout, what=f"{event}: {command.stderr}")


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", BUSY)
async def test_worker_and_projector(
    is_busy: bool, provider: GatedStandIn, private_server: EmbeddedServer, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    variables = environment(provider, private_server, tmp_path / "shared")
    commands = [await BackgroundCommand.start(name, cwd=here, env=variables) for name in ("projector", "worker")]
    try:
        await has_begun(commands[0], "projector.started")
        await has_begun(commands[1], "worker.started")
        if is_busy:
            await publish_and_wait_for_request(provider, private_server.url)
        assert private_server.pid is not None
        os.kill(private_server.pid, signal.SIGSTOP)
        try:
            await stops_in_time(*commands)
        finally:
            os.kill(private_server.pid, signal.SIGCONT)
    finally:
        await provider.open()
        for command in commands:
            await command.end()


@pytest.mark.slow
async def test_worker_that_has_just_begun_to_read(
    provider: GatedStandIn, private_server: EmbeddedServer, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    variables = environment(provider, private_server, tmp_path / "shared")
    projector = await BackgroundCommand.start("projector", cwd=here, env=variables)
    try:
        await has_begun(projector, "projector.started")
        async with faulty_proxy(private_server.url) as proxy:
            proxy.holds_replies_to = READING_BEGINS
            worker = await BackgroundCommand.start("worker", cwd=here, env={**variables, "REDIS_URL": proxy.url})
            try:
                await wait_until(lambda: proxy.holds_replies_to is None, what="FastStream's first commands")
                await stops_in_time(worker)
            finally:
                await worker.end()
    finally:
        await projector.end()


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", BUSY)
async def test_gateway(is_busy: bool, provider: GatedStandIn, private_server: EmbeddedServer, tmp_path: Path) -> None:
    here, variables = tmp_path / "here", environment(provider, private_server, tmp_path / "shared")
    here.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    variables["TOLLBOOK_GATEWAY_PORT"] = str(port)
    projector = await BackgroundCommand.start("projector", cwd=here, env=variables)
    await has_begun(projector, "projector.started")
    gateway = await BackgroundCommand.start("gateway", cwd=here, env=variables)
    asking: asyncio.Task[httpx.Response] | None = None
    try:
        await has_begun(gateway, "gateway.served")
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            if is_busy:
                made = await run_cli(
                    "keys", "create", "--user", "u1", "--reason", "a test", "--json", cwd=here, env=variables
                )
                await provider.shut()
                body = {"model": "score_post", "messages": [{"role": "user", "content": "a post"}]}
                key = {"authorization": f"Bearer {json.loads(made.stdout)['key']}"}
                url = f"http://127.0.0.1:{port}/v1/chat/completions"
                asking = asyncio.create_task(client.post(url, json=body, headers=key))
                await wait_until(lambda: provider.arrived.total() > 0, what="a request")
            assert private_server.pid is not None
            os.kill(private_server.pid, signal.SIGSTOP)
            try:
                await stops_in_time(gateway)
            finally:
                os.kill(private_server.pid, signal.SIGCONT)
            if asking is not None:
                await asyncio.gather(asking, return_exceptions=True)
    finally:
        await provider.open()
        for command in (gateway, projector):
            await command.end()


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", BUSY)
async def test_up_with_its_own_server(is_busy: bool, provider: GatedStandIn, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    command = await BackgroundCommand.start("up", cwd=here, env=environment(provider, None, tmp_path / "data"))
    try:
        await has_begun(command, "Ctrl-C stops it")
        server_pid = int((tmp_path / "data" / "valkey" / "valkey.pid").read_text())
        if is_busy:
            port = (tmp_path / "data" / "valkey" / "port").read_text().strip()
            password = (tmp_path / "data" / "valkey" / "password").read_text().strip()
            await publish_and_wait_for_request(provider, f"redis://default:{password}@127.0.0.1:{port}/0")
        os.kill(server_pid, signal.SIGSTOP)
        await stops_in_time(command)
        await wait_until(lambda: not Path(f"/proc/{server_pid}").exists(), what="the server's end")
    finally:
        await provider.open()
        await command.end()


async def publish_and_wait_for_request(provider: GatedStandIn, redis_url: str) -> None:
    """Return once a request is in flight, to which no answer comes."""
    await provider.shut()
    async with connect(redis_url) as redis:
        await redis.xadd("analysis", {"task": "score_post", "task_id": "t1", "user_id": "u1", "prompt": "a post"})
    await wait_until(lambda: provider.arrived.total() > 0, what="a request")


async def announce_nothing(*_: str) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("part", ["up", "projector"])
async def test_what_waits_for_memory_at_its_start_ends_at_once(
    private_server: EmbeddedServer, tmp_path: Path, part: str
) -> None:
    async with running_system(tmp_path / "data", private_server.url) as running:
        settings = running.system.runtime.settings.model_copy(
            update={"duckdb_memory": "1MB", "redis_url": private_server.url}
        )
    stop = asyncio.Event()
    with capture_logs() as logs:
        main = (
            run_projector(settings, stop) if part == "projector" else run_up(settings, STREAMS, stop, announce_nothing)
        )
        running_part = asyncio.create_task(main)
        await wait_until(
            lambda: any(line["event"] == "projection.not_opened" for line in logs), what="a wait for memory"
        )
        stop.set()
        async with asyncio.timeout(GRACE_S):
            await running_part
    assert any(line["event"] == "process.stopped_while_opening" for line in logs)


async def test_a_projector_on_standby_ends_at_the_first_signal(
    private_server: EmbeddedServer, provider: GatedStandIn, tmp_path: Path
) -> None:
    variables = environment(provider, private_server, tmp_path / "data")
    projector = await BackgroundCommand.start("projector", cwd=tmp_path, env=variables)
    await has_begun(projector, "projector.started")
    standby = await BackgroundCommand.start(
        "projector", "--standby", cwd=tmp_path, env={**variables, "TOLLBOOK_DATA_DIR": str(tmp_path / "other")}
    )
    commands = [projector, standby]
    try:
        await has_begun(standby, "projector.standing_by")
        await ends_soon(standby)
    finally:
        for command in commands:
            await command.end()


async def ends_soon(command: BackgroundCommand) -> None:
    began = time.monotonic()
    command.terminate()
    assert await command.wait(GRACE_S) == 0, command.stderr
    assert time.monotonic() - began < GRACE_S
    assert "process.stopped_while_opening" in command.stderr


@pytest.mark.slow
async def test_events_left_unfolded_at_shutdown_are_logged(private_server: EmbeddedServer, tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with running_system(tmp_path / "system", private_server.url) as running:
            running.system.projection.projector.pause()
            await running.redis.xadd(STREAMS[0], {**TASK, "task_id": "t1", "user_id": "u1"})
            await running.answers(["t1"])
            running.system.handle.pipeline.end_within(1.0)
    (warning,) = (line for line in logs if line["event"] == "projection.left_behind")
    assert (warning["log_level"], "the next start folds the rest" in warning["problem"]) == ("warning", True)
