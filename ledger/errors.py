"""Errors of the ledger, one class for each thing a caller can do something about.

LedgerError, in the public tree that `schemas.errors` draws
├── IdempotencyConflict       final: the call id was used before, with other content
├── CallUnknown               final: no such hold; it was never opened, or its record has expired
├── ResultUnreadable          final: the value stored under a task's result key is not a result
├── CreditTooLow              final: the user has less credit than was to be taken back
├── BudgetCreditTooLow        final: less is left of a budget's credit than was to be taken back
├── CreditNotDue              later: the credit has not expired yet
├── NoPlanAssigned            final: there is no plan that could be cleared
├── KeyUnknown                final: there is no such key of the gateway
├── KeyTaken                  final: there is another key of this id; create one with another id
├── KeyAlreadyRevoked         final: the key is revoked already, from the same or an earlier time
├── KeyExpired                final: the key has expired, so it cannot be replaced
├── LedgerUnavailable         retry with the same call id: the outcome is unknown, a repeat changes nothing
│   ├── RedisCannotServe      retry later: Redis refused the command for now, so nothing was done
│   ├── TooFewReplicas        retry later: fewer replicas have a write than TOLLBOOK_MIN_REPLICAS asks for
│   ├── ArchiveUnavailable    retry later: the archive's object store does not answer
│   └── BaselineUnavailable   retry later: DuckDB is down or behind the watermark (being rebuilt)
├── PolicyChanged             decide again by the policy in force: the caller used an older one
└── LedgerRefused             needs a person: no call is made until the stores agree again (G8)
    ├── LedgerReplaced        Redis holds another ledger, or none
    ├── LedgerWentBack        an event that this process has seen is no longer on the ledger
    ├── CallsStopped          the projector stopped because the stores disagree, so all calls are stopped
    ├── LedgerAhead           DuckDB has folded events that the ledger does not have
    ├── LedgerDiverged        DuckDB and the ledger's own balance differ
    ├── PermissionsMissing    the Redis user may not do what Tollbook needs
    ├── ServerTooOld          the server has no functions
    ├── ArchiveRefused        the archive's object store gives no access, or lacks what Tollbook needs
    ├── WrongPartitions       the ledger was made with another number of partitions
    └── PolicyUnreadable      the policy in Redis differs from its event
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from tollbook.schemas.errors import AppError
from tollbook.schemas.identifiers import EntryId, describe_budget
from tollbook.schemas.money import format_usd
from tollbook.schemas.results import ErrorCode


class LedgerError(AppError):
    """Base of every error that the ledger raises on purpose."""

    code = "LEDGER_ERROR"


class IdempotencyConflict(LedgerError):
    """The same id came again with other content. The first content counts, and nothing is charged."""

    code = ErrorCode.IDEMPOTENCY_CONFLICT

    def __init__(self, call_id: str, *, kind: str = "task id") -> None:
        super().__init__(f"{kind} {call_id} was used before with other content; use a new {kind}", {"id": call_id})
        self.call_id = call_id


class CallUnknown(LedgerError):
    """The ledger has no such call, or no such hold of it: it was never opened, or its record has expired."""

    code = "CALL_UNKNOWN"

    def __init__(self, call_id: str, hold: int | None = None) -> None:
        subject = f"call {call_id}" if hold is None else f"call {call_id} with a hold number {hold}"
        super().__init__(f"there is no {subject} on the ledger: it was never opened, or its record has expired")
        self.call_id = call_id
        self.hold = hold


class ResultUnreadable(LedgerError):
    """The value stored under a task's result key is not a result: another program wrote it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"the key {key} does not hold a task's result ({problem}); another program wrote it")
        self.key = key


class LedgerUnavailable(LedgerError):
    """Redis or the projection did not answer. The outcome is unknown; repeating with the same call id is safe."""

    code = ErrorCode.LEDGER_UNAVAILABLE


