"""Two Tollbooks on one Redis database: neither takes the other's tasks (G4)."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.system import REPLIES, STREAMS, RunningSystem, run_cli, running_system
from tollbook.consumers.service import build_worker, serve_worker
from tollbook.ledger.stream_owners import STREAM_OWNERS, StreamTaken
from tollbook.schemas.results import TaskStatus


async def serve(running: RunningSystem, *streams: str) -> None:
    """Begin to work and end at once."""
    worker, stop = build_worker(running.system.runtime, streams, "late"), asyncio.Event()
    stop.set()
    await serve_worker(running.system.runtime, worker, stop, redis_url=running.system.redis_url)


async def test_a_stream_is_served_by_one_tollbook(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    task = {"task": "score_post", "task_id": "t1", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}
    async with (
        running_system(tmp_path / "first" / "data", server_url) as first,
        running_system(tmp_path / "second" / "data", server_url, workers=0, namespace="second") as second,
    ):
        await first.publish("analysis", [task])
        assert (await first.answers(["t1"]))[0].status is TaskStatus.DONE
        with pytest.raises(StreamTaken, match="served by the Tollbook 'tollbook', this one is 'second'"):
            await serve(second, *STREAMS)
        # It was refused before it could claim anything.
        assert await redis_client.exists("second:worker:late") == 0
        refused = await run_cli(
            *("publish", "analysis", "score_post", "a post", "--user", "u1"),
            cwd=tmp_path,
            env={"REDIS_URL": server_url, "TOLLBOOK_NAMESPACE": "second", "TOLLBOOK_DATA_DIR": str(tmp_path)},
        )
        assert (refused.code, refused.stdout) == (1, "")
        assert "the task stream analysis in this Redis database is served by the Tollbook 'tollbook'" in refused.stderr
        assert await redis_client.xlen("analysis") == 1
        # As the message has it.
        await redis_client.hdel(STREAM_OWNERS, "generation")
        await serve(second, "generation")
        assert await redis_client.hget(STREAM_OWNERS, "generation") == b"second"
