"""Reads of pages are limited: a query that takes too long is cancelled, and too many at a time are refused."""

import asyncio
from pathlib import Path

import pytest

from tests.report_data import load, make_data_dir
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.views.web.background import Background
from tollbook.views.web.projection import Projection, Query

pytestmark = pytest.mark.slow

ENDLESS = Query(
    "SELECT count(*) FROM range(1000000000000) AS one, range(1000) AS two WHERE one.range % 7 = two.range", {}
)
COUNT = Query("SELECT count(*) AS calls FROM calls", {})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    make_data_dir(directory, load(100, users=5))
    return directory / "tollbook.duckdb"


async def test_a_query_that_takes_too_long_is_cut_off_and_the_next_is_answered(path: Path) -> None:
    projection = Projection(path, limit_s=0.5)
    with pytest.raises(LedgerUnavailable, match=r"longer than 0\.5 s"):
        await projection.read(ENDLESS)
    answer = await projection.read(COUNT)
    await projection.aclose()

    assert answer.rows[0] == [{"calls": 100}]
    assert answer.seq > 100


async def test_too_many_pages_at_a_time_are_refused(path: Path) -> None:
    projection = Projection(path)
    asked = await asyncio.gather(*(projection.read(COUNT) for _ in range(40)), return_exceptions=True)
    await projection.aclose()

    refused = [each for each in asked if isinstance(each, LedgerUnavailable)]
    assert 0 < len(refused) < 40
    assert "too many pages" in str(refused[0])


async def test_a_missing_or_damaged_projection_is_reported(tmp_path: Path) -> None:
    (tmp_path / "none.duckdb").write_bytes(b"no database")
    for name in ("missing.duckdb", "none.duckdb"):
        projection = Projection(tmp_path / name)
        with pytest.raises(LedgerUnavailable):
            await projection.read(COUNT)
        await projection.aclose()


async def test_background_work_has_its_own_event_loop_and_a_time_limit() -> None:
    background = Background(limit_s=0.2)

    async def endless() -> None:
        await asyncio.Event().wait()

    async def answer() -> int:
        return id(asyncio.get_running_loop())

    with pytest.raises(LedgerUnavailable, match="longer than"):
        await background.run(endless)
    assert await background.run(answer) != id(asyncio.get_running_loop())
    asked = await asyncio.gather(*(background.run(answer) for _ in range(20)), return_exceptions=True)
    background.close()
    assert any(isinstance(each, LedgerUnavailable) for each in asked)
    assert any(isinstance(each, int) for each in asked)
