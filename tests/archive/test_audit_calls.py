"""Answers about calls of the real gate, across the seam of archive and stream: lives, statements, explanations."""

import csv
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from tests.archive.test_audit import check_statements
from tests.archive.test_sealing import NEVER
from tests.archive_files import directory_of
from tests.calling import COMPLETION_TOKENS, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling, period
from tests.system import run_cli
from tollbook.audit.calls import CallLife, find_call
from tollbook.audit.explanations import Decision, explain
from tollbook.audit.reader import AuditReader, Selection
from tollbook.audit.search import search
from tollbook.audit.statements import make_statement
from tollbook.cli.audit_find import read_search
from tollbook.inference.administration import Administration
from tollbook.inference.cost_tracker import CostTracker
from tollbook.ledger.archive.history import LedgerSource
from tollbook.ledger.archive.sealing import Sealer, SealingSettings
from tollbook.ledger.archive.segments import Archive
from tollbook.ledger.gate.requests import OpenCall
from tollbook.ledger.server.connection import connect
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import (
    BudgetDenied,
    CostAdjusted,
    CostRecorded,
    Event,
)

# claude-sonnet-4 at $3 and $15 a million; written to a cache, a prompt costs $3.75. gpt-4o-mini: $0.15 and $0.60.
COST = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
COST_OF_FALLBACK = PROMPT_TOKENS * 150 + COMPLETION_TOKENS * 600
BOUND = PROMPT_BOUND * 3_750 + 2_000 * 15_000
BOUND_OF_FALLBACK = PROMPT_BOUND * 150 + 2_000 * 600
BOUND_OF_LONG = PROMPT_BOUND * 3_750 + 20_000 * 15_000
CORRECTED = 1_234_567
CAP, CREDIT = 50_000_000, 10_000_000
OWN = 10_500_000
CAMPAIGN_CAP = 500_000_000
BOUND_OF_CAMPAIGN = PROMPT_BOUND * 3_750 + 60_000 * 15_000

# One ledger for all tests: they only read it.
pytestmark = pytest.mark.asyncio(loop_scope="module")


# --- Calls of the real gate


