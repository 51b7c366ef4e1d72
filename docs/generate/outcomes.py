"""What a reply means: tables made by reading each reply with the code that reads real replies.

The rows are the stand-in's scenarios, the HTTP statuses and the faults of the network. The tests play each scenario
against the whole system, and compare with the same rows.
"""

import json
from pathlib import Path
from typing import Final

from docs.generate.markdown import code, table, with_part
from tollbook.inference.attempts import Attempt, ChatRequest
from tollbook.inference.providers.bodies import read_body
from tollbook.inference.providers.faults import Fault
from tollbook.inference.providers.replies import Reply, read_reply
from tollbook.schemas.failures import FAILURES
from tollbook.standin.scenarios import SCENARIOS

PAGE: Final = Path(__file__).resolve().parents[1] / "reference" / "outcomes.md"
MODEL: Final = "anthropic/claude-sonnet-4"
MAX_TOKENS: Final = 1_000

_STATUSES: Final = (400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 524, 529)
_BOOKED: Final = {
    "reported": "as reported",
    "priced": "priced from the usage",
    "doubted": "priced by the dearer reading, marked `usage_doubt`",
    "assumed": "assumed: the upper bound",
    "nothing": "nothing",
}
_CHARGES: Final = {"none": "nothing", "known": "as reported", "unknown": "assumed: the upper bound"}
_FAULTS: Final = (
    ("There was no connection.", Fault("not_sent", "none", "", may_fall_back=False)),
    ("No complete reply in time.", Fault("timeout", "unknown", "")),
    ("The connection broke.", Fault("connection_error", "unknown", "")),
    ("The reply is not readable HTTP.", Fault("invalid_response", "unknown", "")),
)


def documents() -> dict[Path, str]:
    """Return the page, with its text."""
    text = PAGE.read_text(encoding="utf-8")
    for name, made in (
        ("outcomes", scenarios("outcome")),
        ("forms", scenarios("form")),
        ("usage", scenarios("usage")),
        ("errors", scenarios("error")),
        ("statuses", statuses()),
        ("reasons", table(("reason", "meaning"), [(code(name), text) for name, text in FAILURES.items()])),
    ):
        text = with_part(text, name, made)
    return {PAGE: text}


def scenarios(group: str) -> str:
    """Every scenario of a group, and its outcome."""
    rows = [
        (
            code(name),
            scenario.meaning,
            code(scenario.result),
            next_steps(attempt_of(name)),
            _BOOKED[scenario.booked],
        )
        for name, scenario in SCENARIOS.items()
        if scenario.group == group
    ]
    return table(("scenario", "reply", "result", "tried next", "booked"), rows)


def statuses() -> str:
    """Every HTTP status and every fault of the network."""
    rows: list[tuple[str, ...]] = []
    for status in _STATUSES:
        attempt = _read(status, json.dumps({"error": {"code": status, "message": ""}}).encode())
        rows.append((f"HTTP {status}", code(attempt.reason or ""), next_steps(attempt), _CHARGES[attempt.charge]))
    page = _read(502, b"<html></html>")
    rows.append(("HTTP 5xx with a proxy's page", code(page.reason or ""), next_steps(page), _CHARGES[page.charge]))
    rows += [(meaning, code(fault.reason), next_steps(fault), _CHARGES[fault.charge]) for meaning, fault in _FAULTS]
    return table(("what happened", "reason", "tried next", "booked"), rows)


def attempt_of(name: str) -> Attempt:
    """Read a scenario's reply as real replies are read."""
    scenario = SCENARIOS[name]
    return _read(scenario.status, scenario.body(scenario.tokens(MODEL, 40, 40), "gen-1", "text"))


def next_steps(ended: Attempt | Fault) -> str:
    """Return what is tried after a request; a model that may have charged is not asked again before another is."""
    if isinstance(ended, Attempt) and ended.is_ok:
        return "nothing"
    is_risky = ended.charge == "unknown"
    steps = ["the same model"] * ended.is_retryable + ["the fallback"] * ended.may_fall_back
    if isinstance(ended, Attempt) and ended.reason == "context_too_long":
        return "the fallback, if its context is larger"
    if is_risky and len(steps) == 2:
        return "the fallback; without one, the same model"
    return ", then ".join(steps) or "nothing"


def _read(status: int, body: bytes) -> Attempt:
    reply = Reply.of_body(status, {}, read_body(body), latency_ms=0, now_s=0.0)
    return read_reply(reply, ChatRequest(model=MODEL, messages=(), max_tokens=MAX_TOKENS), is_insured=False)
