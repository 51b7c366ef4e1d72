"""The checks of a chaos run: the ledger, event by event, against the provider's own book.

No code under test is used here: only the raw events, the stored results, the replies, the dead
letters and the provider's records count. All problems are collected, and reported with the events
of the calls that they are about.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from tests.chaos.clients import Answer
from tests.chaos.processes import Downtime
from tests.chaos.scenario import CAMPAIGN_CAP_NANOUSD, CLIENT, Publication, Scenario
from tollbook.schemas.identifiers import task_id_from_entry

# A worker that was not paused asks the provider within this time after the gate allowed it, even on a busy machine.
_SOON_MS: Final = 5_000
_RECONCILED: Final = ("reconciled", "reconciled in part")
_SHOWN_CALLS: Final = 5


@dataclass(frozen=True, slots=True)
class RawEvent:
    """One entry of the ledger, read by this file alone."""

    id: str
    type: str
    seq: int
    user_id: str
    period: str
    call_id: str
    attempt: int
    amount: int
    committed: str
    payload: dict[str, Any]
    partition: int = 0

    @classmethod
    def read(cls, entry_id: bytes, fields: dict[bytes, bytes], partition: int) -> Self:
        text = {name.decode(): value.decode() for name, value in fields.items()}
        return cls(
            id=entry_id.decode(),
            type=text["type"],
            seq=int(text["seq"]),
            user_id=text["user_id"],
            period=text["period"],
            call_id=text["call_id"],
            attempt=int(text["attempt"]),
            amount=int(text["amount"]),
            committed=text["committed"],
            payload=json.loads(text["payload"]),
            partition=partition,
        )

    @classmethod
    def of_archive(cls, row: dict[str, Any]) -> Self:
        committed = "" if row["committed"] is None else str(row["committed"])
        taken = {name: row[name] for name in cls.__slots__}
        return cls(**{**taken, "committed": committed, "payload": json.loads(row["payload"])})

    @property
    def at_ms(self) -> int:
        return int(self.id.partition("-")[0])

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass
class Evidence:
    """All records of a run. `published` has stream, entry id and the publication's number in the scenario.

    `unconfirmed` has stream and entry id of publications that were repeated, since no replica had them in time.
    """

    scenario: Scenario
    published: Sequence[tuple[str, str, int]]
    events: Sequence[RawEvent]
    results: dict[str, str]
    replies: Sequence[tuple[str, str]]
    dead_letters: Sequence[dict[str, str]]
    requests: Sequence[dict[str, Any]]
    book: Sequence[dict[str, Any]]
    downtimes: Sequence[Downtime]
    answers: Sequence[Answer] = ()
    unconfirmed: Sequence[tuple[str, str]] = ()


@dataclass
class HoldFacts:
    """One hold of one call, as the ledger has it. Units: nano-dollars, milliseconds."""

    call_id: str
    number: int
    user_id: str
    run: str
    budgets: tuple[str, ...]
    reserved_ms: int
    held: int = 0
    settled_ms: int | None = None
    outcome: str = ""
    cost: int = 0
    assumed: int = 0
    # The assumed part before the provider was asked about it.
    booked_assumed: int = 0
    attempts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    # The attempt that died with its worker, if its id is known: id, number and its assumed charge.
    died: tuple[str, int, int] | None = None
    # Ids of requests whose cost the provider has reported later.
    reported_ids: set[str] = field(default_factory=set[str])

    @property
    def seen(self) -> set[str | None]:
        """Ids of the requests whose cost the ledger knows."""
        seen = {each.get("generation_id") for each in self.attempts if each["charge_basis"] != "assumed"}
        return seen | self.reported_ids

    @property
    def assumed_by_outcome(self) -> Counter[str]:
        """The assumed charges that remain, by the attempt's outcome and whether its id is known."""
        found = Counter[str]()
        for each in self.attempts:
            if each["charge_basis"] == "assumed" and each.get("generation_id") not in self.reported_ids:
                known = ", id known" if each.get("generation_id") else ""
                found[f"{each['outcome']}{known}"] += each["charge_nanousd"]
        if rest := self.assumed - found.total():
            found[f"{self.outcome}{', id known' if self.died else ''}"] += rest
        return found

    @property
    def learnable(self) -> list[tuple[str | None, int]]:
        """The assumed charges of attempts, with their ids."""
        found = [(e.get("generation_id"), e["charge_nanousd"]) for e in self.attempts if e["charge_basis"] == "assumed"]
        if self.died is not None and self.died[1] not in [each["attempt"] for each in self.attempts]:
            found.append((self.died[0], self.died[2]))
        return found

    @property
    def overage(self) -> int:
        return max(0, self.cost - self.held)

    @property
    def asked_for(self) -> str:
        """The mark in the prompts of its requests: the task id, or the client's user."""
        return self.user_id if self.user_id.startswith(CLIENT) else self.call_id

    @property
    def pid(self) -> int:
        """The pid of the process that made the hold. A process's name is host, pid and a random part."""
        return int(self.run.rpartition(".")[0].rsplit("-", 2)[1])