class Scene:
    """A ledger with a call of every kind; its first half is sealed and trimmed."""

    def __init__(self, calling: Calling) -> None:
        self.calling = calling
        self.reader = AuditReader(
            LedgerSource(
                calling.runtime.handle.ledger_id,
                tuple(calling.runtime.handle.keys),
                Archive(calling.runtime.settings.archive_path),
                calling.runtime.handle.redis,
            )
        )

    @property
    def archive(self) -> Archive:
        return Archive(self.calling.runtime.settings.archive_path)

    async def run(self, call_id: str, *faults: str | None, is_final: bool = False, **fields: Any) -> Any:
        self.calling.script(*faults)
        async with self.calling.runner() as (runner, _):
            return await runner.run(self.calling.call(call_id, **fields), is_final=is_final)

    async def happen(self) -> None:
        administration = Administration(
            self.calling.runtime.ledger, self.calling.runtime.policies, self.calling.runtime.user_ids
        )
        await self.run("plain", None)
        await self.run("fallback", "hang_charged", None, campaign_id="spring/sale")
        await administration.adjust_cost("fallback", CORRECTED, Signature("eva", "invoice of November"))
        await administration.set_plan("u1", "trial", Signature("eva", "extended"), cap_nanousd=CAP)
        await administration.grant_credit("u1", CREDIT, Signature("ben", "outage", "k1"))
        await self._hold("dies")
        await self.run("waits", is_final=True)
        await self.run("too-long", max_tokens=20_000)
        await self._take_over("dies")
        await administration.grant_credit("u1", 2 * CREDIT, Signature("ben", "again", "k2"))
        await CostTracker(self.calling.runtime).record_usage("u1", "0.0105", model="m/other", idempotency_key="own")
        await self.run("fails", "http_400", "http_400", model="gpt-4o-mini")
        await self.run("other", None, user_id="u2", campaign_id="spring/sale")
        await self.run("campaign", user_id="u2", campaign_id="spring/sale", max_tokens=60_000)
        await self.calling.folded()
        await self._seal()

    async def _hold(self, call_id: str) -> None:
        call = self.calling.call(call_id)
        async with self.calling.runner() as (runner, _):
            await runner.reserve(call)

    async def _take_over(self, call_id: str) -> None:
        call = self.calling.call(call_id, run_id="run-2")
        async with self.calling.runner() as (runner, _):
            found = await runner.run(call)
            assert isinstance(found, OpenCall)
            await runner.take_over(call, found)
            await runner.run(call)

    async def _seal(self) -> None:
        async def folded() -> Any:
            return self.calling.store.position()

        handle = self.calling.runtime.handle
        sealer = Sealer(
            handle.redis,
            self.calling.runtime.ledger.gates[0]._pipeline,
            handle.keys[0],
            self.archive,
            ledger_id=handle.ledger_id,
            settings=SealingSettings(segment_events=5, segment_age_s=NEVER, keep_s=0, keep_events=0),
            folded=folded,
        )
        for _ in range(3):
            assert await sealer.seal()
        assert await sealer.trim() == 15
        await self.calling.folded()

    async def life(self, call_id: str) -> CallLife:
        (life,) = await find_call(self.reader, call_id)
        return life

    async def decisions(self, call_id: str) -> list[Decision]:
        return await explain(self.reader, await self.life(call_id))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    async with connect(server_url) as redis:
        await redis.flushall()
        await redis.function_flush()
    async with open_calling(server_url, tmp_path_factory.mktemp("scene"), campaign_cap_nanousd="0.5") as calling:
        scene = Scene(calling)
        await scene.happen()
        yield scene


@pytest.mark.slow
async def test_statements_of_the_real_gate_close_as_spend_says(scene: Scene) -> None:
    await check_statements(scene.reader, scene.calling.store)


@pytest.mark.slow
async def test_a_statement_has_every_movement_with_the_balance_after_it(scene: Scene) -> None:
    statement = await make_statement(scene.reader, "u1", period())
    settled = COST + CORRECTED
    lines = [
        (line.event.type, line.event.call_id, line.settled_change_nanousd, line.settled_nanousd, line.held_nanousd,
         line.cap_nanousd)
        for line in statement.lines
    ]  # fmt: skip
    trial = 5_000_000_000
    cap = CAP + CREDIT
    taken_over = settled + BOUND
    assert statement.opening_cap_nanousd is None
    assert lines[:8] == [
        ("budget-reserved", "plain", 0, 0, BOUND, trial),
        ("cost-recorded", "plain", COST, COST, 0, trial),
        ("budget-reserved", "fallback", 0, COST, BOUND, trial),
        ("budget-reserved", "fallback", 0, COST, BOUND + BOUND_OF_FALLBACK, trial),
        ("cost-recorded", "fallback", BOUND + COST_OF_FALLBACK, COST + BOUND + COST_OF_FALLBACK, 0, trial),
        ("cost-adjusted", "fallback", CORRECTED - BOUND - COST_OF_FALLBACK, settled, 0, trial),
        ("plan-assigned", lines[6][1], 0, settled, 0, CAP),
        ("credit-granted", lines[7][1], 0, settled, 0, cap),
    ]
    assert lines[8:13] == [
        ("budget-reserved", "dies", 0, settled, BOUND, cap),
        ("budget-denied", "waits", 0, settled, BOUND, cap),
        ("budget-denied", "too-long", 0, settled, BOUND, cap),
        ("cost-recorded", "dies", BOUND, taken_over, 0, cap),
        ("budget-denied", "dies", 0, taken_over, 0, cap),
    ]
    assert lines[13:15] == [
        ("credit-granted", lines[13][1], 0, taken_over, 0, cap + 2 * CREDIT),
        ("cost-recorded", "usage own", OWN, taken_over + OWN, 0, cap + 2 * CREDIT),
    ]
    payloads = [line.event.payload for line in statement.lines]
    assert [(each.author, each.reason) for each in payloads if isinstance(each, CostAdjusted)] == [
        ("eva", "invoice of November")
    ]


