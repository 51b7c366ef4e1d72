"""Checks what must hold at every event and at the end, from the ledger's stream and the provider's book.

The fold is independent: it reads the entries as they are in Redis and shares no code with the
gate, the projector or the other models of the tests.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.simulation.loop import Process
from tests.simulation.provider import Request
from tests.simulation.redis_server import Id, RedisServer

Balance = tuple[int, int]

# Covers the longest pause between attempts, and slow answers.
_SOON_S = 30.0


class Broken(AssertionError):
    """A guarantee is broken; the text begins with its number."""


@dataclass
class HoldState:
    """One hold of one call, as the ledger has it. `run_id` is the worker's run that opened it."""

    call_id: str
    number: int
    user_id: str
    run_id: str
    deadline_ms: int
    held: int
    cost: int = 0
    assumed: int = 0
    is_settled: bool = False
    requests: list[Request] = field(default_factory=list[Request])

    @property
    def process_name(self) -> str:
        return self.run_id.rpartition(".")[0]


class Fold:
    """Balances of all budgets, holds and credits, event by event."""

    def __init__(self) -> None:
        self.position: Id = (0, 0)
        self.events = 0
        self.balances: dict[str, Balance] = defaultdict(lambda: (0, 0))
        self.holds: dict[tuple[str, int], HoldState] = {}
        self.credit: dict[str, int] = defaultdict(int)

    def apply(self, entry_id: Id, event: dict[str, str], payload: dict[str, Any]) -> None:
        """Take one event. Errors: Broken (G2)."""
        self.position, self.events = entry_id, self.events + 1
        amount, call_id = int(event["amount"]), event["call_id"]
        key = call_id, payload.get("hold", 0)
        match event["type"]:
            case "budget-reserved" if payload.get("kind", "hold") == "hold":
                if key in self.holds:
                    raise Broken(f"G2: hold {key} is opened twice")
                self.holds[key] = HoldState(
                    *key, event["user_id"], payload["worker"], payload["deadline_ms"], held=amount
                )
                self._move(event, payload, 0, amount)
            case "budget-reserved":
                hold = self._open(key)
                hold.held += amount
                self._move(event, payload, 0, amount)
            case "cost-recorded":
                hold = self._open(key)
                hold.is_settled, hold.cost = True, amount
                hold.assumed = payload.get("assumed_nanousd", 0)
                self._move(event, payload, amount, -hold.held)
            case "cost-adjusted":
                hold = self.holds[key]
                if not hold.is_settled:
                    raise Broken(f"G2: hold {key} is adjusted before it is settled")
                hold.cost += amount
                hold.assumed += payload.get("assumed_nanousd", 0)
                self._move(event, payload, amount, 0)
            case "credit-granted":
                self.credit[f"user:{event['user_id']}:{event['period']}"] += amount
            case _:
                pass

    def copy(self) -> "Fold":
        """Return a copy; both share the lists of requests."""
        other = Fold()
        other.position, other.events = self.position, self.events
        other.balances.update(self.balances)
        other.credit.update(self.credit)
        other.holds = {key: replace(hold) for key, hold in self.holds.items()}
        return other

    def _open(self, key: tuple[str, int]) -> HoldState:
        hold = self.holds.get(key)
        if hold is None or hold.is_settled:
            raise Broken(f"G2: hold {key} is not open")
        return hold

    def _move(self, event: dict[str, str], payload: dict[str, Any], settled: int, held: int) -> None:
        names = [f"user:{event['user_id']}:{event['period']}", *(each["budget"] for each in payload.get("budgets", ()))]
        stamps = [int(event["committed"]), *(each["committed_nanousd"] for each in payload.get("budgets", ()))]
        for name, stamp in zip(names, stamps, strict=True):
            s, h = self.balances[name]
            self.balances[name] = s + settled, h + held
            if s + settled + h + held != stamp:
                raise Broken(f"G1: {name} stands at {s + settled + h + held}, the gate stamped {stamp}")


def read_event(fields: Sequence[bytes]) -> tuple[dict[str, str], dict[str, Any]]:
    """Read an entry of the ledger."""
    event = {fields[i].decode(): fields[i + 1].decode() for i in range(0, len(fields), 2)}
    return event, json.loads(event["payload"])


@dataclass(frozen=True)
class Snapshot:
    """The ledger at one moment, with results and dead letters."""

    fold: Fold
    results: dict[str, list[bytes]]
    result_at_s: dict[str, float]
    dead_lettered: set[str]
    replies: list[tuple[str, bytes]]


