"""python -m benchmarks.capacity [--footprint FILE] [--calls N]: the capacity of a system of many machines.

Measures the cost of a call (benchmarks/footprint.py), or reads it from a file, and simulates systems that do not fit on
one machine with these costs: workers with one core each, one server per partition, a provider with a fixed delay.
"""

import argparse
import dataclasses
import heapq
import json
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.footprint import Footprint, measure

# A call goes to its partition's server for its task, to reserve, and to settle.
_VISITS: Final = 3
_WARM_UP: Final = 0.25
_DAY_S: Final = 86_400
_RATES: Final = (1_000, 10_000, 100_000)
# Maximum utilisation: servers and workers that are busier leave no room for a burst.
_FULL: Final = 0.7
_PROVIDER_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Plant:
    """A system: partitions with a server each, workers with a core each, and the provider's latency."""

    partitions: int
    workers: int
    in_flight: int = 64
    provider_s: float = _PROVIDER_S


@dataclass(frozen=True, slots=True)
class Outcome:
    """Calls per second, utilisation of servers and workers (0 to 1), and the time of a call without the provider."""

    calls_s: float
    server_share: float
    worker_share: float
    wait_s: float


@dataclass(slots=True)
class _Server:
    """One partition's server: it executes all waiting commands, syncs once, and answers."""

    waiting: list[Callable[[float], None]] = field(default_factory=list[Callable[[float], None]])
    is_busy: bool = False
    busy_s: float = 0.0


@dataclass(slots=True)
class _Worker:
    """One worker's core: one step after the other."""

    waiting: deque[Callable[[float], None]] = field(default_factory=deque[Callable[[float], None]])
    is_busy: bool = False
    busy_s: float = 0.0


SPREAD: Final = tuple(Plant(partitions=n, workers=40, in_flight=100, provider_s=0.05) for n in (1, 3))
"""More calls than servers can do, over one partition and over three."""


class Simulation:
    """A simulation: as many concurrent calls as the workers allow; the end of a call starts the next."""

    def __init__(self, plant: Plant, footprint: Footprint) -> None:
        self._plant = plant
        self._visit_s = footprint.server_us / _VISITS / 1e6
        self._sync_s = footprint.sync_us / 1e6
        # A worker works between a call's visits to the server: after its task, after the hold, and after the answer.
        self._work_s = footprint.worker_us / _VISITS / 1e6
        self._servers = [_Server() for _ in range(plant.partitions)]
        self._workers = [_Worker() for _ in range(plant.workers)]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._begun = 0
        self._done: list[tuple[float, float]] = []

    def run(self, calls: int) -> Outcome:
        """Simulate `calls` calls. The first quarter fills the system and is not counted."""
        for worker in self._workers:
            for _ in range(self._plant.in_flight):
                self._begin(worker, 0.0)
        now = 0.0
        while len(self._done) < calls:
            now, _, event = heapq.heappop(self._events)
            event(now)
        first = int(calls * _WARM_UP)
        ended = [at for _, at in self._done[first:]]
        waited = [at - begun - self._plant.provider_s for begun, at in self._done[first:]]
        return Outcome(
            calls_s=(len(ended) - 1) / (ended[-1] - ended[0]),
            server_share=sum(server.busy_s for server in self._servers) / now / len(self._servers),
            worker_share=sum(worker.busy_s for worker in self._workers) / now / len(self._workers),
            wait_s=sum(waited) / len(waited),
        )

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, event))

    def _begin(self, worker: _Worker, now: float) -> None:
        server = self._servers[self._begun % len(self._servers)]
        self._begun += 1

        def ends(at: float) -> None:
            self._done.append((now, at))
            self._begin(worker, at)

        def settles(at: float) -> None:
            self._work(worker, at, lambda then: self._visit(server, then, ends))

        def asks(at: float) -> None:
            self._work(worker, at, lambda then: self._at(then + self._plant.provider_s, settles))

        def reserves(at: float) -> None:
            self._work(worker, at, lambda then: self._visit(server, then, asks))

        self._visit(server, now, reserves)

    def _visit(self, server: _Server, now: float, then: Callable[[float], None]) -> None:
        server.waiting.append(then)
        if not server.is_busy:
            self._serve(server, now)

    def _serve(self, server: _Server, now: float) -> None:
        batch, server.waiting = server.waiting, []
        server.is_busy = bool(batch)
        if not batch:
            return
        took_s = self._visit_s * len(batch) + self._sync_s
        server.busy_s += took_s

        def answers(at: float) -> None:
            for then in batch:
                then(at)
            self._serve(server, at)

        self._at(now + took_s, answers)

    def _work(self, worker: _Worker, now: float, then: Callable[[float], None]) -> None:
        worker.waiting.append(then)
        if not worker.is_busy:
            self._work_on(worker, now)

    def _work_on(self, worker: _Worker, now: float) -> None:
        worker.is_busy = bool(worker.waiting)
        if not worker.is_busy:
            return
        then = worker.waiting.popleft()
        worker.busy_s += self._work_s

        def done(at: float) -> None:
            then(at)
            self._work_on(worker, at)

        self._at(now + self._work_s, done)


