"""What credits have left by their events, as `verify` recomputes it; the gate's own way is in the stateful tests."""

import pytest

from tollbook.audit.verification.credit_lots import CreditChanged, changed_lots

BUDGET = "prepaid:acme:total"


def changed(
    kind: str, credit: str, change: int, *, expires_ms: int = 0, settled: int = 0, held: int = 0
) -> CreditChanged:
    return CreditChanged(BUDGET, f"credit-{kind}", credit, change, expires_ms, 0, settled, held)


GRANTS = [changed("granted", "never", 100), changed("granted", "soon", 50, expires_ms=9)]


def test_the_credit_that_expires_first_is_used_first_and_its_rest_is_taken_back() -> None:
    events = [*GRANTS, changed("expired", "soon", -20, expires_ms=9, settled=30)]
    assert changed_lots({BUDGET: "30\nsoon 30 0 9\nnever 100 100 0"}, events) != []
    assert changed_lots({BUDGET: "30\nnever 100 100 0"}, events) == []


def test_an_expiry_leaves_what_open_holds_may_need() -> None:
    events = [*GRANTS, changed("expired", "soon", -5, expires_ms=9, settled=30, held=15)]
    assert changed_lots({BUDGET: "30\nsoon 45 15 9\nnever 100 100 0"}, events) == []


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (changed("expired", "soon", -50, settled=30), "credit-expired of credit soon changes it by -$0.00000005, "),
        (changed("revoked", "soon", -60), "credit-revoked of credit soon changes it by -$0.00000006, "),
        (changed("expired", "unknown", -1), "credit-expired of credit unknown changes it by -$0.000000001, "),
    ],
)
def test_an_event_that_takes_more_than_is_left_is_found(event: CreditChanged, problem: str) -> None:
    found = changed_lots({}, [*GRANTS, event])
    assert problem in found[0]


def test_a_correction_gives_back_in_the_opposite_order() -> None:
    events = [*GRANTS, changed("granted", "more", 10, settled=80), changed("granted", "last", 1, settled=40)]
    assert changed_lots({BUDGET: "40\nsoon 50 10 9\nnever 100 100 0\nmore 10 10 0\nlast 1 1 0"}, events) == []