@pytest.mark.slow
async def test_the_life_of_a_call_has_every_event_of_it(scene: Scene) -> None:
    life = await scene.life("fallback")
    assert [event.type for event in life.events] == [
        "budget-reserved", "model-called", "budget-reserved", "fallback-used", "model-called", "cost-recorded",
        "cost-adjusted",
    ]  # fmt: skip
    assert [event.seq for event in life.events] == list(range(5, 12))
    assert (life.status, life.cost_nanousd, life.assumed_nanousd, life.held_nanousd) == ("done", CORRECTED, 0, 0)
    dead = await scene.life("dies")
    assert dead.workers == ("test.run-1", "test.run-2")
    assert [event.type for event in dead.events] == ["budget-reserved", "cost-recorded", "budget-denied"]
    assert dead.events[0].seq <= 15 < dead.events[-1].seq, "across the seam"
    assert (dead.status, dead.cost_nanousd, dead.assumed_nanousd) == ("denied", BOUND, BOUND)


def numbers(decision: Decision) -> list[tuple[str, int, int, int, int]]:
    assert all(each.is_agreed for each in decision.weighings)
    return [
        (each.budget, each.cap_nanousd, each.settled_nanousd, each.held_nanousd, each.amount_nanousd)
        for each in decision.weighings
    ]


# A refused call -> why, the budget in its way, its cap, settled, held, asked for; whose holds there were; the kind of
# event after which there was room.
REFUSALS = [
    ("waits", "wait_timeout", "user:u1", CAP + CREDIT, COST + CORRECTED, BOUND, BOUND, ["dies"], "credit-granted"),
    ("too-long", "cap", "user:u1", CAP + CREDIT, COST + CORRECTED, BOUND, BOUND_OF_LONG, ["dies"], None),
    ("dies", "cap", "user:u1", CAP + CREDIT, COST + CORRECTED + BOUND, 0, BOUND, [], "credit-granted"),
    ("campaign", "cap", "campaign:spring/sale", CAMPAIGN_CAP, CORRECTED + COST, 0, BOUND_OF_CAMPAIGN, [], None),
]


async def test_a_refusal_is_explained_with_the_numbers_at_that_position(scene: Scene) -> None:
    for call_id, reason, budget, cap, settled, held, amount, holders, room in REFUSALS:
        decision = (await scene.decisions(call_id))[-1]
        assert decision.is_refusal
        assert isinstance(decision.event.payload, BudgetDenied)
        assert decision.event.payload.reason == reason
        assert numbers(decision) == [(f"{budget}:{period()}", cap, settled, held, amount)]
        (weighing,) = decision.weighings
        assert weighing.over_nanousd == settled + amount - cap
        assert weighing.over_with_holds_nanousd == settled + held + amount - cap
        assert (weighing.over_nanousd > 0) == (reason == "cap")
        assert weighing.over_with_holds_nanousd > 0
        assert [hold.call_id for hold in weighing.others] == holders
        assert sum(hold.amount_nanousd for hold in weighing.others) == held
        assert (weighing.room and weighing.room.type) == room


async def test_explain_says_how_the_holds_of_other_calls_ended(scene: Scene) -> None:
    ((weighing,), *_) = [decision.weighings for decision in await scene.decisions("too-long")]
    (hold,) = weighing.others
    assert (hold.user_id, hold.worker, hold.amount_nanousd) == ("u1", "test.run-1", BOUND)
    assert hold.settled_by is not None
    assert isinstance(hold.settled_by.payload, CostRecorded)
    assert hold.settled_by.payload.outcome == "taken_over"


