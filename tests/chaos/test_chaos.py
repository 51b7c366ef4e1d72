"""The chaos run in the suite, and as a long run: `python3 dev.py soak --minutes 60 --seed 7 --store cluster`.

A seed repeats the tasks, the faults and their times; how these interleave depends on the machine.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.run import run
from tests.chaos.scenario import draw
from tests.chaos.stores import BATCH, BATCHES, IN_SUITE, STORE_FAULTS
from tests.deployments import CLUSTER, ONE, SENTINEL

_TASKS_PER_S = 100
# With replicas that confirm each write: few enough that faults happen while tasks are published.
_CONFIRMED_TASKS_PER_S = 30


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_no_guarantee_breaks_while_processes_are_killed_and_stopped(request: pytest.FixtureRequest) -> None:
    """G1 to G7, and G9, of a whole system."""
    await play(seed_of(request), chaos_s=16)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_no_guarantee_breaks_with_a_falsified_store(request: pytest.FixtureRequest) -> None:
    """G1, G3, G4, G8: a promoted replica that was cut off, a changed row; the long run makes all faults."""
    await play(seed_of(request), chaos_s=6, store_faults=IN_SUITE)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("store", [CLUSTER, SENTINEL])
async def test_no_guarantee_breaks_while_primaries_are_lost(store: str, request: pytest.FixtureRequest) -> None:
    """G1 to G7, and G9, with a replica for each primary; on a cluster, partitions move as well."""
    await play(seed_of(request), chaos_s=10, store=store)


@pytest.mark.soak
async def test_no_guarantee_breaks_in_a_long_run(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run again and again with new seeds, until the time is over."""
    seed, until = seed_of(request), time.monotonic() + 60 * minutes_of(request)
    store = str(request.config.getoption("--store"))
    while time.monotonic() < until:
        # A person who waits for an hour wants to see progress.
        with capsys.disabled():
            await play(seed, chaos_s=60, store=store, store_faults=tuple(STORE_FAULTS) if store == ONE else ())
        seed += 1


def seed_of(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--seed")) or time.time_ns() % 1_000_000  # pyright: ignore[reportArgumentType]


def minutes_of(request: pytest.FixtureRequest) -> float:
    return float(request.config.getoption("--minutes"))  # pyright: ignore[reportArgumentType]


async def play(seed: int, *, chaos_s: float, store: str = ONE, store_faults: Sequence[str] = ()) -> None:
    # Not one of pytest's directories, which it removes later: after a failure, this directory is the only evidence.
    directory = Path(tempfile.mkdtemp(prefix=f"tollbook-chaos-{seed}-"))
    # Printed before anything can fail; pytest shows it if the test fails.
    print(f"\nchaos: seed {seed}, evidence in {directory}", flush=True)  # noqa: T201 - for the report of a failure.
    rate = _TASKS_PER_S if store == ONE else _CONFIRMED_TASKS_PER_S
    tasks = round(chaos_s * rate) + BATCHES * BATCH * len(store_faults)
    scenario = draw(seed, chaos_s=chaos_s, tasks=tasks, store=store)
    summary = await run(scenario, directory, store=store, store_faults=store_faults)
    print(f"chaos: seed {seed}: {json.dumps(summary)}", flush=True)  # noqa: T201 - as above.
    # A run in which no task succeeds, or no fault happens, would prove nothing.
    assert summary["statuses"]["done"] > summary["entries"] / 10
    assert summary["process_faults"] > chaos_s / 4
    assert summary["answers"][200] > summary["entries"] / 40
    shutil.rmtree(directory)
