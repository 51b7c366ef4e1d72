"""The simulation behind the page on capacity, where the answer is known beforehand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.capacity import SPREAD, Plant, Simulation, growth, plan
from benchmarks.footprint import Footprint
from tests.quick import first_quick

MEASURED = Footprint(**json.loads((Path(__file__).parents[2] / "benchmarks" / "footprint.json").read_text()))
ROUND = replace(MEASURED, worker_us=1_000.0, server_us=300.0, sync_us=0.0)
CALLS = 6_000


def test_one_server_does_as_many_calls_as_its_time_allows() -> None:
    outcome = Simulation(Plant(partitions=1, workers=20, in_flight=20, provider_s=0.01), ROUND).run(CALLS)
    assert outcome.calls_s == pytest.approx(1e6 / 300, rel=0.02)
    assert outcome.server_share == pytest.approx(1, abs=0.05)


def test_workers_without_a_core_to_spare_do_as_many_calls_as_their_time_allows() -> None:
    outcome = Simulation(Plant(partitions=4, workers=2, in_flight=50, provider_s=0.01), ROUND).run(CALLS)
    assert outcome.calls_s == pytest.approx(2 * 1e6 / 1_000, rel=0.02)
    assert outcome.worker_share == pytest.approx(1, abs=0.05)


def test_with_room_everywhere_the_provider_sets_the_pace_and_a_call_waits_for_its_own_work_alone() -> None:
    outcome = Simulation(Plant(partitions=4, workers=10, in_flight=10, provider_s=1.0), ROUND).run(CALLS)
    assert outcome.calls_s == pytest.approx(100, rel=0.05)
    assert outcome.wait_s == pytest.approx(0.0015, rel=2)


def test_a_sync_is_shared_by_what_has_come_meanwhile() -> None:
    synced = replace(ROUND, sync_us=2_000.0)
    outcome = Simulation(Plant(partitions=1, workers=20, in_flight=20, provider_s=0.01), synced).run(CALLS)
    assert outcome.calls_s > 0.9 * 1e6 / 300


@pytest.mark.slow
def test_three_partitions_do_nearly_three_times_as_much_with_the_costs_that_were_measured() -> None:
    of_one, of_three = (Simulation(plant, MEASURED).run(60_000).calls_s for plant in SPREAD)
    assert of_three / of_one >= 2.7


@pytest.mark.parametrize("calls_s", first_quick(1, [1_000, 10_000]))
def test_a_planned_system_does_what_it_is_planned_for_and_has_room(calls_s: int) -> None:
    plant = plan(MEASURED, calls_s)
    outcome = Simulation(plant, MEASURED).run(10 * plant.workers * plant.in_flight)
    assert outcome.calls_s >= calls_s
    assert max(outcome.server_share, outcome.worker_share) < 0.97


def test_growth_is_in_proportion_to_the_rate() -> None:
    of_one, of_ten = growth(MEASURED, 1_000), growth(MEASURED, 10_000)
    assert of_ten == {name: pytest.approx(10 * value) for name, value in of_one.items()}