async def test_explain_shows_the_budgets_of_a_call_that_was_not_refused(scene: Scene) -> None:
    hold, extension = await scene.decisions("fallback")
    own, campaign = f"user:u1:{period()}", f"campaign:spring/sale:{period()}"
    trial = 5_000_000_000
    assert numbers(hold) == [(own, trial, COST, 0, BOUND), (campaign, CAMPAIGN_CAP, 0, 0, BOUND)]
    assert numbers(extension) == [
        (own, trial, COST, BOUND, BOUND_OF_FALLBACK),
        (campaign, CAMPAIGN_CAP, 0, BOUND, BOUND_OF_FALLBACK),
    ]
    assert [each.own_held_nanousd for each in extension.weighings] == [BOUND, BOUND]
    assert not any(decision.is_refusal for decision in (hold, extension))
    assert await scene.decisions("usage own") == [], "it was recorded without a hold"


# --- The command


class Auditor:
    """Runs `tollbook audit` on a scene, in a folder without any settings of its own."""

    def __init__(self, scene: Scene, directory: Path) -> None:
        self.directory = directory
        settings = scene.calling.runtime.settings
        self.env = {"REDIS_URL": str(settings.redis_url), "TOLLBOOK_DATA_DIR": str(settings.data_dir)}

    async def run(self, *arguments: str, env: dict[str, str] | None = None) -> Any:
        return await run_cli("audit", *arguments, cwd=self.directory, env=env or self.env)


@pytest.fixture
def auditor(scene: Scene, tmp_path: Path) -> Auditor:
    (tmp_path / "desk").mkdir()
    return Auditor(scene, tmp_path / "desk")


def usd(nanousd: int) -> str:
    return f"{Decimal(nanousd).scaleb(-9):.9f}"


@pytest.mark.slow
async def test_the_command_explains_in_words_and_in_json(auditor: Auditor) -> None:
    shown = await auditor.run("explain", "too-long")
    assert (shown.code, shown.stderr) == (0, "")
    over = COST + CORRECTED + BOUND_OF_LONG - CAP - CREDIT
    for words in (
        "refused",
        f"${usd(over)} over the cap",
        "$0.05 of plan trial, by eva",
        "$0.01 credit, by ben: outage",
        f"higher by ${usd(over)} once others' holds are settled",
        "There has been no room for it since.",
    ):
        assert words in shown.stdout
    # The longest answer that fits beside what is settled: one token more would not.
    found = re.search(r"an answer of at most ([\d,]+) tokens instead of 20,000", shown.stdout)
    assert found
    most, room = int(found[1].replace(",", "")), CAP + CREDIT - COST - CORRECTED - PROMPT_BOUND * 3_750
    assert most * 15_000 <= room < (most + 1) * 15_000
    document = (await auditor.run("explain", "too-long", "--json")).json()
    (budget,) = document["calls"][0]["decisions"][0]["budgets"]
    assert document["calls"][0]["is_refused"]
    assert [budget[name] for name in ("cap_usd", "settled_usd", "held_usd", "amount_usd", "over_usd")] == [
        usd(CAP + CREDIT), usd(COST + CORRECTED), usd(BOUND), usd(BOUND_OF_LONG), usd(over),
    ]  # fmt: skip
    assert budget["other_holds"][0]["call_id"] == "dies"


@pytest.mark.slow
async def test_the_command_says_that_a_call_was_not_refused(auditor: Auditor) -> None:
    shown = await auditor.run("explain", "plain")
    assert (shown.code, "was not refused" in shown.stdout) == (0, True)
    assert f"fits: ${usd(5_000_000_000 - BOUND).rstrip('0')} of the cap left" in shown.stdout
    assert "no decision: no money was asked for" in (await auditor.run("explain", "usage own")).stdout


