"""One chaos run, from the first process to the last check."""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import httpx
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from tests.chaos.audit import Audit, Evidence, RawEvent
from tests.chaos.plot import GATEWAYS, REPLIES, STREAMS, WORKERS, Blow, Plot
from tests.chaos.processes import Program, tollbook
from tests.chaos.servers import Servers, open_servers
from tests.chaos.stores import BATCH, BATCHES, STORE_BLOWS, read_lines
from tests.chaos.visitors import Visitors
from tests.deployments import ONE
from tests.servers import PATIENCE_S
from tests.system import command_environment
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.keys import GROUP, Keys, dead_letters, worker_key
from tollbook.ledger.projection.comparison import compare
from tollbook.ledger.projection.projector import Projector
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.servers import note_problem, primaries, server_of

ROOT: Final = Path(__file__).resolve().parents[2]
NAMESPACE: Final = Keys().namespace
_PAGE: Final = 2_000
_WATCH_S: Final = 0.25
_ANSWER_S: Final = 10.0
_NO_ANSWER: Final = (RedisError, OSError, TimeoutError, LedgerUnavailable)


class TooFewReplicas(RedisError):
    """What was read or written is not on a replica, and may be lost."""


class NotDrained(AssertionError):
    """The system did not come to rest after it was healed."""


