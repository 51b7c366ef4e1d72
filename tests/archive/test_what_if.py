"""What if: the recorded outcome where nothing is changed, the gate's own where something is.

The oracles are the real gate, asked again under the other cap; a real system run twice; naive sums of sequential
calls; and arithmetic from prices.
"""

import random
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from tests.archive.test_sealing import Archiving, seal_all
from tests.archive.what_if_ledgers import (
    MODEL,
    OTHER,
    PERIOD,
    GateLedger,
    Script,
    Work,
    decide,
    numbered,
    run_work,
    table_of,
)
from tests.archive_files import directory_of
from tests.calling import open_calling
from tests.ledger_maker import LedgerMaker
from tests.stateful.gate_driver import GateDriver
from tests.system import run_cli
from tollbook.audit.what_if import Account, Alternatives, OtherRoute, Outcome, RecordedCaps, WhatIf
from tollbook.cli.what_if import read_alternatives
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.prices.model_price import ModelPrice, price_from_usd
from tollbook.ledger.gate.functions import library_code
from tollbook.ledger.projection.fold import LedgerGap
from tollbook.schemas.events import BudgetDenied, CostRecorded
from tollbook.schemas.money import NANOUSD_PER_USD, format_usd
from tollbook.schemas.policy import default_policy
from tollbook.views import tables
from tollbook.views.what_if import print_what_if

USD = NANOUSD_PER_USD


@pytest.fixture(scope="module")
def driver(server_url: str) -> Iterator[GateDriver]:
    made = GateDriver(server_url, library_code())
    yield made
    made.close()


def cap(nanousd: int, plan: str = "trial") -> Alternatives:
    return Alternatives(plan_caps_nanousd={plan: nanousd})


def price(model: str, prompt: str, completion: str) -> ModelPrice:
    return price_from_usd(model, prompt=Decimal(prompt), completion=Decimal(completion))


def assert_as_recorded(outcome: Outcome) -> None:
    for account, totals in outcome.accounts.items():
        assert not totals.is_changed, account
        assert totals.other_refused == totals.refused
        assert totals.other_spent_nanousd == totals.spent_nanousd
    assert outcome.refusals == []


# --- Nothing changed: the recorded outcome


@pytest.mark.parametrize("seed", range(20))
def test_without_changes_the_outcome_is_the_recorded_one(seed: int) -> None:
    entries = LedgerMaker(seed).run(500).entries
    outcome = decide(entries)
    assert_as_recorded(outcome)
    assert outcome == decide(entries, batch=37), "wherever tables end"
    kinds = [fields[1] for _, fields in entries]
    amounts = [int(fields[15]) for _, fields in entries]
    moved = [
        nanousd for kind, nanousd in zip(kinds, amounts, strict=True) if kind in (b"cost-recorded", b"cost-adjusted")
    ]
    total = outcome.total()
    assert (total.refused, total.spent_nanousd) == (kinds.count(b"budget-denied"), sum(moved))
    assert outcome.events == len(entries)


