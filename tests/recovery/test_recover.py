"""A ledger that went back in time is put in order by `tollbook recover` (G1, G3, G4, G5).

The gate itself writes random ledgers. An older copy of every key is put in place, as a restored backup does.
"""

import asyncio
import json
import random
import shutil
import socket
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Final, cast

import duckdb
import pytest
from redis.asyncio import Redis

from tests.archive.gate_ledger import BOUND, CAP, LEDGER, GateLedger
from tollbook.app.recovery import LeaseLost, Recovery, Report, open_recovery
from tollbook.audit.verification.live_projection import LiveProjection
from tollbook.audit.verification.verification import Options, verify
from tollbook.inference.policy_changes import apply_policy
from tollbook.inference.runtime import open_ledger
from tollbook.inference.settings import Settings
from tollbook.ledger.archive.known_events import CopiesDiffer
from tollbook.ledger.archive.replay import rebuild
from tollbook.ledger.archive.restoring import LedgerMoved
from tollbook.ledger.errors import CallsStopped, IdempotencyConflict, LedgerDiverged
from tollbook.ledger.gate.call_record import parse_call_record
from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.policies import POLICY_FIELDS
from tollbook.ledger.gate.requests import (
    EMPTY_BASELINE,
    AdjustRequest,
    BudgetCap,
    ChargeRequest,
    CreateKeyRequest,
    FinishedCall,
    OpenCall,
    Reserved,
    ReserveRequest,
    RevokeKeyRequest,
    SettleRequest,
)
from tollbook.ledger.gate.unbooked import FOLDER, note_unbooked, unbooked_charge
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.fold import LedgerMismatch
from tollbook.ledger.projection.lease import Lease, ProjectorRunning
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import (
    BudgetReserved,
    CostRecorded,
    KeyCreated,
    KeyRevoked,
    LedgerRecovered,
    payload_json,
)
from tollbook.schemas.identifiers import EntryId, Window, partition_of
from tollbook.schemas.policy import default_policy

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


