"""Events compared with what the gate left beside them, before they are folded: an event of another program is found.

In the step that appends an event, the gate also writes each of its moves on the tail of the budget, a refusal, a plan
or a credit as a record under its id, and a policy in `meta`. The comparison is exact for every move of money after the
watermark: entry by entry, and the balance after the last. Entries up to the watermark may be gone; but the watermark
only passes what was folded, hence compared.

Not compared are attempts, fallbacks and seals: they move no money. `tollbook verify` compares attempts and fallbacks
with the records of their calls, and seals with the archive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import duckdb
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.call_record import RECORD_KEPT_MS, parse_call_record
from tollbook.ledger.gate.policies import POLICY_FIELDS, StoredPolicy
from tollbook.ledger.keys import Keys
from tollbook.ledger.packaged import packaged_text
from tollbook.ledger.projection.fold import statement
from tollbook.ledger.server.servers import clock_ms, read_together
from tollbook.schemas.identifiers import EntryId, describe_budget
from tollbook.schemas.money import format_usd

# Read in one step of the server; others wait meanwhile.
_MAX_ENTRIES: Final = 5_000
_MAX_KEYS: Final = 500


class ForgedEvent(LedgerRefused):
    """An event that the gate cannot have written. Neither it nor what follows is folded."""

    def __init__(self, *, partition: int, seq: int, entry_id: str, problem: str) -> None:
        super().__init__(
            f"partition {partition}: event {seq} ({entry_id}) was not written by the gate: {problem}. Neither it nor "
            "what follows is folded. Find out who writes to Redis, run `tollbook verify`, and restore Redis"
        )
        self.partition = partition
        self.seq = seq
        self.entry_id = entry_id


class TailChanged(LedgerRefused):
    """The gate's own balance of a budget is not the one that the events give."""

    def __init__(self, *, partition: int, budget: str, problem: str) -> None:
        super().__init__(
            f"partition {partition}: {describe_budget(budget)}: {problem}: the tail was changed in Redis, and not by "
            "the gate. Run `tollbook verify`, and restore Redis"
        )
        self.partition = partition
        self.budget = budget


class WatermarkMoved(LedgerUnavailable):
    """Another projector has trimmed the tails that events were to be checked against. They can be read again."""


class Doubted(Exception):
    """Gate and projection disagree, and either may be wrong: `refusal` is the reason if DuckDB is in order."""

    def __init__(self, refusal: LedgerRefused) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class _Part(NamedTuple):
    """Consecutive entries that must be on a budget's tail. `balance` is after the last; None if more entries follow."""

    budget: str
    after_ms: int
    after_n: int
    entries: int
    digest: str
    balance: str | None


class _Move(NamedTuple):
    seq: int
    id: str
    settled: int
    held: int


class _Other(NamedTuple):
    seq: int
    id: str
    ms: int
    type: str
    call_id: str
    user_id: str
    content_hash: str | None


class _Repeated(NamedTuple):
    seq: int
    id: str
    type: str
    call_id: str


