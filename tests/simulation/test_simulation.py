"""Thousands of runs, one per seed, each with its own faults; and broken copies of the code, which must all be caught.

A failing run names its seed. `TEST_SEEDS=923 pytest tests/simulation` runs that one alone, `TEST_SEEDS=0-9999` a range.
"""

import os
from collections.abc import Iterator

import pytest
import structlog

from tests.simulation.broken_variants import BROKEN, LOSSES, BrokenVariant
from tests.simulation.checks import Broken
from tests.simulation.loop import Stuck
from tests.simulation.world import World, quiet_logs, simulate

pytestmark = pytest.mark.slow

CHUNK = 60
DEFAULT_SEEDS = range(6 * CHUNK)
MORE_SEEDS = range(6 * CHUNK, 100 * CHUNK)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    quiet_logs()
    yield
    structlog.reset_defaults()


def _chunks(seeds: range) -> list[range]:
    return [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]


def _asked_for() -> list[range]:
    asked = os.environ.get("TEST_SEEDS")
    if not asked:
        return _chunks(DEFAULT_SEEDS)
    first, _, last = asked.partition("-")
    return _chunks(range(int(first), int(last or first) + 1))


@pytest.mark.parametrize("seeds", _asked_for(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_the_guarantees_hold_under_random_faults(seeds: range) -> None:
    """G1, G2, G3, G4, G6, G9: at every event, and once all faults are over and nothing is left to do."""
    for seed in seeds:
        simulate(seed)


@pytest.mark.soak
@pytest.mark.parametrize("seeds", _chunks(MORE_SEEDS), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_the_guarantees_hold_in_many_more_runs(seeds: range) -> None:
    for seed in seeds:
        simulate(seed)


@pytest.mark.parametrize("seeds", _asked_for(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_the_guarantees_hold_if_the_server_loses_its_last_writes(seeds: range) -> None:
    """G1, G3, G4: a restored backup or a failover at any moment; later a person puts the newer data back."""
    for seed in seeds:
        simulate(seed, **LOSSES)


@pytest.mark.soak
@pytest.mark.parametrize("seeds", _chunks(MORE_SEEDS), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_the_guarantees_hold_in_many_more_losses(seeds: range) -> None:
    for seed in seeds:
        simulate(seed, **LOSSES)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_variant_is_caught(broken: BrokenVariant) -> None:
    variant = broken.variant()

    def run_until_caught() -> None:
        for seed in (broken.known_seed, *range(broken.seeds)):
            simulate(seed, variant, **broken.changes)

    with pytest.raises((Broken, Stuck), match=broken.seen_as):
        run_until_caught()


def test_a_seed_gives_the_same_run_every_time() -> None:
    logs: list[list[str]] = []
    for _ in range(2):
        world = World(5)
        world.run()
        logs.append(world.checker.log)
    assert logs[0] == logs[1]
    assert len(logs[0]) > 10


def test_the_runs_with_losses_reach_every_kind_of_event() -> None:
    signs = {"the server goes back to", "the newer data is back", "BACK", "AHEAD", "end w"}
    for seed in range(200):
        log = "\n".join(simulate(seed, **LOSSES).checker.log)
        signs -= {sign for sign in signs if sign in log}
        if not signs:
            return
    assert not signs


def test_the_runs_reach_every_kind_of_fault() -> None:
    """A fault that is drawn but never happens would prove nothing."""
    signs = {"kill ", "pause ", "cut ", "stop ", "WAIT", "STALE", "SETTLED", "taken_over", "cost-adjusted", "expired"}
    signs |= {"cancelled", "fallback-used", '"extension"', "budget-denied", "ATTEMPTS_EXHAUSTED"}
    for seed in range(200):
        log = "\n".join(simulate(seed).checker.log)
        signs -= {sign for sign in signs if sign in log}
        if not signs:
            return
    assert not signs
