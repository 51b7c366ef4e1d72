"""The scenario of a run, which a seed decides before anything runs: caps, tasks, and the faults that will happen."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from tests.chaos.provider import mark
from tests.deployments import CLUSTER, ONE, SENTINEL
from tollbook.standin import FAULTS
from tollbook.standin.faults import STREAM_FAULTS

REPLIES: Final = "replies"
CLAIM_AFTER_S: Final = 2.0
# In long runs, timeouts may be longer than workers are paused: only then can a resumed one still read its answer.
ATTEMPT_TIMEOUTS_S: Final = (2.0, 8.0)
_LONG_S: Final = 30.0
WORKERS: Final = tuple(f"worker {number}" for number in range(1, 5))
GATEWAYS: Final = ("gateway 1", "gateway 2")
CLIENT: Final = "client-"
STREAMS: Final = ("scraping", "analysis", "generation", "monitoring")
TRIM_AFTER_S: Final = 5
CAMPAIGN_CAP_NANOUSD: Final = 40_000_000

FaultKind = Literal["kill", "stop", "end", "lose", "move"]
# The faults of each kind of servers, with their weights. If a primary is killed, its replica is promoted; of servers
# with replicas, "stop" pauses a replica, and "move" moves a partition. A single server is itself killed or paused.
SERVER_FAULTS: Final[dict[str, dict[FaultKind, int]]] = {
    ONE: {"kill": 2, "stop": 1},
    CLUSTER: {"kill": 3, "stop": 2, "move": 3},
    SENTINEL: {"kill": 3, "stop": 2},
}
# Seconds between two faults of servers with replicas. After each fault, calls wait until the replica is up to date
# again; without a pause between faults, no call would be made.
SERVER_PAUSES_S: Final = {CLUSTER: (2.0, 6.0), SENTINEL: (6.0, 12.0)}


@dataclass(frozen=True, slots=True)
class ProcessFault:
    """A fault of a process: killed (SIGKILL), paused (SIGSTOP, SIGCONT) or ended (SIGTERM).

    "lose" kills it and removes its file, which for the projector is DuckDB. For servers see SERVER_FAULTS.

    Units: seconds. After `for_s` the process is started again or resumed.
    """

    at_s: float
    target: str
    kind: FaultKind
    for_s: float


@dataclass(frozen=True, slots=True)
class Publication:
    """One entry for a task stream. `kind` says how it should end."""

    at_s: float
    stream: str
    fields: dict[str, str]
    kind: Literal["task", "repeat", "conflict", "malformed"]


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request of a client of a gateway, with its retries. `length` is the prompt's, in words.

    `leaves_after_s`: when the client closes its first connection, whatever is under way. `comes_back`: it retries then,
    as SDKs do. `has_key`: it sends an Idempotency-Key; otherwise a count of its retries.
    """

    at_s: float
    number: int
    model: str
    length: int
    is_streamed: bool
    has_key: bool
    leaves_after_s: float | None
    comes_back: bool
    campaign: str | None

    @property
    def user(self) -> str:
        return f"{CLIENT}{self.number}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole run. Units: nano-dollars, seconds."""

    seed: int
    chaos_s: float
    caps_nanousd: dict[str, int]
    publications: tuple[Publication, ...]
    process_faults: tuple[ProcessFault, ...]
    fault_rates: dict[str, float]
    latency_ms: int
    attempt_timeout_s: float
    is_trimmed: bool
    max_task_attempts: int
    client_requests: tuple[ClientRequest, ...] = ()
    chunk_ms: int | None = None

    @property
    def drain_s(self) -> float:
        """How long the system may take to finish all work: the longest lease of a hold, and time for the rest."""
        return 82.0 + 4 * self.attempt_timeout_s

    def settings(self, partitions: int = 1) -> dict[str, str]:
        """Return the variables that every process gets."""
        caps = {user: _usd(cap) for user, cap in self.caps_nanousd.items()}
        # With several partitions, a campaign's users are in more than one, which a campaign's cap does not allow.
        campaigns = {"TOLLBOOK_CAMPAIGN_CAP_USD": _usd(CAMPAIGN_CAP_NANOUSD)} if partitions == 1 else {}
        return {
            "TOLLBOOK_DIALECT": "openrouter",
            "TOLLBOOK_CAPS": json.dumps({"users": caps}),
            **campaigns,
            "TOLLBOOK_CLAIM_AFTER_S": str(CLAIM_AFTER_S),
            "TOLLBOOK_ATTEMPT_TIMEOUT_S": str(self.attempt_timeout_s),
            "TOLLBOOK_RETRIES": "1",
            "TOLLBOOK_BACKOFF_BASE_S": "0.05",
            "TOLLBOOK_BACKOFF_MAX_S": "0.2",
            "TOLLBOOK_RETRY_AFTER_MAX_S": "1",
            "TOLLBOOK_HOLD_WAIT_S": "6",
            "TOLLBOOK_TAIL_KEEP_S": "1",
            "TOLLBOOK_STOP_GRACE_S": "1",
            "TOLLBOOK_GATEWAY_WAIT_S": "3",
            # About the lease of their holds, which the sweeper settles after a gateway was killed.
            "TOLLBOOK_GATEWAY_TIMEOUT_S": "6",
            "TOLLBOOK_CONCURRENCY": "8",
            "TOLLBOOK_MAX_TASK_ATTEMPTS": str(self.max_task_attempts),
            "TOLLBOOK_SEGMENT_EVENTS": "500",
            "TOLLBOOK_SEGMENT_AGE_S": "5",
            "TOLLBOOK_STREAM_KEEP_S": str(TRIM_AFTER_S if self.is_trimmed else 86_400),
            "TOLLBOOK_LOG_FORMAT": "json",
        }


