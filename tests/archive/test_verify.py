"""`verify` on ledgers that the real gate wrote: nothing is found where nothing is wrong; and what its report says."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from ledger.segments import Archive
from ledger.source import LedgerSource
from ledger.verify import NotTrusted, Options, Verdict, verify
from ledger.verify_projection import LiveProjection
from tests.archive.gate_ledger import CAP, LEDGER, GateLedger, gate_ledger


@pytest.fixture
async def books(redis_client: Redis, tmp_path: Path) -> AsyncIterator[GateLedger]:
    made = await gate_ledger(redis_client, tmp_path / "ledger", 1, 300)
    yield made
    await made.aclose()


async def verdict_of(books: GateLedger, tmp_path: Path, **options: Any) -> Verdict:
    directory = tmp_path / "verify"
    shutil.rmtree(directory, ignore_errors=True)
    return await verify(books.source, Options(directory, **options), live=LiveProjection.look(books.store))


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("seed", range(4))
async def test_nothing_is_found_on_what_the_gate_wrote(
    redis_client: Redis, tmp_path: Path, seed: int, partitions: int
) -> None:
    made = await gate_ledger(redis_client, tmp_path / "ledger", seed, 500, partitions=partitions)
    verdict = await verdict_of(made, tmp_path)
    assert verdict.findings == []
    types = {row["type"] for row in made.store.query("SELECT DISTINCT type FROM events")}
    assert len(types) == 9, "every type of event was there to be verified"
    assert verdict.events == sum(made.store.position(keys.partition).seq for keys in made.keys)
    assert sum(part.compared_with_stream for part in verdict.partitions) > 0
    assert verdict.gate_balances
    rows = made.store.query("SELECT count(*) AS rows FROM events")[0]["rows"]
    assert verdict.projection_rows is not None
    assert verdict.projection_rows > rows
    await made.aclose()
