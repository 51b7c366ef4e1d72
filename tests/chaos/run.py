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
from tests.chaos.clients import Clients
from tests.chaos.processes import Program, tollbook
from tests.chaos.scenario import GATEWAYS, REPLIES, STREAMS, WORKERS, ProcessFault, Scenario
from tests.chaos.servers import Servers, open_servers
from tests.chaos.stores import BATCH, BATCHES, STORE_FAULTS, read_lines
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
    """Too few replicas have what was read or written, so it may be lost."""


class NotDrained(AssertionError):
    """The system did not finish all work after the faults were over."""


@dataclass
class Chaos:
    """A run under way."""

    scenario: Scenario
    directory: Path
    server: Servers
    redis: Redis
    provider_url: str
    health_url: str
    programs: dict[str, Program]
    clients: Clients
    store_faults: Sequence[str] = ()
    published: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])
    unconfirmed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    faults_injected: int = 0
    took_s: dict[str, float] = field(default_factory=dict[str, float])
    _events: dict[Keys, list[RawEvent]] = field(default_factory=dict[Keys, list[RawEvent]])
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def data_dir(self) -> Path:
        return self.directory / "data"

    async def run_workload(self) -> None:
        """Publish tasks, run clients and make faults as the scenario says, until all are done and all processes run."""
        self.clients.key = await self._make_key()
        await _until(self.clients.are_served, PATIENCE_S, "the gateways did not start")
        started = time.monotonic()
        # If one of them fails, the others end: publishers would wait for ever for a server that did not come back.
        async with asyncio.TaskGroup() as group:
            for steps in (self._inject_faults, self._run_clients, self._publish_all):
                group.create_task(steps(started))
        await self.reconnect()
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            await _until(lambda: self._heal_provider(client), 20, "the provider did not come back")

    async def reconnect(self) -> None:
        """Close the idle connections of the client: they are older than a server's death, and it retries nothing."""
        for server in await primaries(self.redis):
            await server.connection_pool.disconnect(inuse_connections=False)

    async def _heal_provider(self, client: httpx.AsyncClient) -> bool:
        try:
            reply = await client.post(self.provider_url.removesuffix("/api/v1") + "/standin/faults", json={})
        except httpx.TransportError:
            return False
        return reply.is_success

    async def _inject_faults(self, started: float) -> None:
        locks = {name: asyncio.Lock() for name in ("server", *self.programs)}

        async def inject(process_fault: ProcessFault) -> None:
            await asyncio.sleep(max(0, started + process_fault.at_s - time.monotonic()))
            target = self.server if process_fault.target == "server" else self.programs[process_fault.target]
            async with locks[process_fault.target]:
                await target.inject(process_fault.kind, process_fault.for_s)
            self.faults_injected += 1

        await asyncio.gather(*(inject(process_fault) for process_fault in self.scenario.process_faults))

    async def _make_key(self) -> str:
        """Create a key for the clients, as soon as there is a ledger."""
        made: list[str] = []

        async def is_made() -> bool:
            code, output = await self.tollbook("keys", "create", "--allow", "user", "--allow", "campaign", "--json")
            made.append(json.loads(output)["key"] if code == 0 else "")
            return code == 0

        await _until(is_made, PATIENCE_S, "no key could be made")
        return made[-1]

    async def _run_clients(self, started: float) -> None:
        async def run_client(number: int) -> None:
            each = self.scenario.client_requests[number]
            await asyncio.sleep(max(0, started + each.at_s - time.monotonic()))
            await self.clients.make(each)

        await asyncio.gather(*(run_client(number) for number in range(len(self.scenario.client_requests))))

    async def _publish_all(self, started: float) -> None:
        """Publish each task at its time, except those that are kept for the faults of stores."""
        later = len(self.store_faults) * BATCHES * BATCH
        for number, publication in enumerate(self.scenario.publications[: len(self.scenario.publications) - later]):
            await asyncio.sleep(max(0, started + publication.at_s - time.monotonic()))
            await self._publish(number)

    async def publish_more(self, number: int) -> None:
        """Publish the next `number` tasks at once."""
        # Counted from what is published, so that it can be called again and again.
        first = len(self.published)
        for each in range(first, min(first + number, len(self.scenario.publications))):
            await self._publish(each)

    async def _publish(self, number: int) -> None:
        """Publish a task; repeat it if the server does not answer, as publishers do."""
        publication = self.scenario.publications[number]
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
            self.unconfirmed.append((stream, entry_id.decode()))

    async def _ask(self, key: str, command: Callable[[Pipeline], Any]) -> tuple[Any, bool]:
        """Return a reply, and whether the replicas have everything up to it. Errors: _NO_ANSWER."""
        server = await server_of(self.redis, key)
        pipe = server.pipeline(transaction=False)
        command(pipe)
        if self.server.replicas:
            # WAIT counts only the writes of its own connection.
            tag = key.partition("}")[0] + "}" if key.startswith("{") else f"{{{key}}}"
            pipe.set(f"{tag}:chaos", "")
            pipe.execute_command("WAIT", self.server.replicas, 1000)
        try:
            reply, *others = await pipe.execute()
        except _NO_ANSWER as exc:
            note_problem(self.redis, exc)
            raise
        return reply, not others or others[-1] >= self.server.replicas

    async def inject_store_faults(self) -> None:
        """Make the faults of stores, one after another, each on an idle system."""
        for name in self.store_faults:
            await self.drain()
            await self.wait_until_healthy()
            began = time.monotonic()
            await STORE_FAULTS[name](self)
            self.faults_injected += 1
            self.took_s[name] = round(time.monotonic() - began, 1)

    async def wait_until_healthy(self) -> None:
        """Wait until all processes run, and `doctor` and readiness find nothing wrong. Errors: NotDrained."""
        deadline = time.monotonic() + self.scenario.drain_s
        while problems := await self._problems():
            if time.monotonic() > deadline:
                raise NotDrained(f"a system at rest is not in order; seed {self.scenario.seed}\n{problems}")

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
    async def reading_paused(self) -> AsyncIterator[None]:
        """Stop reading the ledger meanwhile: it is an older copy."""
        async with self._reading:
            yield

    async def forget_lost_publications(self) -> None:
        """Forget publications that are on no stream any more: they will be published again."""
        kept: set[tuple[str, str]] = set()
        for stream in STREAMS:
            entries: Any = await self.redis.xrange(stream)
            kept |= {(stream, entry_id.decode()) for entry_id, _ in entries}
        first_lost = next(
            (n for n, (stream, entry_id, _) in enumerate(self.published) if (stream, entry_id) not in kept), None
        )
        del self.published[first_lost if first_lost is not None else len(self.published) :]

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests that the provider has received so far."""
        return read_lines(self.directory / "requests.jsonl")

    async def drain(self) -> None:
        """Wait until every entry is delivered and acknowledged and no hold is open. Errors: NotDrained."""
        try:
            await _until(self._is_at_rest, self.scenario.drain_s, "the system did not come to rest")
        except NotDrained as exc:
            raise NotDrained(f"{exc}; seed {self.scenario.seed}\n{await self._what_is_left()}") from None

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
        """Read new events before they can be archived and trimmed, until `stop`."""
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
                # On a busy machine, events may be archived and trimmed before they are read here.
                events += await asyncio.to_thread(self._archived, keys, len(events) + 1, found[0].seq)
            events += found
            if len(page) < _PAGE:
                return

    def _archived(self, keys: Keys, first_seq: int, before_seq: int) -> list[RawEvent]:
        segments = Archive(self.data_dir / "archive").segments(keys.partition)
        rows = [row for segment in segments for row in segment.read().to_pylist()]
        return [RawEvent.of_archive(row) for row in rows if first_seq <= row["seq"] < before_seq]

    async def check_ledger(self) -> None:
        """Check that the events read during the run are still on the ledger, unchanged, unless trimmed (G7)."""
        await self.read_ledger()  # The projector may have sealed another segment.
        for keys, events in self._events.items():
            left: Any = await self.redis.xrange(keys.ledger)
            found = [RawEvent.read(entry_id, fields, keys.partition) for entry_id, fields in left]
            removed: Any = await self.redis.hget(keys.meta, "removed")
            assert found == events[int(removed) :], "G7: events that stood on the ledger are gone or changed"

    async def evidence(self) -> Evidence:
        """Collect what the checks need."""
        events = await self.read_ledger()
        results = await self._results()
        replies: Any = await self.redis.xrange(REPLIES)
        letters: Any = await self.redis.xrange(dead_letters(NAMESPACE))
        return Evidence(
            scenario=self.scenario,
            published=self.published,
            events=events,
            results=results,
            replies=[(fields[b"task_id"].decode(), fields[b"result"].decode()) for _, fields in replies],
            dead_letters=[{name.decode(): value.decode() for name, value in fields.items()} for _, fields in letters],
            requests=_lines(self.directory / "requests.jsonl"),
            book=_lines(self.directory / "book.jsonl"),
            downtimes=[downtime for program in self.programs.values() for downtime in program.downtimes],
            answers=self.clients.answers,
            unconfirmed=self.unconfirmed,
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
        """Run a command; return its exit code and its output, or standard error if there is no output."""
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
        return _environment(self.scenario, self.server, self.provider_url, self.data_dir)

    async def check_projection(self) -> None:
        """Check that the projector's file equals a fold from zero (G5), without a discrepancy."""
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
        """Fold the last events, which the projector wrote during its shutdown: that it sealed a segment."""
        projector = Projector(live, self.redis, self.server.keys, trim=_no_trim)
        folding = asyncio.create_task(projector.run())
        await asyncio.wait({folding, asyncio.create_task(projector.catch_up())}, return_when=asyncio.FIRST_COMPLETED)
        folding.cancel()
        await asyncio.gather(folding, return_exceptions=True)
        assert projector.failure is None, f"what the projector left cannot be folded: {projector.failure}"


