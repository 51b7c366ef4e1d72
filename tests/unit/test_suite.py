"""The quick tests cover every guarantee; the long ones are marked, and CI runs them too."""

import ast
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
# For each guarantee, some of the tests that fail when it breaks and that `python3 dev.py test` runs.
# They show that no guarantee is left to the long tests alone.
GUARANTEES: Final = {
    "G1": (
        "tests/contract/test_gate.py::test_a_burst_from_many_workers_stays_within_the_cap",
        "tests/stateful/test_gate_machine.py::test_every_answer_equals_the_models_in_a_few_runs",
    ),
    "G2": (
        "tests/integration/test_ledger.py::test_a_settlement_whose_answer_was_lost_is_not_made_twice",
        "tests/integration/test_sweeper.py::test_any_number_of_sweepers_settle_a_hold_once",
    ),
    "G3": (
        "tests/integration/test_sweeper.py::test_an_overdue_hold_is_charged_in_full_and_marked",
        "tests/integration/test_worker.py::test_a_killed_workers_tasks_are_taken_over_and_its_calls_are_charged",
    ),
    "G4": (
        "tests/contract/test_gate.py::test_one_call_sent_by_many_workers_at_once_is_one_hold",
        "tests/integration/test_claims.py::test_a_claim_that_others_took_is_not_taken_back",
    ),
    "G5": (
        "tests/e2e/test_rebuild.py::test_a_deleted_projection_is_rebuilt_row_for_row",
        "tests/archive/test_rebuilding.py::test_a_rebuild_equals_the_live_fold_wherever_batches_end",
    ),
    "G6": (
        "tests/contract/test_gate.py::test_a_baseline_at_any_position_gives_the_same_balance",
        "tests/integration/test_ledger.py::test_a_stale_baseline_is_read_again",
    ),
    "G7": (
        "tests/archive/test_sealing.py::test_what_is_not_folded_is_neither_sealed_nor_trimmed",
        "tests/archive/test_sealing.py::test_a_damaged_segment_is_never_trimmed",
    ),
    "G8": (
        "tests/contract/test_gate.py::test_a_stream_without_its_identity_is_refused",
        "tests/integration/test_ledger.py::test_without_a_projection_no_new_hold_is_made",
    ),
    "G9": (
        "tests/integration/test_client.py::test_call_waits_for_the_money_that_other_calls_give_back",
        "tests/integration/test_wait_queue.py::test_a_settlement_wakes_the_first_waiting_call",
    ),
    "G10": (
        "tests/unit/test_golden_events.py::test_events_have_no_field_for_what_is_private",
        "tests/integration/test_provider.py::test_secrets_are_in_no_repr_no_error_and_no_log_line",
    ),
    "G11": (
        "tests/integration/test_policies.py::test_two_processes_of_different_policies_never_hold_by_two_caps",
        "tests/integration/test_policies.py::test_a_process_learns_of_a_change_with_its_next_reservation",
    ),
}


def run_while_working(path: str) -> set[str]:
    """Return the tests of a file that `python3 dev.py test` does not leave out."""
    module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    if any(isinstance(node, ast.Assign) and is_long(node.value) for node in module.body):
        return set()
    return {
        f"{path}::{node.name}"
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any(map(is_long, node.decorator_list))
    }


def is_long(mark: ast.expr) -> bool:
    return ast.unparse(mark).startswith(("pytest.mark.slow", "pytest.mark.soak"))


def test_every_guarantee_has_a_quick_test() -> None:
    files = {test.partition("::")[0] for tests in GUARANTEES.values() for test in tests}
    found = set().union(*map(run_while_working, files))

    assert list(GUARANTEES) == [f"G{number}" for number in range(1, 12)]
    assert {name: set(tests) - found for name, tests in GUARANTEES.items()} == {name: set() for name in GUARANTEES}


def test_ci_runs_the_quick_tests_and_then_the_others() -> None:
    recipes = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    line = next(line for line in recipes.splitlines() if line.startswith("for recipe in "))

    assert line.endswith(' test "test --slow"; do')
    assert "python3 dev.py test " in (ROOT / "README.md").read_text(encoding="utf-8")
