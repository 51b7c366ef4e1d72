"""An answer that its worker could not book, and noted, is the outcome of its call: it is not bought again (G4)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.calling import Calling, open_calling
from tests.integration.test_calls import Held
from tests.recovery.test_going_back import put_back, take_backup
from tests.servers import wait_until
from tollbook.inference.runtime import build_ledger
from tollbook.ledger.errors import LedgerWentBack
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.ledger import Ledger, Patience
from tollbook.ledger.gate.requests import OpenCall
from tollbook.schemas.results import InferenceResult, TaskStatus


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Calling]:
    async with open_calling(server_url, tmp_path) as calling:
        yield calling
        await calling.check_guarantees()


def dying_process(calling: Calling) -> Ledger:
    """The ledger as a process has it that does not live to see the newer data come back."""
    runtime = calling.runtime

    async def read(names: Sequence[str], /) -> BaselinePage:
        return await asyncio.to_thread(calling.store.baselines, names)

    return build_ledger(
        runtime.handle,
        runtime.settings,
        read,
        patience=Patience(reserve_s=5.0, settle_s=0.0),
        process="ended",
    )


async def test_whoever_takes_the_call_over_finds_the_answer_and_makes_no_request(
    calling: Calling, redis_client: Redis
) -> None:
    older, gate = await take_backup(redis_client), asyncio.Event()
    async with calling.runner(transport=Held(gate), ledger=dying_process(calling)) as (dying, _):
        running = asyncio.create_task(dying.run(calling.call()))
        await wait_until(lambda: calling.provider.requests == 1)
        newer = await take_backup(redis_client)
        await put_back(redis_client, older)
        gate.set()
        with pytest.raises(LedgerWentBack):
            await running
    # The newer data, from before the note; the file of the dead worker has it.
    await put_back(redis_client, newer)

    async with calling.runner() as (alive, _):
        again = calling.call(run_id="run-2")
        found = await alive.run(again)
        assert isinstance(found, OpenCall)
        await alive.take_over(again, found)
        result = await alive.run(again)

    assert isinstance(result, InferenceResult)
    assert (result.status, bool(result.content)) == (TaskStatus.DONE, True)
    assert await calling.runtime.handle.results.get("t1") == result
    assert calling.provider.requests == 1
    assert await calling.spent() == calling.booked() > 0
    assert await calling.assumed() == 0
