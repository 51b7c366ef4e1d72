"""Faults of the stores: an older backup, a cut-off replica, eviction, a changed or older DuckDB file.

Each fault happens on an idle system, which then gets work. The system must work correctly, or stop calls until a
person has repaired it; then `doctor`, readiness and the logs say why. No call is made that the intact stores would not
have allowed. What is published afterwards is done, and the audit at the end finds that book and ledger agree.
"""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import duckdb
import httpx

from tests.chaos.processes import Downtime
from tests.chaos.scenario import WORKERS
from tests.chaos.servers import OneServer
from tests.servers import wait_until
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from tests.chaos.run import Chaos

StoreFault = Callable[["Chaos"], Awaitable[None]]
# Enough tasks that every worker gets some, and so sees events that will be lost.
BATCH: Final = 120
# The most batches that a fault needs. Tasks that are lost with a server are published again.
BATCHES: Final = 3
# Many times longer than a worker needs for a call that it should not make.
_LOOK_S: Final = 5.0
_WENT_BACK: Final = ("the projector has stopped: DuckDB has folded", "is no longer on the ledger")
_MAY_EVICT: Final = ("allkeys-lru",)


async def restore_an_older_backup(chaos: "Chaos") -> None:
    """The server's files are copied while it is down; later it is started on the copy, and then on the newer files."""
    async with _server_down(chaos):
        older = await _copy_of_server(chaos)
    await chaos.publish_more(BATCH)
    await chaos.drain()
    newest, published = chaos.directory / "newest", len(chaos.published)
    async with chaos.reading_paused(), _outage(chaos):
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, older, newest)
        await _check_that_it_went_back(chaos)
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, newest, chaos.directory / "older")
        # Tasks that were published on the older server are lost with it.
        del chaos.published[published:]
    await chaos.publish_more(BATCH)
    await chaos.drain()
    _excuse_projector(chaos)


async def recover_from_an_older_backup(chaos: "Chaos") -> None:
    """There is only an older backup: a person runs `tollbook recover`, and publishers repeat their tasks."""
    async with _server_down(chaos):
        older, published = await _copy_of_server(chaos), len(chaos.published)
    await chaos.publish_more(BATCH)
    await chaos.drain()
    await _end_projector(chaos)
    async with chaos.reading_paused(), _outage(chaos):
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, older, chaos.directory / "lost")
        del chaos.published[published:]
        await chaos.programs["projector"].start()
        await _check_that_it_went_back(chaos)
        await _recover(chaos)
    await _resume_work(chaos)


async def fail_over_to_a_cut_off_replica(chaos: "Chaos") -> None:
    """The server dies, and a replica whose link was cut takes its address; a person runs `tollbook recover`."""
    promoted = chaos.directory / "replica"
    async with EmbeddedServer(promoted, fsync="always") as server, connect(server.url) as replica:
        await _replicate(replica, chaos)
        publishing = asyncio.create_task(chaos.publish_more(BATCH))
        # When some tasks are done, and many are under way.
        events = await _events_on(chaos.redis)
        await wait_until(lambda: _has_reached(chaos.redis, events + BATCH), what="the first calls")
        await replica.execute_command("REPLICAOF", "NO", "ONE")
        await publishing
        await chaos.drain()
        await _end_projector(chaos)
        async with chaos.reading_paused(), _outage(chaos):
            await _server(chaos).kill()
            await _take_address(replica, _server(chaos).url)
            await chaos.redis.connection_pool.disconnect(inuse_connections=False)
            await chaos.programs["projector"].start()
            await chaos.forget_lost_publications()
            await _check_that_it_went_back(chaos)
            await _recover(chaos)
            # The replica's process belongs to this function, so the usual server takes over its files.
            await server.stop()
            await asyncio.to_thread(_replace, chaos.data_dir, _files(promoted), chaos.directory / "cut-off")
            await _server(chaos).start()
        await chaos.redis.connection_pool.disconnect(inuse_connections=False)
    await _resume_work(chaos)


async def evict(chaos: "Chaos") -> None:
    """The server is set to evict keys."""
    log_sizes = _log_sizes(chaos)
    await chaos.redis.config_set("maxmemory-policy", "allkeys-lru")
    for name in WORKERS:
        await _wait_for_log(chaos, _MAY_EVICT, [name], log_sizes)
    await _check_that_calls_are_stopped(chaos, _MAY_EVICT)
    await chaos.redis.config_set("maxmemory-policy", "noeviction")
    await chaos.publish_more(BATCH)
    await chaos.drain()


