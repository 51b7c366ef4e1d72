"""Blows against what the stores hold: an older backup, a cut-off replica, eviction, a changed or older DuckDB.

Each is struck on a system that has come to rest and is then given work. It must go on rightly, or stop until a person
has undone it, and then `doctor`, readiness and the logs say why: no call is made meanwhile that the stores as they
were would not have allowed. What is published afterwards is done, and the audit at the end finds book and ledger equal.
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

from tests.chaos.plot import WORKERS
from tests.chaos.processes import Standstill
from tests.chaos.servers import OneServer
from tests.servers import wait_until
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from tests.chaos.run import Chaos

StoreBlow = Callable[["Chaos"], Awaitable[None]]
# Enough that every worker takes part, and is told of events that will be lost.
BATCH: Final = 120
# The most that a blow publishes. What is lost with a server is published again.
BATCHES: Final = 3
# What a worker that has not noticed would need to make a call, many times over.
_LOOK_S: Final = 5.0
_WENT_BACK: Final = ("the projector has stopped: DuckDB has folded", "is no longer on the ledger")
_MAY_EVICT: Final = ("allkeys-lru",)


async def restore_an_older_backup(chaos: "Chaos") -> None:
    """The server is stopped, its files are copied; later it is started on the copy. A person restores the newer."""
    async with _server_down(chaos):
        older = await _copy_of_server(chaos)
    await chaos.publish_more(BATCH)
    await chaos.drain()
    newest, published = chaos.directory / "newest", len(chaos.published)
    async with chaos.unread(), _outage(chaos):
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, older, newest)
        await _see_that_it_went_back(chaos)
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, newest, chaos.directory / "older")
        # What was published on the older server has gone with it.
        del chaos.published[published:]
    await chaos.publish_more(BATCH)
    await chaos.drain()
    _forgive(chaos)


async def recover_from_an_older_backup(chaos: "Chaos") -> None:
    """An older backup is all there is: a person has what was lost entered again, and publishers repeat themselves."""
    async with _server_down(chaos):
        older, published = await _copy_of_server(chaos), len(chaos.published)
    await chaos.publish_more(BATCH)
    await chaos.drain()
    await _end_projector(chaos)
    async with chaos.unread(), _outage(chaos):
        async with _server_down(chaos):
            await asyncio.to_thread(_replace, chaos.data_dir, older, chaos.directory / "lost")
        del chaos.published[published:]
        await chaos.programs["projector"].start()
        await _see_that_it_went_back(chaos)
        await _recover(chaos)
    await _go_on(chaos)


async def fail_over_to_a_cut_off_replica(chaos: "Chaos") -> None:
    """The server dies, and a replica takes its address whose link was cut in mid-work; a person recovers the rest."""
    promoted = chaos.directory / "replica"
    async with EmbeddedServer(promoted, fsync="always") as server, connect(server.url) as replica:
        await _replicate(replica, chaos)
        publishing = asyncio.create_task(chaos.publish_more(BATCH))
        # When some of it is done, and much is under way.
        events = await _events_on(chaos.redis)
        await wait_until(lambda: _has_reached(chaos.redis, events + BATCH), what="the first calls")
        await replica.execute_command("REPLICAOF", "NO", "ONE")
        await publishing
        await chaos.drain()
        await _end_projector(chaos)
        async with chaos.unread(), _outage(chaos):
            await _server(chaos).kill()
            await _take_address(replica, _server(chaos).url)
            await chaos.redis.connection_pool.disconnect(inuse_connections=False)
            await chaos.programs["projector"].start()
            await chaos.forget_lost()
            await _see_that_it_went_back(chaos)
            await _recover(chaos)
            # Its process was this test's all along, which from here on has one server again.
            await server.stop()
            await asyncio.to_thread(_replace, chaos.data_dir, _files(promoted), chaos.directory / "cut-off")
            await _server(chaos).start()
        await chaos.redis.connection_pool.disconnect(inuse_connections=False)
    await _go_on(chaos)


async def evict(chaos: "Chaos") -> None:
    """The server is told that it may evict keys."""
    told = _log_sizes(chaos)
    await chaos.redis.config_set("maxmemory-policy", "allkeys-lru")
    for name in WORKERS:
        await _wait_for_words(chaos, _MAY_EVICT, [name], told)
    await _see_that_calls_are_stopped(chaos, _MAY_EVICT)
    await chaos.redis.config_set("maxmemory-policy", "noeviction")
    await chaos.publish_more(BATCH)
    await chaos.drain()


async def change_a_row(chaos: "Chaos") -> None:
    """Somebody sets what was spent to nothing in DuckDB; the caps must hold all the same, which the audit sees."""

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


STORE_BLOWS: Final[dict[str, StoreBlow]] = {
    "restore": restore_an_older_backup,
    "recover": recover_from_an_older_backup,
    "failover": fail_over_to_a_cut_off_replica,
    "evict": evict,
    "change": change_a_row,
    "older": put_an_older_duckdb_in_place,
}
# Struck in the suite, in a bounded time: a ledger that went back and is recovered, and a DuckDB that lies.
IN_SUITE: Final = ("failover", "change")


async def _see_that_it_went_back(chaos: "Chaos") -> None:
    told = _log_sizes(chaos)
    await _see_that_calls_are_stopped(chaos, _WENT_BACK)
    # Those speak who have tasks, and one may have none.
    await _wait_for_words(chaos, _WENT_BACK, WORKERS, told)


async def _see_that_calls_are_stopped(chaos: "Chaos", words: tuple[str, ...]) -> None:
    """Publish, see that nothing of it is called for, and that everybody says why: in one of these words."""
    published, asked = len(chaos.published), len(chaos.requests())
    await chaos.publish_more(BATCH)
    await asyncio.sleep(_LOOK_S)
    called = {line["task_id"] for line in chaos.requests()[asked:]}
    numbers = [number for _, _, number in chaos.published[published:]]
    called &= {chaos.plot.publications[number].fields.get("task_id", "") for number in numbers}
    assert not called, f"G8: {len(called)} calls were made on a store that lies"
    code, findings = await chaos.tollbook("doctor", "--json")
    assert code == 1, f"doctor finds nothing wrong: {findings}"
    failed = [each["found"] for each in json.loads(findings) if each["state"] == "failed"]
    assert _tells(" ".join(failed), words), f"doctor does not say why calls are stopped: {failed}"
    async with httpx.AsyncClient() as client:
        reply = await client.get(f"{chaos.health_url}/health/ready")
    assert reply.status_code == 503, f"a worker says that it is ready: {reply.text}"
    assert _tells(reply.text, words), f"readiness does not say why calls are stopped: {reply.text}"


async def _wait_for_words(chaos: "Chaos", words: tuple[str, ...], names: Sequence[str], told: dict[str, int]) -> None:
    """Wait until one of these programs has said one of these in its log, beyond what it has `told` before."""

    def has_said() -> bool:
        return any(_tells(_log_of(chaos, name)[told[name] :], words) for name in names)

    await wait_until(has_said, what=f"the reason in the log of {', '.join(names)}")


def _log_sizes(chaos: "Chaos") -> dict[str, int]:
    return {name: len(_log_of(chaos, name)) for name in WORKERS}


def _tells(text: str, words: tuple[str, ...]) -> bool:
    return any(word in text for word in words)


def _log_of(chaos: "Chaos", name: str) -> str:
    return (chaos.directory / f"{name.replace(' ', '-')}.log").read_text(encoding="utf-8", errors="replace")


async def _end_projector(chaos: "Chaos") -> None:
    """End it when it has folded everything: what it does not know is lost for good with the server."""

    projector = chaos.programs["projector"]

    async def has_folded() -> bool:
        await projector.end()
        folded = await asyncio.to_thread(_folded, _duckdb(chaos))
        if folded == await _events_on(chaos.redis):
            return True
        await projector.start()  # It takes no longer than its grace to end, whatever is left.
        await asyncio.sleep(_LOOK_S)
        return False

    await wait_until(has_folded, what="the fold of everything")


async def _recover(chaos: "Chaos") -> None:
    """Do what the operator's guide says: end the projector, look, recover, verify. Workers stay."""
    await chaos.programs["projector"].end()
    code, shown = await chaos.tollbook("recover")
    assert code == 1, f"recover finds nothing that is lost: {shown}"
    code, shown = await chaos.tollbook("recover", "--yes", "--reason", "an older backup")
    assert code == 0, f"recover failed: {shown}"
    code, shown = await chaos.tollbook("verify")
    assert code == 0, f"verify is not content with what was recovered: {shown}"


async def _go_on(chaos: "Chaos") -> None:
    await chaos.programs["projector"].start()
    await chaos.publish_more(BATCH)
    await chaos.drain()
    _forgive(chaos)


def _forgive(chaos: "Chaos") -> None:
    """The projector was right to end where the ledger had gone back."""
    chaos.programs["projector"].forget_ends_in(max(chaos.server.outages, key=lambda outage: outage.to_ms))


async def _replicate(replica: "Redis", chaos: "Chaos") -> None:
    """Let a server have what the chaos run's own has. Its password is the same, so it can take its place."""
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
    """Listen where the dead server did."""
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
    assert isinstance(chaos.server, OneServer), "these blows are struck at one server alone"
    return chaos.server.embedded


def _duckdb(chaos: "Chaos") -> Path:
    return chaos.data_dir / "tollbook.duckdb"


def _put(source: Path, target: Path) -> None:
    """Put a copy of a file in the place of another in one step."""
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


def _replace(data_dir: Path, source: Path, kept: Path) -> None:
    """Put files in the place of the server's, which are kept."""
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
