"""`doctor` reports everything that stops or endangers calls, with what to do; a system in order has no failed check."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.servers import PATIENCE_S, wait_until
from tests.system import REPLIES, STREAMS, RunningSystem, running_system
from tollbook.app.doctor import examine
from tollbook.app.findings import Finding
from tollbook.cli import app as cli
from tollbook.consumers.backlog import Backlog, DroppedTasks
from tollbook.consumers.service import build_worker, serve_worker
from tollbook.inference.administration import Administration
from tollbook.inference.runtime import now_ms, open_ledger, open_runtime
from tollbook.inference.settings import load_settings
from tollbook.inference.signs_of_life import read_signs, sign_of_life
from tollbook.ledger.errors import BaselineUnavailable, LedgerUnavailable
from tollbook.ledger.gate.asking import NO_PROJECTOR
from tollbook.ledger.gate.baselines import BaselinePage
from tollbook.ledger.gate.ledger import Patience
from tollbook.ledger.gate.requests import ChargeRequest
from tollbook.ledger.gate.unbooked import FOLDER, note_unbooked, unbooked_charge
from tollbook.ledger.keys import GROUP, dropped_tasks, worker_key
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import CostRecorded, payload_json
from tollbook.schemas.identifiers import EntryId, month_at
from tollbook.views import tables

TASK = {"task": "score_post", "user_id": "u1", "prompt": "a post", "reply_to": REPLIES}


@dataclass
class Place:
    """A running system on a server of its own."""

    running: RunningSystem
    server: EmbeddedServer

    @property
    def redis(self) -> Redis:
        return self.running.redis

    async def findings(self, **changes: Any) -> list[Finding]:
        settings = self.running.system.runtime.settings.model_copy(update={"allow_unsynced": False, **changes})
        return await examine(settings)

    async def failed(self, **changes: Any) -> dict[str, str]:
        return {each.check: each.found for each in await self.findings(**changes) if each.state == "failed"}


@pytest.fixture
async def place(private_server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Place]:
    async with running_system(tmp_path / "system", private_server.url, segment_events=5) as running:
        tasks = [{**TASK, "task_id": f"t{number}"} for number in range(5)]
        await running.publish(STREAMS[0], tasks)
        await running.answers(task["task_id"] for task in tasks)
        await running.fold_all()
        yield Place(running, private_server)


async def test_a_system_in_order_is_found_in_order(place: Place) -> None:
    findings = await place.findings()
    assert {each.check: each.found for each in findings if each.state != "ok"} == {}
    found = {each.check: each.found for each in findings}
    assert "/0, database 0" in found["redis"]
    assert found["writes"] == "a hold could be written and announced now"
    assert found["processes"] == "1 up"
    assert found["projector"] == "alive"
    assert found["ledger"] == "it still has the last folded event"


@pytest.mark.slow
async def test_requests_without_an_answer_are_summed_up_by_reason(place: Place) -> None:
    prompts = ["out_of_credit", "out_of_credit", "reasoning_used_up_limit"]
    tasks = [
        {**TASK, "task_id": f"f{number}", "prompt": f"[[fault={name}]]", "model": "anthropic/claude-3-haiku"}
        for number, name in enumerate(prompts)
    ]
    await place.running.publish(STREAMS[0], tasks)
    await place.running.answers(task["task_id"] for task in tasks)
    await place.running.fold_all()
    (found,) = [each for each in await place.findings() if each.check == "failures"]
    assert found.state == "warning"
    assert found.found == (
        "requests without an answer in the last hour: 2 out_of_credit (anthropic/claude-3-haiku), "
        "1 output_limit (anthropic/claude-3-haiku)"
    )
    assert "no credit left" in found.advice


@pytest.mark.slow
async def test_a_server_that_takes_no_writes(place: Place) -> None:
    await place.redis.config_set("maxmemory", 1)
    failed = await place.failed()
    await place.redis.config_set("maxmemory", 0)
    assert "its memory is used up: raise maxmemory" in failed["writes"]
    assert "1 MiB" in failed["memory"] or "of its limit of 0 MiB" in failed["memory"]


@pytest.mark.slow
async def test_a_full_server_is_not_taken_for_one_without_processes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be renewed in it: neither the projector's lease nor a worker's heartbeat."""

    async def unread(*_: Any) -> Backlog:
        return Backlog(unread=3, read=0, dropped=0)

    monkeypatch.setattr("tollbook.app.process_findings.read_backlog", unread)
    await place.redis.config_set("maxmemory", 1)
    names = [each["name"].decode() for each in await place.redis.xinfo_consumers(STREAMS[1], GROUP)]
    await place.redis.delete("tollbook:projector", *(worker_key("tollbook", name) for name in names))
    failed = await place.failed()
    await place.redis.config_set("maxmemory", 0)
    for check in ("projector", f"stream {STREAMS[1]}"):
        assert "its memory is used up: raise maxmemory" in failed[check], failed
        assert "no projector is alive" not in failed[check]