class RedisCannotServe(LedgerUnavailable):
    """Redis refuses writes for now (a replica, full memory, a failing disk): nothing was done."""


class TooFewReplicas(LedgerUnavailable):
    """Fewer replicas have a write than must have it: a failover may lose the write, so it counts as not done."""

    def __init__(self, *, found: int, needed: int) -> None:
        super().__init__(
            f"{found} of the {needed} replicas that TOLLBOOK_MIN_REPLICAS asks for have the last writes, and no call "
            "is made until all have them: start the replicas, or repair their link to the primary"
        )
        self.found = found
        self.needed = needed


class BaselineUnavailable(LedgerUnavailable):
    """No baseline is available: DuckDB is down, or behind the watermark while it is rebuilt."""


class PolicyChanged(LedgerError):
    """The policy in force in the user's partition is not the one that the caller used; nothing was done (G11)."""

    def __init__(self, version: int) -> None:
        super().__init__(f"policy {version} of the ledger is in force now")
        self.version = version


class LedgerRefused(LedgerError):
    """The stores disagree or cannot serve; no call is made until a person has looked."""

    code = ErrorCode.LEDGER_UNAVAILABLE


class LedgerReplaced(LedgerRefused):
    """Redis holds another ledger than the one this process was started with, or none at all."""

    def __init__(self, *, expected: str, found: str) -> None:
        cause = (
            "REDIS_URL, TOLLBOOK_NAMESPACE or TOLLBOOK_DATA_DIR is of another ledger, or Redis was replaced. Correct "
            "the setting, or restore"
            if found
            else "Redis was emptied or replaced. Restore"
        )
        super().__init__(
            f"Redis holds {'ledger ' + found if found else 'no ledger'}, this process works on {expected}: {cause} "
            "its data and restart, or set the DuckDB file and the archive aside and restart to begin a new ledger"
        )
        self.expected = expected
        self.found = found


class HoldChanged(LedgerError):
    """The cost of a call was corrected since it was read."""

    def __init__(self, call_id: str) -> None:
        super().__init__(
            f"somebody else has corrected the cost of call {call_id} in the meantime: check it, then repeat the "
            "command if it is still right"
        )
        self.call_id = call_id


class CreditTooLow(LedgerError):
    """The user has less credit in that period than was to be taken back."""

    def __init__(self, user_id: str, period: str, credit_nanousd: int) -> None:
        super().__init__(f"{user_id} has {format_usd(credit_nanousd, places=None)} of credit in {period}, no more")
        self.credit_nanousd = credit_nanousd


class BudgetCreditTooLow(LedgerError):
    """Less is left of a budget's credit than was to be taken back, or nothing."""

    def __init__(self, credit_id: str, left_nanousd: int) -> None:
        super().__init__(f"{format_usd(left_nanousd, places=None)} is left of credit {credit_id}, no more")
        self.left_nanousd = left_nanousd


class CreditNotDue(LedgerError):
    """By the Redis clock, a credit has not expired yet."""

    def __init__(self, credit_id: str) -> None:
        super().__init__(f"credit {credit_id} has not expired yet")


class NoPlanAssigned(LedgerError):
    """The ledger has assigned no plan to the user, so that there is none to clear."""

    def __init__(self, user_id: str) -> None:
        super().__init__(f"no plan is set for {user_id}: the plan that each task names is in force already")


class KeyUnknown(LedgerError):
    """No key of the gateway has this id."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"there is no key {key_id}: `tollbook keys list` shows them")
        self.key_id = key_id


class KeyTaken(LedgerError):
    """A key with this id, or with this secret, exists already; nothing was created. Create another key."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"{key_id} or its key is on the ledger already: create another key")
        self.key_id = key_id


