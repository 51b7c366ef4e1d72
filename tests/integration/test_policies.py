"""The policy on the ledger: applied to every partition, followed without a restart, refused where it differs (G11)."""

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from tests.calling import Calling, open_calling, period
from tests.quick import first_quick
from tollbook.audit.verification.verification import Options, verify
from tollbook.consumers.policy_following import PolicyFollowing
from tollbook.consumers.service import build_worker
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.reservations import WaitLimits
from tollbook.inference.client import InferenceClient
from tollbook.inference.cost_tracker import CostTracker
from tollbook.inference.current_policy import CurrentPolicy, PolicyInForce, policy_in_force
from tollbook.inference.errors import BudgetWaitTimeout, PlanLimitReached
from tollbook.inference.policy_changes import (
    PolicyDiffers,
    PolicyRefused,
    apply_policy,
    check_stated_policy,
    next_definitions,
    start_policy,
)
from tollbook.inference.runtime import build_gates, open_runtime
from tollbook.inference.settings import Settings, load_settings
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.errors import LedgerUnavailable, PolicyChanged, PolicyUnreadable
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.policies import PolicyRequest
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.follower import PolicyForged
from tollbook.ledger.projection.traces import ForgedEvent
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.signature import Signature
from tollbook.ledger.stream_owners import STREAM_OWNERS, StreamTaken
from tollbook.schemas.events import BudgetReserved, PolicyApplied
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.tasks import InvalidTask

ME: Final = Signature("ops", "test")
NEVER: Final = EntryId(2**45, 0)
LIMITS: Final = WaitLimits(hold_wait_s=0.0)
DAY: Final = {"name": "day", "by": ["user"], "window": "day", "cap_usd": 1}


@pytest.fixture(autouse=True)
def _is_empty(redis_client: Redis) -> None:
    """Begin with an empty server."""


def trial_at(cap_usd: str | int, **changes: Any) -> Policy:
    return default_policy({"plans": {"trial": {"cap_usd": cap_usd}}, **changes})


@asynccontextmanager
async def open_gates(redis: Redis, partitions: int = 2) -> AsyncIterator[list[Gate]]:
    await load_library(redis)
    pipeline = CommandPipeline(redis)
    keys = [Keys("policies", number) for number in range(partitions)]
    for key in keys:
        await create_ledger(pipeline, key, ledger_id="ledger-1", partitions=partitions)
    try:
        yield [Gate(pipeline, key, "ledger-1", idempotency_ttl_s=3_600, result_ttl_s=600) for key in keys]
    finally:
        await pipeline.aclose()


async def versions(gates: list[Gate]) -> list[int]:
    return [(await gate.policy()).version for gate in gates]


async def test_a_policy_comes_into_force_in_every_partition_under_one_version(redis_client: Redis) -> None:
    async with open_gates(redis_client) as gates:
        first = await apply_policy(gates, default_policy(), ME)
        second = await apply_policy(gates, trial_at(3), ME)
        assert (first.in_force.version, second.in_force.version, second.is_new) == (1, 2, True)
        stored = [policy_in_force(await gate.policy()) for gate in gates]
        assert [each.version for each in stored] == [2, 2]
        assert all(each.policy == trial_at(3) for each in stored)
        again = await apply_policy(gates, trial_at(3), ME)
        assert (again.is_new, await versions(gates)) == (False, [2, 2])


async def test_a_change_that_ended_half_way_is_completed_by_the_next(redis_client: Redis) -> None:
    async with open_gates(redis_client, 3) as gates:
        await apply_policy(gates, default_policy(), ME)
        await apply_policy(gates[:1], trial_at(3), ME)
        assert await versions(gates) == [2, 1, 1]
        applied = await apply_policy(gates, trial_at(2), ME)
        assert (applied.completed, applied.in_force.version, await versions(gates)) == (True, 3, [3, 3, 3])
        for gate in gates:
            entries: Any = await redis_client.xrange(gate.keys.ledger)
            assert [json.loads(fields[b"payload"])["version"] for _, fields in entries] == [1, 2, 3]


