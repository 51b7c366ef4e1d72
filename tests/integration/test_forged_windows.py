"""`verify` finds a hold in a window that its moment is not in: it passes the cap of the one that it is in (G1, G11)."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest
from redis.asyncio import Redis

from tests.calling import Calling, open_calling
from tests.integration.test_policies import findings, put_in_force, run
from tests.quick import first_quick
from tests.recovery.test_recover import BOUND
from tollbook.inference.budgets import calendar_of
from tollbook.ledger.gate.requests import EMPTY_BASELINE, BudgetCap, Reserved, ReserveRequest
from tollbook.schemas.events import BudgetReserved, payload_json
from tollbook.schemas.identifiers import Window
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.windows import WindowKind

KINDS: Final[tuple[WindowKind, ...]] = ("day", "week", "month", "total")
BUDGETS: Final = [{"name": f"each-{kind}", "by": ["user"], "window": kind, "cap_usd": 1} for kind in KINDS]
EAST: Final[dict[str, Any]] = {"timezone": "Pacific/Kiritimati", "month_starts_on": 15, "week_starts_on": "sunday"}
WEST: Final[dict[str, Any]] = {"timezone": "Pacific/Midway", "week_starts_on": "monday"}


@pytest.fixture(autouse=True)
def _is_empty(redis_client: Redis) -> None:
    """Begin with an empty server."""


async def hold(calling: Calling, policy: Policy, **labels: str) -> None:
    """Hold money as a process with the right policy but wrong window names: the gate accepts them."""
    gate = calling.runtime.ledger.gates[0]
    stored, now_ms, calendar = await gate.policy(), await gate.now_ms(), calendar_of(policy)
    named = {kind: labels.get(kind, calendar.window_at(kind, now_ms).name) for kind in KINDS}
    period = labels.get("period", calendar.window_at("month", now_ms).name)
    plan = policy.plan_caps_nanousd["trial"]
    request = ReserveRequest(
        call_id="forged", user_id="u1", window=Window(period, 0, 2**52), content_hash="c", amount_nanousd=10,
        worker="w.1", lease_ms=600_000, policy_version=stored.version,
        payload=payload_json(BudgetReserved(task_type="score_post", plan="trial", worker="w.1", bound=BOUND)),
        budgets=(
            BudgetCap(f"user:u1:{period}", plan),
            *(BudgetCap(f"each-{kind}:u1:{named[kind]}", 10**9) for kind in KINDS),
        ),
    )  # fmt: skip
    reply = await gate.reserve(request, [EMPTY_BASELINE] * 5)
    assert isinstance(reply, Reserved)


@pytest.mark.parametrize("calendar", first_quick(1, [EAST, {}, WEST]), ids=["east of it", "by default", "west of it"])
@pytest.mark.parametrize(
    ("forged", "problem"),
    first_quick(
        1,
        [
            ({"day": "2031-01-05"}, "another day than 2031-01-05"),
            ({"week": "2031-W02"}, "another week than 2031-W02"),
            ({"month": "2031-01"}, "another month than 2031-01"),
            ({"total": "2031-01"}, "another total than 2031-01"),
            ({"period": "2031-01"}, "another month than 2031-01"),
        ],
    ),
)
async def test_a_hold_in_another_window_than_its_moment_is_found(
    server_url: str, tmp_path: Path, calendar: dict[str, Any], forged: dict[str, str], problem: str
) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        policy = default_policy({"budgets": BUDGETS, **calendar})
        await put_in_force(calling, policy)
        await run(calling, "one")
        assert await findings(calling, tmp_path) == []
        await hold(calling, policy, **forged)
        (found,) = await findings(calling, tmp_path)
        assert found.startswith("policy: ")
        assert found.endswith(f"by policy 1 it is in {problem} at that moment")


@pytest.mark.slow
async def test_the_window_of_another_time_zone_is_found(server_url: str, tmp_path: Path) -> None:
    """The day of a zone that is 25 hours away is always another."""
    async with open_calling(server_url, tmp_path) as calling:
        policy = default_policy({"budgets": BUDGETS, **WEST})
        await put_in_force(calling, policy)
        now = datetime.now(UTC)
        here, there = (now.astimezone(ZoneInfo(zone["timezone"])).date() for zone in (WEST, EAST))
        assert there - here in (timedelta(days=1), timedelta(days=2))
        await hold(calling, policy, day=str(there))
        (found,) = await findings(calling, tmp_path)
        assert f"another day than {there}" in found


@pytest.mark.slow
async def test_new_window_boundaries_count_from_their_policy_on(server_url: str, tmp_path: Path) -> None:
    """A current window keeps its name, so both time zones must have the same day at the change."""
    async with open_calling(server_url, tmp_path) as calling:
        noon = datetime.now(UTC).hour
        # A zone in which it is the same day now, and at another hour.
        other = f"Etc/GMT{1 - 2 * (noon < 12):+d}"
        for call, changes in (("one", {}), ("two", {"timezone": other}), ("three", {"week_starts_on": "monday"})):
            await put_in_force(calling, default_policy({"budgets": BUDGETS, **changes}))
            await run(calling, call)
        assert await findings(calling, tmp_path) == []
