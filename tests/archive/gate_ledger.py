"""A ledger that the real gate wrote, from a seed: every kind of event, of calls that end in every way.

Sealed in small segments, trimmed in part, folded. Tests that tamper with it work on a copy.
"""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis

from tollbook.audit.opening_balances import spent_reader
from tollbook.inference.policy_changes import apply_policy
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.sealing import Sealer, SealingSettings
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.errors import BudgetCreditTooLow, CreditTooLow, KeyAlreadyRevoked, NoPlanAssigned
from tollbook.ledger.gate.functions import load_library
from tollbook.ledger.gate.gate import Gate, create_ledger
from tollbook.ledger.gate.requests import (
    EMPTY_BASELINE,
    AdjustRequest,
    AssignRequest,
    AttemptEvent,
    BudgetCap,
    ChargeRequest,
    CreateKeyRequest,
    CreditRequest,
    Position,
    RecordRequest,
    ReleaseRequest,
    Reserved,
    ReserveRequest,
    RevokeKeyRequest,
    SettleRequest,
    WithdrawRequest,
)
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.signature import Signature
from tollbook.ledger.stream import StreamReader
from tollbook.schemas.events import (
    BoundPrice,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    CreditExpired,
    CreditGranted,
    CreditRevoked,
    FallbackUsed,
    KeyCreated,
    KeyRevoked,
    ModelCalled,
    PlanAssigned,
    PlanCleared,
    payload_json,
)
from tollbook.schemas.identifiers import EntryId, Window, budget_name, budget_value, day_at, month_at, partition_of
from tollbook.schemas.money import MAX_NANOUSD, usd_from_nanousd
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.usage import Usage

LEDGER = "ledger-of-the-gate"
CAP = 4_000_000
BOUND = BoundPrice(
    model="m/large", prompt_tokens=9, completion_tokens=9, prompt_nanousd_per_mtok=1, completion_nanousd_per_mtok=1
)
NEVER = 10.0**9
WALLET_CAP = CAP // 8
CLIENTS = (None, None, "acme", "a%,:b")
SIGNATURE = Signature("ops", "asked")


def policy_of(*by: str) -> Policy:
    """A policy with alerts, and a prepaid balance for each user and client that begins with what was spent before."""
    budgets: list[dict[str, Any]] = [
        {"name": "day", "by": ["user"], "window": "day", "cap_usd": usd_from_nanousd(CAP - 1_000), "alerts": [0.5, 1]},
        {"name": "spring", "by": ["user", "campaign"], "window": "month", "cap_usd": usd_from_nanousd(CAP)},
        {"name": "wallet", "by": by, "window": "total", "cap_usd": usd_from_nanousd(WALLET_CAP), "alerts": [0.8]},
    ]
    plans = {"growth": {"cap_usd": usd_from_nanousd(CAP), "alerts": [0.25]}}
    return default_policy({"plans": plans, "budgets": budgets})


# The second one has the same attributes in another order, which counts as a new definition.
POLICIES = (policy_of("user", "client"), policy_of("client", "user"))


@dataclass
class Open:
    call_id: str
    user: str
    budgets: tuple[BudgetCap, ...]
    hold: int
    amount: int
    attempt: int
    client: str | None = None
    spent: int = 0


@dataclass
class Settled:
    call: Open
    cost: int
    is_final: bool
    is_done: bool
    recorded: set[int] = field(default_factory=set[int])


