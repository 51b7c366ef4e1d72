"""Tests of the tests: gates broken on purpose, each of which the state machine must catch.

A variant is the gate's own source with pieces of its text replaced; where a piece is no longer
there, the variant has to be written anew. Those that break what can be seen on the stream are
caught without the model, by G1, G2 or the fold alone; the others by the model's prediction.
"""

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.stateful.gate_driver import GateDriver
from tests.stateful.gate_machine import GateMachine
from tollbook.ledger.gate.functions import library_code

pytestmark = pytest.mark.slow

G1 = "G1 is broken"
G2 = "G2 is broken"
G11 = "G11 is broken"
FOLD = "stamped committed differs"
MODEL = "the model predicts"
EVENTS = "the events differ from the model's"


@dataclass(frozen=True)
class Broken:
    """`seen_as` is the machine's message; with `by_stream`, the fault is found without the model."""

    name: str
    replacements: tuple[tuple[str, str], ...]
    seen_as: str
    by_stream: bool = False

    def code(self) -> str:
        code = library_code()
        for old, new in self.replacements:
            assert code.count(old) == 1, f"{self.name}: the text stands {code.count(old)} times in the gate: {old}"
            code = code.replace(old, new)
        return code


BROKEN = (
    Broken(
        "a hold by another policy than the ledger's is let through (G11)",
        (("if meta.version ~= meta.policy and not", "if false and not"),),
        G11,
        by_stream=True,
    ),
    Broken(
        "an extension by another policy is let through (G11)",
        (("refusal = extension > 0 and other_policy(meta)", "refusal = nil"),),
        G11,
        by_stream=True,
    ),
    Broken(
        "an older policy replaces a newer one (G11)",
        ((" or int(version) <= int(meta.policy) then", " then"),),
        G11,
        by_stream=True,
    ),
    Broken(
        "a policy replaces one that its author has not seen (G11)",
        (("elseif meta.policy ~= args[2] or int(version)", "elseif int(version)"),),
        MODEL,
    ),
    Broken(
        "baselines below the watermark are taken",
        (("if is_after(meta.trim_ms, meta.trim_n, q.ms, q.n) then", "if false then"),),
        FOLD,
        by_stream=True,
    ),
    Broken(
        "tails are dropped and the watermark stays",
        (("redis.call('HSET', keys[1], 'trimmed_to', args[2])", ""),),
        FOLD,
        by_stream=True,
    ),
    Broken(
        "tails are dropped past the watermark",
        (("if is_after(first_ms, first_n, ms, n) or", "if"),),
        FOLD,
        by_stream=True,
    ),
    Broken(
        "holds do not count against the cap",
        (("b.s + b.h + amount > cap then", "b.s + amount > cap then"),),
        G1,
        by_stream=True,
    ),
    Broken(
        "one nano-dollar over the cap is let through",
        (("b.s + b.h + amount > cap then", "b.s + b.h + amount > cap + 1 then"),),
        G1,
        by_stream=True,
    ),
    Broken(
        "only the first budget is weighed",
        (
            ("denied = denied or i", "denied = denied or (i == 1 and i or nil)"),
            ("waiting = waiting or i", "waiting = waiting or (i == 1 and i or nil)"),
        ),
        G1,
        by_stream=True,
    ),
    Broken(
        "an extension is not weighed",
        (("local refused = extends and (w.denied or w.waiting)", "local refused = nil"),),
        G1,
        by_stream=True,
    ),
    Broken(
        "a settled hold is settled again",
        (
            ("return nil, { 'SETTLED', cost .. ' ' .. assumed, call.state }", ""),
            (
                "if call.state ~= 'open' or call.hold ~= hold then",
                # A charge without a hold has no budgets to settle against.
                "if call.budgets == '' or call.hold ~= hold then",
            ),
        ),
        G2,
        by_stream=True,
    ),
    Broken(
        "a settlement frees nothing",
        (("push(tail, id, cost, -amount, balances[i])", "push(tail, id, cost, 0, balances[i])"),),
        FOLD,
        by_stream=True,
    ),
    Broken(
        "an adjustment does not reach the tail",
        (("push(tail, id, difference, 0, balances[i])", ""),),
        FOLD,
        by_stream=True,
    ),
    Broken(
        "the newest entry of a tail goes while its hold is open",
        ((" or (length == 1 and held ~= 0) then", " then"),),
        MODEL,
    ),
    Broken(
        "a baseline that the tail contradicts is taken",
        (("if s ~= q.s or h ~= q.h then", "if false then"),),
        MODEL,
    ),
    Broken("a projection ahead of the ledger is taken", (("if q.seq > meta.seq then", "if false then"),), MODEL),
    Broken(
        "a call that only holds stand in the way of is refused (G9)",
        (("local refused = w.denied or (final == '1' and w.waiting)", "local refused = w.denied or w.waiting"),),
        MODEL,
    ),
    Broken(
        "the last nano-dollar of the cap is refused (G9)",
        (("and b.s + amount > cap then", "and b.s + amount >= cap then"),),
        MODEL,
    ),
    Broken(
        "other content under the same call id passes (G4)",
        (("if call.hash ~= hash then -- G4\n", "if false then -- G4\n"),),
        MODEL,
    ),
    Broken(
        "a resent extension extends again",
        (("local extends = extension > 0 and mark(call, 'x' .. attempt)", "local extends = extension > 0"),),
        MODEL,
    ),
    Broken(
        "a resent event of an attempt is appended again",
        (("if mark(call, MARKS[event.type] .. event.attempt) then", "do"),),
        EVENTS,
    ),
    Broken(
        "a correction is booked where the latest hold stands, not its own",
        (("if not cost or place == '' then", "if true then"),),
        MODEL,
    ),
    Broken(
        "a repeated adjustment is booked again",
        (("    set_settled(call, args[3], cost, assumed)\n  end", "  end"),),
        MODEL,
    ),
    Broken(
        "credit of one period counts in all",
        (("'credit:' .. period, 'plan')\n  return math.min", "'credit:2026-11', 'plan')\n  return math.min"),),
        # By the first that shows it: an answer, or an alert of the cap.
        f"{MODEL}|{EVENTS}",
    ),
    Broken(
        "credit of a budget does not count",
        (("cap = math.min(cap + credit_of(meta, name), MAX_AMOUNT)\n    end", "cap = cap\n    end"),),
        G1,
        by_stream=True,
    ),
    Broken(
        "a credit that has expired counts on",
        (
            (
                "redis.call('HSET', key, name, text(int(redis.call('HGET', key, name) or 0) + change),",
                "redis.call('HSET', key, name, text(int(redis.call('HGET', key, name) or 0) + math.max(change, 0)),",
            ),
        ),
        G1,
        by_stream=True,
    ),
    Broken(
        "a credit expires before its time",
        (("if kind == 'credit-expired' and now < expires then", "if false then"),),
        MODEL,
    ),
    Broken(
        "an expiry takes back what is spent",
        (("taken = math.max(0, lot.left - (after - before))", "taken = lot.amount"),),
        MODEL,
    ),
    Broken(
        "an expiry takes back what open holds need",
        (("taken = math.max(0, lot.left - (after - before))", "taken = lot.left"),),
        MODEL,
    ),
    Broken(
        "the credit that expires last is used first",
        (("lot.expires < other.expires)", "lot.expires > other.expires)"),),
        MODEL,
    ),
    Broken(
        "spend is taken from credits twice",
        (
            (
                "lot.left, state.used, rest = lot.left - part, state.used + part, rest - part",
                "lot.left, rest = lot.left - part, rest - part",
            ),
        ),
        MODEL,
    ),
    Broken(
        "a credit is granted by another policy than the ledger's (G11)",
        (
            (
                "refusal = repeated(read_call(keys[4]), args[3], keys[2]) or other_policy(meta)",
                "refusal = repeated(read_call(keys[4]), args[3], keys[2])",
            ),
        ),
        MODEL,
    ),
    Broken(
        "an alert is raised again",
        (("    if not raised[i] then", "    if true then"),),
        "an alert is raised again",
        by_stream=True,
    ),
    Broken(
        "an alert comes a nano-dollar late",
        (("settled >= threshold)", "settled > threshold)"),),
        EVENTS,
    ),
    Broken(
        "a refusal raises no alert",
        (("(is_refusal and fraction.parts == 10000)", "false"),),
        EVENTS,
    ),
    Broken(
        "alerts of the policy before are raised",
        (("kept.version == meta.policy and", ""), ("  alert_rules[keys[1]] = nil\n  for _, budget", "  for _, budget")),
        EVENTS,
    ),
    Broken(
        "a correction raises no alert",
        (("local due = difference > 0 and due_alerts", "local due = false and due_alerts"),),
        EVENTS,
    ),
    Broken(
        "the id of an earlier request is kept for the one in flight (G3)",
        (
            ("mark(call, 'g' .. text(attempt) ..", "mark(call, 'g' .. call.begun .."),
            ("if attempt == exact(call.begun) then -- G3", "if true then"),
        ),
        MODEL,
    ),
    Broken(
        "the id of a request outlives its hold",
        (("  forget_id(call)\n  set_settled", "  set_settled"),),
        MODEL,
    ),
    Broken(
        "the number of a hold starts anew",
        (("local hold, deadline, cap = text(exact(call.hold) + 1),", "local hold, deadline, cap = '1',"),),
        MODEL,
    ),
)


def _run(url: str, code: str, *, compares: bool, examples: int) -> None:
    machine = type("Broken", (GateMachine,), {"driver": GateDriver(url, code), "compares": compares})
    profile = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        database=None,
        derandomize=True,
        # The first failing run is enough; making it small takes longer than finding it.
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    try:
        run_state_machine_as_test(machine, settings=profile)
    finally:
        machine.driver.close()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_gate_is_caught(broken: Broken, server_url: str) -> None:
    with pytest.raises(AssertionError, match=broken.seen_as):
        _run(server_url, broken.code(), compares=not broken.by_stream, examples=1_500)


def test_the_gate_itself_passes_the_same_run_without_the_model(server_url: str) -> None:
    """G1, G2: what the stream alone shows; otherwise the variants above might be caught for another reason."""
    _run(server_url, library_code(), compares=False, examples=200)
