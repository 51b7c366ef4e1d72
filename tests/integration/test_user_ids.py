"""Users' ids that are personal: on a ledger with hashed ids no plain one is found, and caps hold per person (G10)."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from pydantic import ValidationError
from redis.asyncio import Redis

from tests.servers import wait_until
from tests.system import REPLIES, Fields, RunningSystem, run_cli, running_system
from tollbook.inference.administration import Administration, connect_administration
from tollbook.inference.client import InferenceClient
from tollbook.inference.cost_tracker import CostTracker
from tollbook.inference.current_policy import PolicyInForce
from tollbook.inference.errors import PlanLimitReached
from tollbook.inference.policy_changes import PolicyRefused, apply_policy
from tollbook.inference.prepaid import Credit
from tollbook.inference.runtime import build_gates, open_ledger
from tollbook.inference.user_ids import UserIds, UserKeyLost
from tollbook.inference.user_keys import KEY_FILE, derived_key, hash_of
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.signature import Signature
from tollbook.schemas.identifiers import is_hashed_id
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.results import ErrorCode, TaskStatus

ANN: Final = "ann.personal@example.com"
BOB: Final = "bob.personal@example.com"
CY: Final = "cy.personal@example.com"
PLAIN: Final = (ANN, BOB, CY)
ME: Final = Signature("ops", "test")
POLICY: Final = """
user_ids = "hashed"

[plans.trial]
cap_usd = 5