def draw(seed: int, *, chaos_s: float, tasks: int, store: str = ONE) -> Scenario:
    """Draw the scenario of a seed. `store` is the kind of servers, which decides the faults that they can have."""
    dice = Random(seed)
    users = [f"user-{number}" for number in range(max(4, tasks // 50))]
    caps = {user: dice.randrange(1_000_000, 60_000_000) for user in users}
    # In the last fifth of the time, faults happen while the system works off what was published.
    publish_s = 0.8 * chaos_s
    publications = [
        publication
        for number in range(tasks)
        for publication in _publications(dice, seed, number, users, at_s=dice.uniform(0, publish_s))
    ]
    # With a random generator of their own, so that they do not change what a seed publishes.
    client_requests = _client_requests(Random(seed + 1), number=tasks // 8, until_s=publish_s)
    caps |= {client_request.user: 60_000_000 for client_request in client_requests}
    return Scenario(
        seed=seed,
        chaos_s=chaos_s,
        caps_nanousd=caps,
        publications=tuple(sorted(publications, key=lambda publication: publication.at_s)),
        process_faults=tuple(_process_faults(dice, chaos_s, store)),
        fault_rates=_fault_rates(dice),
        latency_ms=dice.choice((5, 60, 250)),
        attempt_timeout_s=dice.choice(ATTEMPT_TIMEOUTS_S) if chaos_s > _LONG_S else ATTEMPT_TIMEOUTS_S[0],
        is_trimmed=dice.random() < 0.5,
        max_task_attempts=dice.choice((1, 2, 3)),
        client_requests=client_requests,
        chunk_ms=dice.choice((None, 0, 2)),
    )


def _client_requests(dice: Random, *, number: int, until_s: float) -> tuple[ClientRequest, ...]:
    return tuple(
        ClientRequest(
            at_s=dice.uniform(0, until_s),
            number=each,
            model=dice.choice(("score_post", "generate_draft", "openai/gpt-4o-mini")),
            length=dice.randrange(1, 60),
            is_streamed=dice.random() < 0.6,
            has_key=dice.random() < 0.5,
            leaves_after_s=dice.uniform(0.01, 0.6) if dice.random() < 0.3 else None,
            comes_back=dice.random() < 0.8,
            campaign=f"campaign-{dice.randrange(3)}" if dice.random() < 0.2 else None,
        )
        for each in range(number)
    )


def _publications(dice: Random, seed: int, number: int, users: Sequence[str], *, at_s: float) -> list[Publication]:
    stream, task_id = dice.choice(STREAMS), f"s{seed}-{number}"
    if dice.random() < 0.01:
        return [Publication(at_s, stream, _malformed(dice, task_id), "malformed")]
    task = dice.choices(
        ("score_post", "classify_archetype", "extract_patterns", "generate_draft", "ping"), (50, 20, 10, 15, 5)
    )[0]
    fields = {
        "task": task,
        "task_id": task_id,
        # A few users have most of the tasks, so that their calls meet.
        "user_id": dice.choices(users, [1 / (rank + 1) ** 0.7 for rank in range(len(users))])[0],
        "prompt": mark(task_id) + " a post" * dice.randrange(1, 60),
        "reply_to": REPLIES,
    }
    if dice.random() < 0.1:
        fields["campaign_id"] = f"campaign-{dice.randrange(3)}"
    if dice.random() < 0.3:
        fields["max_tokens"] = str(dice.randrange(20, 400))
    made = [Publication(at_s, stream, fields, "task")]
    # Sometimes the publisher repeats a task, at once or later, or reuses an id by mistake.
    if dice.random() < 0.08:
        made.append(Publication(at_s + dice.choice((0.0, 0.1, 3.0)), dice.choice(STREAMS), fields, "repeat"))
    if dice.random() < 0.01 and task != "ping":
        other = fields | {"prompt": fields["prompt"] + " or not"}
        made.append(Publication(at_s + 5.0, stream, other, "conflict"))
    return made


def _malformed(dice: Random, task_id: str) -> dict[str, str]:
    whole = {"task": "score_post", "task_id": task_id, "user_id": "user-0", "prompt": "a post", "reply_to": REPLIES}
    return dice.choice(
        (
            whole | {"task": "do_magic"},
            whole | {"max_tokens": "many"},
            whole | {"plan": "gold"},
            {"task": "score_post", "task_id": task_id},
            {"data": "{not json"},
            {"what": "is this"},
        )
    )


def _process_faults(dice: Random, chaos_s: float, store: str) -> list[ProcessFault]:
    has_replicas = store in SERVER_PAUSES_S
    server_faults = {} if has_replicas else SERVER_FAULTS[store]
    process_faults = _faults_of_servers(dice, chaos_s, store) if has_replicas else []
    at_s = 1.0
    while at_s < chaos_s:
        if dice.random() < 0.1:
            # All workers die at once: only restarted ones can take over.
            process_faults += [ProcessFault(at_s, worker, "kill", dice.uniform(0.0, 1.0)) for worker in WORKERS]
        else:
            process_faults.append(_process_fault(dice, at_s, server_faults))
        at_s += dice.uniform(0.3, 1.7)
    return process_faults


def _faults_of_servers(dice: Random, chaos_s: float, store: str) -> list[ProcessFault]:
    kinds, faults, at_s = SERVER_FAULTS[store], list[ProcessFault](), dice.uniform(1.0, 4.0)
    while at_s < chaos_s:
        kind = dice.choices(list(kinds), list(kinds.values()))[0]
        faults.append(ProcessFault(at_s, "server", kind, dice.uniform(0.0, 2.0)))
        at_s += faults[-1].for_s + dice.uniform(*SERVER_PAUSES_S[store])
    return faults


def _process_fault(dice: Random, at_s: float, server_faults: Mapping[FaultKind, int]) -> ProcessFault:
    worker, gateway = dice.choice(WORKERS), dice.choice(GATEWAYS)
    choices: dict[tuple[str, FaultKind], int] = {
        (worker, "kill"): 6,
        (worker, "stop"): 6,
        (worker, "end"): 1,
        (gateway, "kill"): 5,
        (gateway, "stop"): 1,
        (gateway, "end"): 1,
        ("projector", "kill"): 3,
        ("projector", "stop"): 1,
        ("projector", "lose"): 1,
        **{("server", kind): weight for kind, weight in server_faults.items()},
        ("provider", "kill"): 1,
    }
    target, kind = dice.choices(list(choices), list(choices.values()))[0]
    if kind == "stop" and target in WORKERS:
        # Longer than the claim time: others take over its tasks, and it resumes as a zombie.
        return ProcessFault(at_s, target, kind, CLAIM_AFTER_S + dice.uniform(0.2, 4.0))
    return ProcessFault(at_s, target, kind, dice.uniform(0.0, 2.0))


def _fault_rates(dice: Random) -> dict[str, float]:
    """About one request in seven fails somehow; each kind of fault is there."""
    names = (*FAULTS, *STREAM_FAULTS)
    weights = {name: dice.uniform(0.2, 1.0) * (0.3 if name.startswith("http_4") else 1.0) for name in names}
    weights |= {name: weights[name] * 0.4 for name in ("hang", "hang_charged", "stream_hang")}
    share = 0.15 / sum(weights.values())
    return {name: weight * share for name, weight in weights.items()}


def _usd(nanousd: int) -> str:
    return f"{nanousd // 1_000_000_000}.{nanousd % 1_000_000_000:09d}"
