"""Redis goes back in time under a running system: no call is made until its newer data is there again (G1, G4, G8)."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis

from tests.recovery.apart import Apart, kill, running_apart
from tests.servers import wait_until
from tests.system import REPLIES, BackgroundCommand
from tollbook.inference.client import InferenceClient
from tollbook.inference.errors import AppError
from tollbook.ledger.gate.asking import AskedBaselines
from tollbook.schemas.results import ErrorCode

STREAM: Final = "analysis"
Backup = dict[bytes, bytes]


async def take_backup(redis: Redis) -> Backup:
    """Every key with its value, as a backup of the server holds it."""
    values = {key: await redis.dump(key) async for key in redis.scan_iter()}
    return {key: value for key, value in values.items() if value is not None}


async def put_back(redis: Redis, backup: Backup) -> None:
    """Make the server hold what the backup holds, and nothing else."""
    async with redis.pipeline(transaction=True) as pipeline:
        for key in [key async for key in redis.scan_iter()]:
            pipeline.delete(key)
        for key, value in backup.items():
            pipeline.restore(key, 0, value)
        await pipeline.execute()


async def finish(apart: Apart, name: str, number: int = 3) -> None:
    """Have some tasks done, and folded."""
    tasks = [
        {"task": "score_post", "task_id": f"{name}-{n}", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
        for n in range(number)
    ]
    await apart.running.publish(STREAM, tasks)
    await apart.running.answers([task["task_id"] for task in tasks])
    handle = apart.running.system.handle
    events = await apart.running.redis.xlen(handle.keys[0].ledger)
    asked = AskedBaselines(handle.redis, handle.pipeline, handle.keys, ledger_id=handle.ledger_id, process="test")

    async def is_folded() -> bool:
        return (await asked.reader(0)(["user:u1:none"])).positions[0].seq >= events

    await wait_until(is_folded, what="the fold of what the tasks wrote")
    await asked.aclose()


async def refusal_of_a_call(apart: Apart) -> str:
    """The error of a program beside the workers; it shares their connection to the gate."""
    with pytest.raises(AppError) as refused:
        await InferenceClient("score_post", apart.running.system.runtime).call("a post", user_id="u1")
    assert refused.value.code is ErrorCode.LEDGER_UNAVAILABLE
    return str(refused.value)


@pytest.mark.slow
async def test_a_restored_backup_stops_workers_and_projector_until_the_newer_data_is_back(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with running_apart(tmp_path / "data", server_url) as apart:
        await finish(apart, "before")
        older = await take_backup(redis_client)
        await finish(apart, "lost")
        newer = await take_backup(redis_client)
        paid = apart.running.provider.arrived.total()
        await put_back(redis_client, older)

        assert "is no longer on the ledger" in await refusal_of_a_call(apart)
        await wait_until(lambda: apart.projector.process.returncode is not None, what="the end of the projector")
        assert apart.projector.process.returncode == 1
        assert "the ledger has only" in apart.projector.stderr
        assert apart.running.provider.arrived.total() == paid

        await put_back(redis_client, newer)
        await apart.restart_projector()
        await finish(apart, "after")
        await apart.check_projection()


@pytest.mark.slow
async def test_an_answer_whose_worker_is_killed_meanwhile_is_booked_at_its_cost_once_the_newer_data_is_back(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G3: the restored Redis has neither the hold nor, later, the note; the file of the dead worker has it."""
    async with running_apart(tmp_path / "data", server_url, workers=0) as apart, AsyncExitStack() as ends:
        environment = {
            "REDIS_URL": server_url,
            "TOLLBOOK_DATA_DIR": str(apart.settings.data_dir),
            "OPENROUTER_BASE_URL": apart.running.provider.base_url,
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_CLAIM_AFTER_S": "1",
        }

        async def start_worker() -> BackgroundCommand:
            worker = await BackgroundCommand.start("worker", cwd=tmp_path, env=environment)
            ends.push_async_callback(kill, worker)
            return worker

        worker = await start_worker()
        await finish(apart, "before")
        older = await take_backup(redis_client)
        await apart.running.provider.shut()
        arrived = apart.running.provider.arrived.total()
        await apart.running.publish(
            STREAM, [{"task": "score_post", "task_id": "paid", "user_id": "u1", "prompt": "a post"}]
        )
        await wait_until(lambda: apart.running.provider.arrived.total() > arrived, what="the request")
        newer = {key: value for key, value in (await take_backup(redis_client)).items() if key[:9] != b"tollbook:"}
        await put_back(redis_client, older)
        await apart.running.provider.open()
        await wait_until(lambda: "settlement.kept" in worker.stderr, what="the note of the cost")
        notes = apart.settings.data_dir / "unbooked"
        await wait_until(lambda: len(list(notes.glob("*.json"))) == 1, what="the note's file")
        await wait_until(lambda: redis_client.exists(apart.running.keys.unbooked), what="the note in Redis")
        await kill(worker)
        await kill(apart.projector)

        await put_back(redis_client, newer)
        await apart.restart_projector()
        await start_worker()
        gate = apart.running.system.runtime.ledger.gates[0]

        async def is_booked() -> bool:
            record = await gate.call_record("paid")
            return record is not None and record.state == "settled" and not list(notes.glob("*.json"))

        await wait_until(is_booked, what="the booking")
        record = await gate.call_record("paid")
        assert record is not None
        first, second = (record.settled[number] for number in (1, 2))
        assert first == second, "each of the two requests at its cost, and nothing assumed"
        assert (first.cost_nanousd > 0, first.assumed_nanousd) == (True, 0)
