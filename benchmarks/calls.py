"""Calls: whole calls of one worker process, compared with the bare HTTP client.

The worker is the shipped one (`tollbook worker`) beside a projector and the embedded server that
syncs every write, each in a separate process; tasks come from their stream. The bare client is httpx with the
aiohttp transport. It sends the same requests, with the same concurrency, to the same provider, which answers
at once. A task is done when it is acknowledged. The log is written to a file, a line for each task.
"""

import asyncio
import json
import time
from contextlib import AsyncExitStack
from itertools import count
from pathlib import Path
from typing import Any

from httpx_aiohttp import HttpxAiohttpClient
from redis.asyncio import Redis

from benchmarks.load import MODEL, user_of
from benchmarks.measure import Result, Sizes, Target, compare, in_turn
from benchmarks.processes import command, stand_in
from tollbook.ledger.keys import GROUP
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer

CONCURRENCY = 64
STREAM = "generation"
_USERS = 500
_PROMPT = "Write a short post about the accounting of cloud costs in the style of a weekly column. " * 3
_ROUND_TIMEOUT_S = 120.0


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    calls, rounds = sizes.of(4_000, 200), sizes.of(5, 2)
    await asyncio.to_thread(directory.mkdir, parents=True)
    async with AsyncExitStack() as stack:
        base_url = await stack.enter_async_context(stand_in(directory))
        server = await stack.enter_async_context(EmbeddedServer(directory / "redis", fsync="always"))
        redis = await stack.enter_async_context(connect(server.url))
        environment = {
            "REDIS_URL": server.url,
            "OPENROUTER_BASE_URL": base_url,
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_DATA_DIR": str(directory / "data"),
            "TOLLBOOK_CONCURRENCY": str(CONCURRENCY),
            "TOLLBOOK_LOG_FORMAT": "json",
        }
        await stack.enter_async_context(command("projector", environment=environment, directory=directory))
        worker = command("worker", "--streams", STREAM, environment=environment, directory=directory)
        await stack.enter_async_context(worker)
        client = await stack.enter_async_context(HttpxAiohttpClient(timeout=60))
        numbers = count()

        async def work() -> float:
            return await publish_and_wait(redis, calls, next(numbers))

        async def bare() -> float:
            return await _bare(client, base_url, calls)

        # The first round also waits until both processes are ready.
        await in_turn(1, work, bare)
        worked, sent = await in_turn(rounds, work, bare)
    return [
        compare(
            "calls",
            f"whole calls of one worker against bare httpx, {CONCURRENCY} in flight",
            worked,
            sent,
            unit="calls/s",
            target=Target(">=", 0.35),
            floor=Target(">=", 600),
        )
    ]


async def publish_and_wait(redis: Redis, calls: int, number: int) -> float:
    """Publish tasks and wait until all are acknowledged; return calls a second, from the first XADD on."""
    started = time.perf_counter()
    pipe = redis.pipeline(transaction=False)
    for n in range(calls):
        pipe.xadd(
            STREAM,
            {
                "task": "generate_draft",
                "task_id": f"bench-{number}-{n}",
                "user_id": user_of(n % _USERS),
                "plan": "growth",
                "prompt": _PROMPT,
            },
        )
    await pipe.execute()
    async with asyncio.timeout(_ROUND_TIMEOUT_S):
        while not await _is_all_done(redis):  # noqa: ASYNC110 - another process; it gives no signal.
            await asyncio.sleep(0.02)
    seconds = time.perf_counter() - started
    if (finished := await redis.exists(*(_result_key(number, n) for n in range(calls)))) != calls:
        raise ValueError(f"{finished} tasks of {calls} have a result")
    return calls / seconds


def _result_key(number: int, n: int) -> str:
    return f"{{tollbook:0}}:result:bench-{number}-{n}"


async def _is_all_done(redis: Redis) -> bool:
    groups: list[dict[str, Any]] = await redis.xinfo_groups(STREAM)
    return any(group["name"] == GROUP.encode() and not group["pending"] and group["lag"] == 0 for group in groups)


async def _bare(client: HttpxAiohttpClient, base_url: str, calls: int) -> float:
    body = json.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": _PROMPT}],
            "max_tokens": 2000,
            "temperature": 0.7,
            "user": user_of(1),
        }
    ).encode()
    left = iter(range(calls))

    async def work() -> None:
        for _ in left:
            response = await client.post(
                f"{base_url}/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
            response.raise_for_status()
            if not response.json()["choices"][0]["message"]["content"]:
                raise ValueError("the provider's answer is empty")

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return calls / (time.perf_counter() - started)
