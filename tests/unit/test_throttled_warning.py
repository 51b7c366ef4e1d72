"""A lasting problem is logged once a minute, however many tasks it holds back."""

from structlog.testing import capture_logs

from tollbook.consumers.throttled_warning import FloodWarning, ThrottledWarning
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


def test_the_number_of_remembered_kinds_is_bounded() -> None:
    held_back = ThrottledWarning("tasks.held_back", lambda: 0)
    with capture_logs() as logs:
        for number in range(250):
            held_back.warn(LedgerUnavailable("x" * number))
        held_back.warn(LedgerUnavailable("x" * 249))
    assert len(logs) == 250


def test_a_flood_has_a_few_lines_a_minute_and_a_number() -> None:
    now = [5]
    flood = FloodWarning("task.dead_lettered", lambda: now[0], max_lines=2)
    with capture_logs() as logs:
        for _ in range(100):
            flood.warn("invalid_task", entry_id="1-0")
        flood.warn("attempts_exhausted", entry_id="2-0")
        now[0] += MINUTE
        flood.flush()
        flood.flush()
        for _ in range(3):
            flood.warn("invalid_task", entry_id="3-0")
        flood.flush(is_last=True)
    assert [(line["event"], line["reason"], line.get("times", line.get("entry_id"))) for line in logs] == [
        ("task.dead_lettered", "invalid_task", "1-0"),
        ("task.dead_lettered", "invalid_task", "1-0"),
        ("task.dead_lettered", "attempts_exhausted", "2-0"),
        ("task.dead_lettered_more", "invalid_task", 98),
        ("task.dead_lettered", "invalid_task", "3-0"),
        ("task.dead_lettered", "invalid_task", "3-0"),
        ("task.dead_lettered_more", "invalid_task", 1),
    ]
