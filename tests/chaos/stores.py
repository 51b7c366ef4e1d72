"""Blows against what the stores hold: an older backup, a cut-off replica, eviction, a changed or older DuckDB.

Each is struck on a system that has come to rest and is then given work. It must go on rightly, or stop until a person
has undone it: no call is made meanwhile that the stores as they were would not have allowed. What is published
afterwards is done, and the audit at the end finds book and ledger equal.
"""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb

from tests.chaos.processes import Standstill
from tests.chaos.provider import mark

if TYPE_CHECKING:
    from tests.chaos.run import Chaos

StoreBlow = Callable[["Chaos"], Awaitable[None]]
# Enough that every worker takes part, and is told of events that will be lost.
BATCH: Final = 120
# What a worker that has not noticed would need to make a call, many times over.
_LOOK_S: Final = 5.0
# Workers look at the server's policy every ten seconds.
_POLICY_S: Final = 15.0
_PROBES: Final = 20


async def restore_an_older_backup(chaos: "Chaos") -> None:
    """The server is stopped, its files are copied; later it is started on the copy."""
    async with _server_down(chaos):
        older = await _copy_of_server(chaos)
    await chaos.publish_more(BATCH)
    await chaos.drain()
    await _run_on(chaos, older)


async def fail_over_to_a_cut_off_replica(chaos: "Chaos") -> None:
    """The server dies, and one takes its place that has what a replica had heard when its link was cut, in mid-work."""
    publishing = asyncio.create_task(chaos.publish_more(BATCH))
    await asyncio.sleep(0.2)
    older = await _copy_of_server(chaos)
    await publishing
    await chaos.drain()
    await _run_on(chaos, older)


async def evict(chaos: "Chaos") -> None:
    """The server is told that it may evict keys."""
    await chaos.redis.config_set("maxmemory-policy", "allkeys-lru")
    await asyncio.sleep(_POLICY_S)
    first, asked = len(chaos.published), len(chaos.requests())
    await chaos.publish_more(BATCH)
    await asyncio.sleep(_LOOK_S)
    numbers = [number for _, _, number in chaos.published[first:]]
    _assert_none_called(chaos, {chaos.plot.publications[number].fields.get("task_id", "") for number in numbers}, asked)
    await chaos.redis.config_set("maxmemory-policy", "noeviction")
    await chaos.publish_more(BATCH)
    await chaos.drain()


async def change_a_row(chaos: "Chaos") -> None:
    """Somebody sets what was spent to nothing in DuckDB; the caps must hold all the same, which the audit sees."""

    def change(path: Path) -> None:
        with duckdb.connect(str(path)) as connection:
            connection.execute("UPDATE budgets SET settled_usd = 0")

    await _with_file(chaos, change)


async def put_an_older_duckdb_in_place(chaos: "Chaos") -> None:
    """DuckDB's file is replaced by a copy from before the last work."""
    older = chaos.directory / "older.duckdb"
    await _with_file(chaos, lambda path: shutil.copyfile(path, older))
    await _with_file(chaos, lambda path: shutil.copyfile(older, path))


STORE_BLOWS: Final[dict[str, StoreBlow]] = {
    "restore": restore_an_older_backup,
    "failover": fail_over_to_a_cut_off_replica,
    "evict": evict,
    "change": change_a_row,
    "older": put_an_older_duckdb_in_place,
}
# Those that the runs strike. `change` is found only by a projector that compares its rows with the events when it opens
# the file.
SWITCHED_ON: Final[tuple[str, ...]] = ()


async def _with_file(chaos: "Chaos", change: Callable[[Path], object]) -> None:
    projector = chaos.programs["projector"]
    await projector.end()
    await asyncio.to_thread(change, chaos.data_dir / "tollbook.duckdb")
    await projector.start()
    await chaos.publish_more(BATCH)
    await chaos.drain()


async def _run_on(chaos: "Chaos", older: Path) -> None:
    """Let the system run on an older server's data; nothing may be called. Then put the newer data back."""
    async with chaos.unread(), _outage(chaos):
        newest = chaos.directory / "newest"
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, older, newest)
        await _assert_no_call_is_made(chaos)
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, newest, None)
        chaos.programs["projector"].forget_ends_since(chaos.server.outages[-1].from_ms)
    await chaos.publish_more(BATCH)
    await chaos.drain()


async def _assert_no_call_is_made(chaos: "Chaos") -> None:
    """Publish probes, which vanish with the older server, and see that none is called for."""
    names = [f"probe-{time.time_ns()}-{number}" for number in range(_PROBES)]
    for name in names:
        task: Any = {"task": "score_post", "task_id": name, "user_id": f"probe-{name}", "prompt": f"{mark(name)} post"}
        await chaos.redis.xadd("analysis", task)
    await asyncio.sleep(_LOOK_S)
    _assert_none_called(chaos, set(names))


def _assert_none_called(chaos: "Chaos", task_ids: set[str], asked_before: int = 0) -> None:
    called = {line["task_id"] for line in chaos.requests()[asked_before:]} & task_ids
    assert not called, f"G8: {len(called)} calls were made on a store that lies"


@asynccontextmanager
async def _server_down(chaos: "Chaos") -> AsyncIterator[None]:
    async with _outage(chaos):
        await chaos.server.embedded.kill()
        yield
        await chaos.server.embedded.start()
    await chaos.redis.connection_pool.disconnect(inuse_connections=False)


@asynccontextmanager
async def _outage(chaos: "Chaos") -> AsyncIterator[None]:
    """Processes that end meanwhile end for want of their store."""
    outage = Standstill(0, time.time_ns() // 1_000_000)
    chaos.server.outages.append(outage)
    try:
        yield
    finally:
        outage.to_ms = time.time_ns() // 1_000_000


async def _copy_of_server(chaos: "Chaos") -> Path:
    copy = chaos.directory / f"server-{time.time_ns()}"
    await asyncio.to_thread(shutil.copytree, _files(chaos.data_dir), copy)
    return copy


def _replace(data_dir: Path, source: Path, kept: Path | None) -> None:
    files = _files(data_dir)
    if kept is None:
        shutil.rmtree(files)
    else:
        files.rename(kept)
    source.rename(files)


def _files(data_dir: Path) -> Path:
    return data_dir / "valkey" / "appendonlydir"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a log that is being written."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
