"""A gate for tests: short requests with defaults, answers in the form of `tests/model.py`.

`capture` returns the command of a request instead of sending it, for tests that change it before they send it.
"""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from redis.asyncio import Redis

from tests.model import Answer
from tests.stateful.gate_driver import answer_of
from tollbook.ledger.errors import LedgerError
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.requests import (
    AdjustRequest,
    AssignRequest,
    AttemptEvent,
    Baseline,
    BudgetCap,
    ChargeRequest,
    CreateKeyRequest,
    NoteRequest,
    Position,
    RecordRequest,
    ReleaseRequest,
    ReserveRequest,
    RevokeKeyRequest,
    SettleRequest,
    WithdrawRequest,
)
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import Argument, CommandPipeline
from tollbook.schemas.identifiers import EntryId, Window

PERIOD = "2026-11"
ALWAYS = Window(PERIOD, 0, 2**52)
CAP = 10
BOTH: tuple[Literal["model-called", "fallback-used"], ...] = ("model-called", "fallback-used")


class Captured(Exception):
    """Carries a command that was captured instead of sent."""

    def __init__(self, command: Sequence[Argument]) -> None:
        super().__init__("captured")
        self.command = list(command)


class CapturingPipeline(CommandPipeline):
    """A pipeline that can capture a command instead of sending it."""

    captures = False

    async def execute(self, *command: Argument) -> Any:
        if self.captures:
            raise Captured(command)
        return await super().execute(*command)