@pytest.mark.slow
async def test_the_statement_of_the_command_closes_as_spend_says(auditor: Auditor, scene: Scene) -> None:
    document = (await auditor.run("user", "u1", "--json")).json()
    (row,) = await scene.calling.query("SELECT spent_usd, reserved_usd, cap_usd FROM spend WHERE user_id = 'u1'")
    assert document["closing"] == {
        "settled_usd": str(row["spent_usd"]),
        "held_usd": f"{row['reserved_usd']:f}",
        "cap_usd": str(row["cap_usd"]),
    }
    shown = await auditor.run("user", "u1", "--no-holds")
    assert shown.code == 0
    found = re.findall(r"^ \d\d-\d\d \d\d:\d\d:\d\d  (\w+)", shown.stdout, re.MULTILINE)
    movements = Counter(found)
    assert movements == {"charge": 5, "refused": 3, "credit": 2, "correction": 1, "plan": 1}
    assert "by eva: invoice of November" in shown.stdout
    # Only the newest movements: earlier ones are summed up in a first line, which says how many they are.
    shown = await auditor.run("user", "u1", "--no-holds", "--last", "2")
    lines = [line for line in shown.stdout.splitlines() if re.match(r" \d\d-\d\d ", line)]
    assert len(lines) == 2
    assert "brought forward" in shown.stdout
    assert "10 earlier movements are left out; --last 12 shows all" in shown.stdout
    last = (await auditor.run("user", "u1", "--no-holds", "--last", "2", "--json")).json()
    assert last["closing"] == document["closing"]
    assert [line["seq"] for line in last["lines"]] == [
        line["seq"] for line in document["lines"] if line["type"] != "budget-reserved"
    ][-2:]


@pytest.mark.slow
async def test_an_archive_copied_elsewhere_answers_without_a_server(auditor: Auditor, scene: Scene) -> None:
    copied = auditor.directory / "copied"
    directory_of(scene.archive).rename(copied)
    shown = await auditor.run("call", "fallback", "--archive", str(copied), env={"REDIS_URL": "redis://127.0.0.1:1/0"})
    assert (shown.code, shown.stderr) == (0, "")
    assert "archive up to event 15, no stream" in shown.stdout
    copied.rename(directory_of(scene.archive))


@pytest.mark.slow
async def test_without_redis_the_archive_alone_answers_and_says_so(auditor: Auditor) -> None:
    env = {**auditor.env, "REDIS_URL": "redis://127.0.0.1:1/0"}
    shown = await auditor.run("call", "plain", env=env)
    assert shown.code == 0
    (line,) = shown.stderr.splitlines()
    assert line.startswith("tollbook: reading the archive alone")


async def test_an_unknown_call_or_user_is_reported_in_one_line(auditor: Auditor) -> None:
    for arguments, problem in (
        (("call", "nothing"), "call nothing is not on the ledger"),
        (("explain", "nothing"), "call nothing is not on the ledger"),
        (("user", "nobody"), "user nobody is not on the ledger"),
        (("user", "u1", "--period", "2020-01"), "user u1 has nothing in 2020-01"),
    ):
        shown = await auditor.run(*arguments)
        assert (shown.code, shown.stdout) == (1, "")
        (line,) = shown.stderr.splitlines()
        assert problem in line


# --- Searching


def _model(event: Event) -> set[Any]:
    payload = event.payload
    bound = getattr(payload, "bound", None)
    asked = getattr(payload, "model", None) or getattr(payload, "to_model", None) or (bound and bound.model)
    return {asked, getattr(payload, "model_used", None), getattr(payload, "from_model", None)}