def gate_ledger(driver: GateDriver, seed: int, steps: int) -> GateLedger:
    """A ledger with everything that the gate does, and caps that refuse calls."""
    draw, ledger = random.Random(seed), GateLedger(driver)
    opened, closed, settled = list[tuple[str, str, int, int]](), list[tuple[str, str]](), list[str]()
    for number in range(steps):
        user = draw.choice(("ann", "bob"))
        match draw.choice(("reserve", "reserve", "reserve", "settle", "settle", "extend", "adjust", "again", "assign")):
            case "reserve":
                further = draw.choice(({}, {f"campaign:sale:{PERIOD}": 40}, {f"day:{user}:2026-11-24": 25}))
                amount, is_final = draw.randrange(1, 12), draw.random() < 0.2
                campaign = "sale" if f"campaign:sale:{PERIOD}" in further else None
                answer = ledger.reserve(
                    f"c{number}", user=user, cap=draw.choice((20, 40)), amount=amount, is_final=is_final,
                    further=further, campaign=campaign, plan=draw.choice(("trial", "growth")),
                )  # fmt: skip
                if answer[0] == "OK":
                    opened.append((f"c{number}", user, 1, amount))
            case "again" if closed:
                call_id, owner = closed.pop()
                answer = ledger.reserve(call_id, user=owner, cap=40, amount=5)
                if answer[0] == "OK":
                    opened.append((call_id, owner, answer[1], 5))
            case "settle" if opened:
                call_id, owner, hold, amount = opened.pop(draw.randrange(len(opened)))
                is_final = draw.random() < 0.8
                cost = draw.choice((0, amount // 2, amount, amount + 2))
                ledger.settle(call_id, cost, hold=hold, is_final=is_final, assumed=cost if draw.random() < 0.3 else 0)
                if is_final:
                    settled.append(call_id)
                else:
                    closed.append((call_id, owner))
            case "extend" if opened:
                call_id, _, hold, amount = draw.choice(opened)
                ledger.extend(call_id, draw.randrange(1, 5), spent=amount, cap=40, hold=hold, attempt=number + 2)
            case "adjust" if settled:
                ledger.adjust(draw.choice(settled), draw.randrange(0, 9))
            case "assign":
                if draw.random() < 0.5:
                    ledger.assign(f"a{number}", user=user, plan="growth", cap=draw.randrange(20, 60))
                else:
                    ledger.assign(f"a{number}", user=user, credit=draw.randrange(1, 5))
            case _:
                pass
    return ledger


@pytest.mark.parametrize("seed", range(25))
def test_every_decision_of_the_real_gate_follows_from_the_books_of_a_what_if(driver: GateDriver, seed: int) -> None:
    """The recorded decision stands in any case; the test is that the computed one is the same."""
    outcome = decide(gate_ledger(driver, seed, 120).entries)
    assert_as_recorded(outcome)
    assert outcome.unexplained == 0
    assert outcome.total().refused > 0


# --- Other caps


@st.composite
def works(draw: st.DrawFn) -> Work:
    """Calls of one user that begin and end in any order; some never end."""
    calls = draw(
        st.lists(st.integers(1, 12).flatmap(lambda most: st.tuples(st.just(most), st.integers(0, most))), max_size=12)
    )
    steps = [("begin", number) for number in range(len(calls))]
    for number in range(len(calls)):
        if draw(st.integers(0, 9)):
            after = steps.index(("begin", number)) + 1
            steps.insert(draw(st.integers(after, len(steps))), ("end", number))
    return Work(calls, steps)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=works(), other_cap=st.integers(0, 40))
def test_another_cap_decides_as_the_real_gate_does_under_it(driver: GateDriver, work: Work, other_cap: int) -> None:
    recorded = run_work(driver, work, cap=1_000)
    wanted = run_work(driver, work, cap=other_cap)
    outcome = decide(recorded.ledger.entries, cap(other_cap), recorded_caps=RecordedCaps(plans={"trial": 1_000}))
    total = outcome.total()
    assert total.spent_nanousd == recorded.spent
    assert total.other_spent_nanousd == wanted.spent
    assert total.newly_refused == len(wanted.refused)
    assert total.still_waiting == len(wanted.waiting)
    assert {refusal.call_id for refusal in outcome.refusals} <= wanted.refused
    # G1 holds for what would have been.
    assert total.other_spent_nanousd <= other_cap


def sequential(calls: list[tuple[int, int]], other_cap: int) -> tuple[int, list[str]]:
    """Spent and refused where each call ends before the next begins: the rule in three lines."""
    spent, refused = 0, list[str]()
    for number, (amount, cost) in enumerate(calls):
        if spent + amount > other_cap:
            refused.append(f"c{number}")
        else:
            spent += cost
    return spent, refused


@given(
    most=st.integers(1, 20),
    shares=st.lists(st.integers(0, 100), max_size=40),
    caps=st.tuples(st.integers(0, 300), st.integers(0, 300)),
)
def test_of_sequential_calls_of_one_bound_a_lower_cap_neither_spends_more_nor_refuses_fewer(
    most: int, shares: list[int], caps: tuple[int, int]
) -> None:
    calls = [(most, most * share // 100) for share in shares]
    entries = numbered(calls).entries
    lower, higher = (decide(entries, cap(each)).total() for each in sorted(caps))
    assert lower.other_spent_nanousd <= higher.other_spent_nanousd <= lower.spent_nanousd
    assert lower.other_refused >= higher.other_refused
    for total, other_cap in ((lower, min(caps)), (higher, max(caps))):
        spent, refused = sequential(calls, other_cap)
        assert (total.other_spent_nanousd, total.newly_refused) == (spent, len(refused))
        assert total.other_calls == len(calls) - len(refused)


def test_where_bounds_differ_a_lower_cap_can_spend_more_and_refuse_fewer() -> None:
    """A large call that is refused leaves its room to small ones: no rule of caps can rule that out."""
    calls = [(10, 6), (5, 4), (5, 4)]
    higher, lower = (decide(numbered(calls).entries, cap(each)).total() for each in (10, 9))
    assert (higher.other_spent_nanousd, higher.newly_refused) == (6, 2)
    assert (lower.other_spent_nanousd, lower.newly_refused) == (4 + 4, 1)


def test_the_first_refusal_says_what_decided_it() -> None:
    entries = numbered([(4, 3), (4, 3), (4, 3)]).entries
    first, second = decide(entries, cap(6)).refusals
    assert (first.call_id, first.settled_nanousd, first.amount_nanousd, first.cap_nanousd) == ("c1", 3, 4, 6)
    assert (first.budget, first.account, first.reason) == (f"user:ann:{PERIOD}", Account("ann", PERIOD, "trial"), "cap")
    assert second.call_id == "c2"


def test_later_events_of_a_call_that_would_have_been_refused_do_not_count() -> None:
    script = Script().call("c0", 4, 3).adjust("c0", 2).deny("c0", 4)
    total = decide(script.entries, cap(3)).total()
    assert (total.spent_nanousd, total.refused) == (3 + 2, 1)
    assert (total.other_spent_nanousd, total.other_calls, total.other_refused) == (0, 0, 1)


FIRST = Alternatives(plan_caps_nanousd={"trial": 9}, user_caps_nanousd={"ann": 3})
OWN = RecordedCaps(users={"ann": 9})
CAP_CASES: dict[str, tuple[Script, Alternatives, RecordedCaps, bool]] = {
    "the plan's cap is replaced": (Script(cap=5), cap(3), RecordedCaps(plans={"trial": 5}), True),
    "another plan's cap is not": (Script(cap=5, plan="growth"), cap(3), RecordedCaps(), False),
    "a user's own cap of the settings stays": (Script(cap=9), cap(3), OWN, False),
    "an assigned plan's cap is replaced": (Script().assign("trial", 5 * USD), cap(3), OWN, True),
    "an assigned cap of one's own stays": (Script().assign("trial", 9), cap(3), RecordedCaps(), False),
    "a user's other cap comes first": (Script().assign("trial", 9), FIRST, RecordedCaps(), True),
    "another user's does not": (Script(cap=5), Alternatives(user_caps_nanousd={"bob": 3}), RecordedCaps(), False),
    "credit is on top of the other cap": (Script(cap=5).credit(1), cap(3), RecordedCaps(), False),
}


@pytest.mark.parametrize("case", CAP_CASES)
def test_a_changed_cap_counts_for_the_right_users(case: str) -> None:
    script, changed, recorded, is_refused = CAP_CASES[case]
    total = decide(script.call("c0", 4, 4).entries, changed, recorded_caps=recorded).total()
    assert total.newly_refused == is_refused


def test_a_call_waits_for_holds_and_is_decided_when_they_settle() -> None:
    script = Script().hold("c0", 6).hold("c1", 6).hold("c2", 6).settle("c0", 1).settle("c1", 1).settle("c2", 1)
    waited = decide(script.entries, cap(8)).total()
    assert (waited.other_spent_nanousd, waited.newly_refused, waited.waited, waited.still_waiting) == (3, 0, 2, 0)
    dear = Script().hold("c0", 6).hold("c1", 6).settle("c0", 5).settle("c1", 1)
    refused = decide(dear.entries, cap(8)).total()
    assert (refused.other_spent_nanousd, refused.newly_refused) == (5, 1)


def test_a_wait_ends_after_the_time_that_is_set() -> None:
    script = Script().hold("c0", 6).hold("c1", 6).later(60).charge("x", 0).settle("c0", 1).settle("c1", 1)
    short = decide(script.entries, cap(8), hold_wait_ms=30_000)
    assert [(refusal.call_id, refusal.reason) for refusal in short.refusals] == [("c1", "wait_timeout")]
    assert decide(script.entries, cap(8), hold_wait_ms=90_000).total().newly_refused == 0


def test_a_call_that_waits_at_the_end_counts_as_neither() -> None:
    total = decide(Script().hold("c0", 6).hold("c1", 6).settle("c1", 6).entries, cap(8)).total()
    assert (total.calls, total.other_calls, total.newly_refused, total.still_waiting) == (2, 1, 0, 1)
    assert (total.spent_nanousd, total.other_spent_nanousd) == (6, 0)


CAMPAIGN = f"campaign:sale:{PERIOD}"
SALE = {CAMPAIGN: 10}
ONE_DOLLAR = price(MODEL, "1", "1")
# Ledger, cap, and the expected result: spent, refusals, and calls that still wait; calls wait for 30 s at most.
WAITS: dict[str, tuple[Script, int, tuple[int, list[tuple[str, str]], int]]] = {
    "a correction downwards lets the next one in": (
        # 4 settled, 4 held and 4 more pass 10; with 1 settled they fit.
        Script().hold("d", 4).settle("d", 4, assumed=4).hold("c0", 4).hold("c1", 4).adjust("d", -3),
        10,
        (1, [], 0),
    ),
    "who still does not fit is passed by nobody behind": (
        # When d ends, c2 would fit and c1 does not; c1 has its turn first, when c0 ends.
        Script().hold("c0", 4).hold("d", 4).hold("c1", 6).hold("c2", 3).settle("d", 1).settle("c0", 1).settle("c1", 2),
        10,
        (1 + 1 + 2, [], 0),
    ),
    "who waits takes up no room for an attempt that it has not made": (
        Script().hold("c0", 6).hold("c1", 4).extension("c1", 1).settle("c0", 1).settle("c1", 5).hold("c2", 3),
        9,
        (1 + 5, [], 0),
    ),
    "who was refused after its time is not let in later": (
        Script().hold("c0", 6).hold("c1", 6).later(60).settle("c0", 1).settle("c1", 1).hold("c2", 6),
        8,
        (1, [("c1", "wait_timeout")], 0),
    ),
    "who no longer fits when its time is over is refused by the cap": (
        Script().hold("c0", 6).hold("c1", 3).charge("x", 6).later(60).charge("y", 0),
        8,
        (6, [("c1", "cap")], 0),
    ),
    "who fits when its time is over is let in": (
        Script().hold("c0", 6).hold("c1", 4).credit(2).later(60).charge("y", 0),
        8,
        (0, [], 0),
    ),
    "a wait ends at its very moment, and those behind have their turn before a newcomer": (
        # 29 s after c1 comes c2's credit, at 30 s c3: c1 fits 10, ends at 1, and leaves room for c2 but not for c3.
        Script().hold("c0", 6).hold("c1", 4).settle("c1", 1).hold("c2", 3).credit(2)
        .later(26).hold("c3", 3).settle("c2", 2),
        8,
        (1 + 2, [], 1),
    ),
    "who waits for one budget, and then for another, is woken by the other": (
        Script().hold("a", 6).hold("w", 4, further=SALE).settle("w", 1, further=SALE)
        .as_user("bob", plan="growth").hold("b", 9, further=SALE)
        .as_user("ann").settle("a", 1)
        .as_user("bob", plan="growth").settle("b", 2, further=SALE),
        8,
        (1 + 1 + 2, [], 0),
    ),
    "a call whose second hold is refused while its first one waits is one refusal, and costs nothing": (
        Script().hold("c0", 6).hold("c1", 3).settle("c1", 3, assumed=3).hold("c1", 9, number=2)
        .later(60).charge("y", 0).adjust("c1", -1),
        8,
        (0, [("c1", "cap")], 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WAITS)
def test_waits_end_as_the_gate_would_end_them(case: str) -> None:
    script, other_cap, wanted = WAITS[case]
    outcome = decide(script.entries, cap(other_cap), hold_wait_ms=30_000)
    total, refusals = outcome.total(), [(refusal.call_id, refusal.reason) for refusal in outcome.first_refusals()]
    assert (total.other_spent_nanousd, refusals, total.still_waiting) == wanted
    assert total.other_calls == total.calls - len(refusals) - total.still_waiting
    assert total.newly_refused == len(refusals)


def test_a_late_answer_to_a_call_that_was_refused_after_its_wait_counts_for_nothing() -> None:
    # At a dollar a million, each call is bounded by 2,000,000 nano-dollars.
    script = Script().hold("c0", 5).hold("c1", 5).settle("c1", 5, assumed=5).later(60).charge("x", 0).called("c1", 2)
    changed = Alternatives(plan_caps_nanousd={"trial": 3_000_000}, prices={MODEL: ONE_DOLLAR})
    total = decide(script.entries, changed, hold_wait_ms=30_000).total()
    assert (total.newly_refused, total.not_repriced) == (1, 0)


def test_a_refused_call_that_fits_is_estimated_and_takes_up_room() -> None:
    script = Script(cap=10).call("c0", 5, 3).call("c1", 5, 4)
    for number in range(2, 6):
        script.deny(f"c{number}", 5)
    # 7 are settled, the mean of such calls is 3.5, rounded up to 4: at a cap of 16, bounds of 5 fit at 7 and at 11.
    outcome = decide(script.entries, cap(16))
    total = outcome.total()
    assert (total.allowed, total.other_refused, total.refused) == (2, 2, 4)
    assert (total.estimate_nanousd, total.at_most_nanousd) == (4 + 4, 5 + 5)
    assert total.other_spent_nanousd == total.spent_nanousd == 3 + 4, "an estimate is not spend"


@pytest.mark.parametrize(("other_cap", "is_refused"), [(7, True), (8, False)])
def test_a_wait_that_was_too_long_is_decided_by_what_is_held_then(other_cap: int, is_refused: bool) -> None:
    script = Script(cap=5).hold("c0", 4).deny("c1", 4, reason="wait_timeout")
    total = decide(script.entries, cap(other_cap)).total()
    assert (total.other_refused, total.allowed) == (is_refused, not is_refused)


def test_caps_of_days_and_campaigns_hold_as_recorded() -> None:
    campaign = f"campaign:sale:{PERIOD}"
    script = Script(cap=10).hold("c0", 5, further={campaign: 6}).settle("c0", 5).deny("c1", 5, budget=campaign, cap=6)
    total = decide(script.entries, cap(100)).total()
    assert (total.other_refused, total.allowed) == (1, 0)


def test_a_retry_for_which_the_hold_cannot_grow_is_not_made() -> None:
    script = Script(cap=100).hold("c0", 10).called("c0", 8).extension("c0", 8, model=MODEL).called("c0", 7, attempt=2)
    total = decide(script.settle("c0", 15).entries, cap(17)).total()
    assert (total.cut_short, total.other_spent_nanousd, total.spent_nanousd) == (1, 8, 15)
    assert decide(script.entries, cap(18)).total().other_spent_nanousd == 15


# --- Other prices and models

USAGE = {"prompt_tokens": 301, "completion_tokens": 77}


def test_another_price_counts_for_recorded_tokens_and_bounds_to_the_nanodollar() -> None:
    script = Script().hold("c0", 50).called("c0", 20, usage=USAGE).settle("c0", 20).call("c1", 9, 9, model=OTHER)
    dear = price(MODEL, "3", "15")
    total = decide(script.entries, Alternatives(prices={MODEL: dear})).total()
    assert total.other_spent_nanousd == 301 * 3_000 + 77 * 15_000 + 9
    # At most a thousand tokens of each kind: the bound decides.
    bound = 1_000 * 3_000 + 1_000 * 15_000
    changed = Alternatives(prices={MODEL: dear}, plan_caps_nanousd={"trial": bound - 1})
    (refusal,) = decide(script.entries, changed).refusals
    assert (refusal.call_id, refusal.amount_nanousd) == ("c0", bound)
    # 1,500 nano-dollars a million tokens: (301 + 77) * 0.0015 = 0.567, rounded up once.
    cheap = Alternatives(prices={MODEL: price(MODEL, "0.0000015", "0.0000015")})
    assert decide(script.entries, cheap).total().other_spent_nanousd == 1 + 9


def test_the_price_that_was_recorded_changes_nothing() -> None:
    listed = PriceCatalogue().price("anthropic/claude-3-haiku", 0)
    script = Script().hold("c0", listed_bound(listed), model=listed.model)
    usage = {"prompt_tokens": 301, "completion_tokens": 77}
    cost = 301 * 250 + 77 * 1_250
    script.called("c0", cost, model=listed.model, usage=usage).settle("c0", cost)
    assert_as_recorded(decide(script.entries, Alternatives(prices={listed.model: listed})))


def listed_bound(listed: ModelPrice) -> int:
    highest = listed.max_prices(1_000)
    return sum(highest) // 1_000


PRICE_CASES: dict[str, tuple[Script, int]] = {
    "a charge assumed at the bound is the new bound": (
        Script().hold("c", 5).called("c", 5, basis="assumed").settle("c", 5),
        2_000 * 1_000,
    ),
    "a dead worker's hold is the new hold": (
        Script().hold("c", 5).settle("c", 5, basis="assumed", assumed=5),
        2_000 * 1_000,
    ),
    "what was released stays free": (
        Script().hold("c", 5).called("c", 0, basis="released").settle("c", 0),
        0,
    ),
    "a late answer is priced": (
        Script().hold("c", 5).settle("c", 5, assumed=5).called("c", 2, usage=USAGE).adjust("c", -3),
        (301 + 77) * 1_000,
    ),
    "a correction follows in the ratio of the holds": (
        Script()
        .hold("c", 4_000_000)
        .called("c", 2_000_000, usage={"prompt_tokens": 1_000})
        .settle("c", 2_000_000)
        .adjust("c", -500_000),
        1_000 * 1_000 - 500_000 * 2_000_000 // 4_000_000,
    ),
    "unknown tokens keep the charge": (Script().hold("c", 5).called("c", 3).settle("c", 3), 3),
    "spend outside a hold is priced": (Script().charge("c", 3, model=MODEL, usage=USAGE), (301 + 77) * 1_000),
}


@pytest.mark.parametrize("case", PRICE_CASES)
def test_what_a_call_costs_at_one_dollar_a_million(case: str) -> None:
    script, wanted = PRICE_CASES[case]
    dollar = Alternatives(prices={MODEL: price(MODEL, "1", "1")})
    assert decide(script.entries, dollar).total().other_spent_nanousd == wanted


def fell_back() -> Script:
    script = Script().hold("c0", 50).called("c0", 0, basis="released")
    return script.called("c0", 20, attempt=2, model=OTHER, usage=USAGE).settle("c0", 20)


def prices_of(model: str, _: int, __: str | None) -> ModelPrice:
    return {"m/third": price("m/third", "2", "4"), MODEL: price(MODEL, "1", "1")}[model]


@pytest.mark.parametrize(
    ("route", "wanted"),
    [
        (OtherRoute(fallbacks=("m/third",)), 301 * 2_000 + 77 * 4_000),
        (OtherRoute(model="m/third"), 20),
        (OtherRoute(model=OTHER, fallbacks=(MODEL,)), 301 * 1_000 + 77 * 1_000),
        (OtherRoute(fallbacks=(OTHER,)), 20),
        (OtherRoute(fallbacks=()), 0),
    ],
)
def test_another_route_prices_the_recorded_tokens(route: OtherRoute, wanted: int) -> None:
    walk = WhatIf(
        Alternatives(
            routes={"score_post": route}, prices={OTHER: price(OTHER, "0", "0")} if route.model == OTHER else {}
        ),
        prices_of,
    )
    walk.fold(table_of(fell_back().entries))
    assert walk.finish().total().other_spent_nanousd == wanted
    other_task = WhatIf(Alternatives(routes={"generate_draft": route}), prices_of)
    other_task.fold(table_of(fell_back().entries))
    assert_as_recorded(other_task.finish())


def test_a_dearer_fallback_that_does_not_fit_the_cap_is_not_made() -> None:
    script = (
        Script(cap=100_000)
        .hold("c0", 50)
        .called("c0", 0, basis="released")
        .called("c0", 20, attempt=2, model=OTHER, usage=USAGE)
    )
    dear = Alternatives(prices={OTHER: price(OTHER, "1000", "1000")})
    total = decide(script.settle("c0", 20).entries, dear).total()
    assert (total.cut_short, total.other_spent_nanousd) == (1, 0)


# --- Selections and order


def test_a_selection_has_its_own_sums_and_refusals() -> None:
    script = numbered([(4, 3), (4, 3)]).as_user("bob", plan="growth").call("b0", 4, 4)
    outcome = decide(script.entries, Alternatives(plan_caps_nanousd={"trial": 4, "growth": 1}))
    assert [refusal.call_id for refusal in outcome.first_refusals()] == ["c1", "b0"]
    bob = outcome.select(user_id="bob", period=PERIOD)
    assert (bob.total().spent_nanousd, [refusal.call_id for refusal in bob.first_refusals()]) == (4, ["b0"])
    assert outcome.select(period="2026-10").accounts == {}
    assert {plan: (users, sums.newly_refused) for plan, (users, sums) in outcome.by_plan().items()} == {
        "growth": (1, 1),
        "trial": (1, 1),
    }
    assert list(outcome.by_user()) == ["bob", "ann"], "the most affected first"


def test_a_gap_in_the_ledger_is_reported() -> None:
    with pytest.raises(LedgerGap):
        decide(LedgerMaker(1).run(50).entries[3:])


# --- Whole systems


async def run_calls(url: str, directory: Path, dollars: str) -> tuple[list[Any], dict[str, int], list[str]]:
    """Run the same calls under a trial cap, one after the other; return the raw ledger, spend and refusals."""
    async with (
        open_calling(url, directory, caps={"plans": {"trial": dollars}}) as calling,
        calling.runner() as (runner, _),
    ):
        for number in range(12):
            user = f"u{number % 2}"
            await runner.run(calling.call(f"t{number}", user_id=user, max_tokens=200 + 50 * (number % 3)))
        events = await calling.events()
        entries = [
            [entry_id, [part for pair in fields.items() for part in pair]]
            for entry_id, fields in await calling.raw_events()
        ]
        spent: dict[str, int] = {"u0": 0, "u1": 0}
        for event in events:
            if isinstance(event.payload, CostRecorded):
                spent[event.user_id] += event.amount
        return entries, spent, [event.call_id for event in events if isinstance(event.payload, BudgetDenied)]


async def test_a_system_run_under_the_other_cap_spends_and_refuses_what_the_what_if_said(
    redis_client: Redis, server_url: str, tmp_path: Path
) -> None:
    entries, _, refused = await run_calls(server_url, tmp_path / "high", "1")
    assert refused == []
    await redis_client.flushall()
    # Room for a few calls: each costs some 640,000 nano-dollars, and is bounded by 3 to 5 million.
    _, spent, refused = await run_calls(server_url, tmp_path / "low", "0.0055")
    assert 0 < len(refused) < 12
    outcome = decide(entries, cap(5_500_000), kept_refusals=20, recorded_caps=RecordedCaps(plans={"trial": USD}))
    assert [refusal.call_id for refusal in outcome.first_refusals()] == refused
    assert {user: outcome.select(user_id=user).total().other_spent_nanousd for user in spent} == spent


@pytest.mark.parametrize("width", [40, 80, 140])
def test_whole_amounts_and_ids_are_printed_at_every_width(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "_UNLIMITED", width)
    outcome = decide(LedgerMaker(1).run(300).entries, cap(10_000_000), kept_refusals=20)
    print_what_if(outcome, 10, ["Something."])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert [line for line in shown.splitlines() if line != line.rstrip()] == []
    total = outcome.total()
    amounts = [total.spent_nanousd, total.other_spent_nanousd, total.difference_nanousd]
    amounts += [sums.other_spent_nanousd for sums in outcome.by_user().values()]
    for amount in amounts:
        assert format_usd(amount, places=4) in shown
    text = "".join(shown.split())
    for refusal in outcome.first_refusals():
        assert refusal.call_id in text
        assert format_usd(refusal.amount_nanousd, places=None) in text


@pytest.mark.slow
async def test_the_command_reads_an_archive_and_prints_tables_or_json(redis_client: Redis, tmp_path: Path) -> None:
    archiving = Archiving(redis_client, tmp_path)
    await archiving.fill(300)
    await seal_all(archiving.sealer())
    entries = LedgerMaker(1).run(300).entries
    last = archiving.archive.segments(0)[-1].manifest.last_seq - 7
    options = (
        "--archive",
        str(directory_of(archiving.archive)),
        "--until",
        entries[last - 1][0].decode(),
        "--cap",
        "trial=0.01",
        "--user-cap",
        "user:1=0",
    )
    printed = (await run_cli("what-if", *options, "--json", cwd=tmp_path)).json()
    wanted = decide(
        entries[:last],
        Alternatives(plan_caps_nanousd={"trial": 10_000_000}, user_caps_nanousd={"user:1": 0}),
    )
    assert printed["events"] == last
    assert Decimal(printed["total"]["spent_usd"]["what_if"]) == Decimal(wanted.total().other_spent_nanousd).scaleb(-9)
    assert printed["total"]["newly_refused"] == wanted.total().newly_refused > 0
    assert {plan["plan"] for plan in printed["plans"]} == set(wanted.by_plan())
    assert [each["call_id"] for each in printed["first_refusals"]] == [each.call_id for each in wanted.first_refusals()]
    text = await run_cli("what-if", *options, cwd=tmp_path)
    assert text.code == 0, text.stderr
    assert "Assumes: " in text.stdout
    assert printed["first_refusals"][0]["call_id"] in text.stdout
    archiving.store.close()
    await archiving.pipeline.aclose()


@pytest.mark.parametrize(
    "options",
    [
        {"caps": ["trial"]},
        {"caps": ["gold=3"]},
        {"caps": ["trial=-1"]},
        {"user_caps": ['u"1=3']},
        {"prices": ["m=1"]},
        {"prices": ["m=1,x"]},
        {"routes": ["ping=m"]},
        {"routes": ["score_post=a,b,c"]},
        {"fallbacks": ["score_post=a,b"]},
    ],
)
def test_a_change_that_cannot_be_read_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(typer.BadParameter):
        read_alternatives(**options)


def test_changes_are_read_from_the_options() -> None:
    read = read_alternatives(
        ["trial=3"], ["u42=8.5"], ["claude-3-haiku=0.8,4"], ["score_post=gpt-4o-mini"], ["score_post=none"]
    )
    assert read == Alternatives(
        plan_caps_nanousd={"trial": 3 * USD},
        user_caps_nanousd={"u42": 8_500_000_000},
        prices={"anthropic/claude-3-haiku": price("anthropic/claude-3-haiku", "0.8", "4")},
        routes={"score_post": OtherRoute("openai/gpt-4o-mini", ())},
    )


def test_what_is_booked_later_counts_for_the_plan_of_its_call() -> None:
    """As in the views of the projection: the user is on another plan by the time of the correction."""
    script = Script(plan="trial").call("c0", 4, 3).as_user("ann", plan="growth").call("c1", 4, 3).adjust("c0", 2)
    by_plan = {plan: sums.spent_nanousd for plan, (_, sums) in decide(script.entries).by_plan().items()}
    assert by_plan == {"trial": 3 + 2, "growth": 3}


def test_another_policy_changes_what_it_says_differently() -> None:
    in_force = default_policy({"users": {"vip": 100, "old": 7}, "prices": {"m/a": {"prompt": 1, "completion": 2}}})
    other = default_policy(
        {
            "plans": {"trial": {"cap_usd": 3}, "pro": {"cap_usd": 99}},
            "users": {"vip": 100, "old": 8},
            "prices": {"m/a": {"prompt": 1, "completion": 2}, "M/b": {"prompt": 1, "completion": 1}},
            "tasks": {"score_post": {"model": MODEL, "max_tokens": 500}},
        }
    )
    changed = Alternatives.of_policy(other, in_force)
    assert changed.plan_caps_nanousd == {"trial": 3 * USD, "pro": 99 * USD}
    assert changed.user_caps_nanousd == {"old": 8 * USD}
    assert changed.repriced == {("default", "m/b")}
    assert changed.routes == {"score_post": OtherRoute(MODEL, (), None, states_cheaper=True, providers=("default",))}
    assert not Alternatives.of_policy(in_force, in_force)
    assert changed.with_changes(cap(1)).plan_caps_nanousd == {"trial": 1, "pro": 99 * USD}