class Audit:
    """Folds the events on its own, then checks."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.holds: dict[tuple[str, int], HoldFacts] = {}
        self.by_call: dict[str, list[HoldFacts]] = defaultdict(list)
        self.types: Counter[str] = Counter()
        self._numbers: Counter[int] = Counter()
        self._settled: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._overage: Counter[str] = Counter()
        self._problems: list[tuple[str, str]] = []
        for event in evidence.events:
            self._fold(event)
        # A client's retry may be a call of its own; only the mark in the prompt connects requests and calls then.
        self.by_prompt: dict[str, list[HoldFacts]] = defaultdict(list)
        for hold in self.holds.values():
            self.by_prompt[hold.asked_for].append(hold)
        task_of = {line["generation_id"]: line["task_id"] for line in evidence.requests}
        answered = {generation_id for hold in self.holds.values() for generation_id in hold.seen}
        self.booked: Counter[str] = Counter()
        self.booked_by_user: Counter[str] = Counter()
        self.unseen_overcharges = 0
        for entry in evidence.book:
            charged = entry["charged_nanousd"]
            if entry["fault"] == "overcharge" and entry["generation_id"] not in answered:
                # A bound holds only for a provider that keeps to its price list. If it overcharges and nobody reads
                # the answer, no ledger can know the charge; such a request counts at its list price.
                charged //= 10
                self.unseen_overcharges += 1
            self.booked[task_of[entry["generation_id"]]] += charged
            self.booked_by_user[entry["user"]] += charged

    @property
    def assumed_nanousd(self) -> int:
        """The sum of charges that are assumed."""
        return sum(hold.assumed for hold in self.holds.values())

    @property
    def booked_above_nanousd(self) -> int:
        """How much more the ledger has than the provider's book."""
        return sum(hold.cost for hold in self.holds.values()) - sum(self.booked.values())

    def check(self) -> None:
        """Check what must hold in a system at rest. Errors: AssertionError."""
        self._check_holds()
        self._check_money()
        self._check_requests()
        self._check_results()
        self._check_answers()
        self._raise()

    def check_reconciled(self) -> None:
        """Check what must hold after `tollbook reconcile` has asked the provider. Errors: AssertionError."""
        known = {entry["generation_id"] for entry in self.evidence.book}
        for hold in self.holds.values():
            learnt = sum(nanousd for generation_id, nanousd in hold.learnable if generation_id in known)
            if hold.assumed != hold.booked_assumed - learnt:
                self._add_problem(
                    hold.call_id,
                    f"G3: hold {hold.number} has {hold.assumed} assumed after the provider was asked, "
                    f"{hold.booked_assumed} before, of which it knows {learnt}",
                )
        for call_id, holds in self.by_prompt.items():
            cost = sum(hold.cost for hold in holds)
            if not any(hold.assumed for hold in holds) and cost != self.booked[call_id]:
                self._add_problem(
                    call_id, f"G3: nothing is assumed, {cost} is booked, and {self.booked[call_id]} charged"
                )
        self._raise()

    def summary(self) -> dict[str, Any]:
        """Return counts that show whether enough happened in the run."""
        statuses = Counter(json.loads(text)["status"] for text in self.evidence.results.values())
        codes = Counter(json.loads(text)["error_code"] for text in self.evidence.results.values())
        return {
            "entries": len(self.evidence.published),
            "events": len(self.evidence.events),
            "requests": len(self.evidence.requests),
            "statuses": dict(statuses),
            "errors": {code: number for code, number in codes.items() if code},
            "outcomes": dict(Counter(hold.outcome for hold in self.holds.values())),
            "holds_past_the_first": sum(hold.number > 1 for hold in self.holds.values()),
            "late_answers": sum(
                event.type == "cost-adjusted" and event.payload["reason"] == "late_answer"
                for event in self.evidence.events
            ),
            "answers": dict(Counter(answer.status for answer in self.evidence.answers)),
            "overages": sum(hold.overage > 0 for hold in self.holds.values()),
            "unseen_overcharges": self.unseen_overcharges,
            "charged_nanousd": sum(self.booked.values()),
            "assumed_nanousd": self.assumed_nanousd,
            "assumed_shares": {
                name: round(nanousd / (sum(self.booked.values()) or 1), 4)
                for name, nanousd in sum((hold.assumed_by_outcome for hold in self.holds.values()), Counter()).items()
            },
            "assumed_share": round(self.assumed_nanousd / (sum(self.booked.values()) or 1), 4),
            "above_book_share": round(self.booked_above_nanousd / (sum(self.booked.values()) or 1), 4),
        }

    # --- The fold ---

    def _fold(self, event: RawEvent) -> None:
        self.types[event.type] += 1
        self._numbers[event.partition] += 1
        if event.seq != (number := self._numbers[event.partition]):
            self._add_problem(
                event.call_id, f"G7: event {number} of partition {event.partition} has the number {event.seq}"
            )
        payload = event.payload
        key = event.call_id, payload.get("hold", 0)
        match event.type:
            case "budget-reserved":
                self._reserve(event, key)
            case "budget-denied":
                self._deny(event)
            case "model-called":
                if key in self.holds:
                    self.holds[key].attempts.append({**payload, "attempt": event.attempt})
                else:
                    self._add_problem(event.call_id, "G3: an attempt stands against no hold")
            case "cost-recorded":
                self._settle(event, key)
            case "cost-adjusted":
                self._adjust(event, key)
            case _:
                pass

    def _reserve(self, event: RawEvent, key: tuple[str, int]) -> None:
        if event.payload.get("kind", "hold") == "hold":
            earlier = self.by_call[event.call_id]
            if key[1] != len(earlier) + 1 or any(hold.settled_ms is None for hold in earlier):
                self._add_problem(event.call_id, f"G2: hold {key[1]} is opened out of turn")
            hold = HoldFacts(*key, event.user_id, event.payload["worker"], _budgets_of(event), reserved_ms=event.at_ms)
            self.holds[key] = hold
            earlier.append(hold)
        hold = self.holds.get(key)
        if hold is None or hold.settled_ms is not None:
            self._add_problem(event.call_id, f"G2: hold {key[1]} is extended and is not open")
            return
        hold.held += event.amount
        self._move(event, hold, settled=0, held=event.amount)
        for budget in hold.budgets:
            committed = self._settled[budget] + self._held[budget]
            if committed > self._cap(budget):
                self._add_problem(
                    event.call_id, f"G1: {budget} has {committed} committed, its cap is {self._cap(budget)}"
                )

    def _deny(self, event: RawEvent) -> None:
        budget = event.payload["budget"]
        counted = self._settled[budget] + (self._held[budget] if event.payload["reason"] == "wait_timeout" else 0)
        if counted + event.amount <= self._cap(budget):
            self._add_problem(
                event.call_id,
                f"G9: refused although {counted} and {event.amount} are within the cap {self._cap(budget)} of {budget}",
            )

    def _settle(self, event: RawEvent, key: tuple[str, int]) -> None:
        hold = self.holds.get(key)
        if hold is None or hold.settled_ms is not None:
            self._add_problem(event.call_id, f"G2: hold {key[1]} is settled and was not open")
            return
        hold.settled_ms, hold.outcome, hold.cost = event.at_ms, event.payload["outcome"], event.amount
        hold.assumed = hold.booked_assumed = event.payload.get("assumed_nanousd", 0)
        if hold.outcome in ("expired", "taken_over") and (generation_id := event.payload.get("generation_id")):
            rest = hold.assumed - sum(nanousd for _, nanousd in hold.learnable)
            hold.died = generation_id, event.attempt, rest
            if not rest:
                hold.reported_ids.add(generation_id)
        if event.payload["hold_nanousd"] != hold.held:
            self._add_problem(event.call_id, f"G2: {event.payload['hold_nanousd']} is freed of {hold.held}")
        if event.payload.get("overage_nanousd", 0) != hold.overage:
            self._add_problem(event.call_id, f"G1: {hold.cost} for a hold of {hold.held} is not marked as an overage")
        self._move(event, hold, settled=hold.cost, held=-hold.held, overage=hold.overage)

    def _adjust(self, event: RawEvent, key: tuple[str, int]) -> None:
        hold = self.holds.get(key)
        if hold is None or hold.settled_ms is None:
            self._add_problem(event.call_id, f"G2: hold {key[1]} is adjusted and was not settled")
            return
        overage = hold.overage
        hold.cost += event.amount
        hold.assumed += event.payload.get("assumed_nanousd", 0)
        if event.payload["reason"] in _RECONCILED:
            hold.reported_ids.add(event.payload["generation_id"])
        else:
            hold.booked_assumed = hold.assumed
        if not 0 <= hold.assumed <= hold.cost:
            self._add_problem(event.call_id, f"G3: of {hold.cost}, {hold.assumed} are assumed")
        self._move(event, hold, settled=event.amount, held=0, overage=hold.overage - overage)

    def _move(self, event: RawEvent, hold: HoldFacts, *, settled: int, held: int, overage: int = 0) -> None:
        budgets = _budgets_of(event)
        if budgets != hold.budgets:
            self._add_problem(event.call_id, f"G1: {budgets} are moved, the hold stands against {hold.budgets}")
        stamps = [int(event.committed), *(extra["committed_nanousd"] for extra in event.payload.get("budgets", ()))]
        for budget, stamp in zip(budgets, stamps, strict=True):
            self._settled[budget] += settled
            self._held[budget] += held
            self._overage[budget] += overage
            committed = self._settled[budget] + self._held[budget]
            if committed != stamp:
                self._add_problem(event.call_id, f"G1: {budget} has {committed} committed, the gate stamped {stamp}")
            # A cap can be passed only by what the provider charged beyond a hold.
            if committed > self._cap(budget) + self._overage[budget]:
                self._add_problem(
                    event.call_id,
                    f"G1: {budget} has {committed} committed, its cap is {self._cap(budget)} and "
                    f"{self._overage[budget]} are overages",
                )

    def _cap(self, budget: str) -> int:
        kind, subject, _ = budget.split(":")
        return CAMPAIGN_CAP_NANOUSD if kind == "campaign" else self.evidence.scenario.caps_nanousd[subject]

    # --- At rest ---

    def _check_holds(self) -> None:
        for hold in self.holds.values():
            if hold.settled_ms is None:
                self._add_problem(hold.call_id, f"G2: hold {hold.number} is never settled")
        for budget, held in self._held.items():
            if held:
                self._add_problem("", f"G2: {budget} has {held} held although nothing is open")

    def _check_money(self) -> None:
        """G3: what was charged is booked; what is booked beyond it is assumed."""
        for call_id in self.by_prompt.keys() | self.booked.keys():
            holds = self.by_prompt.get(call_id, [])
            self._compare(
                call_id,
                call_id,
                self.booked[call_id],
                sum(hold.cost for hold in holds),
                sum(hold.assumed for hold in holds),
            )
        for user in {hold.user_id for hold in self.holds.values()} | self.booked_by_user.keys():
            holds = [hold for hold in self.holds.values() if hold.user_id == user]
            cost, assumed = sum(hold.cost for hold in holds), sum(hold.assumed for hold in holds)
            self._compare("", user, self.booked_by_user[user], cost, assumed)

    def _compare(self, call_id: str, whose: str, booked: int, cost: int, assumed: int) -> None:
        if not cost - assumed <= booked <= cost:
            self._add_problem(
                call_id, f"G3: the provider charged {whose} {booked}, the ledger has {cost}, {assumed} of it assumed"
            )

    def _check_requests(self) -> None:
        """G4: a process that sends a request has an open hold, or was paused while its hold was settled."""
        for request in self.evidence.requests:
            at_ms, task_id = request["at_ms"], request["task_id"]
            if not any(self._may_ask(hold, at_ms) for hold in self.by_prompt.get(task_id, ())):
                self._add_problem(
                    task_id, f"G4: {request['generation_id']} was asked for at {at_ms}, and no hold allows it"
                )
        over_ms = {task_id: json.loads(text)["finished_at_ms"] for task_id, text in self.evidence.results.items()}
        for hold in self.holds.values():
            if hold.reserved_ms > over_ms.get(hold.call_id, hold.reserved_ms):
                self._add_problem(hold.call_id, f"G4: hold {hold.number} is opened after the task's result was made")

    def _may_ask(self, hold: HoldFacts, at_ms: int) -> bool:
        if at_ms < hold.reserved_ms:
            return False
        if hold.settled_ms is None or at_ms <= hold.settled_ms + _SOON_MS:
            return True
        return any(
            still.pid == hold.pid
            and still.from_ms <= at_ms
            and still.to_ms >= hold.reserved_ms
            and at_ms <= still.to_ms + _SOON_MS
            for still in self.evidence.downtimes
        )

    def _check_results(self) -> None:
        replies: dict[str, set[str]] = defaultdict(set)
        for task_id, text in self.evidence.replies:
            if json.loads(text)["error_code"] != "IDEMPOTENCY_CONFLICT":
                replies[task_id].add(text)
        letters = {(letter["stream"], letter["entry_id"]): letter["reason"] for letter in self.evidence.dead_letters}
        # One task may be dead-lettered twice: given up, and published again with other content.
        dead_lettered: dict[str, set[str]] = defaultdict(set)
        for letter in self.evidence.dead_letters:
            dead_lettered[letter["task_id"]].add(letter["reason"])
        expected = {task_id_from_entry(*entry) for entry in self.evidence.unconfirmed}
        for stream, entry_id, number in self.evidence.published:
            publication = self.evidence.scenario.publications[number]
            task_id = _task_id(publication, stream, entry_id)
            expected.add(task_id)
            text = self.evidence.results.get(task_id)
            if text is None:
                self._add_problem(task_id, f"G4: {task_id} has no result")
                continue
            result = json.loads(text)
            if (publication.kind == "malformed") != (result["status"] == "invalid"):
                self._add_problem(task_id, f"{task_id} is {publication.kind}, its result is {text}")
            if publication.kind == "malformed" and letters.get((stream, entry_id)) != "invalid_task":
                self._add_problem(task_id, f"{stream} {entry_id} is malformed and no dead letter")
            if publication.kind == "conflict" and "idempotency_conflict" not in dead_lettered[task_id]:
                self._add_problem(task_id, f"G4: two contents of {task_id} were taken for one")
            if result["error_code"] == "ATTEMPTS_EXHAUSTED" and "attempts_exhausted" not in dead_lettered[task_id]:
                self._add_problem(task_id, f"{task_id} was given up and is no dead letter")
            if "reply_to" in publication.fields and replies[task_id] != {text}:
                self._add_problem(task_id, f"G4: {task_id} was answered {replies[task_id]}, its result is {text}")
        for task_id in self.evidence.results.keys() - expected:
            if not task_id.startswith("gw-"):
                self._add_problem(task_id, f"{task_id} has a result, and was never published")

    def _check_answers(self) -> None:
        """G4: requests with one Idempotency-Key are paid as one call; a client's answer is that of its call."""
        calls: dict[str, set[str]] = defaultdict(set)
        paid: dict[str, set[str]] = defaultdict(set)
        for hold in self.holds.values():
            calls[hold.user_id].add(hold.call_id)
            # After a call without a cost, the next try is another call.
            if hold.cost:
                paid[hold.user_id].add(hold.call_id)
        for client_request in self.evidence.scenario.client_requests:
            if client_request.has_key and len(paid[client_request.user]) > 1:
                self._add_problem(
                    "", f"G4: one Idempotency-Key of {client_request.user} paid for {sorted(paid[client_request.user])}"
                )
        for answer in self.evidence.answers:
            if answer.status != 200 or "inference_failed" in answer.text or '"error"' in answer.text:
                continue
            result = json.loads(self.evidence.results.get(answer.call_id, "{}"))
            if (
                answer.call_id not in calls[answer.client_request.user]
                or result.get("user_id") != answer.client_request.user
            ):
                self._add_problem(
                    answer.call_id, f"G4: {answer.client_request.user} was answered by {answer.call_id}: {result}"
                )

    # --- The report ---

    def _add_problem(self, call_id: str, problem: str) -> None:
        self._problems.append((call_id, problem))

    def _raise(self) -> None:
        if not self._problems:
            return
        lines = [f"{len(self._problems)} checks failed with seed {self.evidence.scenario.seed}:"]
        lines += [problem for _, problem in self._problems[:20]]
        for call_id in list(dict.fromkeys(call_id for call_id, _ in self._problems if call_id))[:_SHOWN_CALLS]:
            lines.append(f"--- {call_id}")
            lines += [_line(event) for event in self.evidence.events if event.call_id == call_id]
            lines += [f"  request {request}" for request in self.evidence.requests if request["task_id"] == call_id]
            lines.append(f"  charged {self.booked[call_id]}, result {self.evidence.results.get(call_id)}")
        raise AssertionError("\n".join(lines))


def _budgets_of(event: RawEvent) -> tuple[str, ...]:
    extra = (budget["budget"] for budget in event.payload.get("budgets", ()))
    return (f"user:{event.user_id}:{event.period}", *extra)


def _task_id(publication: Publication, stream: str, entry_id: str) -> str:
    return publication.fields.get("task_id") or task_id_from_entry(stream, entry_id)


def _line(event: RawEvent) -> str:
    payload = {name: value for name, value in event.payload.items() if name not in ("bound", "usage")}
    return f"  {event.id} {event.type} attempt {event.attempt} amount {event.amount} {json.dumps(payload)}"
