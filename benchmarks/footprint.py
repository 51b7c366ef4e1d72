"""Footprint: the cost of a call in each part of the system, to plan for more than one machine.

The processes are those of the benchmark `calls`. Processor time is that of each process by the operating system, bytes
are those of the server and the files; nothing is trimmed meanwhile.
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks.calls import CONCURRENCY, STREAM, publish_and_wait
from benchmarks.processes import command, stand_in
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer

_WARM_UP: Final = 500
_SEGMENT_EVENTS: Final = 3_000
_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
_SYNCS: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Averages per call: processor time in microseconds, sizes in bytes.

    `sync_us` is one sync of the server's log, which many calls share. Large folds take less time per event.
    """

    worker_us: float
    server_us: float
    projector_us: float
    sync_us: float
    received_bytes: float
    sent_bytes: float
    memory_bytes: float
    log_bytes: float
    duckdb_bytes: float
    archive_bytes: float
    events: float


async def measure(directory: Path, calls: int) -> Footprint:
    """Run calls of one worker and measure their cost. Errors: RuntimeError if a process ends."""
    await asyncio.to_thread(directory.mkdir, parents=True)
    async with AsyncExitStack() as stack:
        base_url = await stack.enter_async_context(stand_in(directory))
        server = await stack.enter_async_context(EmbeddedServer(directory / "redis", fsync="always"))
        redis = await stack.enter_async_context(connect(server.url))
        data = directory / "data"
        environment = {
            "REDIS_URL": server.url,
            "OPENROUTER_BASE_URL": base_url,
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_DATA_DIR": str(data),
            "TOLLBOOK_CONCURRENCY": str(CONCURRENCY),
            "TOLLBOOK_LOG_FORMAT": "json",
            "TOLLBOOK_SEGMENT_EVENTS": str(_SEGMENT_EVENTS),
            "TOLLBOOK_SEGMENT_AGE_S": "1",
        }
        worker = command("worker", "--streams", STREAM, environment=environment, directory=directory)
        async with command("projector", environment=environment, directory=directory):
            working = await stack.enter_async_context(worker)
            await publish_and_wait(redis, _WARM_UP, 0)
        # The file is complete when the process has ended.
        duckdb = (data / "tollbook.duckdb").stat().st_size
        async with command("projector", environment=environment, directory=directory) as projecting:
            pids = {"worker": working.pid, "server": server.pid or 0, "projector": projecting.pid}
            before, used = await _figures(redis), _processor_us(pids)
            await publish_and_wait(redis, calls, 1)
            await _until_sealed(redis, data)
            after, used_then = await _figures(redis), _processor_us(pids)
        grown = {name: (after[name] - before[name]) / calls for name in before}
        took = {name: (used_then[name] - used[name]) / calls for name in used}
        return Footprint(
            worker_us=took["worker"],
            server_us=took["server"],
            projector_us=took["projector"],
            sync_us=await asyncio.to_thread(_sync_us, directory / "sync"),
            received_bytes=grown["total_net_input_bytes"],
            sent_bytes=grown["total_net_output_bytes"],
            memory_bytes=grown["used_memory"],
            log_bytes=grown["aof_current_size"],
            duckdb_bytes=((data / "tollbook.duckdb").stat().st_size - duckdb) / calls,
            archive_bytes=_archived_bytes(data) * grown["events"],
            events=grown["events"],
        )


async def _figures(redis: Redis) -> dict[str, float]:
    told: Mapping[str, Any] = await redis.info("everything")
    names = ("total_net_input_bytes", "total_net_output_bytes", "used_memory", "aof_current_size")
    return {**{name: float(told[name]) for name in names}, "events": float(await redis.xlen(Keys().ledger))}


async def _until_sealed(redis: Redis, data: Path) -> None:
    """Wait until all but the newest events are in the archive: sealing is part of the projector's work."""
    written = await redis.xlen(Keys().ledger)
    async with asyncio.timeout(60):
        while _sealed(data) < written - _SEGMENT_EVENTS:  # noqa: ASYNC110 - another process; it gives no signal.
            await asyncio.sleep(0.05)


def _manifests(data: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in data.glob("archive/partition-0/*.json")]


def _sealed(data: Path) -> int:
    return max((manifest["last_seq"] for manifest in _manifests(data)), default=0)


def _archived_bytes(data: Path) -> float:
    """Return the bytes of an event in the archive."""
    manifests = _manifests(data)
    return sum(manifest["file_bytes"] for manifest in manifests) / sum(manifest["events"] for manifest in manifests)


def _processor_us(pids: Mapping[str, int]) -> dict[str, float]:
    used: dict[str, float] = {}
    for name, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used[name] = 1e6 * (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND
    return used


def _sync_us(path: Path) -> float:
    """Return the median of appending a page to a file and syncing it."""
    took: list[float] = []
    with path.open("wb") as file:
        for _ in range(_SYNCS):
            started = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    return 1e6 * statistics.median(took)