async def change_a_row(chaos: "Chaos") -> None:
    """Somebody sets all spend to zero in DuckDB; the caps must hold, which the audit checks."""

    def change(path: Path) -> None:
        with duckdb.connect(str(path)) as connection:
            connection.execute("UPDATE budgets SET settled_usd = 0")

    projector = chaos.programs["projector"]
    await projector.end()
    await asyncio.to_thread(change, _duckdb(chaos))
    await projector.start()
    await chaos.publish_more(BATCH)
    await chaos.drain()
    assert "projection.changed" in _log_of(chaos, "projector"), "G8: a changed row of DuckDB was believed"


async def put_an_older_duckdb_in_place(chaos: "Chaos") -> None:
    """DuckDB's file is replaced by a copy from before the last work, first at rest and then under the projector."""
    projector, older = chaos.programs["projector"], chaos.directory / "older.duckdb"
    await projector.end()
    await asyncio.to_thread(shutil.copyfile, _duckdb(chaos), older)
    await projector.start()
    await chaos.publish_more(BATCH // 2)
    await chaos.drain()
    await projector.end()
    await asyncio.to_thread(_put, older, _duckdb(chaos))
    await projector.start()
    await chaos.publish_more(BATCH // 2)
    await chaos.drain()
    await asyncio.to_thread(_put, older, _duckdb(chaos))
    await chaos.publish_more(BATCH)
    await chaos.drain()


STORE_FAULTS: Final[dict[str, StoreFault]] = {
    "restore": restore_an_older_backup,
    "recover": recover_from_an_older_backup,
    "failover": fail_over_to_a_cut_off_replica,
    "evict": evict,
    "change": change_a_row,
    "older": put_an_older_duckdb_in_place,
}
# Run in the suite, where time is short: a ledger that went back and is recovered, and a falsified DuckDB file.
IN_SUITE: Final = ("failover", "change")


async def _check_that_it_went_back(chaos: "Chaos") -> None:
    log_sizes = _log_sizes(chaos)
    await _check_that_calls_are_stopped(chaos, _WENT_BACK)
    # Only workers that have tasks log it, and one may have none.
    await _wait_for_log(chaos, _WENT_BACK, WORKERS, log_sizes)


async def _check_that_calls_are_stopped(chaos: "Chaos", words: tuple[str, ...]) -> None:
    """Publish tasks; check that no call is made for them, and that `doctor` and readiness say why, in these words."""
    published, asked = len(chaos.published), len(chaos.requests())
    await chaos.publish_more(BATCH)
    await asyncio.sleep(_LOOK_S)
    called = {line["task_id"] for line in chaos.requests()[asked:]}
    numbers = [number for _, _, number in chaos.published[published:]]
    called &= {chaos.scenario.publications[number].fields.get("task_id", "") for number in numbers}
    assert not called, f"G8: {len(called)} calls were made on a store that lies"
    code, findings = await chaos.tollbook("doctor", "--json")
    assert code == 1, f"doctor finds nothing wrong: {findings}"
    failed = [each["found"] for each in json.loads(findings) if each["state"] == "failed"]
    assert _has_any(" ".join(failed), words), f"doctor does not say why calls are stopped: {failed}"
    async with httpx.AsyncClient() as client:
        reply = await client.get(f"{chaos.health_url}/health/ready")
    assert reply.status_code == 503, f"a worker says that it is ready: {reply.text}"
    assert _has_any(reply.text, words), f"readiness does not say why calls are stopped: {reply.text}"


async def _wait_for_log(
    chaos: "Chaos", words: tuple[str, ...], names: Sequence[str], log_sizes: dict[str, int]
) -> None:
    """Wait until the log of one of these programs has one of these words, after the positions in `log_sizes`."""

    def has_said() -> bool:
        return any(_has_any(_log_of(chaos, name)[log_sizes[name] :], words) for name in names)

    await wait_until(has_said, what=f"the reason in the log of {', '.join(names)}")


def _log_sizes(chaos: "Chaos") -> dict[str, int]:
    return {name: len(_log_of(chaos, name)) for name in WORKERS}


def _has_any(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _log_of(chaos: "Chaos", name: str) -> str:
    return (chaos.directory / f"{name.replace(' ', '-')}.log").read_text(encoding="utf-8", errors="replace")


async def _end_projector(chaos: "Chaos") -> None:
    """End the projector once it has folded everything: other events would be lost for good with the server."""

    projector = chaos.programs["projector"]

    async def has_folded() -> bool:
        await projector.end()
        folded = await asyncio.to_thread(_folded, _duckdb(chaos))
        if folded == await _events_on(chaos.redis):
            return True
        await projector.start()  # It ended after its grace period, before it had folded everything.
        await asyncio.sleep(_LOOK_S)
        return False

    await wait_until(has_folded, what="the fold of everything")


async def _recover(chaos: "Chaos") -> None:
    """Recover as the operator's guide says: end the projector, look, recover, verify. Workers keep running."""
    await chaos.programs["projector"].end()
    code, shown = await chaos.tollbook("recover")
    assert code == 1, f"recover finds nothing that is lost: {shown}"
    code, shown = await chaos.tollbook("recover", "--yes", "--reason", "an older backup")
    assert code == 0, f"recover failed: {shown}"
    code, shown = await chaos.tollbook("verify")
    assert code == 0, f"verify is not content with what was recovered: {shown}"


async def _resume_work(chaos: "Chaos") -> None:
    await chaos.programs["projector"].start()
    await chaos.publish_more(BATCH)
    await chaos.drain()
    _excuse_projector(chaos)


def _excuse_projector(chaos: "Chaos") -> None:
    """Remove the projector's exits during the last outage: it was right to end when the ledger had gone back."""
    chaos.programs["projector"].excuse_exits_during(max(chaos.server.outages, key=lambda outage: outage.to_ms))


async def _replicate(replica: "Redis", chaos: "Chaos") -> None:
    """Make a server a replica of the run's own server."""
    url = _server(chaos).url
    for name, value in (("masterauth", _password(url)), ("repl-diskless-sync-delay", 0)):
        await replica.config_set(name, value)
    await chaos.redis.config_set("repl-diskless-sync-delay", 0)
    await replica.execute_command("REPLICAOF", *_address(url))

    async def is_linked() -> bool:
        info: dict[str, Any] = await replica.info("replication")
        return info.get("master_link_status") == "up"

    await wait_until(is_linked, what="the replica's link")


async def _take_address(replica: "Redis", url: str) -> None:
    """Let a server listen on the dead server's port, with its password."""
    await replica.config_set("requirepass", _password(url))
    await replica.config_set("port", _address(url)[1])


def _address(url: str) -> tuple[str, str]:
    host, _, port = url.rpartition("@")[2].removesuffix("/0").partition(":")
    return host, port


def _password(url: str) -> str:
    return url.partition("default:")[2].partition("@")[0]


async def _events_on(redis: "Redis") -> int:
    """Return how many events were ever appended."""
    keys = Keys()
    length, removed = await redis.xlen(keys.ledger), await redis.hget(keys.meta, "removed")
    return length + int(removed or 0)


async def _has_reached(redis: "Redis", events: int) -> bool:
    return await _events_on(redis) >= events


def _folded(path: Path) -> int:
    with duckdb.connect(str(path), read_only=True) as connection:
        row = connection.execute("SELECT max(seq) FROM events").fetchone()
    return row[0] if row is not None else 0


def _server(chaos: "Chaos") -> EmbeddedServer:
    assert isinstance(chaos.server, OneServer), "these faults are possible on one server only"
    return chaos.server.embedded


def _duckdb(chaos: "Chaos") -> Path:
    return chaos.data_dir / "tollbook.duckdb"


def _put(source: Path, target: Path) -> None:
    """Replace a file by a copy of another, in one step."""
    draft = target.with_name(f".{target.name}.draft")
    shutil.copyfile(source, draft)
    draft.replace(target)


@asynccontextmanager
async def _server_down(chaos: "Chaos") -> AsyncIterator[None]:
    async with _outage(chaos):
        await _server(chaos).kill()
        yield
        await _server(chaos).start()
    await chaos.redis.connection_pool.disconnect(inuse_connections=False)


@asynccontextmanager
async def _outage(chaos: "Chaos") -> AsyncIterator[None]:
    """Mark a time in which processes may end because their store is down."""
    outage = Downtime(0, time.time_ns() // 1_000_000)
    chaos.server.outages.append(outage)
    try:
        yield
    finally:
        outage.to_ms = time.time_ns() // 1_000_000


async def _copy_of_server(chaos: "Chaos") -> Path:
    copy = chaos.directory / f"server-{time.time_ns()}"
    await asyncio.to_thread(shutil.copytree, _files(chaos.data_dir), copy)
    return copy


def _replace(data_dir: Path, source: Path, kept: Path) -> None:
    """Replace the server's files by `source`, and move the old ones to `kept`."""
    files = _files(data_dir)
    shutil.rmtree(kept, ignore_errors=True)
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