class GateLedger:
    """Drives the gates of a ledger at random, then seals and folds."""

    def __init__(self, redis: Redis, directory: Path, seed: int, *, partitions: int = 1) -> None:
        self.redis = redis
        self.directory = directory
        self.keys = tuple(Keys("gate-ledger", number) for number in range(partitions))
        self.pipeline = CommandPipeline(redis)
        self.archive = Archive(directory / "archive")
        self.store = Store.open(directory / "live.duckdb", LEDGER, partitions)
        self.source = LedgerSource(LEDGER, self.keys, self.archive, redis)
        self._gates = [
            Gate(self.pipeline, keys, LEDGER, idempotency_ttl_s=3_000_000, result_ttl_s=3_000) for keys in self.keys
        ]
        self._draw = random.Random(seed)
        self._numbers = count(1)
        self._open: list[Open] = []
        self._settled: list[Settled] = []
        # Per partition, since one of them may have lost a policy.
        self._versions = [0] * partitions
        self._granted: dict[str, str] = {}
        # Keys move no money, so they can come between the other steps without changing them.
        self._key_draw, self._key_numbers = random.Random(seed), count(1_000 * (seed + 1))
        self._created: list[str] = []

    async def begin(self) -> None:
        await load_library(self.redis)
        for keys in self.keys:
            await create_ledger(self.pipeline, keys, ledger_id=LEDGER, partitions=len(self.keys))
        now_ms = await self._gates[0].now_ms()
        # Nothing here waits for a month to end.
        self._window = Window(month_at(now_ms).name, 0, 2**52)
        self._day = day_at(now_ms).name
        await self._read_versions()

    async def aclose(self) -> None:
        self.store.close()
        await self.pipeline.aclose()

    async def run(self, steps: int) -> None:
        actions = (
            [self.reserve] * 6 + [self.record] * 4 + [self.settle] * 5 + [self.reserve_again, self.deny] * 2
            + [self.adjust, self.answer_late, self.release, self.charge]
            + [self.assign, self.credit, self.revoke, self.clear, self.grant, self.take_back]
        )  # fmt: skip
        for number in range(steps):
            if number == steps // 2:
                await self.apply_policy()
            await self._draw.choice(actions)()
            if self._key_draw.random() < 0.06:
                await self._key_draw.choice([self.create_key, self.revoke_key])()

    async def fold(self) -> None:
        for keys in self.keys:
            reader = StreamReader(self.redis, keys)
            while batch := await reader.read_after(self.store.position(keys.partition).entry, count=1_000):
                self.store.fold(batch)
            await reader.aclose()

    async def seal(self, *, segment_events: int = 50, keep_events: int = 10**9) -> None:
        await self.fold()
        settings = SealingSettings(
            segment_events=segment_events, segment_age_s=NEVER, keep_s=NEVER, keep_events=keep_events
        )
        for keys in self.keys:

            async def folded(partition: int = keys.partition) -> Position:
                return self.store.position(partition)

            sealer = Sealer(
                self.redis, self.pipeline, keys, self.archive, ledger_id=LEDGER, settings=settings, folded=folded
            )  # fmt: skip
            while await sealer.seal():
                pass
            await sealer.trim()
        await self.fold()

    @property
    def period(self) -> str:
        """The billing period of every call."""
        return self._window.name

    async def trim(self, partition: int, watermark: EntryId, names: Sequence[str]) -> None:
        """Move the watermark, as a projector does."""
        await self._gates[partition].trim(watermark, names)

    def _gate(self, user: str) -> Gate:
        return self._gates[partition_of(user, len(self._gates))]

    async def _read_versions(self) -> None:
        self._versions = [(await gate.policy()).version for gate in self._gates]

    def _version(self, user: str) -> int:
        return self._versions[partition_of(user, len(self._gates))]

    def _budgets(self, user: str, client: str | None) -> tuple[BudgetCap, ...]:
        version = self._version(user)
        names = [(budget_name("user", user, self._window.name), CAP)]
        if user != "u0" or version:  # Before the first policy, one user has no budget for the day.
            names.append((budget_name("day", user, self._day), CAP - 1_000))
        if self._draw.random() < 0.3:
            name, value = ("spring", f"{user},{user}:spring") if version else ("campaign", f"{user}:spring")
            names.append((budget_name(name, value, self._window.name), CAP))
        if client and version:
            names.append((self._wallet(user, client), WALLET_CAP))
        return tuple(BudgetCap(name, cap) for name, cap in names)

    def _wallet(self, user: str, client: str) -> str:
        values, version = {"user": user, "client": client}, self._version(user)
        name = "wallet" if version == 1 else f"wallet~{version}"
        by = POLICIES[(version - 1) % 2].budgets[-1].by
        return budget_name(name, budget_value([values[each] for each in by]), "total")

    async def apply_policy(self) -> None:
        """Put the next version in force, of the caps that calls are held by here, in every partition."""
        read, policy = spent_reader(self.source), POLICIES[max(self._versions) % 2]
        await apply_policy(self._gates, policy, SIGNATURE, read_spent=read, backfills=True)
        await self._read_versions()
        for call in self._open:
            record = await self._gate(call.user).call_record(call.call_id)
            assert record is not None
            known = {budget.name for budget in call.budgets}
            opened = [name for name in record.hold.budgets if name not in known]
            assert all(name.startswith("wallet") for name in opened)
            call.budgets += tuple(BudgetCap(name, WALLET_CAP) for name in opened)

    async def reserve(self, *, amount: int | None = None, is_final: bool = False) -> None:
        user, client = f"u{self._draw.randrange(4)}", self._draw.choice(CLIENTS)
        amount = amount or self._draw.randrange(10_000, 300_000)
        await self._reserve(f"call-{next(self._numbers)}", user, client, amount, is_final=is_final)

    async def deny(self) -> None:
        """Ask for more than any cap leaves, or for an amount that would fit without the open holds."""
        if self._draw.random() < 0.5:
            await self.reserve(amount=60_000_000)
        else:
            await self.reserve(amount=CAP * 3 // 4, is_final=True)

    async def reserve_again(self) -> None:
        closed = [each for each in self._settled if not each.is_final]
        if closed:
            settled = self._draw.choice(closed)
            self._settled.remove(settled)
            await self._reserve(settled.call.call_id, settled.call.user, settled.call.client, 50_000, is_final=True)

    async def _reserve(self, call_id: str, user: str, client: str | None, amount: int, *, is_final: bool) -> None:
        budgets = self._budgets(user, client)
        request = ReserveRequest(
            call_id=call_id, user_id=user, window=self._window, content_hash="c" * 32, amount_nanousd=amount,
            worker="host:1", lease_ms=600_000, payload=self._order(client), budgets=budgets, is_final=is_final,
            policy_version=self._version(user),
        )  # fmt: skip
        reply = await self._gate(user).reserve(request, [EMPTY_BASELINE] * len(budgets))
        if isinstance(reply, Reserved):
            self._open.append(Open(call_id, user, budgets, reply.hold, amount, reply.attempt, client))

    def _order(self, client: str | None) -> str:
        return payload_json(
            BudgetReserved(
                task_type="generate_draft", stream="generation", plan="growth", worker="host:1", bound=BOUND,
                tags={"client": client} if client else None,
            )
        )  # fmt: skip

    async def record(self) -> None:
        if not self._open:
            return
        call = self._draw.choice(self._open)
        if self._draw.random() < 0.4:
            return
        cost = self._draw.randrange(0, max(1, (call.amount - call.spent) // 3))
        call.spent += cost
        extension = self._draw.choice([0, 0, 20_000])
        events = (
            self._called(call, call.attempt, cost, "timeout"),
            AttemptEvent(
                "fallback-used", call.attempt,
                payload_json(FallbackUsed(hold=call.hold, from_model="m/large", to_model="m/small", reason="timeout")),
            ),
        )  # fmt: skip
        request = RecordRequest(
            call_id=call.call_id, user_id=call.user, hold=call.hold, attempts_begun=call.attempt + 1,
            spent_nanousd=call.spent, assumed_nanousd=0, events=events, budgets=self._with_present_caps(call),
            extension_nanousd=extension, extension_payload=self._extension(),
            policy_version=self._version(call.user),
        )  # fmt: skip
        reply = await self._gate(call.user).record(request, [EMPTY_BASELINE] * len(call.budgets))
        if isinstance(reply, int):
            call.amount, call.attempt = reply, call.attempt + 1

    def _with_present_caps(self, call: Open) -> tuple[BudgetCap, ...]:
        """A budget that was redefined since, or no longer exists, limits nothing."""
        version = self._version(call.user)
        gone = ["campaign:"] if version else []
        if call.client and version:
            present = self._wallet(call.user, call.client)
            gone += [budget.name for budget in call.budgets if budget.name.startswith("wallet")]
            gone = [name for name in gone if name != present]
        return tuple(
            BudgetCap(budget.name, MAX_NANOUSD) if budget.name.startswith(tuple(gone)) else budget
            for budget in call.budgets
        )

    def _extension(self) -> str:
        order = BudgetReserved(
            kind="extension", task_type="generate_draft", plan="growth", worker="host:1", bound=BOUND
        )
        return payload_json(order)

    def _called(self, call: Open, attempt: int, cost: int, outcome: str) -> AttemptEvent:
        called = ModelCalled(
            hold=call.hold, model="m/large", outcome=cast("Any", outcome), latency_ms=self._draw.randrange(9_000),
            charge_nanousd=cost, charge_basis="reported" if outcome == "ok" else "assumed",
            usage=Usage(prompt_tokens=7, completion_tokens=self._draw.randrange(90)) if outcome == "ok" else None,
        )  # fmt: skip
        return AttemptEvent("model-called", attempt, payload_json(called))

    async def settle(self) -> None:
        if not self._open:
            return
        call = self._open.pop(self._draw.randrange(len(self._open)))
        outcome = self._draw.choice(["done", "done", "done", "failed", "expired", "taken_over"])
        cost = self._draw.choice([0, call.amount // 2, call.amount // 2, call.amount, call.amount + 7_000])
        events = (self._called(call, call.attempt, cost, "ok"),) if outcome == "done" else ()
        is_final = outcome in ("done", "failed")
        payload = CostRecorded(
            basis="reported" if cost else "released", outcome=cast("Any", outcome), reason=None if cost else "no money",
            assumed_nanousd=0 if outcome == "done" else cost,
        )  # fmt: skip
        request = SettleRequest(
            call_id=call.call_id, user_id=call.user, hold=call.hold, cost_nanousd=cost,
            assumed_nanousd=payload.assumed_nanousd, attempt=call.attempt, is_final=is_final,
            payload=payload_json(payload), budgets=tuple(budget.name for budget in call.budgets), events=events,
        )  # fmt: skip
        await self._gate(call.user).settle(request, [EMPTY_BASELINE] * len(call.budgets))
        self._settled.append(Settled(call, cost, is_final, outcome == "done"))

    async def adjust(self) -> None:
        if self._settled:
            settled = self._draw.choice(self._settled)
            await self._adjust(settled, self._draw.randrange(0, settled.cost + 2_000), ())

    async def answer_late(self) -> None:
        """An answer after another process settled the hold: its attempt is recorded, its cost corrected."""
        waiting = [each for each in self._settled if not each.is_done and each.call.attempt not in each.recorded]
        if waiting:
            settled = self._draw.choice(waiting)
            settled.recorded.add(settled.call.attempt)
            cost = settled.cost if self._draw.random() < 0.3 else settled.cost // 2
            await self._adjust(settled, cost, (self._called(settled.call, settled.call.attempt, cost, "ok"),))

    async def _adjust(self, settled: Settled, cost: int, events: tuple[AttemptEvent, ...]) -> None:
        call = settled.call
        payload = CostAdjusted(basis="reported", reason="late_answer", author="reconciler")
        request = AdjustRequest(
            call_id=call.call_id, user_id=call.user, hold=call.hold, cost_nanousd=cost, assumed_nanousd=0,
            attempt=call.attempt, payload=payload_json(payload),
            budgets=tuple(budget.name for budget in call.budgets), events=events,
        )  # fmt: skip
        await self._gate(call.user).adjust(request, [EMPTY_BASELINE] * len(call.budgets))
        settled.cost = cost

    async def charge(self) -> None:
        user, client = f"u{self._draw.randrange(4)}", self._draw.choice(CLIENTS)
        budgets = tuple(budget.name for budget in self._budgets(user, client))
        payload = CostRecorded(
            basis="reported", outcome="recorded", model="m/other", tags={"client": client} if client else None
        )
        request = ChargeRequest(
            call_id=f"charge-{next(self._numbers)}", user_id=user, period=self._window.name, content_hash="c" * 32,
            cost_nanousd=self._draw.randrange(9_000), assumed_nanousd=0, payload=payload_json(payload), budgets=budgets,
        )  # fmt: skip
        await self._gate(user).charge(request, [EMPTY_BASELINE] * len(budgets))

    async def assign(self) -> None:
        cap = self._draw.randrange(CAP // 2, 2 * CAP)
        payload = payload_json(PlanAssigned(plan="starter", cap_nanousd=cap, author="ops", reason="asked"))
        await self._assign("plan-assigned", "starter", cap, payload)

    async def credit(self) -> None:
        payload = payload_json(CreditGranted(author="ops", reason="sorry"))
        await self._assign("credit-granted", "", self._draw.randrange(1, CAP // 9), payload)

    async def revoke(self) -> None:
        payload = payload_json(CreditRevoked(author="ops", reason="too much"))
        with contextlib.suppress(CreditTooLow):
            await self._withdraw("credit-revoked", self._draw.randrange(1, CAP // 9), payload)

    async def grant(self) -> None:
        """Credit of a client's balance; some of it is due at once."""
        number = next(self._numbers)
        expires = self._draw.choice([0, 0, 1]) or int(not self._granted)  # The first of them in any case.
        await self._credit("credit-granted", f"credit-{number}", self._draw.randrange(1, CAP // 4), expires)
        if expires:
            await self._credit("credit-expired", f"credit-{number}", 0, expires)

    async def take_back(self) -> None:
        credit = f"credit-{self._draw.randrange(1, next(self._numbers))}"
        with contextlib.suppress(BudgetCreditTooLow):
            await self._credit("credit-revoked", credit, self._draw.choice([0, 100]), 0)

    async def _credit(self, kind: Any, credit: str, amount: int, expires: int) -> None:
        user = self._draw.choice(["u1", "u2"]) if kind == "credit-granted" else self._granted.get(credit)
        if user is None or not self._version(user):
            return
        self._granted[credit] = user
        payload: dict[str, Any] = {"credit": credit, "expires_ms": expires or None}
        signed: dict[str, Any] = payload | {"author": "shop", "reason": "payment"}
        payloads = {
            "credit-granted": lambda: CreditGranted(**signed),
            "credit-revoked": lambda: CreditRevoked(**signed),
            "credit-expired": lambda: CreditExpired(**payload),
        }
        await self._gate(user).change_credit(
            CreditRequest(
                command_id=f"{kind} {credit}", user_id=user, content_hash="c" * 32, type=kind, credit_id=credit,
                amount_nanousd=amount, expires_ms=expires, payload=payload_json(payloads[kind]()),
                budget=BudgetCap(self._wallet(user, "acme"), WALLET_CAP),
                policy_version=self._version(user),
            ),
            (EMPTY_BASELINE,),
        )  # fmt: skip

    async def clear(self) -> None:
        with contextlib.suppress(NoPlanAssigned):
            await self._withdraw("plan-cleared", 0, payload_json(PlanCleared(author="ops", reason="asked")))

    async def create_key(self) -> None:
        number = next(self._key_numbers)
        key_id, replaces = f"key-{number:012x}", self._key_draw.choice([None, *self._created[-1:]])
        payload = KeyCreated(
            key_id=key_id, hash=f"{number:064x}", user_id="u1", tags={"team": "a\u00e9\""}, models=("m/large",),
            allows=("tags",), expires_ms=self._key_draw.choice([None, 2**45]), replaces=replaces, author="ops",
            reason="new",
        )  # fmt: skip
        await self._gates[0].create_key(
            CreateKeyRequest(
                command_id=f"key-created {number}", content_hash="c" * 32, key_id=key_id, key_hash=payload.hash,
                payload=payload_json(payload),
            )
        )  # fmt: skip
        self._created.append(key_id)

    async def revoke_key(self) -> None:
        if self._created:
            key_id = self._key_draw.choice(self._created)
            payload = payload_json(KeyRevoked(key_id=key_id, author="ops", reason="lost"))
            with contextlib.suppress(KeyAlreadyRevoked):
                await self._gates[0].revoke_key(
                    RevokeKeyRequest(
                        command_id=f"key-revoked {next(self._key_numbers)}", content_hash="c" * 32, key_id=key_id,
                        payload=payload, after_ms=self._key_draw.choice([0, 86_400_000]),
                    )
                )  # fmt: skip

    async def _withdraw(self, kind: Any, amount: int, payload: str) -> None:
        user = self._draw.choice(["u1", "u2"])
        request = WithdrawRequest(
            command_id=f"command-{next(self._numbers)}", user_id=user, period=self._window.name, content_hash="c" * 32,
            type=kind, amount_nanousd=amount, payload=payload, budget=budget_name("user", user, self._window.name),
        )  # fmt: skip
        await self._gate(user).withdraw(request)

    async def release(self) -> None:
        """Give back the assumed cost of a settled hold, if it is still assumed."""
        if not self._settled:
            return
        settled = self._draw.choice(self._settled)
        call, record = settled.call, await self._gate(settled.call.user).call_record(settled.call.call_id)
        assert record is not None
        standing = record.settled[call.hold]
        request = ReleaseRequest(
            call_id=call.call_id, user_id=call.user, hold=call.hold, hold_cost_nanousd=standing.cost_nanousd,
            hold_assumed_nanousd=standing.assumed_nanousd, attempt=call.attempt,
            amount_nanousd=standing.assumed_nanousd, budgets=standing.budgets,
            payload=payload_json(CostAdjusted(basis="released", reason="a proxy's page", author="ops")),
        )  # fmt: skip
        if standing.assumed_nanousd and await self._gate(call.user).release(request) == "released":
            settled.cost = standing.cost_nanousd - standing.assumed_nanousd

    async def _assign(self, kind: Any, plan: str, amount: int, payload: str) -> None:
        user = self._draw.choice(["u1", "u2"])
        request = AssignRequest(
            command_id=f"command-{next(self._numbers)}", user_id=user, period=self._window.name, content_hash="c" * 32,
            type=kind, plan=plan, amount_nanousd=amount, payload=payload,
            budget=budget_name("user", user, self._window.name),
        )  # fmt: skip
        await self._gate(user).assign(request)


async def gate_ledger(redis: Redis, directory: Path, seed: int, steps: int, *, partitions: int = 1) -> GateLedger:
    """Make a ledger of `steps` steps: sealed, some of it trimmed, and then some more that is not sealed."""
    made = GateLedger(redis, directory, seed, partitions=partitions)
    await made.begin()
    await made.run(steps)
    await made.seal(keep_events=steps // 3)
    await made.run(20)
    await made.fold()
    return made