# Filters as they are written on the command line -> the events that they must find.
CASES: list[tuple[dict[str, Any], Any]] = [
    ({}, lambda _: True),
    ({"user_id": "u2"}, lambda e: e.user_id == "u2"),
    ({"user_id": "u1", "types": ("budget-denied",)}, lambda e: e.user_id == "u1" and e.type == "budget-denied"),
    ({"types": ("model-called", "fallback-used")}, lambda e: e.type in ("model-called", "fallback-used")),
    ({"call_id": "fallback"}, lambda e: e.call_id == "fallback"),
    ({"campaign_id": "spring/sale"}, lambda e: e.call_id in ("fallback", "other", "campaign")),
    ({"campaign_id": "spring"}, lambda _: False),
    ({"campaign_id": "spring/sale", "call_id": "other"}, lambda e: e.call_id == "other"),
    ({"campaign_id": "spring/sale", "call_id": "plain"}, lambda _: False),
    ({"model": "openai/gpt-4o-mini"}, lambda e: "openai/gpt-4o-mini" in _model(e)),
    ({"model": "m/other"}, lambda e: e.call_id == "usage own"),
    ({"outcome": "timeout"}, lambda e: getattr(e.payload, "outcome", None) == "timeout"),
    ({"outcome": "taken_over"}, lambda e: getattr(e.payload, "outcome", None) == "taken_over"),
    ({"reason": "INVOICE"}, lambda e: "invoice" in (getattr(e.payload, "reason", "") or "")),
    ({"least_usd": "0.03"}, lambda e: e.amount >= 30_000_000),
    ({"least_usd": "-1", "most_usd": "-0.000000001"}, lambda e: e.amount < 0),
    ({"most_usd": "0"}, lambda e: e.amount <= 0),
]


async def found_by(scene: Scene, **filters: Any) -> list[int]:
    found: list[Any] = []
    async for table in search(scene.reader, read_search(**filters)):
        found += table["seq"].to_pylist()
    return found


async def all_events(scene: Scene) -> list[Event]:
    return await scene.reader.events(Selection())


@pytest.mark.slow
async def test_filters_find_these_events_and_no_others(scene: Scene) -> None:
    events = await all_events(scene)
    for filters, is_wanted in CASES:
        assert await found_by(scene, **filters) == [event.seq for event in events if is_wanted(event)], filters


async def test_a_time_range_includes_both_of_its_ends(scene: Scene) -> None:
    events = await all_events(scene)
    # Begins in the archive and ends on the stream; begins on the stream; ends in the archive.
    for first, last in ((3, -3), (-6, -2), (1, 8)):
        since, until = events[first], events[last]
        expected = [event.seq for event in events if event.at_ms >= since.at_ms and event.seq <= until.seq]
        assert await found_by(scene, since=since.id, until=until.id) == expected


@pytest.mark.slow
async def test_every_output_format_has_the_same_rows(auditor: Auditor) -> None:
    wanted = ("find", "--user", "u1")
    rows = (await auditor.run(*wanted, "--format", "json")).json()
    assert len(rows) > 15
    texts = list(csv.DictReader(StringIO((await auditor.run(*wanted, "--format", "csv")).stdout)))
    # The form follows from the name of the file, too.
    assert (await auditor.run(*wanted, "--output", "found.parquet")).code == 0
    assert (await auditor.run(*wanted, "--output", "found.json")).code == 0
    binary = pq.read_table(auditor.directory / "found.parquet").to_pylist()
    assert json.loads((auditor.directory / "found.json").read_text()) == rows
    for row, text, typed in zip(rows, texts, binary, strict=True):
        assert list(row) == list(text) == list(typed)
        assert Decimal(row["amount_usd"]) == Decimal(text["amount_usd"]) == typed["amount_usd"]
        assert (row["id"], row["payload"]) == (text["id"], text["payload"]) == (typed["id"], typed["payload"])
    table = (await auditor.run(*wanted, "--limit", "3")).stdout
    assert "the first 3;" in table
    assert (await auditor.run(*wanted, "--limit", "3", "--json")).json() == rows[:3]
    assert (await auditor.run(*wanted, "--output", "found.json")).code == 2, "it is there already"