class KeyAlreadyRevoked(LedgerError):
    """The key is revoked already, from the same or an earlier time: `at_ms`, milliseconds since the epoch."""

    def __init__(self, key_id: str, at_ms: int) -> None:
        moment = datetime.fromtimestamp(at_ms / 1000, UTC)
        super().__init__(f"{key_id} is revoked already, from {moment:%Y-%m-%d %H:%M} UTC on")
        self.key_id = key_id
        self.at_ms = at_ms


class KeyExpired(LedgerError):
    """The key has expired, so it cannot be replaced: create another key."""

    def __init__(self, key_id: str) -> None:
        super().__init__(f"{key_id} has expired: create another key")
        self.key_id = key_id


class LedgerWentBack(LedgerRefused):
    """An event that this process has seen is no longer on the ledger, after a restored backup or a failover."""

    def __init__(self, seen: EntryId) -> None:
        super().__init__(
            f"event {seen}, which this process has seen, is no longer on the ledger: Redis was restored from an "
            "older backup, or a failover lost its last writes. Nothing is written until the event is back: restore the "
            "newer data of Redis, or run `tollbook recover`"
        )
        self.seen = seen


class CallsStopped(LedgerRefused):
    """The projector stopped because the stores disagree. Calls start again when it finds the stores in order."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"calls are stopped: {reason}")
        self.reason = reason


class LedgerAhead(LedgerRefused):
    """DuckDB has folded events that the ledger does not have: Redis was restored from an old backup."""

    def __init__(self, *, folded_seq: int, ledger_seq: int) -> None:
        super().__init__(
            f"DuckDB has folded {folded_seq} events, the ledger has only {ledger_seq}: Redis was restored from an "
            "older backup, or a failover lost its last writes. Restore the newer data of Redis, or run "
            "`tollbook recover`, which shows what is lost"
        )
        self.folded_seq = folded_seq
        self.ledger_seq = ledger_seq


class LedgerDiverged(LedgerRefused):
    """The baseline in DuckDB differs from the ledger's own balance at the same position."""

    def __init__(self, *, budget: str, baseline_nanousd: tuple[int, int], ledger_nanousd: tuple[int, int]) -> None:
        super().__init__(
            f"{describe_budget(budget)}: DuckDB says {_amounts(*baseline_nanousd)}, the ledger says "
            f"{_amounts(*ledger_nanousd)}. Set the DuckDB file aside and restart: it is rebuilt from the ledger"
        )
        self.budget = budget


class PermissionsMissing(LedgerRefused):
    """The Redis user may not use commands, keys or channels that Tollbook needs."""

    def __init__(self, missing: Sequence[str]) -> None:
        super().__init__(
            f"the Redis user may not use {', '.join(missing)}: allow it with ACL SETUSER "
            "(docs/operators/deploy.md has the whole line)"
        )
        self.missing = tuple(missing)


class ServerTooOld(LedgerRefused):
    """The server cannot run functions (Redis before 7.0)."""

    def __init__(self, version: str) -> None:
        super().__init__(f"the Redis server is version {version}; Tollbook needs Redis 7.0 or later, or Valkey")
        self.version = version


class WrongPartitions(LedgerRefused):
    """The number of partitions is fixed when a ledger is created."""

    def __init__(self, *, configured: int, stored: int) -> None:
        super().__init__(f"the ledger was created with {stored} partitions, the settings say {configured}")
        self.configured = configured
        self.stored = stored


class PolicyUnreadable(LedgerRefused):
    """The policy in Redis cannot be parsed, or differs from its own digest: somebody changed it by hand."""

    def __init__(self, partition: int, problem: str) -> None:
        super().__init__(
            f"the policy in Redis (partition {partition}) cannot be used: {problem}. Run `tollbook verify`, which "
            "shows the policy of its event, and restore the data of Redis"
        )
        self.partition = partition


def _amounts(settled_nanousd: int, held_nanousd: int) -> str:
    return f"settled {format_usd(settled_nanousd, places=9)} and held {format_usd(held_nanousd, places=9)}"
