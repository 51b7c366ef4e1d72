"""What the gate writes today is what the golden files show, field for field.

The files stand for ledgers that exist: a difference here means a new version of an event, with an
upcaster and a golden file of its own, never a changed file.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis

from tests.gate_bench import open_bench
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.policies import Opened, Opening, OpeningHold, PolicyRequest
from tollbook.ledger.gate.requests import (
    AdjustRequest,
    AssignRequest,
    AttemptEvent,
    Baseline,
    BudgetCap,
    ChargeRequest,
    CreateKeyRequest,
    CreditRequest,
    Position,
    RecordRequest,
    ReserveRequest,
    RevokeKeyRequest,
    SettleRequest,
    WithdrawRequest,
)
from tollbook.schemas.events import (
    EVENT_VERSION,
    BoundPrice,
    BudgetReserved,
    CostAdjusted,
    CostRecorded,
    CreditExpired,
    CreditGranted,
    CreditRevoked,
    EventPayload,
    FallbackUsed,
    KeyCreated,
    KeyRevoked,
    ModelCalled,
    PlanAssigned,
    PlanCleared,
    PolicyApplied,
    payload_json,
)
from tollbook.schemas.failures import ErrorDetails
from tollbook.schemas.identifiers import Window
from tollbook.schemas.usage import Usage

GOLDEN: Final = Path(__file__).parents[1] / "golden" / "events" / f"v{EVENT_VERSION}"
NOTHING: Final = Baseline(0, 0, Position())
NOVEMBER: Final = Window("2026-11", 0, 2**52)
OWN: Final = BudgetCap("user:u42:2026-11", 15_000_000_000)
DAY: Final = BudgetCap("day:u42:2026-11-05", 2_000_000_000)
SPRING: Final = BudgetCap("campaign:spring:sale:2026-11", 9_000_000_000)
LARGE: Final = "anthropic/claude-sonnet-4"
SMALL: Final = "openai/gpt-4o-mini"
BOUND: Final = BoundPrice(
    model=LARGE,
    prompt_tokens=1_200,
    completion_tokens=2_000,
    prompt_nanousd_per_mtok=3_000_000_000,
    completion_nanousd_per_mtok=15_000_000_000,
)
# 1,200 prompt tokens at 3 dollars and 2,000 completion tokens at 15 dollars per million.
HOLD_NANOUSD: Final = 1_200 * 3_000 + 2_000 * 15_000
_NO_ANSWER: Final = "model-called.no-answer"
# In the order in which the scenario appends them.
FILES: Final = (
    "plan-assigned",
    "credit-granted",
    "budget-reserved",
    "model-called.timeout",
    "fallback-used",
    "budget-reserved.extension",
    "model-called",
    "cost-recorded",
    "cost-adjusted",
    "budget-denied",
    "cost-recorded.charge",
    "credit-revoked",
    "plan-cleared",
    "policy-applied",
    "cost-recorded.budget",
    "alert-raised",
    "credit-granted.budget",
    "credit-revoked.budget",
    "credit-expired",
    "budget-reserved.source",
    "model-called.source",
    "policy-applied.backfill",
    "budget-opened",
    "key-created",
    "key-revoked",
    "policy-applied.holds",
    "budget-opened.holds",
)


TIMEOUT: Final = ModelCalled(
    hold=1, model=LARGE, outcome="timeout", error="no reply within 60 s", latency_ms=60_003,
    charge_nanousd=HOLD_NANOUSD, charge_basis="assumed",
)  # fmt: skip
NO_ANSWER: Final = ModelCalled(
    hold=1, model=LARGE, model_used=LARGE, outcome="ok", http_status=200,
    error="the limit of completion tokens was used up before an answer: 500, 500 of them reasoning", latency_ms=4_100,
    usage=Usage(
        prompt_tokens=60, completion_tokens=500, cache_write_tokens=20, cache_write_1h_tokens=8, reasoning_tokens=500
    ),
    generation_id="gen-2", charge_nanousd=7_680_000, charge_basis="priced", finish_reason="length",
    reason="output_limit", error_details=ErrorDetails(code="length", provider="Anthropic"),
    usage_doubt="the total has more tokens than prompt and completion",
)  # fmt: skip


async def _write_every_event(gate: Gate, first: ModelCalled = TIMEOUT) -> None:
    names = (OWN.name, DAY.name, SPRING.name)
    budgets, baselines = (OWN, DAY, SPRING), (NOTHING,) * 3
    order: dict[str, Any] = {"task_type": "generate_draft", "stream": "generation", "plan": "starter"}
    order |= {"campaign_id": "spring:sale", "worker": "host-7:1", "bound": BOUND}

    async def assign(command: str, payload: PlanAssigned | CreditGranted, amount: int) -> None:
        await gate.assign(
            AssignRequest(
                command_id=command,
                user_id="u42",
                period="2026-11",
                content_hash="c0ffee",
                type=payload.type,
                plan="starter",
                amount_nanousd=amount,
                payload=payload_json(payload),
                budget=OWN.name,
            )
        )

    def reserve(call_id: str, amount: int, payload: EventPayload) -> ReserveRequest:
        return ReserveRequest(
            call_id=call_id, user_id="u42", window=NOVEMBER, content_hash="c0ffee", amount_nanousd=amount,
            worker="host-7:1", lease_ms=90_000, payload=payload_json(payload), budgets=budgets,
        )  # fmt: skip

    plan = PlanAssigned(plan="starter", cap_nanousd=15_000_000_000, author="ops@example.com", reason="upgrade")
    await assign("assign-1", plan, plan.cap_nanousd)
    await assign("credit-1", CreditGranted(author="ops@example.com", reason="outage on 4 November"), 1_000_000_000)
    await gate.reserve(reserve("generation-1-0", HOLD_NANOUSD, BudgetReserved(**order)), baselines)

    fallback = FallbackUsed(hold=1, from_model=LARGE, to_model=SMALL, reason="timeout")
    await gate.record(
        RecordRequest(
            call_id="generation-1-0", user_id="u42", hold=1, attempts_begun=2, spent_nanousd=HOLD_NANOUSD,
            assumed_nanousd=HOLD_NANOUSD, budgets=budgets, extension_nanousd=1_380_000,
            extension_payload=payload_json(BudgetReserved(kind="extension", **order)),
            events=(
                AttemptEvent("model-called", 1, payload_json(first)),
                AttemptEvent("fallback-used", 1, payload_json(fallback)),
            ),
        ),
        baselines,
    )  # fmt: skip

    usage = Usage(prompt_tokens=1_100, completion_tokens=400, cached_tokens=1_000, reasoning_tokens=20)
    answer = ModelCalled(
        hold=1, model=SMALL, model_used="openai/gpt-4o-mini-2024-07-18", outcome="ok", http_status=200,
        latency_ms=2_345, usage=usage, generation_id="gen-1795504509-Ab", charge_nanousd=1_500_000,
        charge_basis="reported", finish_reason="stop",
    )  # fmt: skip
    recorded = CostRecorded(
        basis="assumed", assumed_nanousd=HOLD_NANOUSD, outcome="done", model=answer.model_used, usage=usage,
        generation_id=answer.generation_id,
    )  # fmt: skip
    await gate.settle(
        SettleRequest(
            call_id="generation-1-0", user_id="u42", hold=1, cost_nanousd=HOLD_NANOUSD + 1_500_000,
            assumed_nanousd=HOLD_NANOUSD, attempt=2, is_final=True, payload=payload_json(recorded), budgets=names,
            result="{}", events=(AttemptEvent("model-called", 2, payload_json(answer)),),
        )
    )  # fmt: skip
    adjusted = CostAdjusted(basis="reported", reason="generation_looked_up", author="reconcile", generation_id="gen-2")
    await gate.adjust(
        AdjustRequest(
            call_id="generation-1-0", user_id="u42", hold=1, cost_nanousd=12_000_000, assumed_nanousd=0, attempt=2,
            payload=payload_json(adjusted), budgets=names,
        )
    )  # fmt: skip
    # The gate adds the budget that refused; the caller's part is the same as of a hold.
    await gate.reserve(reserve("generation-2-0", 3_000_000_000, BudgetReserved(**order)), baselines)
    charge = CostRecorded(basis="priced", outcome="recorded", model=SMALL, usage=Usage(prompt_tokens=10))
    await gate.charge(
        ChargeRequest(
            call_id="import-1", user_id="u42", period="2026-11", content_hash="c0ffee", cost_nanousd=1_500,
            assumed_nanousd=0, payload=payload_json(charge), budgets=names,
        ),
        baselines,
    )  # fmt: skip
    revoked = CreditRevoked(grant="1795505017239-1", author="ops@example.com", reason="granted twice")
    cleared = PlanCleared(author="ops@example.com", reason="contract ended")
    for command, payload, amount in (("revoke-1", revoked, 400_000_000), ("clear-1", cleared, 0)):
        await gate.withdraw(
            WithdrawRequest(
                command_id=command, user_id="u42", period="2026-11", content_hash="c0ffee", type=payload.type,
                amount_nanousd=amount, payload=payload_json(payload), budget=OWN.name,
            )
        )  # fmt: skip
    team_week = {"name": "team-week", "by": ["team"], "window": "week", "cap_usd": "20", "alerts": ["0.5", "1"]}
    content = {
        "timezone": "UTC", "default_plan": "trial", "plans": {"trial": {"cap_usd": "5"}}, "budgets": [team_week]
    }  # fmt: skip
    applied = PolicyApplied(
        version=3, digest="5e" * 32, content=content, definitions={"team-week": 2}, author="ops@example.com",
        reason="a budget for each team",
    )  # fmt: skip
    await gate.apply_policy(PolicyRequest(in_force=0, version=3, digest=applied.digest, payload=payload_json(applied)))
    await gate.charge(
        ChargeRequest(
            call_id="import-2", user_id="u42", period="2026-11", content_hash="c0ffee", cost_nanousd=10_000_000_000,
            assumed_nanousd=0, payload=payload_json(charge), budgets=(OWN.name, "team-week~2:red:2026-W48"),
        ),
        (NOTHING, NOTHING),
    )  # fmt: skip
    credit: dict[str, Any] = {"credit": "pay_1", "expires_ms": 1_795_478_400_000}
    signed: dict[str, Any] = credit | {"author": "shop", "reason": "payment"}
    for command, payload, amount in (
        ("credit pay_1", CreditGranted(**signed), 5_000_000_000),
        ("credit-revoked pay_1", CreditRevoked(**signed), 2_000_000_000),
        ("credit-expired pay_1", CreditExpired(**credit), 0),
    ):
        await gate.change_credit(
            CreditRequest(
                command_id=command, user_id="", content_hash="c0ffee", type=payload.type, credit_id="pay_1",
                amount_nanousd=amount, expires_ms=1_795_478_400_000 if amount else 1, payload=payload_json(payload),
                budget=BudgetCap("prepaid:acme:total", 0), policy_version=3,
            ),
            (NOTHING,),
        )  # fmt: skip
    await _write_price_sources(gate, order)
    monthly = applied.model_copy(
        update={
            "version": 4,
            "content": content | {"budgets": [team_week | {"window": "month"}]},
            "definitions": {"team-week": 4},
            "backfilled": ("team-week",),
            "reason": "by month",
        }
    )
    opening = Opening("team-week~4:red:2026-11", 10_000_000_000, 20_000_000_000)
    await gate.apply_policy(
        PolicyRequest(
            in_force=3, version=4, digest=monthly.digest, payload=payload_json(monthly), opened=Opened((opening,))
        )
    )
    await _write_keys(gate)
    renamed = monthly.model_copy(
        update={
            "version": 5,
            "content": content | {"budgets": [team_week | {"name": "squad-week"}]},
            "definitions": {"squad-week": 5},
            "backfilled": ("squad-week",),
            "takes_holds": True,
            "reason": "by squad",
        }
    )
    held = (OpeningHold("generation-3-0", 1, HOLD_NANOUSD),)
    opening = Opening("squad-week~5:red:2026-W48", 10_000_000_000, 20_000_000_000, held)
    await gate.apply_policy(
        PolicyRequest(
            in_force=4, version=5, digest=renamed.digest, payload=payload_json(renamed), opened=Opened((opening,))
        )
    )


async def _write_keys(gate: Gate) -> None:
    signed: dict[str, Any] = {"key_id": "key-0123456789ab", "author": "ops@example.com"}
    created = KeyCreated(
        hash="5e" * 32, name="web shop", user_id="u42", plan="growth", campaign_id="spring:sale", tags={"team": "red"},
        models=("generate_draft", SMALL), streams=("generation",), allows=("campaign", "tags"), is_admin=True,
        expires_ms=1_798_761_600_000, replaces="key-ba9876543210", reason="the shop's gateway", **signed,
    )  # fmt: skip
    await gate.create_key(
        CreateKeyRequest(
            command_id="key-created 1", content_hash="c0ffee", key_id=created.key_id, key_hash=created.hash,
            payload=payload_json(created),
        )
    )  # fmt: skip
    revoked = KeyRevoked(reason="seen in a log", **signed)
    await gate.revoke_key(
        RevokeKeyRequest(
            command_id="key-revoked 1", content_hash="c0ffee", key_id=created.key_id, payload=payload_json(revoked)
        )
    )


async def _write_price_sources(gate: Gate, order: dict[str, Any]) -> None:
    source = "provider 2026-11-24T09:00:00.000Z"
    order = order | {"bound": BOUND.model_copy(update={"source": source})}
    reserve = ReserveRequest(
        call_id="generation-3-0", user_id="u42", window=NOVEMBER, content_hash="c0ffee", amount_nanousd=HOLD_NANOUSD,
        worker="host-7:1", lease_ms=90_000, payload=payload_json(BudgetReserved(**order)), budgets=(OWN,),
        policy_version=3,
    )  # fmt: skip
    await gate.reserve(reserve, (NOTHING,))
    # 1,100 prompt tokens at 3 dollars and 400 completion tokens at 15 dollars per million.
    answer = ModelCalled(
        hold=1, model=LARGE, outcome="ok", http_status=200, latency_ms=2_345,
        usage=Usage(prompt_tokens=1_100, completion_tokens=400), charge_nanousd=1_100 * 3_000 + 400 * 15_000,
        charge_basis="priced", price_source=source, finish_reason="length",
    )  # fmt: skip
    await gate.record(
        RecordRequest(
            call_id="generation-3-0", user_id="u42", hold=1, attempts_begun=2, spent_nanousd=answer.charge_nanousd,
            assumed_nanousd=0, budgets=(OWN,), extension_nanousd=0, extension_payload="", policy_version=3,
            events=(AttemptEvent("model-called", 1, payload_json(answer)),),
        ),
        (NOTHING,),
    )  # fmt: skip


def _without_clock(fields: dict[str, str]) -> dict[str, str]:
    return fields | {"payload": re.sub(r'"(deadline_ms|at_ms)":\d+', r'"\1":0', fields["payload"])}


async def test_the_gate_writes_what_the_golden_files_show(every_redis_client: Redis) -> None:
    async with open_bench(every_redis_client) as bench:
        await _write_every_event(bench.gate)
        found = [_without_clock(fields) for fields in await bench.events()]
    golden = [json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["fields"] for name in FILES]
    assert found == [_without_clock(fields) for fields in golden]
    assert [list(fields) for fields in found] == [list(fields) for fields in golden]


async def test_the_gate_writes_what_the_golden_file_of_a_reply_without_an_answer_shows(
    every_redis_client: Redis,
) -> None:
    async with open_bench(every_redis_client) as bench:
        await _write_every_event(bench.gate, NO_ANSWER)
        found = (await bench.events())[FILES.index("model-called.timeout")]
    assert found == json.loads((GOLDEN / f"{_NO_ANSWER}.json").read_text(encoding="utf-8"))["fields"]


def test_every_golden_file_but_those_of_the_archive_comes_from_the_gate() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} - {"segment-sealed", "ledger-recovered", _NO_ANSWER} == set(
        FILES
    )