@pytest.mark.slow
async def test_a_worker_that_holds_tasks_back_is_named(place: Place, tmp_path: Path) -> None:
    """As one whose requests the projector does not hear, while everything else is in order."""
    settings = place.running.system.runtime.settings.model_copy(update={"data_dir": tmp_path / "elsewhere"})

    async def read(names: Sequence[str], /) -> BaselinePage:
        raise BaselineUnavailable(NO_PROJECTOR)

    async with (
        open_ledger(settings, place.server.url, part="worker") as handle,
        open_runtime(settings, handle, read, patience=Patience()) as runtime,
    ):
        worker = build_worker(runtime, STREAMS[2:3], runtime.name)
        stop = asyncio.Event()
        serving = asyncio.create_task(serve_worker(runtime, worker, stop, redis_url=place.server.url))
        failed, number = dict[str, str](), 0
        async with asyncio.timeout(PATIENCE_S):
            while "tasks" not in failed:
                # The other worker takes some of them, and executes them.
                tasks = [{**TASK, "task_id": f"held-{number + n}", "user_id": "u9"} for n in range(20)]
                await place.running.publish(STREAMS[2], tasks)
                failed, number = await place.failed(), number + 20
        stop.set()
        await serving
    assert set(failed) == {"tasks"}
    assert failed["tasks"].startswith("worker ")
    assert "holds tasks back: no projector runs" in failed["tasks"]


async def test_tasks_that_are_no_longer_held_back_are_no_longer_reported(
    redis_client: Redis, server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = CommandPipeline(redis_client)
    async with sign_of_life(pipeline, load_settings(env_file=None), name="w1", part="worker") as sign:
        sign.hold_back(LedgerUnavailable("no\n projector"))
        await sign.show()
        assert [each.holds_back for each in await read_signs(pipeline, "tollbook")] == ["no projector"]
        now = asyncio.get_running_loop().time()
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + 31)
        await sign.show()
        assert [each.holds_back for each in await read_signs(pipeline, "tollbook")] == [None]
        monkeypatch.undo()
    await pipeline.aclose()


