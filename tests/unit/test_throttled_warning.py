"""What lasts is warned of once a minute, however many tasks it holds back."""

from structlog.testing import capture_logs

from tollbook.consumers.throttled_warning import ThrottledWarning
from tollbook.ledger.errors import BaselineUnavailable, LedgerUnavailable

MINUTE = 60_000


def test_each_kind_of_problem_is_warned_of_at_once_and_then_once_a_minute() -> None:
    now = [5]
    held_back = ThrottledWarning("tasks.held_back", lambda: now[0])
    with capture_logs() as logs:
        for at in (5, 6, MINUTE + 4, MINUTE + 5, MINUTE + 6):
            now[0] = at
            for number in range(100):
                held_back.warn(BaselineUnavailable(f"no projector, {number}"))
        held_back.warn(BaselineUnavailable("the projector is slow"))
        held_back.warn(LedgerUnavailable("no Redis"))
    assert [(line["event"], line["kind"], line["times"], line["problem"]) for line in logs] == [
        ("tasks.held_back", "BaselineUnavailable", 1, "no projector, 0"),
        ("tasks.held_back", "BaselineUnavailable", 99 + 100 + 100 + 1, "no projector, 0"),
        ("tasks.held_back", "BaselineUnavailable", 1, "the projector is slow"),
        ("tasks.held_back", "LedgerUnavailable", 1, "no Redis"),
    ]


def test_kinds_without_end_are_forgotten() -> None:
    held_back = ThrottledWarning("tasks.held_back", lambda: 0)
    with capture_logs() as logs:
        for number in range(250):
            held_back.warn(LedgerUnavailable("x" * number))
        held_back.warn(LedgerUnavailable("x" * 249))
    assert len(logs) == 250