async def test_a_policy_is_replaced_only_by_an_author_who_has_seen_it(redis_client: Redis) -> None:
    async with open_gates(redis_client, 1) as gates:
        await apply_policy(gates, default_policy(), ME)
        with pytest.raises(PolicyChanged) as found:
            await apply_policy(gates, trial_at(3), ME, based_on=0)
        assert (found.value.version, await versions(gates)) == (1, [1])
        (gate,) = gates
        request = PolicyRequest(in_force=0, version=1, digest="other", payload="{}")
        with pytest.raises(PolicyChanged):
            await gate.apply_policy(request)
        with pytest.raises(PolicyChanged):
            await gate.apply_policy(replace(request, in_force=1))


async def test_a_budget_that_no_step_could_decide_is_refused_with_the_reason(redis_client: Redis) -> None:
    policy = default_policy({"budgets": [{"name": "team", "by": ["team"], "window": "week", "cap_usd": 20}, DAY]})
    async with open_gates(redis_client, 2) as gates:
        with pytest.raises(PolicyRefused, match="budget team is kept by team, so its users are in several"):
            await apply_policy(gates, policy, ME)
        assert await versions(gates) == [0, 0]
    async with open_gates(redis_client, 1) as gates:
        pass


def test_a_budget_that_is_new_or_defined_anew_begins_at_zero() -> None:
    team = {"name": "team", "by": ["team"], "window": "week", "cap_usd": 20}
    one = PolicyInForce(1, default_policy({"budgets": [DAY, team]}), {})
    assert next_definitions(PolicyInForce(), one.policy, 1) == {}
    dearer = default_policy({"budgets": [DAY, team | {"cap_usd": 30}]})
    assert next_definitions(one, dearer, 2) == {}
    monthly = default_policy({"budgets": [DAY, team | {"window": "month"}]})
    assert next_definitions(one, monthly, 2) == {"team": 2}
    two = PolicyInForce(2, monthly, {"team": 2})
    assert next_definitions(two, monthly, 3) == {"team": 2}
    assert next_definitions(two, default_policy({"budgets": [DAY]}), 3) == {}


@pytest.mark.parametrize("field", first_quick(1, ["policy_version", "policy_digest", "policy"]))
async def test_a_policy_that_was_changed_by_hand_is_not_used(redis_client: Redis, field: str) -> None:
    async with open_gates(redis_client, 1) as gates:
        await apply_policy(gates, default_policy(), ME)
        (gate,) = gates
        stored = json.loads((await gate.policy()).payload)
        stored["content"]["plans"]["trial"]["cap_usd"] = "5000"
        changed = {"policy_version": "7", "policy_digest": "0" * 64, "policy": json.dumps(stored)}[field]
        await redis_client.hset(gate.keys.meta, field, changed)
        with pytest.raises(PolicyUnreadable, match="partition 0"):
            policy_in_force(await gate.policy())


async def put_in_force(calling: Calling, policy: Policy) -> None:
    handle = calling.runtime.handle
    await apply_policy(build_gates(handle, calling.runtime.settings), policy, ME)


async def run(calling: Calling, call_id: str, **fields: Any) -> InferenceResult:
    call = calling.call(call_id, run_id=call_id, **fields)
    acquired = await calling.runtime.reservations.acquire(call, LIMITS)
    if acquired.hold is None:
        assert acquired.result is not None
        return acquired.result
    return await calling.runtime.runner.run(acquired.call, acquired.hold)


async def test_a_process_learns_of_a_change_with_its_next_reservation(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(5, budgets=[DAY]))
        assert (await run(calling, "one")).status is TaskStatus.DONE
        await put_in_force(calling, trial_at("0.0001", budgets=[DAY]))
        refused = await run(calling, "two")
        assert (refused.status, refused.error_code) == (TaskStatus.DENIED, ErrorCode.PLAN_LIMIT_REACHED)
        await put_in_force(calling, trial_at(9, budgets=[DAY | {"cap_usd": 2}]))
        assert (await run(calling, "three")).status is TaskStatus.DONE
        reserved = [each for each in await calling.events("three") if isinstance(each.payload, BudgetReserved)]
        (payload,) = [each.payload for each in reserved]
        assert isinstance(payload, BudgetReserved)
        assert payload.cap_nanousd == 9_000_000_000
        assert [stamp.cap_nanousd for stamp in payload.budgets] == [2_000_000_000]
        await calling.check_guarantees()
        assert await findings(calling, tmp_path) == []


