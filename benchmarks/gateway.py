"""Gateway: added latency per call, rate of calls, and memory of a stream, compared with the bare provider.

Every event is synced to disk. The same client (httpx over aiohttp) calls both sides, in one run, in turn. The provider
answers after half a second; for the rate it answers at once. Latency is measured with requests that begin evenly spread
over that half second, like those of many clients.

LiteLLM's proxy is measured too if LITELLM names its program (`pip install 'litellm[proxy]'` in a venv of its own).
"""

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import httpx
from httpx_aiohttp import HttpxAiohttpClient

from benchmarks.measure import Result, Sizes, Target, compare, in_turn
from benchmarks.processes import clean_environment, command, end, free_port, output_of, stand_in
from tollbook.ledger.server.embedded import EmbeddedServer

IN_FLIGHT = 64
_MODEL = "openai/gpt-4o-mini"
_PROMPT = "Write a short post about the accounting of cloud costs. [[completion_tokens=60]]"
_ANSWER_S = 0.5
_LITELLM_MODEL = "bench"
_READY_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server of chat completions, and its key."""

    url: str
    key: str = "none"
    model: str = _MODEL


Ask = Callable[[httpx.AsyncClient, Endpoint], Awaitable[float]]
"""Makes one request; returns the time at which its answer counts."""


@dataclass(frozen=True, slots=True)
class System:
    """The measured sides: the bare provider and the gateway, a client for both, and the gateway's process."""

    bare: Endpoint
    gateway: Endpoint
    client: httpx.AsyncClient
    pid: int


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    await asyncio.to_thread(directory.mkdir, parents=True)
    return [
        *await _added(directory / "whole", sizes, "whole answers", _whole),
        # Token by token: the provider's own stream, until its first text.
        *await _added(directory / "first", sizes, "the first part of streams", _first_part, "--chunk-ms", "1"),
        *await _rates(directory / "rate", sizes),
        *await _open_streams(directory / "streams", sizes),
    ]


async def _added(
    directory: Path,
    sizes: Sizes,
    what: str,
    ask: Ask,
    *options: str,
) -> list[Result]:
    """Measure the latency that the gateway adds to `what`."""
    calls, rounds = sizes.of(640, 64), sizes.of(3, 1)
    waits: dict[str, list[list[float]]] = {}
    async with _system(directory, "--latency-ms", str(round(1000 * _ANSWER_S)), *options) as system:

        def side(endpoint: Endpoint) -> Callable[[], Awaitable[float]]:
            async def measure() -> float:
                taken = await _waits(system.client, endpoint, calls, ask, spread_s=_ANSWER_S)
                waits.setdefault(endpoint.url, []).append(taken)
                return median(taken)

            return measure

        sides = system.gateway, system.bare
        await in_turn(1, side(system.gateway))
        waits.clear()
        await in_turn(rounds, *map(side, sides))
    results: list[Result] = []
    for name, figure, goal_ms in (("p50", median, 5.0), ("p99", _p99, 15.0)):
        ours, theirs = ([figure(each) for each in waits[endpoint.url]] for endpoint in sides)
        added = [1000 * (a - b) for a, b in zip(ours, theirs, strict=True)]
        results.append(
            Result(
                benchmark="gateway",
                what=f"added to {what}, {name}, answers after 500 ms, {IN_FLIGHT} in flight",
                subject=median(added),
                reference=None,
                unit="ms",
                floor=Target("<=", goal_ms),
                details={"added_ms": added, "gateway_s": ours, "bare_s": theirs},
            )
        )
    return results


async def _rates(directory: Path, sizes: Sizes) -> list[Result]:
    calls, rounds = sizes.of(2_000, 100), sizes.of(4, 1)
    async with _system(directory) as system, AsyncExitStack() as stack:
        bare, client = system.bare, system.client
        sides = [system.gateway, bare]
        program = os.environ.get("LITELLM")
        if program:
            sides.append(await stack.enter_async_context(_litellm(program, directory, bare)))

        def side(endpoint: Endpoint) -> Callable[[], Awaitable[float]]:
            # LiteLLM makes a tenth of the calls, so it gets a tenth.
            number = calls // 10 if endpoint.model == _LITELLM_MODEL else calls

            async def measure() -> float:
                started = time.perf_counter()
                await _waits(client, endpoint, number, _whole)
                return number / (time.perf_counter() - started)

            return measure

        await in_turn(1, *map(side, sides))
        rates = await in_turn(rounds, *map(side, sides))
    results = [
        compare("gateway", f"whole calls, {IN_FLIGHT} in flight, against the bare provider", *rates[:2], unit="calls/s")
    ]
    if program:
        results.append(
            compare(
                "gateway",
                f"whole calls, {IN_FLIGHT} in flight, against LiteLLM's proxy",
                rates[0],
                rates[2],
                unit="calls/s",
                target=Target(">=", 10),
            )
        )
    return results