@pytest.mark.slow
async def test_caps_and_credits_changed_in_redis(place: Place) -> None:
    keys, runtime = place.running.keys, place.running.system.runtime
    administration = Administration(runtime.ledger, runtime.policies, runtime.user_ids)
    await administration.grant_credit("u1", 5, Signature("ann", "gift"))
    period = month_at(now_ms()).name
    await place.running.fold_all()
    assert await place.failed() == {}
    await place.redis.hset(keys.account("u1"), f"credit:{period}", 7_000_000_000)
    await place.redis.hset(keys.account("stranger"), mapping={"plan": "trial", "cap_nanousd": 900_000_000_000})
    failed = [each.found for each in await place.findings() if each.check == "accounts"]
    assert failed == [
        "user stranger: the cap is $900.00 in Redis, none by the events",
        "user stranger: the plan is trial in Redis, none by the events",
        f"user u1: the credit of {period} is $7.00 in Redis, $0.000000005 by the events",
    ]
    await place.redis.delete(keys.account("stranger"))
    # What is not folded yet is no fault.
    await place.redis.hset(keys.account("u1"), f"credit:{period}", 5)
    assert await place.failed() == {}


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 80, None])
async def test_nothing_is_cut_in_a_narrow_terminal(
    place: Place, width: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [*await place.findings(), Finding("memory", "failed", "the memory is used up", "raise maxmemory")]

    async def found(*_: Any) -> list[Finding]:
        return findings

    monkeypatch.setattr("tollbook.app.doctor.examine", found)
    if width is not None:
        monkeypatch.setattr(tables, "_UNLIMITED", width)
    assert await asyncio.to_thread(cli.run, ["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    words = " ".join(" ".join(lines).split())
    assert width is None or max(map(len, lines)) <= width
    for finding in findings:
        # A word that is wider than its line is broken, as an address may be.
        assert finding.found.replace(" ", "") in words.replace(" ", ""), finding
        assert finding.advice.replace(" ", "") in words.replace(" ", ""), finding


@pytest.mark.slow
async def test_a_server_that_does_not_sync_every_write(place: Place) -> None:
    for setting, value, words in (
        ("no-appendfsync-on-rewrite", "yes", "no-appendfsync-on-rewrite is yes"),
        ("appendfsync", "everysec", "appendfsync is everysec"),
        ("maxmemory-policy", "allkeys-lru", "keys can be evicted"),
    ):
        kept: Any = await place.redis.config_get(setting)
        await place.redis.config_set(setting, value)
        assert words in (await place.failed())["persistence"]
        await place.redis.config_set(setting, kept[setting])
    assert await place.failed() == {}


async def test_a_user_without_permissions(place: Place) -> None:
    await place.redis.execute_command("ACL", "SETUSER", "few", "on", ">pw", "~*", "+@all", "-zadd")
    url = f"redis://few:pw@{place.server.url.rpartition('@')[2]}"
    failed = await place.failed(redis_url=url)
    assert failed["writes"] == "this Redis user may not use the command ZADD, the channels &{tollbook:*"
    # Not even the ledger's size can be read.
    await place.redis.execute_command(
        "ACL", "SETUSER", "others", "on", ">pw", "~tollbook:*", *(f"~{stream}" for stream in STREAMS), "&*", "+@all"
    )
    failed = await place.failed(redis_url=url.replace("few", "others"))
    assert "the keys ~{tollbook:*" in failed["writes"]


@pytest.mark.slow
async def test_calls_that_were_stopped_and_charges_that_are_not_booked(place: Place) -> None:
    keys = place.running.keys
    await place.redis.hset(keys.meta, "stopped", "the ledger went back in time")
    await place.redis.hset(keys.unbooked, "call 1", "{}")
    failed = await place.failed()
    await place.redis.hdel(keys.meta, "stopped")
    assert failed["calls"] == "stopped in partition 0: the ledger went back in time"
    assert failed["unbooked"] == "1 charge of partition 0 could not be booked"


@pytest.mark.slow
async def test_doctor_finds_an_unbooked_charge_that_only_a_file_has(place: Place) -> None:
    """A Redis that was restored has lost its notes."""
    request = ChargeRequest(
        call_id="usage 1", user_id="u1", period="2026-11", content_hash="c", cost_nanousd=5, assumed_nanousd=0,
        payload=payload_json(CostRecorded(basis="reported", outcome="recorded")), budgets=("user:u1:2026-11",),
    )  # fmt: skip
    ledger_id = place.running.system.handle.ledger_id
    note = unbooked_charge(request, ledger_id=ledger_id, partition=0, seen=EntryId(2**45, 0), process="")
    pipeline = place.running.system.handle.pipeline
    folder = place.running.system.runtime.settings.data_dir / FOLDER
    await note_unbooked(pipeline, place.running.keys, note, folder=folder)
    await place.redis.delete(place.running.keys.unbooked)
    assert (await place.failed())["unbooked"] == "1 charge of partition 0 could not be booked"


@pytest.mark.slow
async def test_a_recovery_that_was_interrupted(place: Place) -> None:
    keys = place.running.keys
    await place.redis.hset(keys.meta, "recovering", "{}")
    failed = {each.check: each for each in await place.findings() if each.state == "failed"}
    await place.redis.hdel(keys.meta, "recovering")
    assert failed["recovery"].found == "the recovery of partition 0 is not finished"
    assert "`tollbook recover`" in failed["recovery"].advice


async def test_a_ledger_that_lacks_what_was_folded(place: Place) -> None:
    keys = place.running.keys
    newest: Any = await place.redis.xrevrange(keys.ledger, count=1)
    await place.redis.xdel(keys.ledger, newest[0][0])
    assert "is no longer on the ledger: the ledger went back in time" in (await place.failed())["ledger"]
    # Put back for the orderly end.
    await place.redis.execute_command("XADD", keys.ledger, "MAXLEN", 0, "*", "a", "b")


@pytest.mark.slow
async def test_an_archive_that_lacks_a_segment(place: Place) -> None:
    assert "events up to 3 were trimmed" in (await with_removed(place, "3"))["archive"]


async def with_removed(place: Place, number: str) -> dict[str, str]:
    meta = place.running.keys.meta
    before = await place.redis.hget(meta, "removed")
    await place.redis.hset(meta, "removed", number)
    failed = await place.failed(archive_dir=Path("nowhere"))
    await place.redis.hset(meta, "removed", before or "0")
    return failed


async def test_no_projector(place: Place) -> None:
    async def is_told() -> bool:
        # Again and again, since the projector takes its lease anew every few seconds.
        await place.redis.delete("tollbook:projector")
        return "no projector is alive" in (await place.failed()).get("projector", "")

    await wait_until(is_told, what="the missing projector")


@pytest.mark.slow
async def test_a_process_that_decides_by_other_settings_is_named(place: Place) -> None:
    settings = place.running.system.runtime.settings
    others = settings.model_copy(update={"hold_wait_s": 5.0})
    async with open_ledger(settings, place.server.url, part="worker"), open_ledger(others, place.server.url):
        findings = await place.findings()
        (reported,) = (each for each in findings if each.check == "settings" and each.state == "failed")
        assert reported.found.startswith("application ")
        assert reported.found.endswith("has another TOLLBOOK_HOLD_WAIT_S than the others")
    # A command whose own settings differ says so, and nothing is wrong with the system.
    findings = await place.findings(hold_wait_s=7.0)
    (reported,) = (each for each in findings if each.check == "settings" and each.state != "ok")
    assert (reported.state, "TOLLBOOK_HOLD_WAIT_S" in reported.found) == ("warning", True)
    assert [sign.part for sign in await read_signs(place.running.system.handle.pipeline, "tollbook")] == ["up"]


@pytest.mark.slow
async def test_a_process_of_another_version_is_told(place: Place) -> None:
    signs: Any = await place.redis.hgetall("tollbook:processes")
    (document,) = (json.loads(each) for each in signs.values())
    await place.redis.hset("tollbook:processes", "old-1", json.dumps({**document, "version": "0.0.1"}))
    (reported,) = (each for each in await place.findings() if each.check == "version")
    assert "old-1 runs version 0.0.1" in reported.found or "the others 0.0.1" in reported.found


@pytest.mark.slow
async def test_holds_that_nobody_settles_and_dead_letters(place: Place) -> None:
    await place.redis.zadd(place.running.keys.holds, {"gone": 1})
    await place.redis.xadd("tollbook:dead-letters", {"a": "b"})
    findings = {each.check: each for each in await place.findings()}
    await place.redis.zrem(place.running.keys.holds, "gone")
    assert findings["holds"].state == "failed"
    assert (findings["dead letters"].state, findings["dead letters"].found) == (
        "warning",
        "1 task could not be executed",
    )


@pytest.mark.slow
async def test_a_little_room_on_the_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr("tollbook.app.doctor.shutil.disk_usage", lambda _: usage._replace(free=100 << 20))
    assert "0.1 GiB free" in (await place.failed())["disk"]


async def test_tasks_that_a_publisher_dropped_unread_are_counted_once(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    stream, pipeline = STREAMS[1], CommandPipeline(redis_client)
    await redis_client.xgroup_create(stream, "tollbook", id="0", mkstream=True)

    async def look(counter: DroppedTasks) -> int:
        await counter.look()
        return int(await redis_client.hget(dropped_tasks("tollbook"), stream) or 0)

    counter = DroppedTasks(pipeline, "tollbook", lambda: [stream])
    for _ in range(15):
        await redis_client.xadd(stream, {"a": "b"})
    await redis_client.xreadgroup("tollbook", "c", {stream: ">"}, count=4)
    counted = list[int]()
    for kept in (15, 11, 8, 7):
        await redis_client.xtrim(stream, maxlen=kept, approximate=False)
        counted.append(await look(counter))
    assert counted == [0, 0, 3, 4], "what was read may be dropped"
    # Another process that begins to count, and a group that has read on, count nothing twice.
    assert await look(DroppedTasks(pipeline, "tollbook", lambda: [stream])) == 4
    await redis_client.xreadgroup("tollbook", "c", {stream: ">"}, count=2)
    assert await look(counter) == 4
    await pipeline.aclose()
    settings = load_settings(env_file=None, redis_url=server_url, data_dir=tmp_path)
    reported = {each.state: each for each in await examine(settings) if each.check == f"stream {stream}"}
    assert reported["warning"].found == "4 tasks dropped unread, by a publisher's MAXLEN"
    assert reported["failed"].found == "5 tasks unread, and no worker reads this stream"
    assert f"tollbook worker --streams {stream}" in reported["failed"].advice