async def test_new_task_types_and_routes_need_no_restart(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        client = InferenceClient("generate_draft", calling.runtime)
        assert (await client.call("Tell me", user_id="u1")).model_used is not None
        route = {"model": "openai/gpt-4o-mini", "max_tokens": 50}
        await put_in_force(calling, default_policy({"tasks": {"summarize": route, "generate_draft": route}}))
        assert (await client.call("Tell me more", user_id="u1")).status is TaskStatus.DONE
        assert (await run(calling, "new", task="summarize")).status is TaskStatus.DONE
        models = [
            each.payload.bound.model for each in await calling.events() if isinstance(each.payload, BudgetReserved)
        ]
        assert models[1:] == ["openai/gpt-4o-mini"] * 2


async def test_a_worker_follows_streams_and_their_concurrency(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        runtime, pipeline = calling.runtime, calling.runtime.handle.pipeline
        worker = build_worker(runtime, tuple(runtime.rules.streams), "w1")
        limited = build_worker(runtime, ("generation",), "w2")
        following = PolicyFollowing(runtime, worker, takes_all=True)
        await following.look()
        assert not following.added.is_set()
        streams = {"shop": {"concurrency": 3}, "generation": {"concurrency": 2}}
        await put_in_force(calling, default_policy({"streams": streams}))
        for each, takes_all in ((worker, True), (limited, False)):
            await PolicyFollowing(runtime, each, takes_all=takes_all).look()
            assert (each.concurrency["generation"], each.concurrency["shop"]) == (2, 3)
        assert ("shop" in worker.claims.streams, limited.claims.streams) == (True, ("generation",))
        assert await pipeline.execute("XLEN", "shop") == 0, "the stream has its group"

        # A stream that another Tollbook serves is left to it; what this one serves, it serves on.
        await pipeline.execute("HSET", STREAM_OWNERS, "sales", "other")
        await put_in_force(calling, default_policy({"streams": streams | {"sales": {}}}))
        with pytest.raises(StreamTaken):
            await following.look()
        assert "sales" not in worker.claims.streams


async def test_a_task_type_that_is_gone_is_refused_with_the_policys_names(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        call = calling.call("one", task="score_post")
        policy = default_policy()
        fewer = policy.model_copy(update={"tasks": {"generate_draft": policy.tasks["generate_draft"]}})
        await put_in_force(calling, fewer)
        with pytest.raises(InvalidTask, match="must be one of 'generate_draft', 'ping', not 'score_post'"):
            await calling.runtime.reservations.acquire(call, LIMITS)


async def test_an_extension_is_checked_against_the_policy_in_force(server_url: str, tmp_path: Path) -> None:
    """The hold was made under a cap that a fallback no longer fits; the first model fails."""
    async with open_calling(server_url, tmp_path, retries=0) as calling:
        await put_in_force(calling, trial_at(5))
        call = calling.call("one")
        acquired = await calling.runtime.reservations.acquire(call, LIMITS)
        assert isinstance(acquired.hold, Hold)
        await put_in_force(calling, trial_at(0))
        calling.script("http_500")
        result = await calling.runtime.runner.run(acquired.call, acquired.hold)
        kinds = [(each.type, getattr(each.payload, "kind", None)) for each in await calling.events("one")]
        assert ("budget-reserved", "extension") not in kinds
        assert result.status in (TaskStatus.FAILED, TaskStatus.DONE)
        await calling.check_guarantees()


async def test_checks_and_recorded_spend_follow_the_policy(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        tracker = CostTracker(calling.runtime)
        assert (await tracker.get_usage_summary("u1")).cap_usd == 5
        await put_in_force(calling, trial_at(2, budgets=[DAY]))
        assert (await tracker.get_usage_summary("u1")).cap_usd == 2
        await put_in_force(calling, trial_at(1, budgets=[DAY]))
        assert await tracker.record_usage("u1", "0.75")
        charge = (await calling.events())[-1].payload
        assert [stamp.budget.split(":")[0] for stamp in getattr(charge, "budgets", ())] == ["day"]
        with pytest.raises(PlanLimitReached):
            await tracker.check_budget("u1", estimated_cost_usd="0.5")


async def test_two_processes_of_different_policies_never_hold_by_two_caps(server_url: str, tmp_path: Path) -> None:
    """A burst through two runtimes of one ledger while the policy changes: every hold is by the policy at its place."""
    async with open_calling(server_url, tmp_path, hold_wait_s=0.0) as calling:
        handle, settings = calling.runtime.handle, calling.runtime.settings
        other = replace(handle, policies=await CurrentPolicy.of_ledger(handle.pipeline, handle.keys))
        reader = asyncio.to_thread
        async with open_runtime(settings, other, lambda names: reader(calling.store.baselines, names)) as second:
            runtimes = (calling.runtime, second)

            async def burst(number: int) -> InferenceResult:
                runtime = runtimes[number % 2]
                task = calling.call(f"t{number}", run_id=f"run-{number}").task
                client = InferenceClient("generate_draft", runtime)
                try:
                    return await client.call(str(task.prompt), user_id="u1", task_id=f"t{number}")
                except (PlanLimitReached, BudgetWaitTimeout) as exc:
                    return InferenceResult(task_id=f"t{number}", status=TaskStatus.DENIED, user_id="u1", error=str(exc))

            async def change() -> None:
                for cap in ("0.2", "0.05", "1", "0.1"):
                    await put_in_force(calling, trial_at(cap))

            results, _ = await asyncio.gather(asyncio.gather(*(burst(number) for number in range(30))), change())
        assert {each.status for each in results} <= {TaskStatus.DONE, TaskStatus.DENIED}
        cap = 5_000_000_000
        for event in await calling.events():
            if isinstance(event.payload, PolicyApplied):
                cap = round(float(event.payload.content["plans"]["trial"]["cap_usd"]) * 1e9)
            elif isinstance(event.payload, BudgetReserved):
                assert event.payload.cap_nanousd == cap, "decided by another policy than the one in force there"
        await calling.check_guarantees()
        assert await findings(calling, tmp_path) == []


async def findings(calling: Calling, directory: Path) -> list[str]:
    """Verify the ledger as it is now."""
    handle = calling.runtime.handle
    source = LedgerSource(handle.ledger_id, handle.keys, Archive(directory / "no-archive"), handle.redis)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        verdict = await verify(source, Options(Path(folder)))
    return [f"{each.kind}: {each.problem}" for each in verdict.findings]


@pytest.mark.slow
async def test_verify_recomputes_caps_from_policies(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(4, users={"vip": 100}, budgets=[DAY]))
        for number, user in enumerate(("u1", "vip")):
            assert (await run(calling, f"t{number}", user_id=user)).status is TaskStatus.DONE
        await calling.set_cap(7_000_000_000)
        await run(calling, "assigned")
        await put_in_force(calling, trial_at(6, budgets=[]))
        await run(calling, "later", user_id="u9")
        assert await findings(calling, tmp_path) == []

        # The same ledger, had its policy said something else: every hold under it is named.
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        entries = await calling.raw_events()
        await redis.delete(key.ledger)
        for entry_id, fields in entries:
            changed = dict(fields)
            if fields[b"type"] == b"policy-applied":
                changed[b"payload"] = fields[b"payload"].replace(b'"cap_usd":"4"', b'"cap_usd":"3"')
            await redis.xadd(key.ledger, changed, id=entry_id)  # pyright: ignore[reportArgumentType]
        found = await findings(calling, tmp_path)
        assert any("policy 1 has another content than its digest says" in each for each in found)
        assert any(
            "the cap is stamped 4000000000 nano-dollars, the one in force is 3000000000 by policy 1" in each
            for each in found
        )
        assert not [each for each in found if "vip" in each]


@pytest.mark.slow
async def test_verify_names_a_hold_that_left_a_budget_out(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(4, budgets=[DAY]))
        await run(calling, "one")
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        entries = await calling.raw_events()
        await redis.delete(key.ledger)
        for entry_id, fields in entries:
            changed = dict(fields)
            payload = json.loads(fields[b"payload"])
            if fields[b"type"] == b"budget-reserved":
                changed[b"payload"] = json.dumps({**payload, "budgets": []}).encode()
            await redis.xadd(key.ledger, changed, id=entry_id)  # pyright: ignore[reportArgumentType]
        found = await findings(calling, tmp_path)
        assert "cap: the hold is not against budget day of policy 1 under u1" in found


# What people type, and what is left of it in keys and in JSON as Lua writes it.
HOSTILE: Final = ("50%", "a,b", "x:y", "%2C", "%25,%", "a/b:c,d", "é%ü", "'; DROP--")


@pytest.mark.slow
async def test_values_that_look_like_keys_have_their_own_balance_cap_and_alert(server_url: str, tmp_path: Path) -> None:
    team = {"name": "team", "by": ["team", "user"], "window": "week", "cap_usd": 1, "alerts": [0.4]}
    # So little that two calls' cost reaches 0.4 of it, and that a third does not fit.
    single = {f"{value.replace('%', '%25').replace(',', '%2C')},u1": "0.003" for value in HOSTILE}
    client = {"name": "client", "by": ["team"], "window": "day", "cap_usd": 1, "caps": dict.fromkeys(HOSTILE, "0.5")}
    async with open_calling(server_url, tmp_path) as calling:
        route = {"model": "anthropic/claude-sonnet-4", "max_tokens": 100}
        tasks = {"generate_draft": route}
        await put_in_force(calling, default_policy({"budgets": [team | {"caps": single}, client], "tasks": tasks}))
        calls = [f"t{number}" for number in range(len(HOSTILE))]
        for call_id, value in zip(calls, HOSTILE, strict=True):
            first = await run(calling, call_id, tags={"team": value})
            assert first.status is TaskStatus.DONE, value
            for again in ("more", "most"):
                await run(calling, f"{call_id}-{again}", tags={"team": value})
        stamps = [
            {stamp.budget.split(":", 1)[0]: stamp.cap_nanousd for stamp in event.payload.budgets}
            for event in await calling.events()
            if isinstance(event.payload, BudgetReserved) and event.call_id in calls
        ]
        assert stamps == [{"team": 3_000_000, "client": 500_000_000}] * len(HOSTILE)
        alerts = [event.payload for event in await calling.events() if event.type == "alert-raised"]
        assert {getattr(alert, "cap_nanousd", 0) for alert in alerts} == {3_000_000}
        raised = {getattr(alert, "budget", "").split(":", 1)[1].rsplit(":", 1)[0] for alert in alerts}
        assert raised == set(single)
        await calling.check_guarantees()
        assert await findings(calling, tmp_path) == []


@pytest.mark.slow
async def test_verify_names_a_hold_under_another_value(server_url: str, tmp_path: Path) -> None:
    team = {"name": "team", "by": ["team", "task"], "window": "week", "cap_usd": 1}
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(4, budgets=[team]))
        await run(calling, "one", tags={"team": "50%,red"})
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        entries = await calling.raw_events()
        await redis.delete(key.ledger)
        for entry_id, fields in entries:
            changed = dict(fields) | {b"payload": fields[b"payload"].replace(b":50%25%2Cred,", b":blue,")}
            await redis.xadd(key.ledger, changed, id=entry_id)  # pyright: ignore[reportArgumentType]
        found = await findings(calling, tmp_path)
        assert "cap: the hold is not against budget team of policy 1 under 50%25%2Cred,generate_draft" in found


@pytest.mark.slow
@pytest.mark.parametrize("field", first_quick(1, ["policy_version", "policy_digest", "policy"]))
async def test_verify_names_a_policy_that_no_event_gives(server_url: str, tmp_path: Path, field: str) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(4))
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        values = {"policy_version": "9", "policy_digest": "0" * 64, "policy": "{}"}
        await redis.hset(key.meta, field, values[field])
        found = await findings(calling, tmp_path)
        assert [each for each in found if each.startswith("policy:")]


async def test_a_policy_that_no_event_gives_stops_the_projector(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(4))
        await calling.folded()
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        stored = json.loads(await redis.hget(key.meta, "policy"))  # pyright: ignore[reportArgumentType]
        forged = json.dumps({**stored, "definitions": {"day": 9}})
        await redis.hset(key.meta, "policy", forged)
        with pytest.raises(PolicyForged, match="policy 1 has another content in Redis than in its event"):
            await calling.projector.wait_for(0, NEVER)


async def test_a_policy_that_is_forged_on_the_stream_stops_the_projector(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(4))
        redis, key = calling.runtime.handle.redis, calling.runtime.handle.keys[0]
        (entry,) = await calling.raw_events()
        payload = json.loads(entry[1][b"payload"]) | {"version": 2}
        fields = dict(entry[1]) | {b"seq": b"2", b"payload": json.dumps(payload).encode()}
        await redis.xadd(key.ledger, fields)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ForgedEvent, match="policy 2 is not the one that the gate put in force"):
            await calling.projector.wait_for(0, NEVER)


def stating(tmp_path: Path, url: str, **settings: Any) -> Settings:
    return load_settings(env_file=None, redis_url=url, data_dir=tmp_path / "data", **settings)


async def test_a_start_applies_its_file_until_somebody_else_has_changed_the_policy(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "tollbook.toml"
    file.write_text("[plans.trial]\ncap_usd = 3\n")
    settings = stating(tmp_path, server_url, policy_file=file)
    async with open_gates(redis_client, 1) as gates:
        await start_policy(settings, gates, "tollbook up")
        assert policy_in_force(await gates[0].policy()).policy == trial_at(3)
        await start_policy(settings, gates, "tollbook up")
        assert await versions(gates) == [1]
        file.write_text("[plans.trial]\ncap_usd = 4\n")
        await start_policy(settings, gates, "tollbook up")
        assert (await versions(gates), policy_in_force(await gates[0].policy()).policy) == ([2], trial_at(4))

        await apply_policy(gates, trial_at(7), ME)
        with pytest.raises(PolicyDiffers, match=r"plan trial: cap \$7 -> \$4"):
            await start_policy(settings, gates, "tollbook up")
        # Without a file or a setting, the ledger's policy counts.
        await start_policy(stating(tmp_path, server_url), gates, "tollbook up")
        assert await versions(gates) == [3]


async def test_a_ledger_without_a_policy_gets_its_first_at_the_next_start(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    settings = stating(tmp_path, server_url, day_cap_nanousd="2")
    async with open_gates(redis_client, 2) as gates:
        with pytest.raises(LedgerUnavailable, match="no policy yet"):
            check_stated_policy(settings, PolicyInForce())
        await start_policy(settings, gates, "tollbook up")
        in_force = policy_in_force(await gates[1].policy())
        assert (in_force.version, [rule.name for rule in in_force.policy.budgets]) == (1, ["day"])
        check_stated_policy(settings, in_force)
        check_stated_policy(stating(tmp_path, server_url), in_force)


def test_settings_alone_are_compared_with_the_parts_that_they_state(server_url: str, tmp_path: Path) -> None:
    policy = default_policy({"budgets": [DAY], "timezone": "Europe/Berlin"})
    in_force = PolicyInForce(3, policy)
    check_stated_policy(stating(tmp_path, server_url, day_cap_nanousd="1"), in_force)
    with pytest.raises(PolicyDiffers, match="TOLLBOOK_DAY_CAP_USD"):
        check_stated_policy(stating(tmp_path, server_url, day_cap_nanousd="2"), in_force)
    with pytest.raises(PolicyDiffers, match=r"plan trial: cap \$5 -> \$3"):
        check_stated_policy(stating(tmp_path, server_url, caps={"plans": {"trial": "3"}}), in_force)


async def test_a_process_whose_file_differs_refuses_to_reserve(server_url: str, tmp_path: Path) -> None:
    async with open_calling(server_url, tmp_path) as calling:
        await put_in_force(calling, trial_at(4))
        settings = calling.runtime.settings.model_copy(update={"day_cap_nanousd": 2_000_000_000})
        with pytest.raises(PolicyDiffers, match="budget day: new"):
            async with open_runtime(settings, calling.runtime.handle, lambda _: asyncio.sleep(0)):  # pyright: ignore[reportArgumentType]
                pass
        assert period()