def plan(footprint: Footprint, calls_s: int) -> Plant:
    """Return a system for `calls_s` calls per second that leaves room for a burst.

    A worker has enough concurrent calls that it does not wait for the provider.
    """
    workers = -(-calls_s * footprint.worker_us // (1e6 * _FULL))
    partitions = -(-calls_s * footprint.server_us // (1e6 * _FULL))
    # Most concurrent calls are at the provider; half as many again wait for workers and servers.
    in_flight = -(-calls_s * 1.5 * _PROVIDER_S // workers)
    return Plant(partitions=max(1, int(partitions)), workers=max(1, int(workers)), in_flight=max(1, int(in_flight)))


def growth(footprint: Footprint, calls_s: int) -> dict[str, float]:
    """Return what `calls_s` calls per second need: cores, network in megabytes per second, gigabytes per day."""
    a_day = calls_s * _DAY_S / 1e9
    return {
        "worker cores": calls_s * footprint.worker_us / 1e6,
        "server cores": calls_s * footprint.server_us / 1e6,
        "projector cores": calls_s * footprint.projector_us / 1e6,
        "MB/s to servers": calls_s * footprint.received_bytes / 1e6,
        "MB/s from servers": calls_s * footprint.sent_bytes / 1e6,
        "GB of memory a day kept": a_day * footprint.memory_bytes,
        "GB of log a day": a_day * footprint.log_bytes,
        "GB of DuckDB a day": a_day * footprint.duckdb_bytes,
        "GB of archive a day": a_day * footprint.archive_bytes,
    }


def report(footprint: Footprint, calls: int) -> str:
    """Return the plan as Markdown: the footprint, the needs of each rate, and simulations of systems of that size."""
    lines = ["| of one call | |", "|---|---|"]
    lines += [f"| {name} | {value:,.0f} |" for name, value in dataclasses.asdict(footprint).items()]
    grown = {rate: growth(footprint, rate) for rate in _RATES}
    lines += ["", f"| calls a second | {' | '.join(f'{rate:,}' for rate in _RATES)} |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{grown[rate][name]:,.1f}' for rate in _RATES)} |" for name in grown[_RATES[0]]]
    lines += ["", "| system | calls/s | servers busy | workers busy | a call waits |", "|---|---|---|---|---|"]
    plants = [plan(footprint, rate) for rate in _RATES]
    for plant in (*plants, *SPREAD):
        told = Simulation(plant, footprint).run(max(calls, 10 * plant.workers * plant.in_flight))
        lines.append(
            f"| {plant.partitions} partitions, {plant.workers} workers with {plant.in_flight} calls each "
            f"| {told.calls_s:,.0f} | {told.server_share:.0%} | {told.worker_share:.0%} | {1000 * told.wait_s:.1f} ms |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--footprint", type=Path, help="costs of a call, written by an earlier run")
    parser.add_argument("--write", type=Path, help="where to write the measured costs")
    parser.add_argument("--calls", type=int, default=4_000, help="calls to measure, and at least to simulate")
    options = parser.parse_args()
    if options.footprint is not None:
        footprint = Footprint(**json.loads(options.footprint.read_text()))
    else:
        with tempfile.TemporaryDirectory(prefix="tollbook-bench-") as folder:
            footprint = uvloop.run(measure(Path(folder, "footprint"), options.calls))
    if options.write is not None:
        options.write.write_text(json.dumps(dataclasses.asdict(footprint), indent=2) + "\n")
    print(report(footprint, options.calls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