class _Policy(NamedTuple):
    seq: int
    id: str
    version: int
    digest: str
    before: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What the gate must have left beside the events of a batch after `after`."""

    after: EntryId
    parts: Sequence[_Part]
    others: Sequence[_Other]
    repeated: Sequence[_Repeated]
    policies: Sequence[_Policy]


def read_expected(cursor: duckdb.DuckDBPyConnection, after: EntryId) -> Expected:
    """Read it from the tables of a fold that is not committed yet. Blocks. Errors: duckdb.Error."""
    given = {"ms": after.ms, "n": after.seq}
    parts = [_Part(*row) for row in cursor.execute(statement("trace_moves"), given).fetchall()]
    others = [_Other(*row) for row in cursor.execute(statement("trace_others"), given).fetchall()]
    policies = list[_Policy]()
    if any(other.type == "policy-applied" for other in others):
        # Asked for only then, since it looks through all events.
        policies = [_Policy(*row) for row in cursor.execute(statement("trace_policies")).fetchall()]
        others = [other for other in others if other.type != "policy-applied"]
    repeated = list[_Repeated]()
    if any(other.type != "budget-denied" for other in others):
        # As above.
        rows = cursor.execute(statement("trace_commands"), {"kept_ms": RECORD_KEPT_MS}).fetchall()
        repeated = [_Repeated(*row) for row in rows]
    return Expected(after, parts, others, repeated, policies)


def read_moves(cursor: duckdb.DuckDBPyConnection, budget: str, after: EntryId) -> list[_Move]:
    """Read the moves of one budget in the batch. Blocks. Errors: duckdb.Error."""
    given = {"budget": budget, "ms": after.ms, "n": after.seq}
    return [_Move(*row) for row in cursor.execute(statement("trace_entries"), given).fetchall()]


def check_stamps(
    cursor: duckdb.DuckDBPyConnection, *, partition: int, first_seq: int, last_seq: int, after: EntryId
) -> None:
    """Check what the gate stamped in the events. Blocks. Errors: Doubted; duckdb.Error."""
    given = {"partition": partition, "first": first_seq, "last": last_seq, "ms": after.ms, "n": after.seq}
    for seq, entry_id, budget, kind, stamped, recomputed in cursor.execute(statement("trace_stamps"), given).fetchall():
        says = "-" if stamped is None else _usd(stamped)
        problem = (
            f"{describe_budget(budget)} is stamped {says} committed, the events give {_usd(recomputed)}"
            if kind == "committed"
            else f"{describe_budget(budget)} has {_usd(recomputed)} committed then, its cap is {says}"
        )
        raise Doubted(ForgedEvent(partition=partition, seq=seq, entry_id=entry_id, problem=problem))  # G8


class Traces:
    """What the gate left in one partition. Errors of every method: LedgerUnavailable; RedisError; TimeoutError."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._script = packaged_text("tollbook.ledger.projection", "traces.lua")

    @property
    def partition(self) -> int:
        """The partition's number."""
        return self._keys.partition

    async def differing(self, expected: Expected) -> list[str]:
        """Return the budgets whose tails are not what the events say."""
        found = set[str]()
        for parts in _grouped(expected.parts):
            try:
                answers = await self._read(expected.after, parts)
            except ResponseError as exc:
                await self._check_types(parts, exc)
                raise
            for part, answer in zip(parts, answers, strict=True):
                digest, _, balance = answer.partition(" ")
                if digest != part.digest or part.balance not in (None, balance):
                    found.add(part.budget)
        return sorted(found)

    async def explain(self, budget: str, moves: Sequence[_Move], after: EntryId) -> LedgerRefused | Doubted:
        """Return what is wrong with a budget whose tail differs: the first event that is not on it, or its balance."""
        tail = await self._tail(budget, after)
        partition, what = self._keys.partition, describe_budget(budget)
        for move in moves:
            written = tail.pop(move.id, None)
            if written is None:
                problem = f"its change of {what} is not on the gate's tail"
            elif written[:2] != (move.settled, move.held):
                problem = (
                    f"it moves {what} by {_usd(move.settled)} settled and {_usd(move.held)} held, "
                    f"the gate wrote {_usd(written[0])} and {_usd(written[1])}"
                )
            else:
                continue
            return ForgedEvent(partition=partition, seq=move.seq, entry_id=move.id, problem=problem)
        unknown = [entry_id for entry_id in tail if EntryId.parse(entry_id) < EntryId.parse(moves[-1].id)]
        if unknown:
            return TailChanged(partition=partition, budget=budget, problem=f"it has {unknown[0]}, which no event gives")
        problem = f"the balance after event {moves[-1].seq} ({moves[-1].id}) is not the one that the events give"
        return Doubted(TailChanged(partition=partition, budget=budget, problem=problem))

    async def check_others(self, expected: Expected) -> None:
        """Check that refusals, plans and credits have their records, each its own. Errors: ForgedEvent."""
        if not expected.others:
            return
        oldest_ms = await clock_ms(self._redis, self._keys.meta) - RECORD_KEPT_MS
        others = [other for other in expected.others if other.ms > oldest_ms]
        for start in range(0, len(others), _MAX_KEYS):
            page = others[start : start + _MAX_KEYS]
            commands = [("GET", self._keys.call(other.call_id)) for other in page]
            values = await read_together(self._redis, self._keys.meta, commands, is_one_moment=False)
            for other, value in zip(page, values, strict=True):
                if isinstance(value, Exception) and "WRONGTYPE" not in str(value):
                    raise value
                if (problem := _record_problem(other, value)) is not None:
                    raise self._forged(other, f"{other.type} {other.call_id} {problem}")  # G8
        for each in expected.repeated:
            raise self._forged(each, f"{each.type} {each.call_id} comes again")  # G8

    def _forged(self, event: _Other | _Repeated, problem: str) -> ForgedEvent:
        return ForgedEvent(partition=self._keys.partition, seq=event.seq, entry_id=event.id, problem=problem)

    async def check_policies(self, expected: Expected) -> None:
        """Check that applied policies are in `meta`, or older than the one there. Errors: ForgedEvent."""
        if not expected.policies:
            return
        found: Any = await cast("Any", self._redis).hmget(self._keys.meta, *POLICY_FIELDS)
        stored = StoredPolicy.of_fields(found)
        for each in expected.policies:
            if each.version <= each.before:
                problem = f"policy {each.version} comes after policy {each.before}"
            elif each.version > stored.version or (each.version == stored.version and each.digest != stored.digest):
                problem = f"policy {each.version} is not the one that the gate put in force"
            else:
                continue
            raise ForgedEvent(partition=self._keys.partition, seq=each.seq, entry_id=each.id, problem=problem)  # G11

    async def _read(self, after: EntryId, parts: Sequence[_Part]) -> list[str]:
        keys = [self._keys.meta, *(self._keys.tail(part.budget) for part in parts)]
        arguments = [after.ms, after.seq, *(value for part in parts for value in part[1:4])]
        reply: Any = await cast("Any", self._redis).eval(self._script, len(keys), *keys, *arguments)
        code, *answers = (_text(value) for value in cast("list[bytes | str]", reply))
        if code == "TRIMMED":
            raise WatermarkMoved(f"the watermark has moved to {answers[0]} meanwhile; the events are read again")
        return answers

    async def _check_types(self, parts: Sequence[_Part], problem: ResponseError) -> None:
        """Find the tail that is no list, if that is the problem. Errors: TailChanged."""
        if "WRONGTYPE" not in str(problem):
            return
        for part in parts:
            kind = _text(await self._redis.type(self._keys.tail(part.budget)))
            if kind not in ("list", "none"):
                raise TailChanged(  # G8
                    partition=self._keys.partition, budget=part.budget, problem=f"its tail is a {kind}"
                ) from problem

    async def _tail(self, budget: str, after: EntryId) -> dict[str, tuple[int, int]]:
        entries: Any = await cast("Any", self._redis.lrange(self._keys.tail(budget), 0, -1))
        tail = dict[str, tuple[int, int]]()
        for entry in entries:
            try:
                entry_id, settled, held, _, _ = _text(entry).split(" ")
                if EntryId.parse(entry_id) > after:
                    tail[entry_id] = (int(settled), int(held))
            except ValueError as exc:
                problem = f"it has an entry {_text(entry)!r}"
                raise TailChanged(partition=self._keys.partition, budget=budget, problem=problem) from exc  # G8
        return tail


def _grouped(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Yield the parts in groups that the server reads in a few milliseconds."""
    group, entries = list[_Part](), 0
    for part in parts:
        if group and (len(group) == _MAX_KEYS or entries + part.entries > _MAX_ENTRIES):
            yield group
            group, entries = [], 0
        group.append(part)
        entries += part.entries
    if group:
        yield group


def _record_problem(other: _Other, value: bytes | Exception | None) -> str | None:
    """Return what is wrong with the record under an event's id, or None where it is the event's own."""
    if value is None:
        return "has no record"
    try:
        record = parse_call_record(value) if isinstance(value, bytes) else None
    except ValueError:
        record = None
    if record is None:
        return "has a record that the gate has not written"
    if other.type == "budget-denied":
        is_own = record.state == "denied"
    else:
        is_own = record.state == "settled" and record.hold.hold == 0 and not record.settled
    is_same = other.content_hash in (None, record.content_hash) and record.user_id == other.user_id
    return None if is_own and is_same else "has the record of something else"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _usd(nanousd: int) -> str:
    return format_usd(nanousd, places=None)
