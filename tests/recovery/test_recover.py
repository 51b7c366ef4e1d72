"""A ledger that went back in time is put in order by `tollbook recover` (G1, G3, G4, G5).

The gate itself writes random ledgers. An older copy of every key is put in place, as a restored backup does.
"""

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.archive.gate_ledger import LEDGER, GateLedger
from tollbook.app.recovery import Report, open_recovery
from tollbook.audit.verification.live_projection import LiveProjection
from tollbook.audit.verification.verification import Options, verify
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.reentering import Signature
from tollbook.ledger.gate.call_record import parse_call_record
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.requests import (
    AdjustRequest,
)
from tollbook.ledger.projection.store import Store
from tollbook.schemas.identifiers import partition_of

Backup = dict[bytes, tuple[bytes, int]]
SIGNATURE = Signature("ops", "backup restored")


async def take_backup(redis: Redis) -> Backup:
    """Every key with its value and its time to live in ms."""
    found = {key: (await redis.dump(key), await redis.pttl(key)) async for key in redis.scan_iter()}
    return {key: (value, ttl_ms) for key, (value, ttl_ms) in found.items() if value is not None}


async def put_back(redis: Redis, backup: Backup) -> None:
    """Make the server hold what the backup holds, and nothing else."""
    async with redis.pipeline(transaction=True) as pipeline:
        for key in [key async for key in redis.scan_iter()]:
            pipeline.delete(key)
        for key, (value, ttl_ms) in backup.items():
            pipeline.restore(key, max(0, ttl_ms), value)
        await pipeline.execute()


class Ledger(GateLedger):
    """A late answer brings the result of its call, as a worker's does."""

    async def _adjust(self, settled: Any, cost: int, events: Any) -> None:
        gate = self._gate(settled.call.user)
        adjust = gate.adjust

        async def with_result(request: AdjustRequest, baselines: Any = ()) -> Any:
            return await adjust(replace(request, result='{"late":1}' if events else ""), baselines)

        gate.adjust = with_result  # type: ignore[method-assign]
        try:
            await super()._adjust(settled, cost, events)
        finally:
            gate.adjust = adjust  # type: ignore[method-assign]


@dataclass
class Restored:
    """A ledger that `made` wrote, and what Redis held before it went back."""

    made: Ledger
    settings: Settings
    newer: Backup

    @property
    def redis(self) -> Redis:
        return self.made.redis

    async def recover(self, signature: Signature | None = SIGNATURE) -> Report:
        async with open_recovery(self.settings) as recovery:
            return await (recovery.look() if signature is None else recovery.apply(signature))

    async def check(self) -> None:
        """The ledger is sound, and DuckDB goes on from where it was."""
        store = Store.open(self.settings.projection_path, LEDGER, len(self.made.keys))
        try:
            self.made.store = store
            await self.made.fold()
            assert store.query("SELECT * FROM discrepancies") == []
            live = await asyncio.to_thread(LiveProjection.look, store)
            verdict = await verify(self.made.source, Options(self.settings.data_dir / "verify"), live=live)
            assert verdict.findings == []
        finally:
            store.close()

    def gate(self, user: str) -> Gate:
        """The gate of another process, which has seen nothing."""
        keys = self.made.keys[partition_of(user, len(self.made.keys))]
        return Gate(self.made.pipeline, keys, LEDGER, idempotency_ttl_s=3_000_000, result_ttl_s=3_000)


