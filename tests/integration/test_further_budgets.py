"""Further budgets and the policy's calendar in what people read: statements, the report, days and caps."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo

import pytest
from redis.asyncio import Redis

from tests.calling import Calling, open_calling
from tests.integration.test_policies import put_in_force, run
from tollbook.audit.reader import AuditReader
from tollbook.audit.statements import make_statement
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.replay import ReplayLimits, replay
from tollbook.schemas.policy import default_policy
from tollbook.views.audit.documents import statement_document
from tollbook.views.audit.screens import print_statement
from tollbook.views.report.queries import Selection, ask, prepare
from tollbook.views.report.tables import sheets

TEAM: Final = {"name": "team", "by": ["team"], "window": "week", "cap_usd": 20}
EACH: Final = {"name": "each", "by": ["user", "team"], "window": "total", "cap_usd": 9}


@pytest.fixture(autouse=True)
def _is_empty(redis_client: Redis) -> None:
    """Begin with an empty server."""


def source_of(calling: Calling) -> LedgerSource:
    handle = calling.runtime.handle
    return LedgerSource(handle.ledger_id, tuple(handle.keys), None, handle.redis)


async def spend(calling: Calling) -> dict[str, int]:
    """Two users of one team, and one of none; what each has spent."""
    for call_id, user_id, tags in (("a", "ann", "red"), ("b", "bob", "red"), ("c", "ann", None), ("d", "ann", "a,b")):
        await run(calling, call_id, user_id=user_id, **({"tags": {"team": tags}} if tags else {}))
    await calling.folded()
    return {name: await calling.spent(name) for name in ("ann", "bob")}


async def test_a_statement_has_the_further_budgets_that_its_movements_count_in(
    server_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, default_policy({"budgets": [TEAM, EACH]}))
        spent = await spend(calling)
        reader = AuditReader(source_of(calling))
        statement = await make_statement(reader, "ann")
        one = spent["bob"]
        found = {each.budget.rsplit(":", 1)[0]: each for each in statement.further}
        assert {name: each.own_settled_nanousd for name, each in found.items()} == dict.fromkeys(
            ("team:red", "team:a,b", "each:ann,red", "each:ann,a%2Cb"), one
        )
        assert (found["team:red"].own_held_nanousd, found["team:red"].cap_nanousd) == (0, 20_000_000_000)
        document = statement_document(reader, statement, statement.lines)
        assert [each["budget"] for each in document["further_budgets"]] == [each.budget for each in statement.further]
        print_statement(reader, statement, statement.lines)
        assert "budget team of red, week" in capsys.readouterr().out
        reader.close()


async def test_the_report_has_a_section_for_further_budgets(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, default_policy({"budgets": [TEAM]}))
        spent = await spend(calling)
        cursor = calling.store.connection.cursor()
        prepare(cursor)

        def shown(**selection: Any) -> list[tuple[Any, ...]]:
            answers = ask(cursor, Selection(**selection))
            (sheet,) = [each for each in sheets(answers) if each.name == "budgets"]
            return [(row["budget"], row["value"], row["calls"], int(row["spent_usd"].scaleb(9))) for row in
                    sheet.rows.to_pylist()]  # fmt: skip

        one = spent["bob"]
        assert shown() == [("team", "red", 2, 2 * one), ("team", "a,b", 1, one)]
        assert shown(user="bob") == [("team", "red", 1, 2 * one)], "its balance is everybody's"
        cursor.close()


async def test_days_and_periods_are_those_of_the_policys_time_zone(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        zone = "Pacific/Kiritimati"  # 14 hours before UTC: most of the time, another day.
        await put_in_force(calling, default_policy({"timezone": zone, "month_starts_on": 2}))
        await run(calling, "one")
        await calling.folded()
        settled = [event.at_ms for event in await calling.events("one") if event.type == "cost-recorded"]
        day = datetime.fromtimestamp(settled[0] / 1000, ZoneInfo(zone)).date()
        assert [row["day"] for row in await calling.query("SELECT day FROM spend_by_day")] == [day]
        (row,) = await calling.query("SELECT * FROM policy_calendar")
        assert row == {"timezone": zone, "month_starts_on": 2}
        # So little is left that it is used up at once: on this day, by the policy's clock.
        await calling.set_cap(1)
        await calling.runtime.ledger.account("u1", "2026-11")
        await calling.folded()
        newest = (await calling.query("SELECT recorded_at FROM newest_event"))[0]["recorded_at"]
        (use,) = await calling.query("SELECT runs_out_on FROM cap_use")
        assert use["runs_out_on"] == newest.astimezone(ZoneInfo(zone)).date()
        assert datetime.now(UTC) - newest.astimezone(UTC) < timedelta(hours=1)


async def test_a_replay_of_one_user_has_all_budgets_that_are_the_users_own(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, default_policy({"budgets": [TEAM, EACH]}))
        await spend(calling)
        wanted = await calling.query("SELECT budget, settled_usd, cap_usd FROM budgets WHERE contains(budget, 'ann')")
        assert len(wanted) == 3
        store = await replay(source_of(calling), tmp_path / "ann.duckdb", ReplayLimits(None, "ann"))
        try:
            found = store.query("SELECT budget, settled_usd, cap_usd FROM budgets")
            assert store.query("SELECT * FROM discrepancies") == []
        finally:
            store.close()
        assert sorted(found, key=str) == sorted(wanted, key=str)