@dataclass
class Chaos:
    """A run under way."""

    plot: Plot
    directory: Path
    server: Servers
    redis: Redis
    provider_url: str
    health_url: str
    programs: dict[str, Program]
    visitors: Visitors
    store_blows: Sequence[str] = ()
    published: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])
    unsure: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    struck: int = 0
    took_s: dict[str, float] = field(default_factory=dict[str, float])
    _events: dict[Keys, list[RawEvent]] = field(default_factory=dict[Keys, list[RawEvent]])
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    async def unleash(self) -> None:
        """Publish, visit and strike as the plot has it, until all are done and everything runs again."""
        self.visitors.key = await self._make_key()
        await _until(self.visitors.are_served, PATIENCE_S, "the gateways did not start")
        started = time.monotonic()
        # Where one of them fails, the others end: publishers would wait for ever for a server that did not come back.
        async with asyncio.TaskGroup() as group:
            for deeds in (self._strike_all, self._visit_all, self._publish_all):
                group.create_task(deeds(started))
        await self.reconnect()
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            await _until(lambda: self._heal_provider(client), 20, "the provider did not come back")

    async def reconnect(self) -> None:
        """Give up the client's own idle connections: they are from before a server's death, and it repeats nothing."""
        for server in await primaries(self.redis):
            await server.connection_pool.disconnect(inuse_connections=False)

    async def _heal_provider(self, client: httpx.AsyncClient) -> bool:
        try:
            reply = await client.post(self.provider_url.removesuffix("/api/v1") + "/standin/faults", json={})
        except httpx.TransportError:
            return False
        return reply.is_success

    async def _strike_all(self, started: float) -> None:
        locks = {name: asyncio.Lock() for name in ("server", *self.programs)}

        async def strike(blow: Blow) -> None:
            await asyncio.sleep(max(0, started + blow.at_s - time.monotonic()))
            target = self.server if blow.target == "server" else self.programs[blow.target]
            async with locks[blow.target]:
                await target.strike(blow.deed, blow.for_s)
            self.struck += 1

        await asyncio.gather(*(strike(blow) for blow in self.plot.blows))

    async def _make_key(self) -> str:
        """Make a key for the visitors, as soon as there is a ledger."""
        made: list[str] = []

        async def is_made() -> bool:
            code, output = await self.tollbook("keys", "create", "--allow", "user", "--allow", "campaign", "--json")
            made.append(json.loads(output)["key"] if code == 0 else "")
            return code == 0

        await _until(is_made, PATIENCE_S, "no key could be made")
        return made[-1]

    async def _visit_all(self, started: float) -> None:
        async def visit(number: int) -> None:
            each = self.plot.visits[number]
            await asyncio.sleep(max(0, started + each.at_s - time.monotonic()))
            await self.visitors.make(each)

        await asyncio.gather(*(visit(number) for number in range(len(self.plot.visits))))

    async def _publish_all(self, started: float) -> None:
        """Publish each in its time, but for those that are kept for the blows against stores."""
        later = len(self.store_blows) * BATCHES * BATCH
        for number, publication in enumerate(self.plot.publications[: len(self.plot.publications) - later]):
            await asyncio.sleep(max(0, started + publication.at_s - time.monotonic()))
            await self._publish(number)

    async def publish_more(self, number: int) -> None:
        """Publish the next ones at once."""
        # Counted from what is published, so that it can be called again and again.
        first = len(self.published)
        for each in range(first, min(first + number, len(self.plot.publications))):
            await self._publish(each)

    async def _publish(self, number: int) -> None:
        """Publish one; where the server does not answer, again, as publishers do."""
        publication = self.plot.publications[number]
        stream, fields = publication.stream, cast("Any", publication.fields)
        while True:
            try:
                async with asyncio.timeout(_ANSWER_S):
                    entry_id, is_kept = await self._ask(stream, lambda pipe: pipe.xadd(stream, fields))
            except _NO_ANSWER:
                await asyncio.sleep(0.1)
                continue
            if is_kept:
                self.published.append((stream, entry_id.decode(), number))
                return
            self.unsure.append((stream, entry_id.decode()))

    async def _ask(self, key: str, command: Callable[[Pipeline], Any]) -> tuple[Any, bool]:
        """Return a reply, and whether replicas have everything that was there then. Errors: _NO_ANSWER."""
        server = await server_of(self.redis, key)
        pipe = server.pipeline(transaction=False)
        command(pipe)
        if self.server.replicas:
            # WAIT answers for what its connection has written alone.
            tag = key.partition("}")[0] + "}" if key.startswith("{") else f"{{{key}}}"
            pipe.set(f"{tag}:chaos", "")
            pipe.execute_command("WAIT", self.server.replicas, 1000)
        try:
            reply, *others = await pipe.execute()
        except _NO_ANSWER as exc:
            note_problem(self.redis, exc)
            raise
        return reply, not others or others[-1] >= self.server.replicas

    async def strike_stores(self) -> None:
        """Strike at the stores, one blow after another, each on a system at rest."""
        for name in self.store_blows:
            await self.drain()
            await self.be_in_order()
            began = time.monotonic()
            await STORE_BLOWS[name](self)
            self.struck += 1
            self.took_s[name] = round(time.monotonic() - began, 1)

    async def be_in_order(self) -> None:
        """Wait until everything runs and no view of the system finds anything wrong. Errors: NotDrained."""
        deadline = time.monotonic() + self.plot.drain_s
        while problems := await self._problems():
            if time.monotonic() > deadline:
                raise NotDrained(f"a system at rest is not in order; seed {self.plot.seed}\n{problems}")

    async def _problems(self) -> str:
        living = [name async for name in self.redis.scan_iter(worker_key(NAMESPACE, "*"))]
        if len(living) != len(WORKERS) + len(GATEWAYS):
            return f"workers and gateways that live: {living}"
        code, findings = await self.tollbook("doctor", "--json")
        if code != 0:
            return f"doctor: {findings}"
        with contextlib.suppress(httpx.TransportError):
            async with httpx.AsyncClient(timeout=_ANSWER_S) as client:
                reply = await client.get(f"{self.health_url}/health/ready")
            return "" if reply.is_success else f"readiness: {reply.text}"
        return "readiness: no answer"

    @asynccontextmanager
    async def unread(self) -> AsyncIterator[None]:
        """Let nobody read the ledger meanwhile: it is not the one that counts."""
        async with self._reading:
            yield

    async def forget_lost(self) -> None:
        """Forget what was published and is on no stream any more: publishers will do that again."""
        kept: set[tuple[str, str]] = set()
        for stream in STREAMS:
            entries: Any = await self.redis.xrange(stream)
            kept |= {(stream, entry_id.decode()) for entry_id, _ in entries}
        first_lost = next(
            (n for n, (stream, entry_id, _) in enumerate(self.published) if (stream, entry_id) not in kept), None
        )
        del self.published[first_lost if first_lost is not None else len(self.published) :]

    def requests(self) -> list[dict[str, Any]]:
        """Return what the provider was asked so far."""
        return read_lines(self.directory / "requests.jsonl")

    async def drain(self) -> None:
        """Wait until every entry is delivered and acknowledged and no hold is open. Errors: NotDrained."""
        try:
            await _until(self._is_at_rest, self.plot.drain_s, "the system did not come to rest")
        except NotDrained as exc:
            raise NotDrained(f"{exc}; seed {self.plot.seed}\n{await self._what_is_left()}") from None

    async def _what_is_left(self) -> str:
        keys = self.server.keys
        lines = [f"holds: {await self.redis.zrange(each.holds, 0, 9, withscores=True)}" for each in keys]
        for stream in STREAMS:
            lines.append(f"{stream}: {await self.redis.xpending(stream, GROUP)}")
        for name in self.programs:
            log = (self.directory / f"{name.replace(' ', '-')}.log").read_text(encoding="utf-8", errors="replace")
            lines += [f"{name}: {line[:500]}" for line in log.splitlines()[-3:]]
        return "\n".join(lines)

    async def _is_at_rest(self) -> bool:
        with contextlib.suppress(RedisConnectionError, LedgerUnavailable):
            return await self._has_nothing_left()
        return False

    async def _has_nothing_left(self) -> bool:
        if any([await self.redis.zcard(keys.holds) for keys in self.server.keys]):
            return False
        for stream in STREAMS:
            last: Any = await self.redis.xrevrange(stream, count=1)
            groups: Any = await self.redis.xinfo_groups(stream)
            if last and not groups:
                return False  # No worker has begun yet.
            if any(group["pending"] or group["last-delivered-id"] != last[0][0] for group in groups if last):
                return False
        return True

    async def watch_ledger(self, stop: asyncio.Event) -> None:
        """Read what is appended, before it can be archived and trimmed, until `stop`."""
        while not stop.is_set():
            with contextlib.suppress(*_NO_ANSWER):
                async with asyncio.timeout(_ANSWER_S):
                    await self.read_ledger()
            await asyncio.sleep(_WATCH_S)

    @property
    def read_so_far(self) -> list[RawEvent]:
        """What `read_ledger` has read until now."""
        return [event for events in self._events.values() for event in events]

    async def read_ledger(self) -> list[RawEvent]:
        """Return every event ever appended, oldest first in each partition. Errors: _NO_ANSWER."""
        async with self._reading:
            for keys in self.server.keys:
                await self._read_partition(keys, self._events.setdefault(keys, []))
        return self.read_so_far

    async def _read_partition(self, keys: Keys, events: list[RawEvent]) -> None:
        while True:
            after = f"({events[-1].id}" if events else "-"
            page, is_kept = await self._ask(
                keys.ledger, lambda pipe, after=after: pipe.xrange(keys.ledger, after, "+", count=_PAGE)
            )
            if not is_kept:
                raise TooFewReplicas("a failover could lose what was read")
            found = [RawEvent.read(entry_id, fields, keys.partition) for entry_id, fields in page]
            if found and found[0].seq > len(events) + 1:
                # On a machine that stands still, events are archived and trimmed before they are read here.
                events += await asyncio.to_thread(self._archived, keys, len(events) + 1, found[0].seq)
            events += found
            if len(page) < _PAGE:
                return

    def _archived(self, keys: Keys, first_seq: int, before_seq: int) -> list[RawEvent]:
        segments = Archive(self.data_dir / "archive").segments(keys.partition)
        rows = [row for segment in segments for row in segment.read().to_pylist()]
        return [RawEvent.of_archive(row) for row in rows if first_seq <= row["seq"] < before_seq]

    async def check_ledger(self) -> None:
        """What was read while the run went on must stand on the ledger as it was, up to what was trimmed (G7)."""
        await self.read_ledger()  # The projector may have sealed another segment.
        for keys, events in self._events.items():
            left: Any = await self.redis.xrange(keys.ledger)
            found = [RawEvent.read(entry_id, fields, keys.partition) for entry_id, fields in left]
            removed: Any = await self.redis.hget(keys.meta, "removed")
            assert found == events[int(removed) :], "G7: events that stood on the ledger are gone or changed"

    async def evidence(self) -> Evidence:
        """Gather what the checks need."""
        events = await self.read_ledger()
        results = await self._results()
        replies: Any = await self.redis.xrange(REPLIES)
        letters: Any = await self.redis.xrange(dead_letters(NAMESPACE))
        return Evidence(
            plot=self.plot,
            published=self.published,
            events=events,
            results=results,
            replies=[(fields[b"task_id"].decode(), fields[b"result"].decode()) for _, fields in replies],
            dead_letters=[{name.decode(): value.decode() for name, value in fields.items()} for _, fields in letters],
            requests=_lines(self.directory / "requests.jsonl"),
            book=_lines(self.directory / "book.jsonl"),
            standstills=[standstill for program in self.programs.values() for standstill in program.standstills],
            answers=self.visitors.answers,
            unsure=self.unsure,
        )

    async def _results(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for keys in self.server.keys:
            start = len(keys.result(""))
            server = await server_of(self.redis, keys.meta)
            names: list[bytes] = [name async for name in server.scan_iter(keys.result("*"), count=1000)]
            values: Any = await server.mget(names) if names else []
            found |= {name.decode()[start:]: value.decode() for name, value in zip(names, values, strict=True)}
        return found

    async def reconcile(self) -> dict[str, Any]:
        """Run `tollbook reconcile`."""
        code, output = await self.tollbook("reconcile", "--json")
        assert code == 0, f"tollbook reconcile failed: {output}"
        return json.loads(output)

    async def verify(self) -> None:
        """Run `tollbook verify`."""
        code, output = await self.tollbook("verify")
        assert code == 0, f"tollbook verify is not content: {output}"

    async def tollbook(self, *arguments: str) -> tuple[int | None, str]:
        """Run a command; return its exit code and what it said, errors where there was no output."""
        process = await asyncio.create_subprocess_exec(
            *tollbook(*arguments),
            cwd=self.directory,
            env=self.environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        return process.returncode, (output or errors).decode()

    def environment(self) -> dict[str, str]:
        return _environment(self.plot, self.server, self.provider_url, self.data_dir)

    async def check_projection(self) -> None:
        """What the projector leaves must be what a fold from nothing makes (G5), without a discrepancy."""
        keys = self.server.keys
        ledger_id: Any = await self.redis.hget(keys[0].meta, "ledger_id")
        live = await asyncio.to_thread(Store.open, self.data_dir / "tollbook.duckdb", ledger_id.decode(), len(keys))
        try:
            rebuilt = await rebuild(
                self.redis,
                keys,
                ledger_id.decode(),
                self.directory / "rebuilt.duckdb",
                archive=Archive(self.data_dir / "archive"),
            )
            try:
                await self._fold_the_end(live)
                differences = await asyncio.to_thread(compare, live, rebuilt)
                discrepancies = rebuilt.query("FROM discrepancies LIMIT 5")
                folded = rebuilt.query("SELECT count(*) AS n FROM events")[0]["n"]
            finally:
                rebuilt.close()
        finally:
            live.close()
        assert not differences, f"G5: the live projection is not what a rebuild gives: {differences}"
        assert not discrepancies, f"the fold disagrees with the gate: {discrepancies}"
        assert folded == len(self.read_so_far), (
            f"G5: {folded} events are folded, the ledger has {len(self.read_so_far)}"
        )

    async def _fold_the_end(self, live: Store) -> None:
        """Fold what the projector wrote while it ended: that it has sealed the last events."""
        projector = Projector(live, self.redis, self.server.keys, trim=_no_trim)
        folding = asyncio.create_task(projector.run())
        await asyncio.wait({folding, asyncio.create_task(projector.catch_up())}, return_when=asyncio.FIRST_COMPLETED)
        folding.cancel()
        await asyncio.gather(folding, return_exceptions=True)
        assert projector.failure is None, f"what the projector left cannot be folded: {projector.failure}"


async def _no_trim(*_: Any) -> None:
    """Leave the tails alone: nothing is read by a gate any more."""


async def run(plot: Plot, directory: Path, *, store: str = ONE, store_blows: Sequence[str] = ()) -> dict[str, Any]:
    """Play a plot on servers of a kind, then strike at the stores, and check everything; return counts for the report.

    Only what one server holds is struck at.

    Errors: AssertionError.
    """
    async with _opened(plot, directory, store) as chaos:
        chaos.store_blows = store_blows
        try:
            return await _play(chaos)
        except BaseException:
            await _keep_evidence(chaos)
            raise


async def _play(chaos: Chaos) -> dict[str, Any]:
    started = time.monotonic()
    stop = asyncio.Event()
    watching = asyncio.create_task(chaos.watch_ledger(stop))
    try:
        await chaos.unleash()
        await chaos.strike_stores()
        healed = time.monotonic()
        await chaos.drain()
        drained = time.monotonic()
        before = Audit(await chaos.evidence())
        before.check()
        for name in (*WORKERS, *GATEWAYS):
            await chaos.programs[name].end()
        reconciled = await chaos.reconcile()
        after = Audit(await chaos.evidence())
        after.check()
        after.check_reconciled()
        await chaos.verify()
        await chaos.programs["projector"].end()
    finally:
        # Not before the projector has ended, which archives and trims until then.
        stop.set()
        await watching
    await chaos.check_ledger()
    await chaos.check_projection()
    surprises = [
        surprise.text
        for program in chaos.programs.values()
        for surprise in program.surprises
        if not surprise.is_for_want_of(chaos.server.outages)
    ]
    assert not surprises, f"processes ended unasked: {surprises}"
    return {
        **after.summary(),
        "visits_left": chaos.visitors.left,
        "blows": chaos.struck,
        "store_blows_s": chaos.took_s,
        "assumed_before_nanousd": before.assumed_nanousd,
        "assumed_before_share": before.summary()["assumed_share"],
        "asked": reconciled["asked"],
        "chaos_s": round(healed - started, 1),
        "drain_s": round(drained - healed, 1),
        "checks_s": round(time.monotonic() - drained, 1),
    }


@asynccontextmanager
async def _opened(plot: Plot, directory: Path, store: str) -> AsyncIterator[Chaos]:
    data_dir = directory / "data"
    faults = directory / "faults.json"
    faults.write_text(json.dumps({"seed": plot.seed, "rates": plot.fault_rates}), encoding="utf-8")
    port = _free_port()
    health_port = _free_port(port + 1)
    first_port = _free_port(health_port + 1)
    ports = dict(zip(GATEWAYS, (first_port, _free_port(first_port + 1)), strict=True))
    provider_url = f"http://127.0.0.1:{port}/api/v1"
    async with open_servers(store, directory) as servers, connect(servers.url) as redis:
        env = _environment(plot, servers, provider_url, data_dir)
        worker = tollbook("worker", "--streams", ",".join(STREAMS), "--supervised")
        stand_in = (sys.executable, "-m", "tests.chaos.provider", "--port", str(port), "--faults", str(faults))
        stand_in += ("--directory", str(directory), "--latency-ms", str(plot.latency_ms))
        stand_in += () if plot.chunk_ms is None else ("--chunk-ms", str(plot.chunk_ms))
        commands = {
            "provider": stand_in,
            "projector": tollbook("projector", "--supervised"),
            **dict.fromkeys(WORKERS, worker),
            **dict.fromkeys(GATEWAYS, tollbook("gateway", "--supervised")),
        }
        files = {"projector": data_dir / "tollbook.duckdb"}
        own = {WORKERS[0]: {"TOLLBOOK_METRICS_PORT": str(health_port)}}
        own |= {
            name: {"TOLLBOOK_GATEWAY_PORT": str(number), "TOLLBOOK_METRICS_PORT": "off"}
            for name, number in ports.items()
        }
        programs = {
            name: Program(name, command, env | own.get(name, {}), directory, files.get(name))
            for name, command in commands.items()
        }
        try:
            for program in programs.values():
                await program.start()
            health_url = f"http://127.0.0.1:{health_port}"
            visitors = Visitors([f"http://127.0.0.1:{number}" for number in ports.values()], key="")
            yield Chaos(plot, directory, servers, redis, provider_url, health_url, programs, visitors)
        finally:
            # The workers first, while there is somebody to answer them.
            for program in reversed(programs.values()):
                await program.end()


def _environment(plot: Plot, servers: Servers, provider_url: str, data_dir: Path) -> dict[str, str]:
    own = {
        "REDIS_URL": servers.url,
        "OPENROUTER_BASE_URL": provider_url,
        "TOLLBOOK_DATA_DIR": str(data_dir),
        "PYTHONPATH": str(ROOT),
    }
    return command_environment({**plot.settings(servers.partitions), **servers.settings, **own})


async def _keep_evidence(chaos: Chaos) -> None:
    """Write the ledger as it stands beside book and logs."""
    try:
        events = await chaos.read_ledger()
    except _NO_ANSWER:
        events = chaos.read_so_far  # The failure may have left no server.
    with (chaos.directory / "ledger.jsonl").open("w", encoding="utf-8") as file:
        for event in events:
            file.write(json.dumps(event.as_dict()) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _free_port(first: int | None = None) -> int:
    """Return a port below the range of outgoing connections, so that nobody gets it while its program is down."""
    # Runs that start at once have neighbouring process ids, and none of them listens yet.
    for port in range(first or 18_000 + 8 * (os.getpid() % 240), 20_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


async def _until(condition: Any, timeout_s: float, problem: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline:
            raise NotDrained(f"{problem} within {timeout_s} s")
        await asyncio.sleep(0.1)
