"""Gate checks: the gate as it is, against itself without its looks at whether its store has lied (G1, G4, G8).

The other gate is the same source with those pieces replaced: whether the events that a caller was told of are still
on the ledger, whether calls are stopped, whether what the projection says agrees with the tails, and the content's hash
in each event, from which lost calls are entered again. The client is the same on both sides.
"""

import uuid
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from benchmarks.gate import TASKS, Pairs
from benchmarks.measure import Result, Sizes, Target, compare, in_turn
from tollbook.ledger.gate.functions import library_code, load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline

# Text of the gate -> what stands there without its checks.
_WITHOUT: Final = (
    ("'removed_to', 'stopped', 'policy_version')", "'removed_to')"),
    ("stopped = m[5],", "stopped = nil,"),
    ("known = known_events(ledger, seq), policy = m[6] or '0',", "known = nil, policy = who.version,"),
    ("  if who.seen ~= '' and who.seen ~= '0-0' and not has_event(meta, ledger, who.seen) then", "  if false then"),
    ("  meta.known.seq = meta.seq\n  add_known(meta.known, id)\n", ""),
    ("  if q.seq > meta.seq then -- G8", "  if false then"),
    ("  if s ~= q.s or h ~= q.h then -- G8", "  if false then"),
    (
        "local function stamp_hash(stamps, hash)\n",
        "local function stamp_hash(stamps, hash)\n  if true then return end\n",
    ),
)


async def run(directory: Path, sizes: Sizes) -> list[Result]:
    pairs, rounds = sizes.of(8_000, 300), sizes.of(9, 2)
    async with (
        EmbeddedServer(directory / "checked", fsync="always") as checked,
        EmbeddedServer(directory / "unchecked", fsync="always") as unchecked,
        Redis.from_url(checked.url) as with_checks,
        Redis.from_url(unchecked.url) as without,
    ):
        await load_library(with_checks)
        await without.function_load(_unchecked(library_code()), replace=True)
        pipelines = CommandPipeline(with_checks), CommandPipeline(without)
        sides = [await _pairs(pipeline, pairs) for pipeline in pipelines]
        await in_turn(1, *(side.gate for side in sides))
        a, b = await in_turn(rounds, *(side.gate for side in sides))
        for pipeline in pipelines:
            await pipeline.aclose()
    what = f"reserve+settle with every check against none, over the pipeline, {TASKS} tasks"
    return [compare("gate_checks", what, a, b, unit="pairs/s", target=Target(">=", 0.95))]


async def _pairs(pipeline: CommandPipeline, pairs: int) -> Pairs:
    keys, ledger_id = Keys("bench"), str(uuid.uuid4())
    await create_ledger(pipeline, keys, ledger_id=ledger_id, partitions=1)
    gate = Gate(pipeline, keys, ledger_id, idempotency_ttl_s=3_000_000, result_ttl_s=600_000)
    return Pairs("checks", gate, _nothing, pairs)


async def _nothing(stream: str, fields: dict[str, str]) -> None:
    raise NotImplementedError("no side of this benchmark appends without the gate")


def _unchecked(code: str) -> str:
    for old, new in _WITHOUT:
        if code.count(old) != 1:
            raise ValueError(f"the text stands {code.count(old)} times in the gate: {old}")
        code = code.replace(old, new)
    return code
