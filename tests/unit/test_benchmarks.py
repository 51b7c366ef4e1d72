"""The benchmarks run, and judge as documented. The suite does not check what they measure."""

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest

from benchmarks.load import EVENTS_A_CALL, typical_entries
from benchmarks.measure import Target, compare, in_turn
from tollbook.schemas.upcasters import event_from_entry


@dataclass(frozen=True)
class Measured:
    """One run of the command, and what it wrote."""

    run: subprocess.CompletedProcess[str]
    results: list[dict[str, Any]]


NAMES = (
    "gate",
    "gate_checks",
    "calls",
    "gateway",
    "projection",
    "budget_check",
    "heavy_query",
    "spend_report",
    "replay",
    "verify",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """All of them, in one process: most of what each needs is the start of an interpreter."""
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--json", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert path.exists(), run.stderr
    return Measured(run, json.loads(path.read_text(encoding="utf-8"))["results"])


# The first one waits for all of them; longer on a machine with much else to do.
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_exit_code_says_whether_the_targets_are_met(measured: Measured) -> None:
    targets = [result["is_met"] for result in measured.results if result["is_met"] is not None]
    assert measured.run.returncode == (0 if all(targets) else 1), measured.run.stderr
    assert tuple(dict.fromkeys(result["benchmark"] for result in measured.results)) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_prints_a_table_and_writes_its_results(name: str, measured: Measured) -> None:
    results = [result for result in measured.results if result["benchmark"] == name]
    assert any(result["is_met"] is not None for result in results), "it has no target"
    # A difference of two short measurements can be on either side of zero.
    differences = ("added to", "memory of a stream")
    figures = [
        (result["subject"], result["reference"]) for result in results if not result["what"].startswith(differences)
    ]
    assert figures
    assert all(subject > 0 and (reference is None or reference > 0) for subject, reference in figures)
    assert name in measured.run.stdout


@pytest.mark.parametrize(
    ("bound", "value", "subject", "reference", "is_met"),
    [
        (">=", 0.8, 80.0, 100.0, True),
        (">=", 0.8, 79.9, 100.0, False),
        ("<=", 1.3, 13.0, 10.0, True),
        ("<=", 1.3, 13.1, 10.0, False),
    ],
)
def test_a_target_is_judged_by_the_ratio_of_the_medians(bound, value, subject, reference, is_met) -> None:
    result = compare("b", "w", [subject, 1.0, 999.0], [reference, 1.0, 999.0], unit="x", target=Target(bound, value))
    assert result.is_met is is_met


@pytest.mark.parametrize(("subject", "is_met"), [(600.0, True), (599.0, False)])
def test_a_floor_is_judged_by_the_subject_itself(subject: float, is_met: bool) -> None:
    result = compare("b", "w", [subject], [1.0], unit="x", target=Target(">=", 0.5), floor=Target(">=", 600))
    assert result.is_met is is_met


async def test_sides_take_turns() -> None:
    seen: list[str] = []

    async def side(name: str) -> float:
        seen.append(name)
        return float(len(seen))

    assert await in_turn(2, lambda: side("a"), lambda: side("b")) == [[1.0, 3.0], [2.0, 4.0]]
    assert seen == ["a", "b", "a", "b"]


def test_the_load_is_readable_events_in_the_ledgers_order() -> None:
    events = []
    for entry_id, fields in islice(typical_entries(40, users=3), 40 * EVENTS_A_CALL):
        texts = [part.decode() for part in fields]
        events.append(event_from_entry(entry_id.decode(), dict(zip(texts[::2], texts[1::2], strict=True))))
    assert [event.seq for event in events] == list(range(1, 40 * EVENTS_A_CALL + 1))
    assert [event.type for event in events[:3]] == ["budget-reserved", "model-called", "cost-recorded"]
    assert all(event.payload.hold == 1 for event in events if hasattr(event.payload, "hold"))
