"""Gate checks: the gate, compared with itself without its checks of its stores (G1, G4, G8).

The other gate is the same source without these checks: whether the events that a caller has seen are still on the
ledger, whether calls are stopped, and whether the projection agrees with the tails; and without the content's hash in
each event, from which lost calls are entered again. The client is the same on both sides. The target is for redis-py's
client, as in the gate's own benchmark.
"""

import uuid
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks.gate import TASKS, Pairs, PlainClient
from benchmarks.measure import Result, Sizes, Target, compare, in_turn
from tollbook.ledger.gate.functions import library_code, load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.embedded import EmbeddedServer
from tollbook.ledger.server.pipeline import CommandPipeline

# Text of the gate -> the same text without its checks.
_WITHOUT: Final = (
    ("'removed_to', 'stopped', 'policy_version')", "'removed_to')"),
    ("stopped = m[5],", "stopped = nil,"),
    ("known = known_events(ledger, seq), policy = m[6] or '0',", "known = nil, policy = version,"),
    ("  if seen ~= '' and seen ~= '0-0' and not has_event(meta, ledger, seen) then", "  if false then"),
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
        clients = PlainClient(with_checks), PlainClient(without)
        pipelines = CommandPipeline(with_checks), CommandPipeline(without)
        results = [
            await _compare("redis-py client", clients, pairs, rounds, target=Target(">=", 0.95)),
            await _compare("over Tollbook's pipeline", pipelines, pairs, rounds),
        ]
        for pipeline in pipelines:
            await pipeline.aclose()
    return results


async def _compare(
    name: str, clients: tuple[Any, Any], pairs: int, rounds: int, *, target: Target | None = None
) -> Result:
    sides = [await _pairs(name, client, pairs) for client in clients]
    await in_turn(1, *(side.gate for side in sides))
    a, b = await in_turn(rounds, *(side.gate for side in sides))
    what = f"reserve+settle with every check against none, {name}, {TASKS} tasks"
    return compare("gate_checks", what, a, b, unit="pairs/s", target=target)


async def _pairs(name: str, client: Any, pairs: int) -> Pairs:
    keys, ledger_id = Keys(f"bench-{type(client).__name__}"), str(uuid.uuid4())
    await create_ledger(client, keys, ledger_id=ledger_id, partitions=1)
    gate = Gate(client, keys, ledger_id, idempotency_ttl_s=3_000_000, result_ttl_s=600_000)
    return Pairs(name.split()[0], gate, _nothing, pairs)


async def _nothing(stream: str, fields: dict[str, str]) -> None:
    raise NotImplementedError("no side of this benchmark appends without the gate")


def _unchecked(code: str) -> str:
    for old, new in _WITHOUT:
        if code.count(old) != 1:
            raise ValueError(f"the text is {code.count(old)} times in the gate, not once: {old}")
        code = code.replace(old, new)
    return code
