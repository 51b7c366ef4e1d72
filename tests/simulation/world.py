"""One simulated run: workers, provider, projection and publishers on a network with faults, all drawn from a seed.

The workers are the project's own code, from the deliveries down to the bytes for Redis and for
the provider. After a time of faults everything is healed. Then all work must end, and the checks
of checks.py must pass.
"""

import asyncio
import math
import traceback
from collections import deque
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from random import Random
from typing import Any, Final

import structlog

from tests.simulation.checks import Broken, Checker, Fold, Snapshot, read_event
from tests.simulation.loop import Process, VirtualLoop
from tests.simulation.network import Connection, Faults, Network
from tests.simulation.provider import LARGE, SMALL, Provider, ProviderFaults
from tests.simulation.redis_server import Backup, RedisServer
from tollbook.consumers.claims import Claims
from tollbook.consumers.dead_letters import DeadLetters
from tollbook.consumers.messages import Delivery
from tollbook.consumers.reply_streams import ReplyStreams
from tollbook.consumers.sweeper import Sweeper
from tollbook.consumers.worker import Worker, WorkerLimits
from tollbook.inference.calls.reservations import Reservations, WaitLimits
from tollbook.inference.calls.retry import RetryPolicy
from tollbook.inference.calls.runner import CallRunner
from tollbook.inference.current_policy import CurrentPolicy, PolicyInForce
from tollbook.inference.providers.client import ProviderClient
from tollbook.inference.providers.clients import ProviderClients
from tollbook.inference.task_deltas import DeltaStream
from tollbook.inference.user_ids import UserIds
from tollbook.ledger.errors import BaselineUnavailable, LedgerUnavailable
from tollbook.ledger.gate.baselines import BaselinePage, Baselines
from tollbook.ledger.gate.functions import function, library_code
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.ledger import Ledger, Patience
from tollbook.ledger.gate.requests import Position
from tollbook.ledger.gate.wait_queue import BudgetWaitQueue
from tollbook.ledger.keys import GROUP, Keys
from tollbook.ledger.results import Results
from tollbook.ledger.server.pipeline import CommandPipeline, pack_command
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.routes import Route
from tollbook.schemas.windows import WindowKind

STREAM: Final = "generation"
LEDGER_ID: Final = "ledger-of-the-simulation"
ROUTE: Final = Route(model=LARGE, fallback=(SMALL,), max_tokens=400, temperature=0.0)
# About the bound of one attempt of LARGE: 220 prompt tokens and 400 completion tokens.
BOUND_NANOUSD: Final = 220 * 3_000 + 400 * 15_000
_REST_S: Final = 40.0
_LONGEST_S: Final = 7200.0
_READ_COUNT: Final = 16
# Further budgets of a scenario: attribute and window.
_BUDGETS: Final[dict[str, tuple[str, WindowKind]]] = {"day": ("user", "day"), "campaign": ("campaign", "month")}
# Error lines that are expected after a ledger went back in time; every other one is a bug.
_EXPECTED: Final = ("settlement.kept", "charge.kept", "unbooked.left")


def quiet_logs() -> None:
    """Drop all log lines of the project, and collect those that mean a bug."""
    structlog.configure(
        processors=[_raise_crash],
        wrapper_class=structlog.make_filtering_bound_logger(40),
        cache_logger_on_first_use=False,
    )


_crashes: list[str] = []


