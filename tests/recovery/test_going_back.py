"""Redis goes back in time under a running system: no call is made until its newer data is there again (G1, G4, G8)."""

from pathlib import Path
from typing import Final

import pytest
from redis.asyncio import Redis

from tests.recovery.apart import Apart, running_apart
from tests.servers import wait_until
from tests.system import REPLIES
from tollbook.inference.client import InferenceClient
from tollbook.inference.errors import AppError
from tollbook.ledger.projection.remote import remote_reader
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
    events = await apart.running.redis.xlen(apart.running.system.handle.keys[0].ledger)
    read = remote_reader(apart.settings.data_dir)

    async def is_folded() -> bool:
        return (await read(["user:u1:none"])).positions[0].seq >= events

    await wait_until(is_folded, 30, what="the fold of what the tasks wrote")


async def refusal_of_a_call(apart: Apart) -> str:
    """What a program beside the workers is told; it shares their connection to the gate."""
    with pytest.raises(AppError) as refused:
        await InferenceClient("score_post", apart.running.system.runtime).call("a post", user_id="u1")
    assert refused.value.code is ErrorCode.LEDGER_UNAVAILABLE
    return str(refused.value)


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
        await wait_until(lambda: apart.projector.process.returncode is not None, 30, what="the end of the projector")
        assert apart.projector.process.returncode == 1
        assert "the ledger has only" in apart.projector.stderr
        assert apart.running.provider.arrived.total() == paid

        await put_back(redis_client, newer)
        await apart.restart_projector()
        await finish(apart, "after")
        await apart.check_projection()