[[budgets]]
name = "prepaid"
by = ["user", "team"]
window = "total"
cap_usd = 0
"""


@asynccontextmanager
async def hashed(server_url: str, folder: Path, **values: Any) -> AsyncIterator[RunningSystem]:
    file = folder / "hashed.toml"
    file.write_text(POLICY)
    async with running_system(folder / "data", server_url, policy_file=file, **values) as running:
        yield running


def task(number: int, user: str, **fields: str) -> Fields:
    return {
        "task": "generate_draft", "user_id": user, "task_id": f"t{number}", "prompt": "Write", "reply_to": REPLIES,
        **fields,
    }  # fmt: skip


def administration(running: RunningSystem) -> Administration:
    runtime = running.system.runtime
    return Administration(runtime.ledger, runtime.policies, runtime.user_ids)


async def events(running: RunningSystem) -> list[dict[str, str]]:
    found: Any = await running.redis.xrange(running.keys.ledger)
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]


@pytest.mark.slow
async def test_no_plain_id_is_on_the_ledger_or_in_what_is_made_of_it(
    redis_client: Redis, server_url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with structlog.testing.capture_logs() as logged:
        async with hashed(server_url, tmp_path, metrics_port="0", segment_age_s=0.01) as running:
            runtime, ops = running.system.runtime, administration(running)
            await running.publish("generation", [task(1, ANN), task(2, BOB), task(3, ANN, plan="nonsense")])
            first, second, invalid = await running.answers(["t1", "t2", "t3"])
            assert [each.status for each in (first, second)] == [TaskStatus.DONE] * 2
            assert invalid.error_code is ErrorCode.INVALID_TASK
            assert await ops.set_plan(ANN, "starter", ME, cap_nanousd=1)
            assert await ops.grant_credit(BOB, 10**9, ME)
            assert await ops.revoke_credit(BOB, 10**8, ME)
            granted = await ops.prepaid.grant(Credit("prepaid", f"{CY},red", "pay-1"), 10**9, ME)
            assert granted.is_new
            await running.publish("generation", [task(4, ANN)])
            (denied,) = await running.answers(["t4"])
            assert denied.error_code is ErrorCode.PLAN_LIMIT_REACHED
            client = InferenceClient("generate_draft", runtime)
            direct = await client.call("Write", CY, tags={"team": "red"})
            assert await CostTracker(runtime).record_usage(CY, "0.01", idempotency_key="k1")
            with pytest.raises(PlanLimitReached) as refused:
                await client.call("Write", ANN)

            hashes = {user: runtime.user_ids.on_ledger(user) for user in PLAIN}
            assert [each.user_id for each in (first, second, denied, invalid)] == [
                hashes[ANN], hashes[BOB], hashes[ANN], hashes[ANN],
            ]  # fmt: skip
            assert direct.user_id == hashes[CY]
            on_ledger = await events(running)
            kinds = {each["type"] for each in on_ledger}
            assert {
                "plan-assigned",
                "credit-granted",
                "credit-revoked",
                "budget-reserved",
                "cost-recorded",
                "budget-denied",
            } <= kinds
            assert {each["user_id"] for each in on_ledger if each.get("user_id")} == set(hashes.values())
            rows = await running.query("SELECT user_id FROM spend ORDER BY 1")
            assert {row["user_id"] for row in rows} == set(hashes.values())
            tables = await running.query(
                "SELECT table_name FROM information_schema.tables WHERE table_catalog = current_database()"
            )
            folded = {name: await running.query(f"FROM {name}") for name in (row["table_name"] for row in tables)}
            assert {"events", "spend", "calls"} <= folded.keys()
            archive = Archive(running.system.runtime.settings.archive_path)
            newest = len(on_ledger)
            await wait_until(lambda: _archived(archive) >= newest, what="everything is sealed")
            sealed = [events.to_pylist() async for events in LedgerSource.of_archive(archive).events(0)]
            exported = await _metrics(running)
            names = await _names_and_values(redis_client)

    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert any(path.suffix == ".duckdb" for path in files)
    printed = capfd.readouterr()
    seen = {
        "events": json.dumps(on_ledger),
        "DuckDB": repr(folded),
        "archive": repr(sealed),
        "results": first.model_dump_json() + denied.model_dump_json(),
        "refusal": str(refused.value),
        "logs": repr(logged) + printed.out + printed.err,
        "metrics": exported,
        # What still has plain ids: the table, what was published, and dead letters, which are whole tasks.
        "redis": repr({name: each for name, each in names.items() if name not in _STILL_PLAIN}),
    }
    assert all(kept in seen["archive"] and kept in seen["DuckDB"] for kept in hashes.values())
    for user in PLAIN:
        for place, text in seen.items():
            assert user not in text, (place, user)
        for path in files:
            assert user.encode() not in path.read_bytes(), (path, user)


_STILL_PLAIN: Final = {"{tollbook:0}:users", "generation", "tollbook:dead-letters"}


def _archived(archive: Archive) -> int:
    return max((segment.manifest.last_seq for segment in archive.segments(0)), default=0)


async def _metrics(running: RunningSystem) -> str:
    import httpx

    async with httpx.AsyncClient() as client:
        return (await client.get(f"{running.system.state.url}/metrics")).text


async def _names_and_values(redis: Redis) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async for name in redis.scan_iter():
        kind: Any = await redis.type(name)
        read: Any = {
            "hash": redis.hgetall, "string": redis.get, "stream": redis.xrange,
            "list": lambda key: redis.lrange(key, 0, -1), "zset": lambda key: redis.zrange(key, 0, -1),
            "set": redis.smembers,
        }.get(kind.decode())  # fmt: skip
        if read is not None:  # It may have expired meanwhile.
            found[name.decode()] = await read(name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("partitions", [1, 2])
async def test_caps_hold_per_person_whoever_spells_the_id(
    server_url: str, redis_client: Redis, tmp_path: Path, partitions: int
) -> None:
    assert await redis_client.ping()
    async with hashed(server_url, tmp_path, partitions=partitions) as running:
        ops, runtime = administration(running), running.system.runtime
        kept = runtime.user_ids.on_ledger(ANN)
        await ops.set_plan(ANN, "trial", ME, cap_nanousd=1)
        client = InferenceClient("generate_draft", runtime)
        for spelling in (ANN, kept):
            with pytest.raises(PlanLimitReached):
                await client.call("Write", spelling)
        assert (await client.call("Write", BOB)).status is TaskStatus.DONE
        summary = await CostTracker(runtime).get_usage_summary(BOB)
        assert (summary.user_id, summary.spent_usd > 0) == (BOB, True)
        # A hash is not hashed again, and what the provider is told is another one.
        assert await runtime.user_ids.keep(kept) == kept
        assert running.system.handle.user_key.hex() not in json.dumps(await events(running))
        key = derived_key(running.system.handle.user_key)
        assert (hash_of(ANN, key), key != running.system.handle.user_key) == (kept, True)


@pytest.mark.slow
async def test_commands_take_and_print_plain_ids_until_a_user_is_forgotten(
    server_url: str, redis_client: Redis, tmp_path: Path
) -> None:
    assert await redis_client.ping()
    async with hashed(server_url, tmp_path) as running:
        await running.publish("generation", [task(1, ANN), task(2, BOB), task(3, ANN, plan="nonsense")])
        await running.answers(["t1", "t2", "t3"])
        await running.fold_all()
        env = {
            "REDIS_URL": server_url, "TOLLBOOK_DATA_DIR": str(tmp_path / "data"),
            "OPENROUTER_BASE_URL": running.provider.base_url, "TOLLBOOK_DIALECT": "openrouter",
        }  # fmt: skip
        kept = running.system.runtime.user_ids.on_ledger(ANN)

        async def say(*arguments: str) -> Any:
            done = await run_cli(*arguments, cwd=tmp_path, env=env)
            assert done.code == 0, done.stderr
            return done.json() if "--json" in arguments else done.stdout

        assert [row["user_id"] for row in await say("spend", ANN, "--json")] == [ANN]
        assert {row["user_id"] for row in await say("spend", "--json")} == {ANN, BOB}
        assert ANN in await say("spend", kept)
        await say("plan", "set", ANN, "growth", "--reason", "upgrade", "--yes")
        assert (await say("plan", "show", ANN, "--json"))["plan"] == "growth"
        assert [row["user_id"] for row in await say("plan", "list", "--json")] == [ANN]
        await say("credit", "grant", ANN, "1", "--reason", "sorry", "--yes")
        granted = await say("credit", "list", ANN, "--json")
        assert [row["user_id"] for row in granted] == [ANN]
        await say(
            "credit", "grant", "--budget", "prepaid", "--value", f"{ANN},red", "--usd", "5", "--id", "pay-1", "--yes"
        )
        await running.fold_all()
        for arguments in (("credit", "list", "--budget", "prepaid"), ("spend", "--budgets")):
            assert [row["value"] for row in await say(*arguments, "--json")] == [f"{ANN},red"], arguments
        await say("credit", "revoke", ANN, "--grant", granted[0]["id"], "--reason", "no", "--yes")
        assert (await say("audit", "user", ANN, "--json"))["user_id"] == ANN
        unknown = await run_cli("audit", "user", CY, cwd=tmp_path, env=env)
        assert (unknown.code, f"user {CY} is not on the ledger" in unknown.stderr) == (1, True)
        unset = await run_cli("plan", "clear", CY, "--reason", "none", "--yes", cwd=tmp_path, env=env)
        assert (unset.code, f"no plan is set for {CY}" in unset.stderr) == (1, True)
        assert ANN in await say("cost", "adjust", "t1", "0.02", "--reason", "invoice", "--yes")
        assert ANN in await say("dead-letters", "list", "--user", ANN)
        assert ANN in await say("top", "--once")
        assert kept in await say("audit", "find", "--user", ANN)
        lower = await say("what-if", "--user", ANN, "--user-cap", f"{ANN}=0.0001", "--json")
        assert [user["user_id"] for user in lower["users"]] == [ANN]
        assert await say("users", "hash", ANN) == f"{kept}\n"
        assert {row["user_id"] for row in await say("users", "list", "--json")} == {ANN, BOB}
        assert (await run_cli("users", "forget", ANN, cwd=tmp_path, env=env)).code == 2, "it asks first"

        forgotten = await say("users", "forget", ANN, "--yes")
        assert "1 dead letters dropped" in forgotten
        assert kept in forgotten
        assert {row["user_id"] for row in await say("spend", "--json")} == {kept, BOB}
        # With the plain id, the spend can still be found, by computing the hash. Nothing else connects the two.
        assert [row["user_id"] for row in await say("spend", ANN, "--json")] == [kept]
        assert not await running.dead_letters()
        # Without Redis the key's copy beside the projection serves.
        alone = {name: value for name, value in env.items() if name != "REDIS_URL"}
        done = await run_cli("spend", ANN, "--json", cwd=tmp_path, env=alone)
        assert [row["user_id"] for row in done.json()] == [kept], done.stderr


@pytest.mark.slow
async def test_user_ids_are_fixed_when_a_ledger_is_created(
    server_url: str, redis_client: Redis, tmp_path: Path
) -> None:
    assert await redis_client.ping()
    async with hashed(server_url, tmp_path) as running:
        gates = build_gates(running.system.handle, running.system.runtime.settings)
        with pytest.raises(PolicyRefused, match="users' ids are hashed on this ledger"):
            await apply_policy(gates, default_policy(), ME)
        (tmp_path / "other.toml").write_text(POLICY.replace('"hashed"', '"plain"'))
        env = {"REDIS_URL": server_url}
        for last in (["--dry-run"], ["--reason", "r"]):
            done = await run_cli("policy", "apply", "other.toml", *last, cwd=tmp_path, env=env)
            assert (done.code, "users' ids are hashed on this ledger" in done.stdout + done.stderr) == (1, True), done
    await redis_client.flushall()
    async with running_system(tmp_path / "plain", server_url) as running:
        gates = build_gates(running.system.handle, running.system.runtime.settings)
        with pytest.raises(PolicyRefused, match="users' ids are plain on this ledger"):
            await apply_policy(gates, default_policy({"user_ids": "hashed"}), ME)
        assert not (tmp_path / "plain" / KEY_FILE).exists()
        assert not await redis_client.exists(running.keys.users)
        done = await run_cli("users", "list", cwd=tmp_path, env={"REDIS_URL": server_url})
        assert (done.code, "users' ids are plain on this ledger" in done.stderr) == (2, True)


async def test_a_ledger_whose_key_is_lost_is_not_opened_and_the_copy_brings_it_back(
    server_url: str, redis_client: Redis, tmp_path: Path
) -> None:
    async with hashed(server_url, tmp_path) as running:
        settings, keys = running.system.runtime.settings, running.keys
        before = running.system.handle.user_key
    assert (tmp_path / "data" / KEY_FILE).stat().st_mode & 0o077 == 0
    await redis_client.delete(keys.secrets)
    elsewhere = settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})
    with pytest.raises(UserKeyLost):
        async with open_ledger(elsewhere, server_url, may_create=False):
            pass
    with pytest.raises(UserKeyLost):
        async with connect_administration(elsewhere):
            pass
    async with open_ledger(settings, server_url, may_create=False) as again:
        assert again.user_key == before
    await redis_client.hset(keys.secrets, "provider_user_key", "00" * 32)
    with pytest.raises(UserKeyLost):
        async with open_ledger(settings, server_url, may_create=False):
            pass


async def test_the_table_is_written_once_for_each_id(server_url: str, redis_client: Redis, tmp_path: Path) -> None:
    async with hashed(server_url, tmp_path) as running:
        handle, user_ids = running.system.handle, running.system.runtime.user_ids
        kept = await user_ids.keep(ANN)
        await redis_client.hdel(running.keys.users, kept)
        await user_ids.keep(ANN)
        assert not await redis_client.exists(running.keys.users), "known to this process already"
        other = UserIds(handle.policies, handle.pipeline, running.keys, handle.user_key)
        assert await other.keep(ANN) == kept
        assert await user_ids.plain([kept, "h-" + "0" * 40]) == {kept: ANN}
        assert await user_ids.forget(ANN)
        assert not await user_ids.forget(ANN)
        assert await user_ids.keep(ANN) == kept
        assert await user_ids.known() == {kept: ANN}
        with pytest.raises(ValueError, match="must have"):
            await user_ids.keep("")


def test_a_plain_id_is_never_used_on_a_hashed_ledger() -> None:
    in_force = PolicyInForce(1, default_policy({"user_ids": "hashed"}))
    with pytest.raises(LedgerUnavailable, match="try again"):
        in_force.budgets_at(0, {"user": ANN, "plan": "trial"})
    assert in_force.budgets_at(0, {"user": "h-" + "0" * 40, "plan": "trial"})[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"users": {ANN: 3}},
        {"budgets": [{"name": "d", "by": ["user"], "window": "day", "cap_usd": 1, "caps": {ANN: 2}}]},
        {"budgets": [{"name": "d", "by": ["team", "user"], "window": "day", "cap_usd": 1, "caps": {f"r,{ANN}": 2}}]},
    ],
)
def test_a_policy_with_hashed_ids_names_no_plain_one(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="tollbook users hash ID") as refused:
        default_policy({"user_ids": "hashed", **changes})
    assert ANN not in refused.value.errors(include_input=False)[0]["msg"]
    text = json.dumps(changes).replace(ANN, "h-" + "a" * 40)
    assert isinstance(default_policy({"user_ids": "hashed", **json.loads(text)}), Policy)
    assert default_policy(changes).user_ids == "plain"


def test_a_hash_has_a_form_of_its_own() -> None:
    kept = hash_of(ANN, b"k" * 32)
    assert is_hashed_id(kept)
    assert hash_of(kept, b"k" * 32) == kept
    assert hash_of(ANN, b"x" * 32) != kept != hash_of(BOB, b"k" * 32)
    assert not any(map(is_hashed_id, (ANN, kept[:-1], kept.upper(), f"{kept}0", f"{kept}\n")))