def _raise_crash(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    if event["event"] in _EXPECTED:
        raise structlog.DropEvent
    _crashes.append(f"{event}\n{traceback.format_exc()}")
    raise structlog.DropEvent


@dataclass
class Scenario:
    """What the seed decides before anything runs."""

    users: int
    tasks: int
    workers: int
    chaos_s: float
    concurrency: int
    caps: dict[str, int]
    claim_after_s: float
    attempt_timeout_s: float
    hold_wait_s: float
    max_attempts: int
    max_deliveries: int
    retries: int
    tail_keep_s: float
    baseline_age_s: float
    start_s: float
    clock_skew_s: float
    network: Faults
    provider: ProviderFaults
    deaths: float
    pauses: float
    outages: float
    stops: float
    projection_trouble: float
    duplicates: float
    credits: float
    losses: float = 0.0
    """Not drawn: how often the server loses its last writes, as a share of the moments at which faults may begin."""

    @classmethod
    def draw(cls, random: Random) -> "Scenario":
        def some(share: float, most: float) -> float:
            """Return zero, or with the probability `share` anything up to `most`."""
            return random.uniform(0, most) if random.random() < share else 0.0

        caps = {"user": round(BOUND_NANOUSD * random.choice((1, 1.5, 2.2, 4, 40)))}
        if random.random() < 0.2:
            caps["day"] = round(BOUND_NANOUSD * random.choice((1.2, 2.5)))
        if random.random() < 0.2:
            caps["campaign"] = round(BOUND_NANOUSD * random.choice((1.2, 3)))
        noon = datetime(2026, 11, 17, 12, tzinfo=UTC).timestamp()
        midnight = datetime(2026, 12, 1, tzinfo=UTC).timestamp()
        return cls(
            users=random.randint(1, 3),
            tasks=random.randint(1, 8),
            workers=random.randint(1, 3),
            chaos_s=random.choice((10.0, 40.0, 90.0)),
            concurrency=random.randint(1, 4),
            caps=caps,
            claim_after_s=random.choice((3.0, 10.0)),
            attempt_timeout_s=random.choice((2.0, 8.0)),
            hold_wait_s=random.choice((2.0, 20.0, 120.0)),
            max_attempts=random.randint(1, 4),
            max_deliveries=random.choice((3, 20)),
            retries=random.randint(0, 2),
            tail_keep_s=random.choice((0.0, 1.0, 10.0)),
            baseline_age_s=random.choice((0.0, 3.0, 60.0)),
            start_s=midnight - random.uniform(0, 60) if random.random() < 0.15 else noon,
            clock_skew_s=random.choice((0.0, 0.0, 2.0)),
            network=Faults(
                broken=some(0.6, 0.1),
                silent=some(0.2, 0.02),
                slow=some(0.3, 0.1),
                message_lost=random.choice((0.0, 0.5, 1.0)),
                latency_s=random.choice((0.0005, 0.05)),
            ),
            provider=ProviderFaults(
                refused=some(0.4, 0.5),
                failed_free=some(0.3, 0.3),
                lost=some(0.4, 0.4),
                unreachable=some(0.2, 0.3),
                never=some(0.3, 0.3),
                late=some(0.3, 0.3),
            ),
            deaths=some(0.6, 0.1),
            pauses=some(0.4, 0.1),
            outages=some(0.3, 0.05),
            stops=some(0.3, 0.05),
            projection_trouble=some(0.4, 0.1),
            duplicates=some(0.4, 0.5),
            credits=some(0.2, 0.05),
        )


@dataclass(frozen=True)
class Variant:
    """The code under test, or a broken copy of it."""

    lua: str = field(default_factory=library_code, repr=False)
    worker: type[Worker] = Worker
    reservations: type[Reservations] = Reservations
    runner: type[CallRunner] = CallRunner
    gate: type[Gate] = Gate
    ledger: type[Ledger] = Ledger


class Projection:
    """Stands for projector and DuckDB: folds when the world tells it to, and answers reads with a delay."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._fold = Fold()
        self._touched: deque[tuple[EntryId, set[str]]] = deque()
        self.is_down = False

    def rebuild(self) -> None:
        """Start from an empty fold, as after the DuckDB file was set aside."""
        self._fold, self._touched = Fold(), deque()

    def has_gone_ahead(self) -> bool:
        """Whether an event is folded that the ledger lacks."""
        entries = self._world.server.stream(self._world.keys.ledger.encode()).entries
        return self._fold.position != (0, 0) and self._fold.position not in entries

    def fold(self, most: int) -> None:
        """Fold up to `most` further events; like a projector, refuse a ledger that lacks an event it has folded."""
        entries = self._world.server.stream(self._world.keys.ledger.encode()).entries
        if self.has_gone_ahead():
            return
        for entry_id in [each for each in entries if each > self._fold.position][:most]:
            event, payload = read_event(entries[entry_id])
            before = dict(self._fold.balances)
            self._fold.apply(entry_id, event, payload)
            moved = {name for name, now in self._fold.balances.items() if before.get(name) != now}
            self._touched.append((EntryId(*entry_id), moved))

    def trim(self, keep_s: float) -> None:
        """Move the watermark to what is folded and older than `keep_s`."""
        oldest_ms = (self._world.loop.time() - keep_s) * 1000
        if self.has_gone_ahead():
            return
        watermark, names = None, set[str]()
        while self._touched and self._touched[0][0].ms <= oldest_ms:
            watermark, touched = self._touched.popleft()
            names |= touched
        if watermark is not None:
            keys = self._world.keys
            tails = [keys.tail(name) for name in sorted(names)]
            self._world.command(
                "FCALL", function("trim"), 2 + len(tails), keys.meta, keys.ledger, *tails, LEDGER_ID, str(watermark)
            )

    async def read(self, names: Sequence[str], /) -> BaselinePage:
        """Answer a worker's request for baselines, with network delays."""
        random = self._world.random
        await asyncio.sleep(random.uniform(0.001, 0.01))
        if self.is_down:
            raise BaselineUnavailable("the projection does not answer")
        page = BaselinePage(
            {0: Position(EntryId(*self._fold.position), self._fold.events)},
            {name: self._fold.balances[name] for name in names if name in self._fold.balances},
        )
        await asyncio.sleep(random.uniform(0.001, 0.01))
        return page


def _policy(scenario: Scenario) -> Policy:
    caps = {name: usd_from_nanousd(cap) for name, cap in scenario.caps.items()}
    return default_policy(
        {
            "plans": {plan: {"cap_usd": caps["user"]} for plan in default_policy().plans},
            "tasks": {"generate_draft": ROUTE},
            "budgets": [
                {"name": name, "by": [attribute], "window": window, "cap_usd": caps[name]}
                for name, (attribute, window) in _BUDGETS.items()
                if name in caps
            ],
            "prices": {LARGE: {"prompt": 3, "completion": 15}, SMALL: {"prompt": 1, "completion": 5}},
        }
    )


class World:
    """Everything of one run; `changes` replace parts of the drawn scenario."""

    def __init__(self, seed: int, variant: Variant | None = None, **changes: Any) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.scenario = replace(Scenario.draw(self.random), **changes)
        self.variant = variant or Variant()
        self.loop = VirtualLoop(self.random, start_s=self.scenario.start_s)
        self.keys = Keys("tollbook", 0)
        self.server = RedisServer(self.loop.time, self.variant.lua)
        self.checker = Checker(
            self.server,
            self.loop.time,
            ledger=self.keys.ledger,
            prefix=self.keys.prefix,
            caps=self.scenario.caps,
            claim_after_s=self.scenario.claim_after_s,
            max_attempts=self.scenario.max_attempts,
        )
        self.network = Network(self.loop, self.server, self.random, self.scenario.network)
        self.network.watch = self.checker.on_command
        self.network.on_trouble = self.note_trouble
        self.provider = Provider(
            self.loop, self.random, self.scenario.provider, timeout_s=self.scenario.attempt_timeout_s
        )
        self.provider.on_request = self._on_request
        self.projection = Projection(self)
        self.workers: list[Process] = []
        self.stops: dict[Process, asyncio.Event] = {}
        self.task_ids: list[str] = []
        self.gates: dict[Process, Gate] = {}
        self._newest: tuple[Backup, Snapshot] | None = None
        self._observer = Process("observer")
        self._is_troubled = True

    # --- Running ---

    def run(self) -> None:
        """Run to the end. Errors: Broken; Stuck."""
        _crashes.clear()
        try:
            self.loop.run(self._run_phases(), until_s=self.scenario.start_s + _LONGEST_S)
            self._raise_crashes()
            self.checker.check_end(task_ids=self.task_ids, book=self.provider.book)
        except Broken:
            raise
        except BaseException:
            self._raise_crashes()
            raise
        finally:
            self.loop.end()

    def _raise_crashes(self) -> None:
        if _crashes:
            raise Broken(f"a worker's code crashed: {_crashes[0]}")

    async def _run_phases(self) -> None:
        scenario, loop = self.scenario, self.loop
        self.command("FCALL", function("create"), 2, self.keys.meta, self.keys.ledger, LEDGER_ID, 1)
        for _ in range(scenario.workers):
            self.start_worker()
        publishing = loop.spawn(self._observer, self._publish())
        folding = loop.spawn(self._observer, self._project())
        await self._make_trouble()
        await publishing
        self._heal()
        await self._rest()
        # A command that was sent long ago may still be executed, and may make new work.
        await asyncio.sleep(_REST_S)
        await self._rest()
        folding.cancel()

    async def _rest(self) -> None:
        while not self._is_at_rest() and not _crashes:  # noqa: ASYNC110 - there is no signal; and time is virtual.
            await asyncio.sleep(5.0)

    def command(self, *command: Any) -> Any:
        """Run a command that belongs to no worker."""
        return self.network.execute(self._observer, command, is_answered=False)

    def note_trouble(self, process: Process, lasts_s: float = 0.0) -> None:
        until_s = self.loop.time() + lasts_s
        self.checker.trouble_s[process] = max(until_s, self.checker.trouble_s.get(process, 0.0))

    def _on_request(self, request: Any) -> None:
        try:
            self.checker.on_request(request)
        except Broken as exc:
            self.loop.problems.append(exc)
            raise

    def _is_at_rest(self) -> bool:
        stream = self.server.stream(STREAM.encode())
        group = stream.groups.get(GROUP.encode())
        if group is None or group.pending or stream.last > group.last:
            return False
        has_holds = any(not hold.is_settled for hold in self.checker.fold.holds.values())
        return not has_holds and not self.provider.under_way

    # --- Publishing and folding ---

    async def _publish(self) -> None:
        random, scenario = self.random, self.scenario
        for number in range(scenario.tasks):
            if random.random() < 0.5:
                await asyncio.sleep(random.uniform(0.0, 10.0))
            while self._newest is not None:  # noqa: ASYNC110 - a task published now would be lost with the ledger.
                await asyncio.sleep(1.0)
            task_id = f"t{number}"
            self.task_ids.append(task_id)
            fields = {
                "task": "generate_draft",
                "task_id": task_id,
                "user_id": f"u{random.randrange(scenario.users)}",
                "prompt": f"[{task_id}] {'x' * random.randrange(20)}",
                "reply_to": "replies",
                "campaign_id": f"c{random.randrange(2)}",
            }
            self._add(fields)
            while random.random() < scenario.duplicates:
                await asyncio.sleep(random.choice((0.0, 1.0, 20.0)))
                while self._newest is not None:  # noqa: ASYNC110
                    await asyncio.sleep(1.0)
                self._add(fields if random.random() < 0.8 else {**fields, "prompt": f"[{task_id}] something else"})

    def _add(self, fields: dict[str, str]) -> None:
        self.command("XADD", STREAM, "*", *(part for pair in fields.items() for part in pair))

    async def _project(self) -> None:
        random, scenario = self.random, self.scenario
        while True:
            await asyncio.sleep(random.uniform(0.05, 1.0))
            if self.projection.is_down:
                continue
            if not self._is_troubled or random.random() >= scenario.projection_trouble:
                self.projection.fold(10_000)
            elif random.random() < 0.1:
                self.projection.rebuild()
            else:
                self.projection.fold(random.randint(0, 3))
            if random.random() < 0.3:
                self.projection.trim(scenario.tail_keep_s)

    # --- Trouble ---

    async def _make_trouble(self) -> None:
        random, scenario, loop = self.random, self.scenario, self.loop
        end_s = loop.time() + scenario.chaos_s
        kinds = {
            self._kill_one: scenario.deaths,
            self._pause_one: scenario.pauses,
            self._cut_one: scenario.outages,
            self._stop_one: scenario.stops,
            self._take_projection_down: scenario.projection_trouble,
            self._grant_credit: scenario.credits,
        }
        if scenario.losses:  # Only if asked for: one more kind would change the random draws of every seed.
            kinds[self._lose_suffix] = scenario.losses
        while loop.time() < end_s:
            await asyncio.sleep(random.uniform(0.0, 1.0))
            for act, share in kinds.items():
                if random.random() < share:
                    act()

    def _living(self) -> list[Process]:
        return [process for process in self.workers if process.is_runnable and not self.stops[process].is_set()]

    def _kill_one(self) -> None:
        if living := self._living():
            process = self.random.choice(living)
            self.checker.say(f"kill {process.name}")
            self.loop.kill(process)
            self.loop.world_later(self.random.uniform(0.0, 15.0), self.start_worker)

    def _pause_one(self) -> None:
        if living := self._living():
            process, seconds = self.random.choice(living), self.random.choice((0.1, 5.0, 30.0, 200.0))
            self.checker.say(f"pause {process.name} for {seconds}")
            self.note_trouble(process)
            self.loop.pause(process)
            self.loop.world_later(seconds, self._resume, process)

    def _resume(self, process: Process) -> None:
        self.checker.say(f"resume {process.name}")
        self.note_trouble(process)
        self.loop.resume(process)

    def _cut_one(self) -> None:
        if living := self._living():
            process, seconds = self.random.choice(living), self.random.choice((0.5, 5.0, 30.0))
            self.checker.say(f"cut {process.name} off for {seconds}")
            self.network.cut(process, seconds)

    def _stop_one(self) -> None:
        if living := self._living():
            process = self.random.choice(living)
            self.checker.say(f"stop {process.name}")
            self.note_trouble(process)
            self.checker.stopped.add(process)
            self.stops[process].set()
            self.loop.world_later(self.random.uniform(0.0, 15.0), self.start_worker)

    def _take_projection_down(self) -> None:
        if not self.projection.is_down:
            self.projection.is_down = True
            self.loop.world_later(self.random.uniform(0.0, 10.0), setattr, self.projection, "is_down", False)

    def _grant_credit(self) -> None:
        if self._newest is not None:
            return
        user_id, now = f"u{self.random.randrange(self.scenario.users)}", datetime.fromtimestamp(self.loop.time(), UTC)
        period, keys = f"{now:%Y-%m}", self.keys
        command_id = f"credit-{len(self.checker.log)}"
        touched = (keys.meta, keys.ledger, keys.account(user_id), keys.call(command_id))
        touched += (keys.tail(f"user:{user_id}:{period}"),)
        amount = self.random.randint(1, BOUND_NANOUSD)
        self.command(
            *("FCALL", function("assign"), 5, *touched, LEDGER_ID, command_id, user_id, period, "hash"),
            *("credit-granted", "", amount, 1000, '{"author":"a","reason":"r"}'),
        )

    def _lose_suffix(self) -> None:
        """Make a backup and restore it a little later: writes in between are lost."""
        if self._newest is None:
            backup, snapshot = self.server.backup(), self.checker.snapshot()
            self.loop.world_later(self.random.choice((0.01, 0.5, 5.0)), self._go_back, backup, snapshot)

    def _go_back(self, backup: Backup, snapshot: Snapshot) -> None:
        if self._newest is not None or not self._is_troubled or snapshot.fold.position == self.checker.fold.position:
            return
        self._newest = self.server.backup(), self.checker.snapshot()
        self.checker.say(f"the server goes back to {snapshot.fold.position}")
        self._put_back(backup, snapshot, newest=self._newest[1].fold)
        self.loop.world_later(self.random.uniform(1.0, 40.0), self._bring_back)

    def _bring_back(self) -> None:
        """Restore the newer data, as a person would, and end the processes that have written on the older."""
        if self._newest is None:
            return
        (backup, snapshot), self._newest = self._newest, None
        self.checker.say("the newer data is back")
        self._put_back(backup, snapshot, newest=None)
        if self.projection.has_gone_ahead():
            self.projection.rebuild()
        entries = self.server.stream(self.keys.ledger.encode()).entries
        seen = {process: (gate.seen.ms, gate.seen.seq) for process, gate in self.gates.items()}
        ended = [process for process, newest in seen.items() if newest != (0, 0) and newest not in entries]
        self.checker.forget(ended)
        for process in ended:
            if not process.is_dead:
                self.checker.say(f"end {process.name}")
                self.loop.kill(process)
                self.loop.world_later(1.0, self.start_worker)

    def _put_back(self, backup: Backup, snapshot: Snapshot, *, newest: Fold | None) -> None:
        known = {process: (gate.seen.ms, gate.seen.seq) for process, gate in self.gates.items()}
        self.server.put_back(backup, is_another_server=self.random.random() < 0.5)
        self.checker.restore(snapshot, newest=newest, known=known)
        self.network.replace_server(self.workers, self.random.uniform(0.01, 2.0))

    def _heal(self) -> None:
        """End all faults. Paused processes resume or are killed for good, and one new worker is started."""
        self.checker.say("heal")
        self._is_troubled = False
        self._bring_back()
        self.network.faults.broken = self.network.faults.silent = self.network.faults.slow = 0.0
        self.projection.is_down = False
        for process in self.workers:
            self.network.down_until_s.pop(process, None)
            if process.is_paused:
                self.note_trouble(process)
                if self.random.random() < 0.5:
                    self._resume(process)
                elif self.random.random() < 0.5:
                    self.loop.kill(process)
        self.start_worker()

    # --- A worker ---

    def start_worker(self) -> None:
        process = Process(f"w{len(self.workers)}")
        self.workers.append(process)
        self.checker.processes[process.name] = process
        self.note_trouble(process)
        self.stops[process] = asyncio.Event()
        work = self.loop.spawn(process, self._work(process, self.stops[process]))
        work.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (problem := task.exception()) is not None and not self.loop.is_ending:
            self.loop.problems.append(problem)

    async def _work(self, process: Process, stop: asyncio.Event) -> None:
        """Do what `serve_worker` does, with the simulation's reader instead of FastStream."""
        async with self._open_worker(process) as (worker, sweeper):
            claims = worker.claims
            await _persist(claims.heartbeat)
            await _persist(claims.ensure_groups)
            background = [
                asyncio.create_task(claims.run(worker.take_claimed, worker.overtaken_calls.watch)),
                asyncio.create_task(sweeper.run()),
                asyncio.create_task(self._read(process, worker)),
            ]
            for task in background:
                task.add_done_callback(self._on_end)
            await stop.wait()
            background[-1].cancel()
            await worker.drain(self.random.choice((0.0, 1.0, 10.0)))
            worker.overtaken_calls.close()
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await _persist(claims.resign)
        self.checker.say(f"{process.name} has ended")
        self.checker.ended.add(process)

    @asynccontextmanager
    async def _open_worker(self, process: Process) -> AsyncIterator[tuple[Worker, Sweeper]]:
        scenario, random, redis = self.scenario, self.random, self.network.client().typed()
        skew_ms = round(1000 * random.uniform(-scenario.clock_skew_s, scenario.clock_skew_s))

        def now_ms() -> int:
            return int(self.loop.time() * 1000) + skew_ms

        pipeline = CommandPipeline(redis, timeout_s=scenario.claim_after_s / 3)
        # A process that opens a ledger learns its newest event. Without losses, nothing depends on it.
        seen = EntryId(*self.server.stream(self.keys.ledger.encode()).last) if scenario.losses else ZERO_ENTRY
        gate = self.variant.gate(
            pipeline,
            self.keys,
            LEDGER_ID,
            idempotency_ttl_s=90_000,
            result_ttl_s=90_000,
            seen=seen,
            process=process.name,
        )
        self.gates[process] = gate
        baselines = Baselines(self.projection.read, 0, monotonic=self.loop.time, max_age_s=scenario.baseline_age_s)
        ledger = self.variant.ledger(
            redis, (gate,), (baselines,), patience=Patience(settle_s=math.inf), jitter=random.random
        )
        queue = BudgetWaitQueue(redis, [self.keys.waiters], retry_every_s=3.0)
        queue.start()
        provider = ProviderClient(
            attempt_timeout_s=scenario.attempt_timeout_s,
            connect_timeout_s=1.0,
            transport=self.provider.transport(),
            monotonic=self.loop.time,
            now_s=self.loop.time,
        )
        retry = RetryPolicy(
            retries=scenario.retries, backoff_base_s=0.5, backoff_max_s=2.0, retry_after_max_s=3.0, random=random.random
        )
        results = Results(redis, pipeline, namespace="tollbook", partitions=1, ttl_s=90_000, id_ttl_s=90_000)
        policies = CurrentPolicy.fixed(PolicyInForce(policy=_policy(scenario)))
        reservations = self.variant.reservations(
            ledger=ledger,
            results=results,
            policies=policies,
            queue=queue,
            max_call_s=retry.max_call_s(scenario.attempt_timeout_s),
            now_ms=now_ms,
        )
        runner = self.variant.runner(
            ledger=ledger,
            results=results,
            providers=ProviderClients(provider),
            policies=policies,
            retry=retry,
            now_ms=now_ms,
        )
        claims = Claims(
            pipeline,
            namespace="tollbook",
            consumer=process.name,
            streams=[STREAM],
            claim_after_s=scenario.claim_after_s,
        )
        waiting = WaitLimits(hold_wait_s=scenario.hold_wait_s, max_attempts=scenario.max_attempts, max_parked=20_000)
        worker = self.variant.worker(
            name=process.name,
            reservations=reservations,
            runner=runner,
            policies=policies,
            user_ids=UserIds(policies, pipeline, Keys("tollbook", 0), b"key of the ledger"),
            replies=ReplyStreams(pipeline, namespace="tollbook", task_streams=lambda: [STREAM]),
            open_deltas=lambda task_id, _: DeltaStream(pipeline, self.keys.deltas(task_id)),
            results=results,
            claims=claims,
            dead_letters=DeadLetters(pipeline, "tollbook", now_ms=now_ms),
            limits=WorkerLimits(
                concurrency={STREAM: scenario.concurrency}, waiting=waiting, max_deliveries=scenario.max_deliveries
            ),
            now_ms=now_ms,
        )
        yield worker, Sweeper(ledger, ledger.gates, is_alive=claims.is_alive)
        await queue.aclose()
        await provider.aclose()
        await pipeline.aclose()

    async def _read(self, process: Process, worker: Worker) -> None:
        """Read new entries, as many as there are slots for."""
        connection = Connection(self.network)
        read = ("XREADGROUP", "GROUP", GROUP, process.name, "COUNT", str(_READ_COUNT), "STREAMS", STREAM, ">")
        command = pack_command(read)
        while True:
            try:
                async with asyncio.timeout(30):
                    await connection.send_packed_command([command])
                    reply = await connection.read_response()
            except (OSError, TimeoutError, Exception) as exc:
                if isinstance(exc, AssertionError):
                    raise
                await connection.disconnect()
                await asyncio.sleep(1.0)
                continue
            if reply is None:
                await asyncio.sleep(1.0)
                continue
            await worker.take(
                [
                    Delivery(STREAM, entry_id.decode(), {flat[i]: flat[i + 1] for i in range(0, len(flat), 2)})
                    for entry_id, flat in reply[0][1]
                ]
            )


async def _persist(step: Any) -> None:
    while True:
        try:
            return await step()
        except LedgerUnavailable:
            await asyncio.sleep(0.5)


def simulate(seed: int, variant: Variant | None = None, **changes: Any) -> World:
    """Run one seed, with `changes` to its scenario. Errors: what the checks found, with the seed as a note."""
    world = World(seed, variant, **changes)
    try:
        world.run()
    except Exception as exc:
        exc.add_note(f"seed {seed}; its last events:\n" + "\n".join(world.checker.log[-60:]))
        raise
    return world
