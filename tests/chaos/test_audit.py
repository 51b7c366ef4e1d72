"""The audit of the chaos run finds what is wrong: each guarantee broken once, in a small ledger made by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.audit import Audit, Evidence, RawEvent
from tests.chaos.clients import Answer
from tests.chaos.processes import Downtime
from tests.chaos.scenario import ClientRequest, Publication, Scenario

PERIOD = "2026-11"
HELD, COST = 100, 40
CAP = 150
TASK = {"task": "score_post", "task_id": "t1", "user_id": "u1", "prompt": "a post", "reply_to": "replies"}
RESULT = {"task_id": "t1", "status": "done", "error_code": None, "finished_at_ms": 1_020}


def make_event(at_ms: int, kind: str, amount: int, committed: int, **payload: Any) -> RawEvent:
    return RawEvent(
        id=f"{at_ms}-0",
        type=kind,
        seq=0,
        user_id="u1",
        period=PERIOD,
        call_id="t1",
        attempt=1,
        amount=amount,
        committed=str(committed),
        payload={"hold": 1, **payload},
    )


def reserved(**changes: Any) -> RawEvent:
    event = make_event(1_000, "budget-reserved", HELD, HELD, worker="host-7-abc.1")
    return replace(event, **changes)


def called(**changes: Any) -> RawEvent:
    payload = {"generation_id": "g1", "charge_nanousd": COST, "charge_basis": "reported"} | changes
    return make_event(1_020, "model-called", 0, HELD, **payload)


def settled(cost: int = COST, **changes: Any) -> RawEvent:
    return make_event(1_021, "cost-recorded", cost, cost, **{"hold_nanousd": HELD, "outcome": "done", **changes})


def denied(amount: int) -> RawEvent:
    budget = f"user:u1:{PERIOD}"
    return replace(make_event(1_030, "budget-denied", amount, COST, budget=budget, reason="cap"), call_id="t2")


def make_evidence(*events: RawEvent, **changes: Any) -> Evidence:
    events = tuple(replace(event, seq=number) for number, event in enumerate(events, 1))
    scenario = Scenario(
        seed=1,
        chaos_s=0,
        caps_nanousd={"u1": CAP},
        publications=(Publication(0, "analysis", TASK, "task"),),
        process_faults=(),
        fault_rates={},
        latency_ms=0,
        attempt_timeout_s=2.0,
        is_trimmed=False,
        max_task_attempts=3,
    )
    text = json.dumps(RESULT)
    evidence = Evidence(
        scenario=scenario,
        published=[("analysis", "1-0", 0)],
        events=events,
        results={"t1": text},
        replies=[("t1", text)],
        dead_letters=[],
        requests=[{"task_id": "t1", "generation_id": "g1", "at_ms": 1_010}],
        book=[{"generation_id": "g1", "user": "u1", "charged_nanousd": COST, "fault": None}],
        downtimes=[],
    )
    return replace(evidence, **changes)


GOOD = (reserved(), called(), settled())


def test_a_correct_ledger_has_no_problem() -> None:
    audit = Audit(make_evidence(*GOOD))
    audit.check()
    audit.check_reconciled()


def given_up_and_published_again(*reasons: str) -> Evidence:
    text = json.dumps({**RESULT, "error_code": "ATTEMPTS_EXHAUSTED"})
    good = make_evidence(*GOOD)
    again = Publication(1, "analysis", {**TASK, "prompt": "something else"}, "conflict")
    return replace(
        good,
        scenario=replace(good.scenario, publications=(*good.scenario.publications, again)),
        published=[*good.published, ("analysis", "2-0", 1)],
        results={"t1": text},
        replies=[("t1", text)],
        dead_letters=[
            {"task_id": "t1", "stream": "analysis", "entry_id": "2-0", "reason": reason} for reason in reasons
        ],
    )


@pytest.mark.parametrize(
    "reasons", [("idempotency_conflict", "attempts_exhausted"), ("attempts_exhausted", "idempotency_conflict")]
)
def test_a_task_may_be_dead_lettered_twice(reasons: tuple[str, ...]) -> None:
    Audit(given_up_and_published_again(*reasons)).check()


@pytest.mark.parametrize(
    ("reason", "says"),
    [("attempts_exhausted", "two contents of t1 were taken for one"), ("idempotency_conflict", "is no dead letter")],
)
def test_each_reason_must_be_among_the_dead_letters(reason: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        Audit(given_up_and_published_again(reason)).check()


def late_request(at_ms: int) -> list[dict[str, Any]]:
    return [
        {"task_id": "t1", "generation_id": "g1", "at_ms": 1_010},
        {"task_id": "t1", "generation_id": "g2", "at_ms": at_ms},
    ]


BROKEN: dict[str, tuple[Callable[[], Evidence], str]] = {
    "a hold above the cap": (
        lambda: make_evidence(
            reserved(amount=CAP + 1, committed=str(CAP + 1)), called(), settled(hold_nanousd=CAP + 1)
        ),
        f"G1: user:u1:{PERIOD} has {CAP + 1} committed, its cap is {CAP}",
    ),
    "a stamp of the gate that is not the sum": (
        lambda: make_evidence(reserved(committed=str(HELD - 1)), called(), settled()),
        f"the gate stamped {HELD - 1}",
    ),
    "a cost above the hold that is not marked": (
        lambda: make_evidence(
            reserved(),
            called(charge_nanousd=HELD + 1),
            settled(HELD + 1),
            book=[{"generation_id": "g1", "user": "u1", "charged_nanousd": HELD + 1, "fault": "overcharge"}],
        ),
        "is not marked as an overage",
    ),
    "a hold that stays open": (lambda: make_evidence(reserved(), called()), "G2: hold 1 is never settled"),
    "a hold settled twice": (lambda: make_evidence(*GOOD, settled()), "G2: hold 1 is settled and was not open"),
    "a second hold beside the first": (
        lambda: make_evidence(
            reserved(),
            reserved(payload={**reserved().payload, "hold": 2}, committed=str(2 * HELD)),
            called(),
            settled(),
        ),
        "G2: hold 2 is opened out of turn",
    ),
    "a charge that nobody booked": (
        lambda: make_evidence(
            *GOOD, book=[{"generation_id": "g1", "user": "u1", "charged_nanousd": COST + 1, "fault": None}]
        ),
        f"G3: the provider charged t1 {COST + 1}, the ledger has {COST}, 0 of it assumed",
    ),
    "money that was booked and neither charged nor assumed": (
        lambda: make_evidence(*GOOD, book=[]),
        f"G3: the provider charged u1 0, the ledger has {COST}, 0 of it assumed",
    ),
    "a call again, long after the settlement": (
        lambda: make_evidence(*GOOD, requests=late_request(9_000)),
        "G4: g2 was asked for at 9000, and no hold allows it",
    ),
    "a call before there is a hold": (
        lambda: make_evidence(*GOOD, requests=late_request(999)),
        "G4: g2 was asked for at 999, and no hold allows it",
    ),
    "a hold opened after the result": (
        lambda: make_evidence(*GOOD, results={"t1": json.dumps(RESULT | {"finished_at_ms": 999})}),
        "G4: hold 1 is opened after the task's result was made",
    ),
    "a task without a result": (lambda: make_evidence(*GOOD, results={}), "G4: t1 has no result"),
    "a reply that is not the result": (
        lambda: make_evidence(*GOOD, replies=[("t1", json.dumps(RESULT | {"status": "failed"}))]),
        "G4: t1 was answered",
    ),
    "a task given up and not put aside": (
        lambda: make_evidence(*GOOD, results={"t1": json.dumps(RESULT | {"error_code": "ATTEMPTS_EXHAUSTED"})}),
        "t1 was given up and is no dead letter",
    ),
    "an event that is missing": (
        lambda: replace(make_evidence(*GOOD), events=[replace(event, seq=2) for event in GOOD]),
        "G7: event 1 of partition 0 has the number 2",
    ),
    "a refusal of what fits": (
        lambda: make_evidence(*GOOD, denied(CAP - COST)),
        f"G9: refused although {COST} and {CAP - COST} are within the cap {CAP}",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_guarantee_is_found_and_reported(name: str) -> None:
    make, problem = BROKEN[name]
    audit = Audit(make())
    with pytest.raises(AssertionError, match="seed 1") as failure:
        audit.check()
    assert problem in str(failure.value)


def test_a_paused_process_may_call_late() -> None:
    still = [Downtime(pid=7, from_ms=1_005, to_ms=9_000)]
    Audit(make_evidence(*GOOD, requests=late_request(9_001), downtimes=still)).check()


def test_an_assumed_charge_that_the_provider_knows_is_found() -> None:
    """G3: after reconciling, only what the provider does not know may be assumed."""
    events = (reserved(), called(charge_nanousd=HELD, charge_basis="assumed"), settled(HELD, assumed_nanousd=HELD))
    audit = Audit(make_evidence(*events))
    audit.check()
    with pytest.raises(AssertionError, match="assumed after the provider was asked"):
        audit.check_reconciled()


CLIENT_REQUEST = ClientRequest(
    at_s=0.0, number=1, model="m", length=1, is_streamed=False, has_key=True, leaves_after_s=None, comes_back=True,
    campaign=None,
)  # fmt: skip


def client_evidence(call_id: str = "gw-1", *, answered_by: str = "gw-1", text: str = "an answer") -> Evidence:
    """Evidence of a client with the calls `gw-1` and `call_id`, whose answer is that of the call `answered_by`."""
    events: list[RawEvent] = []
    for each in dict.fromkeys(("gw-1", call_id)):
        start = COST * (len(events) // 3)
        stamped = (replace(event, committed=str(int(event.committed) + start)) for event in GOOD)
        events += [replace(event, user_id=CLIENT_REQUEST.user, call_id=each) for event in stamped]
    good = make_evidence(*GOOD)
    return replace(
        good,
        scenario=replace(
            good.scenario, caps_nanousd={CLIENT_REQUEST.user: CAP}, publications=(), client_requests=(CLIENT_REQUEST,)
        ),
        published=[],
        events=[replace(event, seq=number) for number, event in enumerate(events, 1)],
        results={
            "gw-1": json.dumps(RESULT | {"user_id": CLIENT_REQUEST.user}),
            "gw-3": json.dumps(RESULT | {"user_id": "u2"}),
        },
        replies=[],
        requests=[
            {"task_id": CLIENT_REQUEST.user, "generation_id": f"g{n}", "at_ms": 1_010} for n in range(len(events) // 3)
        ],
        book=[
            {"generation_id": f"g{n}", "user": CLIENT_REQUEST.user, "charged_nanousd": COST, "fault": None}
            for n in range(len(events) // 3)
        ],
        answers=[Answer(CLIENT_REQUEST, answered_by, 200, text)],
    )


def test_a_client_request_is_one_call_with_its_answer() -> None:
    Audit(client_evidence()).check()


def test_a_client_request_may_be_a_second_call_if_the_first_cost_nothing() -> None:
    first = (
        replace(reserved(), user_id=CLIENT_REQUEST.user, call_id="gw-2"),
        replace(settled(0, outcome="failed"), user_id=CLIENT_REQUEST.user, call_id="gw-2"),
    )
    good = client_evidence()
    events = [replace(event, seq=number) for number, event in enumerate((*first, *good.events), 1)]
    Audit(replace(good, events=events)).check()


@pytest.mark.parametrize(
    ("evidence", "says"),
    [
        (client_evidence("gw-2"), "one Idempotency-Key of client-1 paid for"),
        (client_evidence(answered_by="gw-3"), "client-1 was answered by gw-3"),
        (replace(client_evidence(), book=[]), "the provider charged client-1 0, the ledger has 40"),
    ],
    ids=["two calls of one key", "an answer of somebody else's call", "money that was not charged"],
)
def test_a_wrong_answer_to_a_client_is_found(evidence: Evidence, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        Audit(evidence).check()