@asynccontextmanager
async def restored_ledger(
    redis: Redis,
    url: str,
    directory: Path,
    seed: int,
    *,
    partitions: int = 1,
    steps: int = 120,
    kept: int | None = None,
) -> AsyncIterator[Restored]:
    """Make a ledger, and put Redis back to what it held after `kept` steps."""
    made = Ledger(redis, directory, seed, partitions=partitions)
    await made.begin()
    draw = random.Random(seed)
    kept = draw.randrange(5, steps) if kept is None else kept
    await made.run(kept)
    if draw.random() < 0.5:
        await made.seal(keep_events=kept // 2)
    older = await take_backup(redis)
    await made.run(steps - kept)
    if draw.random() < 0.7:
        await made.seal(keep_events=steps)
        await made.run(10)
    await made.fold()
    newer = await take_backup(redis)
    made.store.close()
    data_dir = directory / "data"
    data_dir.mkdir()
    shutil.copy(directory / "live.duckdb", data_dir / "tollbook.duckdb")
    settings = Settings(
        redis_url=url, namespace="gate-ledger", partitions=partitions, data_dir=data_dir,
        archive_dir=directory / "archive", allow_unsynced=True,
    )  # fmt: skip
    await put_back(redis, older)
    try:
        yield Restored(made, settings, newer)
    finally:
        await made.pipeline.aclose()


# --- What the gate keeps


async def state_of(redis: Redis) -> dict[str, Any]:
    """Everything in Redis that follows from events, by key; results, waiters and watermarks do not."""
    found = dict[str, Any]()
    async for raw in redis.scan_iter():
        key = raw.decode()
        name = key.partition("}:")[2]
        if name.startswith("tail:"):
            found[key] = await redis.lrange(raw, 0, -1)
        elif name.startswith("call:"):
            found[key] = await redis.get(raw), await redis.ttl(raw) > 0
        elif name == "holds":
            found[key] = await redis.zrange(raw, 0, -1, withscores=True)
        elif name.startswith("account:"):
            found[key] = await redis.hgetall(raw)
        elif name == "ledger":
            found[key] = await redis.xrange(raw)
        elif name == "meta":
            found[key] = await redis.hmget(raw, ["ledger_id", "partitions", "sealed_seq", "sealed_chain"])
    return found


def check_call(was: tuple[bytes, bool], now: tuple[bytes, bool]) -> None:
    """An open call may have begun one more attempt, and may have spent more without proof; never less (G3)."""
    assert now[1] == was[1], "whether it expires"
    before, after = parse_call_record(was[0]), parse_call_record(now[0])
    _, settled, marks, *rest = was[0].split(b"\n")
    _, settled_now, marks_now, *rest_now = now[0].split(b"\n")
    assert (settled, set(marks.split()), rest) == (settled_now, set(marks_now.split()), rest_now)
    uncertain = ("attempts_begun", "spent_nanousd", "assumed_nanousd")
    if before.state == "open":
        assert after.hold.attempts_begun >= before.hold.attempts_begun
        assert after.hold.spent_nanousd == before.hold.spent_nanousd
        assert after.hold.assumed_nanousd >= before.hold.assumed_nanousd
    same = {name: getattr(before.hold, name) for name in uncertain}
    assert replace(after, hold=replace(after.hold, **same)) == before


def check_state(was: dict[str, Any], now: dict[str, Any]) -> None:
    assert was.keys() == now.keys()
    for key, value in was.items():
        if "}:call:" in key:
            check_call(value, now[key])
        elif key.endswith("}:ledger"):
            # The older copy may not have been trimmed yet, and the recovery is on record.
            last = now[key][-1][1]
            now[key] = now[key][:-1] if last[b"type"] == b"ledger-recovered" else now[key]
            assert now[key][-len(value) :] == value
        else:
            assert now[key] == value, key


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize("seed", range(6))
async def test_lost_events_come_back_with_all_that_the_gate_keeps(
    every_redis_client: Redis, every_server_url: str, tmp_path: Path, seed: int, partitions: int
) -> None:
    url = every_server_url
    async with restored_ledger(every_redis_client, url, tmp_path, seed, partitions=partitions) as restored:
        now = await take_backup(restored.redis)
        await put_back(restored.redis, restored.newer)
        was = await state_of(restored.redis)
        await put_back(restored.redis, now)

        report = await restored.recover()

        assert report.is_applied
        assert all(part.restored == part.loss.events for part in report.partitions)
        check_state(was, await state_of(restored.redis))
        assert (await restored.recover(None)).is_whole
        await restored.check()
