"""Names of the Redis keys. All keys of one partition share a hash tag, and so a cluster slot."""

from dataclasses import dataclass, field
from typing import Final

GROUP: Final = "tollbook"
"""The consumer group of every task stream."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one ledger partition. The names that every step needs are made once."""

    namespace: str = "tollbook"
    partition: int = 0
    prefix: str = field(init=False, repr=False, compare=False)
    """The hash tag with which every key of the partition begins."""
    meta: str = field(init=False, repr=False, compare=False)
    """Hash: the ledger's identity and watermark."""
    ledger: str = field(init=False, repr=False, compare=False)
    """Stream: the events."""
    holds: str = field(init=False, repr=False, compare=False)
    """Sorted set: call id of each open hold by its deadline, in milliseconds."""
    waiters: str = field(init=False, repr=False, compare=False)
    """Hash of the budgets that calls wait for; also the channel on which freed budgets are announced."""

    def __post_init__(self) -> None:
        """Make the names."""
        prefix = f"{{{self.namespace}:{self.partition}}}:"
        object.__setattr__(self, "prefix", prefix)
        for name in ("meta", "ledger", "holds", "waiters"):
            object.__setattr__(self, name, prefix + name)

    @property
    def tail_pattern(self) -> str:
        """Glob for all tails of the partition."""
        return self.tail("*")

    @property
    def credits(self) -> str:
        """Hash: credit of each budget, and what is left of each of its credits."""
        return f"{self.prefix}credits"

    @property
    def alerts(self) -> str:
        """Hash: the event that raised an alert, by budget and fraction."""
        return f"{self.prefix}alerts"

    @property
    def unbooked(self) -> str:
        """Hash: costs of calls whose hold the ledger lost, by call id and hold; booked once the ledger is in order."""
        return f"{self.prefix}unbooked"

    @property
    def secrets(self) -> str:
        """Hash: secrets of this ledger, such as the key that makes users' names for providers. Never in an event."""
        return f"{self.prefix}secrets"

    @property
    def users(self) -> str:
        """Hash: users' plain ids by their hashed ids, if ids on the ledger are hashed. Entries can be removed."""
        return f"{self.prefix}users"

    @property
    def api_keys(self) -> str:
        """Hash, in partition 0 alone: the gateway's keys, by the SHA-256 of each; see `functions/header.lua`."""
        return f"{self.prefix}keys"

    @property
    def probe(self) -> str:
        """Stream: written and deleted in one step, to check that the partition can be written."""
        return f"{self.prefix}probe"

    @property
    def baseline_requests(self) -> str:
        """Channel: requests of other processes for baselines, which the projector answers."""
        return f"{self.prefix}baseline-requests"

    def baseline_answers(self, asker: str) -> str:
        """Channel: the projector's answers to one process."""
        return f"{self.prefix}baseline-answers:{asker}"

    @property
    def mark(self) -> str:
        """String: written before each wait for replicas, so that the wait covers all earlier writes."""
        return f"{self.prefix}mark"

    def tail(self, budget: str) -> str:
        """List: deltas of one budget that the projector may not have folded yet."""
        return f"{self.prefix}tail:{budget}"

    def call(self, call_id: str) -> str:
        """String: the record of one call, kept for the idempotency period."""
        return f"{self.prefix}call:{call_id}"

    def account(self, user_id: str) -> str:
        """Hash: plan, cap and credits that the ledger assigned to a user."""
        return f"{self.prefix}account:{user_id}"

    def result(self, task_id: str) -> str:
        """String: the task's result as JSON; also the channel on which its arrival is announced."""
        return f"{self.prefix}result:{task_id}"

    def deltas(self, task_id: str) -> str:
        """Stream: a task's answer while it is generated; kept for an hour."""
        return f"{self.prefix}deltas:{task_id}"


def dead_letters(namespace: str) -> str:
    """Stream: tasks that cannot be executed, with the reason."""
    return f"{namespace}:dead-letters"


def dropped_dead_letters(namespace: str) -> str:
    """String: how many dead letters were dropped because there were too many, or they were too old.

    In the hash slot of the letters, since both are changed in one step.
    """
    return f"{{{dead_letters(namespace)}}}:dropped"


def tidying_lease(namespace: str) -> str:
    """String: present while a worker tidies the task streams, and for a while after."""
    return f"{namespace}:tidying"


def alerts(namespace: str) -> str:
    """Stream: alerts for people, with a consumer group for each receiver."""
    return f"{{{namespace}:alerts}}:queue"


def alert_receivers(namespace: str) -> str:
    """Hash: the state of deliveries to each receiver of alerts."""
    return f"{{{namespace}:alerts}}:receivers"


def fed_alerts(namespace: str) -> str:
    """Hash: sequence number of the newest event whose alert is in the queue, by partition."""
    return f"{{{namespace}:alerts}}:fed"


def raised_alerts(namespace: str) -> str:
    """Hash: the alerts about the system that are raised at present, by kind."""
    return f"{{{namespace}:alerts}}:raised"


def task_partition(namespace: str, task_id: str) -> str:
    """String: the partition that has the call of a task id; only if there are several partitions."""
    return f"{namespace}:task:{task_id}"


def projector_lease(namespace: str) -> str:
    """String: the projector that folds the ledger, and where; absent while there is none."""
    return f"{namespace}:projector"


def processes(namespace: str) -> str:
    """Hash: the sign of life of each process on the ledger, by its name."""
    return f"{namespace}:processes"


def dropped_tasks(namespace: str) -> str:
    """Hash: how many tasks were dropped from each task stream before a worker read them."""
    return f"{namespace}:dropped-tasks"


def worker_key(namespace: str, consumer: str) -> str:
    """String: present while a worker is alive."""
    return f"{namespace}:worker:{consumer}"


def is_reserved_key(namespace: str, key: str) -> bool:
    """Whether a key is a ledger's own, beside those of its partitions."""
    return key.startswith(f"{namespace}:")


def gateway_calls(namespace: str, digest: str) -> str:
    """Hash: calls of the gateway whose answers have not been delivered yet, by call id; for one key and body.

    If the client has named the call: its failed attempts, by number.
    """
    return f"{namespace}:gateway:{digest}"


def web_session(namespace: str, digest: str) -> str:
    """String: a session of the web view, by the SHA-256 of its id; it ends with its time to live."""
    return f"{namespace}:web-session:{digest}"


def web_link(namespace: str, digest: str) -> str:
    """String: a link into the web view that works once, by the SHA-256 of its secret; present until it was used."""
    return f"{namespace}:web-link:{digest}"