async def _no_trim(*_: Any) -> None:
    """Do not trim the tails: no gate reads them any more."""


async def run(
    scenario: Scenario, directory: Path, *, store: str = ONE, store_faults: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a scenario on servers of a kind, then the faults of stores, and check all; return counts for the report.

    Faults of stores are possible on one server only.

    Errors: AssertionError.
    """
    async with _opened(scenario, directory, store) as chaos:
        chaos.store_faults = store_faults
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
        await chaos.run_workload()
        await chaos.inject_store_faults()
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
        # Not before the projector has ended, since it archives and trims until then.
        stop.set()
        await watching
    await chaos.check_ledger()
    await chaos.check_projection()
    unexpected_exits = [
        unexpected_exit.text
        for program in chaos.programs.values()
        for unexpected_exit in program.unexpected_exits
        if not unexpected_exit.is_caused_by(chaos.server.outages)
    ]
    assert not unexpected_exits, f"processes ended unasked: {unexpected_exits}"
    return {
        **after.summary(),
        "clients_left": chaos.clients.left,
        "process_faults": chaos.faults_injected,
        "store_faults_s": chaos.took_s,
        "assumed_before_nanousd": before.assumed_nanousd,
        "assumed_before_share": before.summary()["assumed_share"],
        "asked": reconciled["asked"],
        "chaos_s": round(healed - started, 1),
        "drain_s": round(drained - healed, 1),
        "checks_s": round(time.monotonic() - drained, 1),
    }


@asynccontextmanager
async def _opened(scenario: Scenario, directory: Path, store: str) -> AsyncIterator[Chaos]:
    data_dir = directory / "data"
    faults = directory / "faults.json"
    faults.write_text(json.dumps({"seed": scenario.seed, "rates": scenario.fault_rates}), encoding="utf-8")
    port = _free_port()
    health_port = _free_port(port + 1)
    first_port = _free_port(health_port + 1)
    ports = dict(zip(GATEWAYS, (first_port, _free_port(first_port + 1)), strict=True))
    provider_url = f"http://127.0.0.1:{port}/api/v1"
    async with open_servers(store, directory) as servers, connect(servers.url) as redis:
        env = _environment(scenario, servers, provider_url, data_dir)
        worker = tollbook("worker", "--streams", ",".join(STREAMS), "--supervised")
        stand_in = (sys.executable, "-m", "tests.chaos.provider", "--port", str(port), "--faults", str(faults))
        stand_in += ("--directory", str(directory), "--latency-ms", str(scenario.latency_ms))
        stand_in += () if scenario.chunk_ms is None else ("--chunk-ms", str(scenario.chunk_ms))
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
            clients = Clients([f"http://127.0.0.1:{number}" for number in ports.values()], key="")
            yield Chaos(scenario, directory, servers, redis, provider_url, health_url, programs, clients)
        finally:
            # The workers first, while the provider still answers them.
            for program in reversed(programs.values()):
                await program.end()


def _environment(scenario: Scenario, servers: Servers, provider_url: str, data_dir: Path) -> dict[str, str]:
    own = {
        "REDIS_URL": servers.url,
        "OPENROUTER_BASE_URL": provider_url,
        "TOLLBOOK_DATA_DIR": str(data_dir),
        "PYTHONPATH": str(ROOT),
    }
    return command_environment({**scenario.settings(servers.partitions), **servers.settings, **own})


async def _keep_evidence(chaos: Chaos) -> None:
    """Write the ledger to a file beside book and logs."""
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
    """Return a port below the range of outgoing connections, so that it stays free while its program is down."""
    # Runs that start at the same time have neighbouring process ids, so each begins its search at another port.
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