# One ledger while one works, more of them in CI.
SEEDS: Final = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
PARTITIONS: Final = [pytest.param(1, marks=pytest.mark.slow), 2]


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
    is_trimmed: bool = True,
) -> AsyncIterator[Restored]:
    """Make a ledger, and put Redis back to what it held after `kept` steps."""
    made = Ledger(redis, directory, seed, partitions=partitions)
    await made.begin()
    draw = random.Random(seed)
    kept = draw.randrange(5, steps) if kept is None else kept
    await made.run(kept)
    if draw.random() < 0.5:
        await made.seal(keep_events=kept // 2 if is_trimmed else steps * 10)
    older = await take_backup(redis)
    await made.run(steps - kept)
    if draw.random() < 0.7:
        await made.seal(keep_events=steps if is_trimmed else steps * 10)
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
        elif name.startswith("account:") or name in ("credits", "alerts", "keys"):
            found[key] = await redis.hgetall(raw)
        elif name == "ledger":
            found[key] = await redis.xrange(raw)
        elif name == "meta":
            found[key] = await redis.hmget(raw, [*META_FIELDS, *POLICY_FIELDS])
    return found


META_FIELDS = ("ledger_id", "partitions", "sealed_seq", "sealed_chain")


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


@pytest.mark.slow
@pytest.mark.parametrize("partitions", PARTITIONS)
@pytest.mark.parametrize("seed", SEEDS)
async def test_lost_events_come_back_with_all_state_of_the_gate(
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


async def newest_event(restored: Restored) -> dict[bytes, bytes]:
    entries: Any = await restored.redis.xrevrange(restored.made.keys[0].ledger, count=1)
    return entries[0][1]


class Crash(Exception):
    """The command is killed."""


class DyingPipeline(CommandPipeline):
    """The transport of a command that dies instead of its n-th write."""

    def __init__(self, redis: Redis, writes: int) -> None:
        super().__init__(redis)
        self._left = writes

    async def execute(self, *command: Any) -> Any:
        if command[0] in ("FCALL", "SET", "HSET", "HSETNX", "HDEL"):
            self._left -= 1
        if self._left < 0:
            raise Crash
        return await super().execute(*command)


async def die_at(restored: Restored, writes: int) -> bool:
    """Recover, but die instead of the n-th write; return whether it came to that."""
    url = str(restored.settings.redis_url)
    async with open_ledger(restored.settings, url, may_create=False) as handle:
        pipeline = DyingPipeline(handle.redis, writes)
        try:
            await Recovery(restored.settings, replace(handle, pipeline=pipeline), batch_events=7).apply(SIGNATURE)
        except Crash:
            return True
        finally:
            await pipeline.aclose()
            # As when the lease of a command that was killed has ended.
            await restored.redis.delete("gate-ledger:projector")
    return False


@pytest.mark.slow
async def test_a_run_that_was_killed_at_any_write_is_finished_by_the_next(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with restored_ledger(redis_client, server_url, tmp_path, 3, steps=60, kept=30) as restored:
        older = await take_backup(redis_client)
        await put_back(redis_client, restored.newer)
        was = await state_of(redis_client)
        writes = 0
        for writes in range(100):
            await put_back(redis_client, older)
            if not await die_at(restored, writes):
                break
            await restored.recover()
            check_state(was, await state_of(redis_client))
            assert (await newest_event(restored))[b"type"] == b"ledger-recovered"
            assert await redis_client.hget(restored.made.keys[0].meta, "stopped") is None
            assert (await restored.recover(None)).is_whole
        else:
            pytest.fail("it never came to an end")
        assert writes > 5
        await restored.check()


# --- Newer events stand on the stream


def spent(store: Store) -> dict[str, int]:
    """What was booked in each budget; what it was opened with was booked elsewhere."""
    rows = store.query(
        "SELECT b.budget, nanousd(b.settled_usd) - coalesce(o.opened, 0) AS settled FROM budgets AS b LEFT JOIN ("
        "SELECT payload->'budgets'->0->>'budget' AS budget, sum(nanousd(amount_usd))::BIGINT AS opened FROM events "
        "WHERE type = 'budget-opened' GROUP BY ALL) AS o USING (budget)"
    )
    return {row["budget"]: row["settled"] for row in rows if row["settled"]}


async def folded(restored: Restored, name: str) -> dict[str, int]:
    """What each budget has spent by the ledger as it is, folded from nothing."""
    made = restored.made
    path = restored.settings.data_dir / name
    store = await rebuild(made.redis, made.keys, LEDGER, path)
    try:
        return spent(store)
    finally:
        store.close()


def costs(store: Store) -> dict[tuple[str, int], list[tuple[int, tuple[str, ...]]]]:
    """What each hold cost, event by event, with the further budgets that it was booked in."""
    found = defaultdict[tuple[str, int], list[tuple[int, tuple[str, ...]]]](list)
    for row in store.query(
        "SELECT call_id, hold, nanousd(amount_usd) AS amount, payload FROM events "
        "WHERE type IN ('cost-recorded', 'cost-adjusted')"
    ):
        budgets = tuple(stamp["budget"] for stamp in json.loads(row["payload"]).get("budgets", ()))
        found[row["call_id"], row["hold"]].append((row["amount"], budgets))
    return found


async def payloads_of(restored: Restored, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Call and payload of each event of a type on the stream as it is."""
    return [
        (fields[b"call_id"].decode(), json.loads(fields[b"payload"]))
        for keys in restored.made.keys
        for _, fields in cast("Any", await restored.redis.xrange(keys.ledger))
        if fields[b"type"] == kind.encode()
    ]


async def go_on(restored: Restored, steps: int) -> None:
    """Let calls go on, by processes that know nothing of the loss; they use ids of lost calls again."""
    other = Ledger(restored.redis, restored.settings.data_dir / "other", 77, partitions=len(restored.made.keys))
    await other.begin()
    calls = [key.decode().rpartition("call-")[2] async for key in restored.redis.scan_iter("*call:call-*")]
    other._numbers = count(1 + max(int(number) for number in calls))
    await other.run(steps)
    await other.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("partitions", PARTITIONS)
@pytest.mark.parametrize("seed", SEEDS)
async def test_lost_charges_are_entered_again_beside_newer_calls(
    every_redis_client: Redis, every_server_url: str, tmp_path: Path, seed: int, partitions: int
) -> None:
    redis, url = every_redis_client, every_server_url
    async with restored_ledger(redis, url, tmp_path, seed, partitions=partitions, is_trimmed=False) as restored:
        common = await folded(restored, "common.duckdb")
        known = Store.open(restored.settings.projection_path, LEDGER, partitions)
        lost, lost_costs = spent(known), costs(known)
        known.close()
        kept = {(call_id, payload["hold"]) for call_id, payload in await payloads_of(restored, "budget-reserved")}
        await go_on(restored, 40)
        newer = await folded(restored, "newer.duckdb")
        expected = Counter(
            {name: newer.get(name, 0) + lost.get(name, 0) - common.get(name, 0) for name in {*newer, *lost, *common}}
        )
        # A hold that is not lost, and against a budget that was opened since, is settled in it too.
        for _, opened in await payloads_of(restored, "budget-opened"):
            budget = opened["budgets"][0]["budget"]
            for key in kept & {(held["call_id"], held["hold"]) for held in opened.get("holds", ())}:
                expected[budget] += sum(amount for amount, budgets in lost_costs[key] if budget not in budgets)

        report = await restored.recover()

        assert any(part.loss.newer for part in report.partitions)
        assert await folded(restored, "after.duckdb") == {
            name: nanousd for name, nanousd in expected.items() if nanousd
        }
        head = await state_of(redis)
        assert (await restored.recover()).is_whole
        assert await state_of(redis) == head
        await restored.check()


@pytest.mark.slow
async def test_charges_are_entered_again_once_wherever_a_run_was_killed(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"steps": 50, "kept": 25, "is_trimmed": False}
    async with restored_ledger(redis_client, server_url, tmp_path, 5, **options) as restored:
        await go_on(restored, 10)
        before, kept = await take_backup(redis_client), tmp_path / "kept"
        shutil.copytree(restored.settings.data_dir, kept)
        await restored.recover()
        expected = await folded(restored, "after.duckdb")
        writes = 0
        for writes in range(0, 100, 3):
            await put_back(redis_client, before)
            shutil.rmtree(restored.settings.data_dir)
            shutil.copytree(kept, restored.settings.data_dir)
            if not await die_at(restored, writes):
                break
            await restored.recover()
            assert await folded(restored, "after.duckdb") == expected
            assert (await restored.recover(None)).is_whole
        assert writes > 6


@pytest.mark.slow
@pytest.mark.parametrize("is_replaced", [False, True])
async def test_beside_newer_events_a_lost_policy_comes_into_force_again_unless_it_was_replaced(
    redis_client: Redis, server_url: str, tmp_path: Path, is_replaced: bool
) -> None:
    """Lost: policy 2, and what its redefined budget began with."""
    made = Ledger(redis_client, tmp_path, 1)
    await made.begin()
    await made.apply_policy()
    await charge(made._gate("u1"), "early", 500, client="acme")
    older = await take_backup(redis_client)
    await made.apply_policy()
    lost = json.loads((await made._gate("u1").policy()).payload)
    await made.fold()
    newer = await take_backup(redis_client)
    made.store.close()
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "live.duckdb", tmp_path / "data" / "tollbook.duckdb")
    settings = Settings(
        redis_url=server_url, namespace="gate-ledger", data_dir=tmp_path / "data", archive_dir=tmp_path / "archive",
        allow_unsynced=True,
    )  # fmt: skip
    await put_back(redis_client, older)
    restored = Restored(made, settings, newer)
    gate = restored.gate("u1")
    try:
        if is_replaced:
            await apply_policy([gate], default_policy(), SIGNATURE)
        await charge(gate, "newer", 40, client="acme")
        (part,) = (await restored.recover()).partitions
        stored = await gate.policy()
        payload = json.loads(stored.payload)
        assert stored.version == 2
        assert (payload["content"] == lost["content"]) is not is_replaced
        assert part.entered == (not is_replaced)
        balances = await folded(restored, "after.duckdb")
        assert balances["user:u1:2026-11"] == 540
        entries: Any = await redis_client.xrange(made.keys[0].ledger)
        opened = [json.loads(fields[b"payload"])["budgets"][0] for _, fields in entries
                  if fields[b"type"] == b"budget-opened"]  # fmt: skip
        if not is_replaced:
            assert payload["recovered_id"]
            assert {"budget": "wallet~2:acme,u1:total", "cap_nanousd": CAP // 8, "committed_nanousd": 500} in opened
        head = await state_of(redis_client)
        assert (await restored.recover()).is_whole
        assert await state_of(redis_client) == head
        await restored.check()
    finally:
        await made.pipeline.aclose()


@pytest.mark.slow
async def test_beside_newer_events_a_lost_opening_has_the_holds_that_are_open_still(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """Lost: policy 2, which opened a budget while two calls were open. One of them was settled since."""
    made = Ledger(redis_client, tmp_path, 1)
    await made.begin()
    await made.apply_policy()
    for call_id in ("open", "over"):
        await made._reserve(call_id, "u1", "acme", 1_000, is_final=True)
    still_open, over = made._open
    older = await take_backup(redis_client)
    await made.apply_policy()
    await made.fold()
    newer = await take_backup(redis_client)
    made.store.close()
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "live.duckdb", tmp_path / "data" / "tollbook.duckdb")
    settings = Settings(
        redis_url=server_url, namespace="gate-ledger", data_dir=tmp_path / "data", archive_dir=tmp_path / "archive",
        allow_unsynced=True,
    )  # fmt: skip
    await put_back(redis_client, older)
    restored = Restored(made, settings, newer)
    gate = restored.gate("u1")

    async def settle(call_id: str, cost: int) -> None:
        record = await gate.call_record(call_id)
        assert record is not None
        await gate.settle(
            SettleRequest(
                call_id=call_id, user_id="u1", hold=1, cost_nanousd=cost, assumed_nanousd=0, attempt=1, is_final=True,
                payload=payload_json(CostRecorded(basis="reported", outcome="done")), budgets=record.hold.budgets,
            )
        )  # fmt: skip

    try:
        await settle(over.call_id, 30)
        await restored.recover()
        (payload,) = [
            payload for _, payload in await payloads_of(restored, "budget-opened")
            if payload["budgets"][0]["budget"] == "wallet~2:acme,u1:total"
        ]  # fmt: skip
        assert payload["holds"] == [{"call_id": still_open.call_id, "hold": 1, "amount_nanousd": 1_000}]
        assert payload["budgets"][0]["committed_nanousd"] == 30 + 1_000
        await settle(still_open.call_id, 400)
        await restored.check()
    finally:
        await made.pipeline.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("is_beside_newer", [False, True])
async def test_lost_keys_are_in_force_again_and_end_when_they_were_to_end(
    redis_client: Redis, server_url: str, tmp_path: Path, is_beside_newer: bool
) -> None:
    """Lost: a key, its revocation for tomorrow, the revocation of an older key, and that of one revoked again since."""
    made = Ledger(redis_client, tmp_path, 1)
    await made.begin()
    gate = made._gates[0]
    for number in (1, 2):
        await create_key(gate, number)
    older = await take_backup(redis_client)
    await create_key(gate, 3)
    tomorrow = await revoke_key(gate, 3, after_ms=86_400_000)
    for number in (1, 2):
        await revoke_key(gate, number)
    was = await gate.api_keys()
    await made.fold()
    newer = await take_backup(redis_client)
    made.store.close()
    (tmp_path / "data").mkdir()
    shutil.copy(tmp_path / "live.duckdb", tmp_path / "data" / "tollbook.duckdb")
    settings = Settings(
        redis_url=server_url, namespace="gate-ledger", data_dir=tmp_path / "data", archive_dir=tmp_path / "archive",
        allow_unsynced=True,
    )  # fmt: skip
    await put_back(redis_client, older)
    restored = Restored(made, settings, newer)
    gate = restored.gate("u1")
    try:
        if is_beside_newer:
            await revoke_key(gate, 2, command="since")
        (part,) = (await restored.recover()).partitions
        now = await gate.api_keys()
        if is_beside_newer:
            assert (part.entered, len(part.left)) == (3, 1)
        else:
            assert now == was
        assert now.keys() == was.keys()
        ends = [json.loads(now[f"{number:064x} revoked"])["at_ms"] for number in (1, 2, 3)]
        assert ends[2] == tomorrow
        assert max(ends[:2]) <= await gate.now_ms()
        head = await state_of(redis_client)
        assert (await restored.recover()).is_whole
        assert await state_of(redis_client) == head
        await restored.check()
    finally:
        await made.pipeline.aclose()


async def create_key(gate: Gate, number: int) -> None:
    payload = KeyCreated(key_id=f"key-{number:012x}", hash=f"{number:064x}", user_id="u1", author="ops", reason="new")
    await gate.create_key(
        CreateKeyRequest(
            command_id=f"key-created {number}", content_hash="c" * 32, key_id=payload.key_id, key_hash=payload.hash,
            payload=payload_json(payload),
        )
    )  # fmt: skip


async def revoke_key(gate: Gate, number: int, *, after_ms: int = 0, command: str = "") -> int:
    """Revoke a key; return when it ends."""
    key_id = f"key-{number:012x}"
    request = RevokeKeyRequest(
        command_id=f"key-revoked {command or number}", content_hash="c" * 32, key_id=key_id, after_ms=after_ms,
        payload=payload_json(KeyRevoked(key_id=key_id, author="ops", reason="lost")),
    )  # fmt: skip
    return (await gate.revoke_key(request)).at_ms


# --- What comes after: repeats, other content, what is noted


def request(call_id: str, *, content: str = "content", user: str = "u1") -> ReserveRequest:
    return ReserveRequest(
        call_id=call_id, user_id=user, window=Window("2026-11", 0, 2**52), content_hash=content, amount_nanousd=1_000,
        worker="w", lease_ms=600_000, payload=PAYLOAD, budgets=(BudgetCap(f"user:{user}:2026-11", CAP),),
    )  # fmt: skip


async def settle(gate: Gate, call_id: str, cost: int = 700, *, hold: int = 1) -> None:
    payload = payload_json(CostRecorded(basis="reported", outcome="done"))
    await gate.settle(
        SettleRequest(
            call_id=call_id, user_id="u1", hold=hold, cost_nanousd=cost, assumed_nanousd=0, attempt=hold,
            is_final=True, payload=payload, budgets=("user:u1:2026-11",), result='{"secret":"answer"}',
        )
    )  # fmt: skip


async def take_over(gate: Gate, call_id: str, cost: int = 1_000) -> None:
    """Settle the hold of a worker that gave no sign of life; the call is not over."""
    payload = payload_json(CostRecorded(basis="assumed", outcome="taken_over", assumed_nanousd=cost))
    await gate.settle(
        SettleRequest(
            call_id=call_id, user_id="u1", hold=1, cost_nanousd=cost, assumed_nanousd=cost, attempt=1, is_final=False,
            payload=payload, budgets=("user:u1:2026-11",),
        )
    )  # fmt: skip


async def charge(gate: Gate, call_id: str, cost: int = 1, *, client: str | None = None) -> None:
    """Book spend that an application reports."""
    tags = {"client": client} if client else None
    payload = payload_json(CostRecorded(basis="reported", outcome="recorded", reason="an invoice", tags=tags))
    await gate.charge(
        ChargeRequest(
            call_id=call_id, user_id="u1", period="2026-11", content_hash="c", cost_nanousd=cost, assumed_nanousd=0,
            payload=payload, budgets=("user:u1:2026-11",),
        ),
        [EMPTY_BASELINE],
    )  # fmt: skip


PAYLOAD = payload_json(
    BudgetReserved(task_type="score_post", plan="growth", worker="w", bound=BOUND, stream="generation")
)


@asynccontextmanager
async def lost_calls(
    redis: Redis, url: str, directory: Path, *, held_cost: int = 600, is_taken_over: bool = False, charged: int = 0
) -> AsyncIterator[Restored]:
    """Lost: `over` (settled), `open` (held), `denied`; and the settlement of `held`, whose hold is not lost.

    With `is_taken_over`, that hold was taken over before, and its second hold is lost. `charged` is lost spend that an
    application had reported.
    """
    made = Ledger(redis, directory, 1)
    await made.begin()
    gate = made._gate("u1")
    await gate.reserve(request("held"), [EMPTY_BASELINE])
    if is_taken_over:
        await take_over(gate, "held")
    await made.fold()
    older = await take_backup(redis)
    for call in ("over", "open"):
        await gate.reserve(request(call), [EMPTY_BASELINE])
    if charged:
        await charge(gate, "reported", charged)
    await settle(gate, "over")
    if is_taken_over:
        await gate.reserve(request("held"), [EMPTY_BASELINE])
    await settle(gate, "held", cost=held_cost, hold=2 if is_taken_over else 1)
    await gate.reserve(replace(request("denied"), amount_nanousd=CAP), [EMPTY_BASELINE])
    await made.fold()
    newer = await take_backup(redis)
    made.store.close()
    (directory / "data").mkdir(exist_ok=True)
    shutil.copy(directory / "live.duckdb", directory / "data" / "tollbook.duckdb")
    settings = Settings(
        redis_url=url, namespace="gate-ledger", data_dir=directory / "data", archive_dir=directory / "archive",
        allow_unsynced=True,
    )  # fmt: skip
    await put_back(redis, older)
    try:
        yield Restored(made, settings, newer)
    finally:
        await made.pipeline.aclose()


async def test_a_repeat_of_a_restored_call_is_the_same_call_and_other_content_is_a_conflict(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        await restored.recover()
        gate = restored.gate("u1")
        # The answer is in no event: the task is told that its result has expired, and is not paid again.
        over, held, denied, still_open = [
            await gate.reserve(request(call), [EMPTY_BASELINE]) for call in ("over", "held", "denied", "open")
        ]
        assert over == held == FinishedCall("settled", "", None)
        assert isinstance(denied, FinishedCall)
        assert denied.state == "denied"
        assert isinstance(still_open, OpenCall)
        for call in ("over", "held", "denied", "open"):
            with pytest.raises(IdempotencyConflict):
                await gate.reserve(request(call, content="other"), [EMPTY_BASELINE])
        await settle(gate, "open")
        await restored.check()


@pytest.mark.slow
async def test_beside_newer_calls_a_lost_call_is_not_paid_again_and_what_is_lost_is_declared(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        gate = restored.gate("u1")
        await gate.reserve(request("newer"), [EMPTY_BASELINE])

        (part,) = (await restored.recover()).partitions

        assert (part.restored, part.entered, part.entered_nanousd) == (0, 2, 700 + 600)
        declared = LedgerRecovered.model_validate_json((await newest_event(restored))[b"payload"])
        assert (declared.lost_holds, declared.lost_held_nanousd) == (1, 1_000)
        assert (declared.author, declared.reason) == ("ops", "backup restored")
        assert await gate.reserve(request("over"), [EMPTY_BASELINE]) == FinishedCall("settled", "", None)
        assert await gate.reserve(request("held"), [EMPTY_BASELINE]) == FinishedCall("settled", "", None)
        with pytest.raises(IdempotencyConflict):
            await gate.reserve(request("over", content="other"), [EMPTY_BASELINE])
        assert isinstance(await gate.reserve(request("open"), [EMPTY_BASELINE]), Reserved)
        (balance,) = await gate.balance(
            user_id="u1", period="2026-11", budgets=request("x").budgets, baselines=[EMPTY_BASELINE]
        )
        assert (balance.settled_nanousd, balance.held_nanousd) == (700 + 600, 2 * 1_000)
        await restored.check()


@pytest.mark.slow
@pytest.mark.parametrize("cost", [600, 1_000], ids=["it cost less", "it cost what was assumed"])
async def test_a_call_that_was_taken_over_since_is_over_once_its_lost_end_is_entered_again(
    redis_client: Redis, server_url: str, tmp_path: Path, cost: int
) -> None:
    """G4: a worker that was started on the restored ledger settles the hold, and cannot know that the call was over."""
    async with lost_calls(redis_client, server_url, tmp_path, held_cost=cost) as restored:
        gate = restored.gate("u1")
        await take_over(gate, "held")

        await restored.recover()

        assert await gate.reserve(request("held"), [EMPTY_BASELINE]) == FinishedCall("settled", "", None)
        assert (await folded(restored, "after.duckdb"))["user:u1:2026-11"] == 700 + cost
        head = await state_of(redis_client)
        await restored.recover()
        assert await state_of(redis_client) == head
        await restored.check()


@pytest.mark.slow
async def test_a_call_whose_last_hold_is_lost_is_over_once_its_charge_is_entered_again(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """G4: the ledger knows only of the first hold, which was charged to a worker that had died."""
    async with lost_calls(redis_client, server_url, tmp_path, is_taken_over=True) as restored:
        gate = restored.gate("u1")
        await gate.reserve(request("newer"), [EMPTY_BASELINE])

        await restored.recover()

        assert await gate.reserve(request("held"), [EMPTY_BASELINE]) == FinishedCall("settled", "", None)
        assert (await folded(restored, "after.duckdb"))["user:u1:2026-11"] == 1_000 + 700 + 600
        await restored.check()


@pytest.mark.slow
async def test_a_lost_call_that_was_paid_again_is_charged_twice_since_it_was_paid_twice(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        gate = restored.gate("u1")
        await gate.reserve(request("over"), [EMPTY_BASELINE])
        await settle(gate, "over", cost=500)
        await settle(gate, "held", cost=1_000)

        await restored.recover()

        assert (await folded(restored, "after.duckdb"))["user:u1:2026-11"] == 700 + 500 + 600
        await restored.check()


@pytest.mark.slow
async def test_what_was_reported_again_since_is_not_entered_again_and_is_named(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path, charged=50) as restored:
        await charge(restored.gate("u1"), "reported", 50)
        with duckdb.connect(str(restored.settings.projection_path), read_only=True) as connection:
            lost = connection.execute("SELECT id FROM events WHERE call_id = 'reported'").fetchall()

        (part,) = (await restored.recover()).partitions

        assert [(entry_id,) for entry_id in part.left] == lost
        assert (await folded(restored, "after.duckdb"))["user:u1:2026-11"] == 700 + 600 + 50


@pytest.mark.slow
async def test_a_paid_answer_whose_hold_is_gone_is_charged_under_a_new_id_once(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        gate, keys, pipeline = restored.gate("u1"), restored.made.keys[0], restored.made.pipeline
        await gate.reserve(request("newer"), [EMPTY_BASELINE])
        payload = payload_json(CostRecorded(basis="reported", outcome="done"))
        late = SettleRequest(
            call_id="open", user_id="u1", hold=1, cost_nanousd=800, assumed_nanousd=0, attempt=1, is_final=True,
            payload=payload, budgets=("user:u1:2026-11",),
        )  # fmt: skip
        note = unbooked_charge(late, ledger_id=LEDGER, partition=0, seen=EntryId(2**45, 0), process="w")
        await note_unbooked(pipeline, keys, note, folder=restored.settings.data_dir / FOLDER)

        assert (await restored.recover(None)).partitions[0].unbooked == 1
        assert (await restored.recover()).partitions[0].booked == 1

        assert (await folded(restored, "after.duckdb"))["user:u1:2026-11"] == 700 + 600 + 800
        assert not await redis_client.exists(keys.unbooked)
        assert not list((restored.settings.data_dir / FOLDER).iterdir())
        # The same note comes from another machine.
        await note_unbooked(pipeline, keys, note, folder=None)
        await restored.recover()
        assert (await folded(restored, "again.duckdb"))["user:u1:2026-11"] == 700 + 600 + 800
        await restored.check()


@pytest.mark.parametrize("is_settled", [True, False], ids=["settled", "open"])
@pytest.mark.slow
async def test_a_paid_answer_whose_hold_was_lost_is_charged_beside_the_run_that_has_its_number_now(
    is_settled: bool, redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """A process that had seen nothing has run the call again: its first hold bears the lost one's number."""
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        gate, keys, pipeline = restored.gate("u1"), restored.made.keys[0], restored.made.pipeline
        with duckdb.connect(str(restored.settings.projection_path), read_only=True) as connection:
            (seen,) = connection.execute("SELECT id FROM events WHERE call_id = 'open'").fetchall()[0]
        await gate.reserve(replace(request("open"), worker="another"), [EMPTY_BASELINE])
        if is_settled:
            await settle(gate, "open", cost=500)
        payload = payload_json(CostRecorded(basis="reported", outcome="done"))
        late = SettleRequest(
            call_id="open", user_id="u1", hold=1, cost_nanousd=800, assumed_nanousd=0, attempt=1, is_final=True,
            payload=payload, budgets=("user:u1:2026-11",),
        )  # fmt: skip
        note = unbooked_charge(late, ledger_id=LEDGER, partition=0, seen=EntryId.parse(seen), process="w")
        await note_unbooked(pipeline, keys, note, folder=restored.settings.data_dir / FOLDER)

        await restored.recover()

        if not is_settled:
            await settle(gate, "open", cost=500)
        assert (await folded(restored, "after.duckdb"))["user:u1:2026-11"] == 700 + 600 + 800 + 500
        await restored.check()


@pytest.mark.slow
async def test_a_paid_answer_is_booked_although_an_event_that_nobody_kept_is_lost(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """Its hold stands, but its process was told of an event that neither DuckDB nor the archive had."""
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        gate, keys, pipeline = restored.gate("u1"), restored.made.keys[0], restored.made.pipeline
        await restored.recover()
        late = SettleRequest(
            call_id="open", user_id="u1", hold=1, cost_nanousd=800, assumed_nanousd=0, attempt=1, is_final=True,
            payload=payload_json(CostRecorded(basis="reported", outcome="done")), budgets=("user:u1:2026-11",),
        )  # fmt: skip
        note = unbooked_charge(late, ledger_id=LEDGER, partition=0, seen=EntryId(2**45, 0), process="w")
        await note_unbooked(pipeline, keys, note, folder=None)

        assert (await restored.recover(None)).partitions[0].unbooked == 1
        assert (await restored.recover()).partitions[0].booked == 1

        assert not await redis_client.exists(keys.unbooked)
        record = await gate.call_record("open")
        assert record is not None
        assert record.settled[1].cost_nanousd == 800
        assert (await folded(restored, "after.duckdb"))["user:u1:2026-11"] == 700 + 600 + 800


# --- What is refused, and what is nothing


async def test_nothing_is_lost_if_the_copies_have_fewer_events(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        await put_back(redis_client, restored.newer)
        await restored.gate("u1").reserve(request("newer"), [EMPTY_BASELINE])
        before = await state_of(redis_client)
        assert (await restored.recover()).is_whole
        assert await state_of(redis_client) == before


@pytest.mark.slow
@pytest.mark.parametrize("is_declared", [False, True])
async def test_events_that_only_another_projector_had_are_lost_until_declared(
    redis_client: Redis, server_url: str, tmp_path: Path, is_declared: bool
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        keys = restored.made.keys[0]
        older = await folded(restored, "older.duckdb")
        known = Store.open(restored.settings.projection_path, LEDGER, 1)
        seen = known.position(0).entry
        known.close()
        await redis_client.hset(keys.meta, mapping={"stopped": "it went back", "stopped_seen": str(seen)})
        await charge(restored.gate("u1"), "newer")
        if is_declared:
            await restored.recover()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        shutil.copy(restored.settings.data_dir / "older.duckdb", elsewhere / "tollbook.duckdb")

        restored.settings = restored.settings.model_copy(update={"data_dir": elsewhere})
        report = await restored.recover(None)

        assert older == {}
        assert (report.is_whole, report.has_copies) == (True, True)
        assert report.partitions[0].unknown == (None if is_declared else seen)
        assert report.is_in_order is is_declared


async def test_recover_without_yes_writes_nothing(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        before = await state_of(redis_client)
        (part,) = (await restored.recover(None)).partitions
        assert part.summary.kinds == {"budget-reserved": 2, "cost-recorded": 2, "budget-denied": 1}
        assert (part.summary.settled_nanousd, part.summary.held_nanousd) == (700 + 600, 1_000)
        assert await state_of(redis_client) == before
        assert [path.name for path in restored.settings.data_dir.iterdir()] == ["tollbook.duckdb"]


async def test_the_projection_of_another_ledger_is_refused(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        restored.settings.projection_path.unlink()
        Store.open(restored.settings.projection_path, "another-ledger").close()
        words = f"this DuckDB file belongs to ledger another-ledger, Redis holds ledger {LEDGER}: name the file"
        with pytest.raises(LedgerMismatch, match=words):
            await restored.recover()


async def test_it_does_not_work_beside_a_projector(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        lease = Lease(restored.made.pipeline, namespace="gate-ledger", owner="projector", place="elsewhere")
        await lease.take()
        with pytest.raises(ProjectorRunning, match="stop it first"):
            await restored.recover()
        assert not (await restored.recover(None)).is_whole


class LosingPipeline(CommandPipeline):
    """Loses the lease to another process before the first write of a recovery."""

    async def execute(self, *command: Any) -> Any:
        if command[0] == "FCALL" and command[1] != function("stop"):
            await super().execute("SET", "gate-ledger:projector", "late\nelsewhere\n1")
            await asyncio.Event().wait()  # Only the loss of the lease can end this.
        return await super().execute(*command)


@pytest.mark.slow
async def test_it_stops_once_another_has_taken_the_lease(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        before = await redis_client.xlen(Keys("gate-ledger").ledger)
        async with open_ledger(restored.settings, server_url, may_create=False) as handle:
            pipeline = LosingPipeline(handle.redis)
            with pytest.raises(LeaseLost, match=r"a projector \(late, elsewhere\) has started .* run this again"):
                await Recovery(restored.settings, replace(handle, pipeline=pipeline)).apply(SIGNATURE)
            await pipeline.aclose()
        assert await redis_client.xlen(Keys("gate-ledger").ledger) == before
        await redis_client.delete("gate-ledger:projector")
        assert (await restored.recover()).is_in_order


async def test_a_projector_on_the_same_file_does_not_take_its_lease(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        opening = open_ledger(restored.settings, server_url, may_create=False)
        async with opening as handle, Recovery(restored.settings, handle)._alone():
            place = f"{socket.gethostname()}:{restored.settings.projection_path.resolve()}"
            lease = Lease(handle.pipeline, namespace="gate-ledger", owner="projector", place=place)
            with pytest.raises(ProjectorRunning, match="recover"):
                await lease.take(is_alone=True)


@pytest.mark.slow
async def test_the_archive_may_know_more_than_the_projection(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    """The last segments were not recorded on the ledger; the projector's sealer does that afterwards."""
    async with restored_ledger(redis_client, server_url, tmp_path, 3, steps=250, kept=20) as restored:
        restored.settings.projection_path.unlink()
        segments = restored.made.archive.segments(0)
        assert len(segments) > 2

        (part,) = (await restored.recover()).partitions

        assert part.loss.known.seq == segments[-1].manifest.last_seq
        restored.made.store = store = Store.open(restored.settings.projection_path, LEDGER, 1)
        await restored.made.seal(segment_events=10**6)
        store.close()
        sealed = int(await redis_client.hget(restored.made.keys[0].meta, "sealed_seq") or 0)
        assert sealed == segments[-1].manifest.last_seq
        await restored.check()


@pytest.mark.slow
async def test_a_ledger_that_others_write_to_is_left_to_the_next_run(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        gate = restored.gate("u1")
        payload = payload_json(CostRecorded(basis="reported", outcome="recorded"))
        spending = ChargeRequest(
            call_id="usage x", user_id="u1", period="2026-11", content_hash="c", cost_nanousd=50, assumed_nanousd=0,
            payload=payload, budgets=("user:u1:2026-11",),
        )  # fmt: skip

        class Interrupted(CommandPipeline):
            async def execute(self, *command: Any) -> Any:
                if command[:2] == ("FCALL", function("restore")):
                    # No call may begin, but what has been spent is booked.
                    with pytest.raises(CallsStopped, match="tollbook recover"):
                        await gate.reserve(request("newer"), [EMPTY_BASELINE])
                    await gate.charge(spending, [EMPTY_BASELINE])
                return await super().execute(*command)

        async with open_ledger(restored.settings, server_url, may_create=False) as handle:
            pipeline = Interrupted(handle.redis)
            with pytest.raises(LedgerMoved, match="run the command again"):
                await Recovery(restored.settings, replace(handle, pipeline=pipeline), batch_events=1).apply(SIGNATURE)
            await pipeline.aclose()
        (part,) = (await restored.recover()).partitions
        assert part.entered_nanousd == 700 + 600
        await restored.check()


@pytest.mark.slow
async def test_copies_of_two_histories_are_refused(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    async with restored_ledger(redis_client, server_url, tmp_path, 3, steps=60, kept=30) as restored:
        last_seq = restored.made.archive.segments(0)[-1].manifest.last_seq
        with duckdb.connect(str(restored.settings.projection_path)) as connection:
            connection.execute("UPDATE events SET id = '1-1' WHERE seq = ?", [last_seq])
        before = await state_of(redis_client)
        with pytest.raises(CopiesDiffer, match=f"at position {last_seq}"):
            await restored.recover()
        assert await state_of(redis_client) == before


@pytest.mark.slow
async def test_an_event_that_was_changed_in_the_projection_is_not_restored(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    async with lost_calls(redis_client, server_url, tmp_path) as restored:
        with duckdb.connect(str(restored.settings.projection_path)) as connection:
            connection.execute("UPDATE events SET amount_usd = 0 WHERE type = 'cost-recorded' AND call_id = 'over'")
        before = await state_of(redis_client)
        with pytest.raises(LedgerDiverged):
            async with open_ledger(restored.settings, server_url, may_create=False) as handle:
                await Recovery(restored.settings, handle, batch_events=1).apply(SIGNATURE)
        after = await state_of(redis_client)
        assert after == before


@pytest.mark.slow
async def test_an_embedded_server_at_rest_is_started_for_it(private_server: EmbeddedServer, tmp_path: Path) -> None:
    async with (
        connect(private_server.url) as redis,
        lost_calls(redis, private_server.url, tmp_path) as restored,
    ):
        restored.settings = restored.settings.model_copy(update={"redis_url": None})
        await restored.made.pipeline.aclose()
        await redis.aclose()
        await private_server.stop()
        (part,) = (await restored.recover()).partitions
        assert part.restored == part.loss.events > 0
        await private_server.start()
        async with connect(private_server.url) as again:
            entries: Any = await again.xrevrange(restored.made.keys[0].ledger, count=1)
        assert entries[0][1][b"type"] == b"ledger-recovered"
