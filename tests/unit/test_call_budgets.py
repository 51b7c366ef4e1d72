"""Which budgets a call is held against, by the policy."""

from datetime import UTC, datetime
from typing import Any

import pytest

from tollbook.inference.budgets import BudgetPolicy, name_problems, window_problems
from tollbook.schemas.money import MAX_NANOUSD, NANOUSD_PER_USD
from tollbook.schemas.policy import default_policy

# Monday, 2026-11-30, half past ten in the evening; in Berlin it is half past eleven.
NOW_MS = round(datetime(2026, 11, 30, 22, 30, tzinfo=UTC).timestamp() * 1000)
HOUR_MS = 3_600_000
CALL = {"user": "u42", "plan": "trial", "task": "summarize", "model": "a/b", "team": "red", "region": "eu,west"}


def _policy(*budgets: dict[str, Any], **changes: Any) -> BudgetPolicy:
    definitions = changes.pop("definitions", {})
    return BudgetPolicy(
        default_policy({"budgets": [{"cap_usd": 2, **each} for each in budgets], **changes}), definitions
    )


def _names(policy: BudgetPolicy, **changes: str) -> list[str]:
    return [budget.name for budget in policy.budgets_at(NOW_MS, CALL | changes)[1]]


@pytest.mark.parametrize(
    ("by", "window", "name"),
    [
        (["team"], "week", "b:red:2026-W49"),
        ([], "day", "b:all:2026-11-30"),
        (["user"], "day", "b:u42:2026-11-30"),
        (["plan"], "month", "b:trial:2026-11"),
        (["task"], "month", "b:summarize:2026-11"),
        (["model"], "total", "b:a/b:total"),
        (["region"], "total", "b:eu,west:total"),
        (["team", "region"], "week", "b:red,eu%2Cwest:2026-W49"),
    ],
)
def test_a_budget_has_a_balance_for_each_value_of_its_attributes(by: list[str], window: str, name: str) -> None:
    assert _names(_policy({"name": "b", "by": by, "window": window})) == ["user:u42:2026-11", name]


def test_a_call_without_an_attribute_is_not_held_against_the_budget() -> None:
    policy = _policy(
        {"name": "by-campaign", "by": ["campaign"], "window": "month"},
        {"name": "both", "by": ["team", "campaign"], "window": "month"},
    )
    assert _names(policy) == ["user:u42:2026-11"]
    assert _names(policy, campaign="c1") == ["user:u42:2026-11", "by-campaign:c1:2026-11", "both:red,c1:2026-11"]


def test_single_values_have_caps_of_their_own() -> None:
    policy = _policy(
        {"name": "b", "by": ["team"], "window": "week", "caps": {"red": "0.5"}},
        {"name": "two", "by": ["team", "plan"], "window": "week", "caps": {"blue,trial": 7}},
        users={"u7": 9},
    )

    def caps(**changes: str) -> list[float]:
        return [each.cap_nanousd / NANOUSD_PER_USD for each in policy.budgets_at(NOW_MS, CALL | changes)[1]]

    assert caps() == [5, 0.5, 2]
    assert caps(team="blue", user="u7", plan="growth") == [9, 2, 2]
    assert caps(team="blue", plan="starter") == [15, 2, 2]
    assert caps(team="blue") == [5, 2, 7]


def test_the_budgets_are_valid_while_all_their_windows_are() -> None:
    policy = _policy({"name": "b", "by": [], "window": "day"}, timezone="Europe/Berlin")
    window, _ = policy.budgets_at(NOW_MS, CALL)
    assert (window.name, window.start_ms, window.end_ms) == ("2026-11", NOW_MS - 23.5 * HOUR_MS, NOW_MS + HOUR_MS / 2)
    later, budgets = policy.budgets_at(window.end_ms, CALL)
    assert (later.name, later.start_ms) == ("2026-12", window.end_ms)
    assert [each.name for each in budgets] == ["user:u42:2026-12", "b:all:2026-12-01"]
    assert policy.budgets_at(NOW_MS, CALL)[0] == window


def test_a_billing_period_begins_on_the_policys_first_day() -> None:
    policy = _policy(month_starts_on=15)
    assert _names(policy) == ["user:u42:2026-11"]
    window, _ = policy.budgets_at(NOW_MS, CALL)
    assert window.end_ms == round(datetime(2026, 12, 15, tzinfo=UTC).timestamp() * 1000)


def test_a_budget_that_was_redefined_begins_at_zero() -> None:
    policy = _policy({"name": "b", "by": ["team"], "window": "week"}, definitions={"b": 4})
    assert _names(policy) == ["user:u42:2026-11", "b~4:red:2026-W49"]


def test_caps_of_budgets_are_known_by_their_names() -> None:
    """A hold counts in the budgets that it was made against, whatever a later policy says."""
    policy = _policy({"name": "b", "by": ["team"], "window": "week", "caps": {"red": 3}}, definitions={"b": 4})
    keys = ["user:u42:2026-10", "b~4:red:2026-W40", "b:red:2026-W40", "gone:x:total"]
    caps = [each.cap_nanousd for each in policy.caps_of(keys, plan="starter")]
    assert caps == [15 * NANOUSD_PER_USD, 3 * NANOUSD_PER_USD, MAX_NANOUSD, MAX_NANOUSD]


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ({}, {"timezone": "Europe/Berlin"}, []),
        ({}, {"timezone": "Asia/Tokyo"}, ["day", "month"]),
        ({}, {"month_starts_on": 15}, []),
        ({"month_starts_on": 15}, {}, []),
        ({}, {"week_starts_on": "sunday"}, []),
    ],
)
def test_windows_begin_otherwise_only_while_both_are_in_the_same(
    before: dict[str, Any], after: dict[str, Any], kinds: list[str]
) -> None:
    """G1: else a window that is over would be spent from again. It is half past ten in the evening, UTC."""
    rules = [{"name": name, "by": [], "window": name[4:], "cap_usd": 1} for name in ("per-day", "per-week")]
    old, new = (default_policy({"budgets": rules, **changes}) for changes in (before, after))
    found = window_problems(old, new, NOW_MS)
    assert [each.split("the current ")[1].split()[0] for each in found] == kinds


def test_a_budget_of_a_settings_name_is_what_the_setting_defines() -> None:
    right = _policy({"name": "day", "by": ["user"], "window": "day"}).policy
    wrong = _policy({"name": "campaign", "by": ["team"], "window": "month"}).policy
    assert name_problems(right) == []
    assert "another name" in name_problems(wrong)[0]