async def _open_streams(directory: Path, sizes: Sizes) -> list[Result]:
    number = sizes.of(2_000, 50)
    # A part every three seconds, so that no stream ends before the last one has begun.
    async with _system(directory, "--chunk-ms", "3000") as system:
        gateway, client, process = system.gateway, system.client, system.pid
        before_mb = _resident_mb(process)
        has_begun = asyncio.Semaphore(0)

        async def hold_open() -> None:
            url, content, headers = _parts(gateway, is_streamed=True)
            async with client.stream("POST", url, content=content, headers=headers) as reply:
                reply.raise_for_status()
                parts = reply.aiter_bytes()
                await anext(parts)
                has_begun.release()
                async for _ in parts:
                    pass

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(hold_open()) for _ in range(number)]
            for _ in range(number):
                await has_begun.acquire()
            took_s = time.perf_counter() - started
            if any(stream.done() for stream in streams):
                raise ValueError("some streams ended before all were open")
            used_mb = _resident_mb(process) - before_mb
            for stream in streams:
                stream.cancel()
    return [
        Result(
            benchmark="gateway",
            what=f"memory of a stream, {number} open at once",
            subject=1000 * used_mb / number,
            reference=None,
            unit="kB",
            details={"resident_mb_before": before_mb, "streams": number, "opening_s": took_s},
        )
    ]


@asynccontextmanager
async def _system(directory: Path, *options: str) -> AsyncIterator[System]:
    """Run provider, server, projector and gateway, and make a key."""
    await asyncio.to_thread(directory.mkdir, parents=True)
    async with AsyncExitStack() as stack:
        base_url = await stack.enter_async_context(stand_in(directory, *options))
        server = await stack.enter_async_context(EmbeddedServer(directory / "redis", fsync="always"))
        port = free_port()
        environment = {
            "REDIS_URL": server.url,
            "OPENROUTER_BASE_URL": base_url,
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_DATA_DIR": str(directory / "data"),
            "TOLLBOOK_LOG_FORMAT": "json",
            "TOLLBOOK_GATEWAY_PORT": str(port),
            "TOLLBOOK_CAPS": '{"plans": {"growth": 100000}}',
        }
        await stack.enter_async_context(command("projector", environment=environment, directory=directory))
        process = await stack.enter_async_context(command("gateway", environment=environment, directory=directory))
        client = await stack.enter_async_context(
            HttpxAiohttpClient(timeout=120, limits=httpx.Limits(max_connections=4_000))
        )
        url = f"http://127.0.0.1:{port}"
        await _until_ready(client, url)
        made = await output_of(
            "keys", "create", "--user", "bench", "--plan", "growth", "--reason", "benchmark", "--json",
            environment=environment, directory=directory,
        )  # fmt: skip
        yield System(Endpoint(base_url), Endpoint(f"{url}/v1", json.loads(made)["key"]), client, process.pid)


@asynccontextmanager
async def _litellm(program: str, directory: Path, provider: Endpoint) -> AsyncIterator[Endpoint]:
    """Run LiteLLM's proxy over the same provider, without budgets and database."""
    entry = {"model": f"openai/{_MODEL}", "api_base": provider.url, "api_key": "none"}
    config, port = directory / "litellm.json", free_port()  # JSON is YAML.
    key = f"sk-{secrets.token_hex(32)}"  # It does not start without one.
    models = [{"model_name": _LITELLM_MODEL, "litellm_params": entry}]
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": key}}), encoding="utf-8")
    with (directory / "litellm.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program, "--config", str(config), "--port", str(port), "--host", "127.0.0.1",
            env={**clean_environment(), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with HttpxAiohttpClient(timeout=10) as client:
            await _until_ready(client, f"http://127.0.0.1:{port}/health/liveliness")
        yield Endpoint(f"http://127.0.0.1:{port}/v1", key, _LITELLM_MODEL)
    finally:
        await end(process)


async def _until_ready(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(_READY_TIMEOUT_S):
        while True:
            try:
                await client.get(url)
            except httpx.HTTPError:
                await asyncio.sleep(0.1)  # Another process; it gives no signal.
            else:
                return


async def _waits(
    client: httpx.AsyncClient,
    endpoint: Endpoint,
    calls: int,
    ask: Ask,
    *,
    spread_s: float = 0.0,
) -> list[float]:
    """Make concurrent calls; return the seconds of each. The first calls begin spread over `spread_s`."""
    left = iter(range(calls))
    waits: list[float] = []

    async def work(number: int) -> None:
        await asyncio.sleep(spread_s * number / IN_FLIGHT)
        for _ in left:
            started = time.perf_counter()
            ended = await ask(client, endpoint)
            waits.append(ended - started)

    await asyncio.gather(*map(work, range(min(IN_FLIGHT, calls))))
    return waits


async def _whole(client: httpx.AsyncClient, endpoint: Endpoint) -> float:
    """Read a whole answer; return the time at which it was complete."""
    url, content, headers = _parts(endpoint, is_streamed=False)
    reply = await client.post(url, content=content, headers=headers)
    reply.raise_for_status()
    if not reply.json()["choices"][0]["message"]["content"]:
        raise ValueError("the answer is empty")
    return time.perf_counter()


async def _first_part(client: httpx.AsyncClient, endpoint: Endpoint) -> float:
    """Read a whole stream; return the time of its first text."""
    url, content, headers = _parts(endpoint, is_streamed=True)
    first = 0.0
    async with client.stream("POST", url, content=content, headers=headers) as reply:
        reply.raise_for_status()
        async for part in reply.aiter_bytes():
            if not first and b'"content":"[' in part.replace(b": ", b":"):
                first = time.perf_counter()
    if not first:
        raise ValueError("the stream has no text")
    return first


def _parts(endpoint: Endpoint, *, is_streamed: bool) -> tuple[str, bytes, dict[str, str]]:
    body = {
        "model": endpoint.model,
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": 200,
        "stream": is_streamed,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.key}"}
    return f"{endpoint.url}/chat/completions", json.dumps(body).encode(), headers


def _p99(figures: Sequence[float]) -> float:
    return quantiles(figures, n=100)[98]


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError("the process has no memory")