class Checker:
    """Watches a simulation. `caps` are the caps by budget kind, users' credits come on top."""

    def __init__(
        self,
        server: RedisServer,
        clock: Callable[[], float],
        *,
        ledger: str,
        prefix: str,
        caps: dict[str, int],
        claim_after_s: float,
        max_attempts: int,
    ) -> None:
        self.fold = Fold()
        self.results: dict[str, list[bytes]] = defaultdict(list)
        self.dead_lettered: set[str] = set()
        self.replies: list[tuple[str, bytes]] = []
        self.processes: dict[str, Process] = {}
        self.trouble_s: dict[Process, float] = {}
        self.stopped: set[Process] = set()
        self.ended: set[Process] = set()
        """Processes that have shut down. For the checks they are as dead as killed ones."""
        self.log: list[str] = []
        self._server = server
        self._clock = clock
        self._ledger = ledger.encode()
        self._result_prefix = f"{prefix}result:".encode()
        self._tail_prefix = f"{prefix}tail:".encode()
        self._caps = caps
        self._claim_after_s = claim_after_s
        self._max_attempts = max_attempts
        self._result_at_s: dict[str, float] = {}
        self._waited: set[tuple[str, object]] = set()
        # By call and process: the hold that the process may use, when the gate allowed it, and its pauses until then.
        self._allowed: dict[tuple[str, Process], tuple[int, float, float]] = {}
        self.newest: Fold | None = None
        """The ledger before it went back; None while nothing is lost."""
        self.lived_through_loss: set[Process] = set()
        """Processes that lived through a loss: their calls were stopped, so their holds may have expired."""
        self.forked = 0
        """Number of requests for holds of a ledger that went back, by processes that could not know it."""
        self._known: dict[Process, Id] = {}
        self._since_loss: list[tuple[Request, HoldState]] = []
        server.on_add = self.on_add
        server.on_set = self.on_set

    # --- A ledger that goes back in time ---

    def snapshot(self) -> Snapshot:
        """Return the present state."""
        results = {task_id: list(values) for task_id, values in self.results.items()}
        return Snapshot(self.fold.copy(), results, dict(self._result_at_s), set(self.dead_lettered), list(self.replies))

    def restore(self, snapshot: Snapshot, *, newest: Fold | None, known: dict[Process, Id]) -> None:
        """Follow the server, which was set to another moment.

        `newest` is the ledger that is lost now (None: nothing is lost any more), `known` the newest event that each
        process has seen.
        """
        self.fold, self.results = snapshot.fold.copy(), defaultdict(list, snapshot.results)
        self._result_at_s, self.dead_lettered = dict(snapshot.result_at_s), set(snapshot.dead_lettered)
        self.replies = list(snapshot.replies)
        self.newest, self._known = newest, known
        self.lived_through_loss |= set(self.processes.values())

    def forget(self, ended: Collection[Process]) -> None:
        """Forget the requests of processes whose writes are lost: they wrote on a ledger that had gone back."""
        for request, hold in self._since_loss:
            if request.process in ended:
                hold.requests.remove(request)
                self.forked += 1
        self._since_loss.clear()

    def _check_seen_events(self, process: Process, name: str, call_id: str, reply: Any) -> None:
        """A process that has seen an event that the ledger lacks must not change the ledger."""
        known = self._known.get(process, (0, 0))
        if self.newest is None or reply[0] != b"OK" or name not in ("reserve", "record", "settle", "adjust"):
            return
        if known != (0, 0) and known not in self._server.stream(self._ledger).entries:
            raise Broken(f"G1: {process.name} has a {name} on a ledger that lacks {known}, which it knew of")

    def say(self, text: str) -> None:
        self.log.append(f"{self._clock():.3f} {text}")

    # --- At every event ---

    def on_add(self, stream: bytes, entry_id: Id, fields: list[bytes]) -> None:
        if stream == b"replies":
            self.replies.append((fields[1].decode(), fields[3]))
        if stream == b"tollbook:dead-letters":
            self.dead_lettered.add(fields[fields.index(b"task_id") + 1].decode())
        if stream != self._ledger:
            return
        event, payload = read_event(fields)
        self.say(f"event {event['type']} {event['call_id']} amount {event['amount']} {event['payload']}")
        before = dict(self.fold.balances)
        self.fold.apply(entry_id, event, payload)
        if int(event["seq"]) != self.fold.events:
            raise Broken(f"G7: event {self.fold.events} has the number {event['seq']}")
        match event["type"]:
            case "budget-reserved":
                self._check_caps(event, payload)
            case "budget-denied" if self.newest is None:
                self._check_denial(event, payload, before)
            case "cost-recorded" | "cost-adjusted":
                hold = self.fold.holds[event["call_id"], payload["hold"]]
                if hold.cost > hold.held:
                    raise Broken(f"G1: hold {hold.number} of {hold.call_id} is {hold.held} and costs {hold.cost}")
                if self.newest is not None:
                    return  # Its process cannot know how old this ledger is.
                if payload.get("outcome") == "taken_over":
                    self._check_takeover(hold)
                if payload.get("outcome") in ("taken_over", "expired") and hold.assumed:
                    self._check_assumption(hold, payload["outcome"])
            case _:
                pass

    def _cap_of(self, budget: str) -> int:
        return self._caps[budget.partition(":")[0]] + self.fold.credit.get(budget, 0)

    def _check_caps(self, event: dict[str, str], payload: dict[str, Any]) -> None:
        names = [f"user:{event['user_id']}:{event['period']}", *(each["budget"] for each in payload.get("budgets", ()))]
        for name in names:
            settled, held = self.fold.balances[name]
            if settled + held > self._cap_of(name):
                raise Broken(f"G1: {name} stands at {settled} + {held}, its cap is {self._cap_of(name)}")
        for kind in self._caps:
            if kind != "campaign" and not any(name.startswith(f"{kind}:") for name in names):
                raise Broken(f"G1: no budget of kind {kind} was held against")

    def _check_denial(self, event: dict[str, str], payload: dict[str, Any], balances: dict[str, Balance]) -> None:
        settled, held = balances.get(payload["budget"], (0, 0))
        counted = settled if payload["reason"] == "cap" else settled + held
        if counted + int(event["amount"]) <= self._cap_of(payload["budget"]):
            raise Broken(f"G9: {event['call_id']} is refused, {settled} + {held} + {event['amount']} is within the cap")
        if payload["reason"] == "wait_timeout" and (event["call_id"], self._server.client) not in self._waited:
            raise Broken(f"G9: {event['call_id']} is refused for open holds and has not waited for them")

    def _check_takeover(self, hold: HoldState) -> None:
        process = self.processes[hold.process_name]
        if process is self._server.client:
            return  # It knows which of its own runs have ended.
        if process in self.ended:
            return  # Its reservation was still under way when the process was told to stop.
        since_s = self._clock() - self.trouble_s.get(process, 0.0)
        if not process.is_dead and not process.is_paused and since_s > 2 * self._claim_after_s + 5:
            raise Broken(f"G4: {hold.call_id} is taken over from {process.name}, which lives and is well")

    def _check_assumption(self, hold: HoldState, outcome: str) -> None:
        """A living worker knows that it sent nothing, even if it was cut off and others took it for dead."""
        process = self.processes[hold.process_name]
        is_well = not process.is_dead and not process.paused_s and not process.is_paused and process not in self.stopped
        is_well = is_well and process not in self.lived_through_loss
        if is_well and not hold.requests and (outcome == "expired" or process is self._server.client):
            raise Broken(
                f"G3: hold {hold.number} of {hold.call_id} is charged for, and its worker lives and sent nothing"
            )

    def on_set(self, key: bytes, value: bytes) -> None:
        if key.startswith(self._result_prefix):
            task_id = key[len(self._result_prefix) :].decode()
            self.say(f"result {task_id} {value.decode()}")
            self.results[task_id].append(value)
            if len(self.results[task_id]) > 1 and self.newest is None:
                raise Broken(f"G4: {task_id} has a second result")
            self._result_at_s[task_id] = self._clock()

    def on_command(self, process: Process, command: Sequence[Any], reply: Any, is_answered: bool) -> None:
        """Check a command that was executed."""
        if command[0] != "FCALL" or not isinstance(reply, list):
            return
        name = command[1].rpartition("_")[2]
        if name in ("renew", "create"):
            return
        self.say(f"{process.name} {name} {command[4 + command[2]]} -> {reply[:5]}")
        self._check_seen_events(process, name, command[4 + command[2]], reply)
        for key in command[3 : 3 + command[2]]:
            if key.encode().startswith(self._tail_prefix):
                self._check_tail(key)
        if not is_answered:
            return
        arguments = command[3 + command[2] :]
        if name == "reserve" and reply[0] == b"WAIT":
            self._waited.add((arguments[1], process))
        hold: int | None = None
        is_own = reply[:2] == [b"EXISTS", b"open"] and reply[4].decode() in arguments[2].split()
        if name == "reserve" and (reply[0] == b"OK" or is_own):
            hold = int(reply[2])
        elif name == "record" and reply[0] == b"OK":
            hold = max(number for call_id, number in self.fold.holds if call_id == arguments[1])
        if hold is not None:
            self._allowed[arguments[1], process] = hold, self._clock(), process.paused_s

    def _check_tail(self, key: str) -> None:
        newest = self._server.execute(["LINDEX", key, -1])
        budget = key.encode()[len(self._tail_prefix) :].decode()
        settled, held = self.fold.balances.get(budget, (0, 0))
        if newest is not None and tuple(int(n) for n in newest.split()[3:]) != (settled, held):
            raise Broken(f"G1: the tail of {budget} says {newest.decode()}, the fold {settled} and {held}")
        if newest is None and held:
            raise Broken(f"G6: {budget} has open holds and no tail")

    def on_request(self, request: Request) -> None:
        """Check a request when the provider gets it."""
        self.say(f"request {request.number} {request.call_id} {request.model} by {request.process.name}")
        allowed = self._allowed.get((request.call_id, request.process))
        if allowed is None:
            raise Broken(f"G1: {request.process.name} calls for {request.call_id} without a hold")
        number, at_s, paused_s = allowed
        if number > self._max_attempts:
            raise Broken(
                f"G3: {request.call_id} is begun anew after {number - 1} holds, {self._max_attempts} are allowed"
            )
        key = request.call_id, number
        known = self.newest.holds.get(key) if self.newest is not None else None
        is_own = known is not None and known.process_name == request.process.name
        hold = known if known is not None and is_own else self.fold.holds[key]
        hold.requests.append(request)
        if self.newest is not None:
            self._since_loss.append((request, hold))
            return
        result_at_s = self._result_at_s.get(request.call_id)
        if result_at_s is not None and at_s > result_at_s:
            raise Broken(f"G4: {request.call_id} calls a model for a hold made after its result was stored")
        # A process that was paused cannot know what happened meanwhile; others ask soon after they are allowed to.
        stood_still = request.process.paused_s > paused_s
        if not stood_still and self._clock() > max(hold.deadline_ms / 1000, at_s + _SOON_S):
            raise Broken(f"G4: {request.call_id} calls a model after the deadline of its hold")

    # --- At the end ---

    def _is_reply_received(self, request: Request) -> bool:
        """Whether the reply came to a process that was never paused and never stopped."""
        process = request.process
        is_well = not process.is_dead and not process.paused_s and process not in self.stopped
        return request.is_answered and is_well

    def check_end(self, *, task_ids: Sequence[str], book: Sequence[Request]) -> None:
        for task_id in task_ids:
            if len(self.results[task_id]) != 1:
                raise Broken(f"G4: {task_id} has {len(self.results[task_id])} results")
            if b"ATTEMPTS_EXHAUSTED" in self.results[task_id][0] and task_id not in self.dead_lettered:
                raise Broken(f"{task_id} was given up and is not in the dead-letter stream")
        for task_id, reply in self.replies:
            if b"IDEMPOTENCY_CONFLICT" not in reply and reply != self.results[task_id][0]:
                raise Broken(f"G4: {task_id} was answered {reply!r}, its result is {self.results[task_id][0]!r}")
        known = 0
        for hold in self.fold.holds.values():
            if not hold.is_settled:
                raise Broken(f"G2: hold {hold.number} of {hold.call_id} is never settled")
            booked = sum(request.charge_nanousd or 0 for request in hold.requests)
            known += len(hold.requests)
            if not hold.cost - hold.assumed <= booked <= hold.cost:
                raise Broken(
                    f"G3: hold {hold.number} of {hold.call_id} is settled at {hold.cost}, {hold.assumed} of it "
                    f"assumed; the provider charged {booked}"
                )
            if hold.assumed and hold.requests and all(map(self._is_reply_received, hold.requests)):
                raise Broken(f"G3: hold {hold.number} of {hold.call_id} stays assumed, though every answer came")
        if known + self.forked != len(book):
            raise Broken(f"G3: {len(book) - known - self.forked} requests stand against no hold")
        for budget, (_, held) in self.fold.balances.items():
            if held:
                raise Broken(f"G2: {budget} has {held} held and nothing open")
        for key in self._server.names():
            if key.startswith(self._tail_prefix):
                self._check_tail(key.decode())