class GateBench:
    """Every command has defaults: user `u` in one period, cap 10, a baseline of nothing at the beginning."""

    def __init__(self, redis: Redis, pipeline: CapturingPipeline, keys: Keys) -> None:
        self.redis = redis
        self.pipeline = pipeline
        self.keys = keys
        self.gate = Gate(pipeline, keys, "ledger-1", idempotency_ttl_s=3_600, result_ttl_s=600)

    async def do(self, name: str, **arguments: Any) -> Answer:
        """Send a command; return the answer, or the refusal, as a tuple."""
        try:
            return answer_of(await getattr(self, name)(**arguments))
        except LedgerError as exc:
            return answer_of(exc)

    async def capture(self, name: str, **arguments: Any) -> list[Any]:
        self.pipeline.captures = True
        try:
            await getattr(self, name)(**arguments)
        except Captured as captured:
            return captured.command
        finally:
            self.pipeline.captures = False
        raise AssertionError("nothing was sent")

    async def events(self) -> list[dict[str, str]]:
        entries: Any = await self.redis.xrange(self.keys.ledger)
        return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]

    async def head(self) -> Position:
        return (await create_ledger(self.pipeline, self.keys, ledger_id="ledger-1", partitions=1)).head

    async def everything(self) -> dict[bytes, bytes | None]:
        """All keys with their serialised values, to see that nothing has changed."""
        return {key: await self.redis.dump(key) async for key in self.redis.scan_iter()}

    def reserve(
        self,
        call: str = "a",
        amount: int = 4,
        *,
        cap: int = CAP,
        user: str = "u",
        further: Sequence[tuple[str, int]] = (),
        content: str = "content",
        worker: str = "worker",
        lease_ms: int = 60_000,
        window: Window = ALWAYS,
        final: bool = False,
        trial: bool = False,
        baselines: Sequence[Baseline] | None = None,
    ) -> Awaitable[Any]:
        budgets = _budgets(user, cap, further)
        request = ReserveRequest(
            call_id=call, user_id=user, window=window, content_hash=content, amount_nanousd=amount, worker=worker,
            lease_ms=lease_ms, payload='{"plan":"trial"}', budgets=budgets, is_final=final, is_trial=trial,
        )  # fmt: skip
        return self.gate.reserve(request, baselines or _nothing(budgets))

    def record(
        self,
        call: str = "a",
        *,
        hold: int = 1,
        begun: int = 2,
        spent: int = 3,
        assumed: int = 1,
        attempt_events: Sequence[Literal["model-called", "fallback-used"]] = BOTH,
        extension: int = 0,
        cap: int = CAP,
        user: str = "u",
        further: Sequence[tuple[str, int]] = (),
        baselines: Sequence[Baseline] | None = None,
    ) -> Awaitable[Any]:
        budgets = _budgets(user, cap, further)
        request = RecordRequest(
            call_id=call, user_id=user, hold=hold, attempts_begun=begun, spent_nanousd=spent, assumed_nanousd=assumed,
            events=tuple(AttemptEvent(kind, begun - 1, "{}") for kind in attempt_events), budgets=budgets,
            extension_nanousd=extension,
        )  # fmt: skip
        return self.gate.record(request, baselines or _nothing(budgets))

    def note(
        self, call: str = "a", *, hold: int = 1, attempt: int = 1, provider: str = "default", generation: str = "gen-1"
    ) -> Awaitable[Any]:
        request = NoteRequest(
            call_id=call, user_id="u", hold=hold, attempt=attempt, provider=provider, generation_id=generation
        )
        return self.gate.note(request)

    def settle(
        self,
        call: str = "a",
        cost: int = 3,
        *,
        hold: int = 1,
        assumed: int = 0,
        attempt: int = 1,
        final: bool = True,
        result: str = '{"done":1}',
        attempt_events: Sequence[Literal["model-called", "fallback-used"]] = (),
        budgets: Sequence[str] = ("user:u:2026-11",),
        baselines: Sequence[Baseline] = (),
    ) -> Awaitable[Any]:
        request = SettleRequest(
            call_id=call, user_id="u", hold=hold, cost_nanousd=cost, assumed_nanousd=assumed, attempt=attempt,
            is_final=final, payload='{"outcome":"done"}', budgets=tuple(budgets), result=result if final else "",
            events=tuple(AttemptEvent(kind, attempt, "{}") for kind in attempt_events),
        )  # fmt: skip
        return self.gate.settle(request, baselines)

    def adjust(
        self,
        call: str = "a",
        cost: int = 2,
        *,
        hold: int = 1,
        assumed: int = 0,
        result: str = "",
        ends: bool = False,
        seen: tuple[int, int] | None = None,
        attempt_events: Sequence[Literal["model-called", "fallback-used"]] = (),
        budgets: Sequence[str] = ("user:u:2026-11",),
        baselines: Sequence[Baseline] = (),
    ) -> Awaitable[Any]:
        request = AdjustRequest(
            call_id=call, user_id="u", hold=hold, cost_nanousd=cost, assumed_nanousd=assumed, attempt=1,
            payload='{"author":"ops"}', budgets=tuple(budgets), result=result,
            events=tuple(AttemptEvent(kind, 1, "{}") for kind in attempt_events), ends_call=ends,
            seen=seen,
        )  # fmt: skip
        return self.gate.adjust(request, baselines)

    def release(
        self,
        call: str = "a",
        amount: int = 1,
        *,
        stands: tuple[int, int] = (3, 1),
        attempt: int = 1,
        budgets: Sequence[str] = ("user:u:2026-11",),
        baselines: Sequence[Baseline] = (),
    ) -> Awaitable[Any]:
        request = ReleaseRequest(
            call_id=call, user_id="u", hold=1, hold_cost_nanousd=stands[0], hold_assumed_nanousd=stands[1],
            attempt=attempt, amount_nanousd=amount, payload='{"author":"ops"}', budgets=tuple(budgets),
        )  # fmt: skip
        return self.gate.release(request, baselines)

    def withdraw(
        self,
        command: str = "k",
        amount: int = 0,
        *,
        kind: Literal["credit-revoked", "plan-cleared"] = "credit-revoked",
        content: str = "content",
    ) -> Awaitable[Any]:
        request = WithdrawRequest(
            command_id=command, user_id="u", period=PERIOD, content_hash=content, type=kind, amount_nanousd=amount,
            payload='{"author":"ops"}', budget=f"user:u:{PERIOD}",
        )  # fmt: skip
        return self.gate.withdraw(request)

    def charge(
        self,
        call: str = "a",
        cost: int = 3,
        *,
        assumed: int = 0,
        content: str = "content",
        budgets: Sequence[str] = ("user:u:2026-11",),
        baselines: Sequence[Baseline] | None = None,
    ) -> Awaitable[Any]:
        request = ChargeRequest(
            call_id=call, user_id="u", period=PERIOD, content_hash=content, cost_nanousd=cost,
            assumed_nanousd=assumed, payload='{"outcome":"recorded"}', budgets=tuple(budgets),
        )  # fmt: skip
        return self.gate.charge(request, baselines or [Baseline(0, 0, Position())] * len(budgets))

    def assign(
        self,
        command: str = "k",
        amount: int = 20,
        *,
        kind: Literal["plan-assigned", "credit-granted"] = "plan-assigned",
        content: str = "content",
        user: str = "u",
        period: str = PERIOD,
    ) -> Awaitable[Any]:
        request = AssignRequest(
            command_id=command, user_id=user, period=period, content_hash=content, type=kind, plan="growth",
            amount_nanousd=amount, payload='{"author":"ops"}', budget=f"user:{user}:{period}",
        )  # fmt: skip
        return self.gate.assign(request)

    def create_key(
        self, key_id: str = "key-1", *, digest: str = "a" * 64, command: str = "k", content: str = "content"
    ) -> Awaitable[Any]:
        request = CreateKeyRequest(
            command_id=command, content_hash=content, key_id=key_id, key_hash=digest,
            payload=f'{{"key_id":"{key_id}","hash":"{digest}","author":"ops","reason":"shop"}}',
        )  # fmt: skip
        return self.gate.create_key(request)

    def revoke_key(
        self, key_id: str = "key-1", *, after_ms: int = 0, command: str = "r", content: str = "content"
    ) -> Awaitable[Any]:
        request = RevokeKeyRequest(
            command_id=command, content_hash=content, key_id=key_id, after_ms=after_ms,
            payload=f'{{"key_id":"{key_id}","author":"ops","reason":"lost"}}',
        )  # fmt: skip
        return self.gate.revoke_key(request)

    def balance(
        self,
        *,
        cap: int = CAP,
        user: str = "u",
        further: Sequence[tuple[str, int]] = (),
        baselines: Sequence[Baseline] | None = None,
    ) -> Awaitable[Any]:
        budgets = _budgets(user, cap, further)
        return self.gate.balance(user_id=user, period=PERIOD, budgets=budgets, baselines=baselines or _nothing(budgets))

    async def trim(self, *, to: EntryId | None = None, budgets: Sequence[str] = ("user:u:2026-11",)) -> Any:
        """Drop the entries of the tails, by default up to the newest event."""
        return await self.gate.trim(to or (await self.head()).entry, budgets)


@asynccontextmanager
async def open_bench(redis: Redis) -> AsyncIterator[GateBench]:
    """A bench on an empty server."""
    await load_library(redis)
    pipeline = CapturingPipeline(redis)
    keys = Keys("bench")
    await create_ledger(pipeline, keys, ledger_id="ledger-1", partitions=1)
    try:
        yield GateBench(redis, pipeline, keys)
    finally:
        await pipeline.aclose()


def _budgets(user: str, cap: int, further: Sequence[tuple[str, int]]) -> tuple[BudgetCap, ...]:
    return (BudgetCap(f"user:{user}:{PERIOD}", cap), *(BudgetCap(*budget) for budget in further))


def _nothing(budgets: Sequence[BudgetCap]) -> tuple[Baseline, ...]:
    return tuple(Baseline(0, 0, Position()) for _ in budgets)
