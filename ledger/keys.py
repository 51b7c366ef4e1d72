"""Names of the Redis keys. All keys of one partition share a hash tag, hence a cluster slot."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one ledger partition."""

    namespace: str = "tollbook"
    partition: int = 0

    @property
    def prefix(self) -> str:
        """The hash tag with which every key of the partition begins."""
        return f"{{{self.namespace}:{self.partition}}}:"

    @property
    def meta(self) -> str:
        """Hash: the ledger's identity and watermark."""
        return self.prefix + "meta"

    @property
    def ledger(self) -> str:
        """Stream: the events."""
        return self.prefix + "ledger"

    @property
    def holds(self) -> str:
        """Sorted set: call id of each open hold by its deadline, in milliseconds."""
        return self.prefix + "holds"

    @property
    def waiters(self) -> str:
        """Hash of the budgets somebody waits for; also the channel on which freed budgets are announced."""
        return self.prefix + "waiters"

    @property
    def tail_pattern(self) -> str:
        """Glob for all tails of the partition."""
        return self.tail("*")

    def tail(self, budget: str) -> str:
        """List: deltas of one budget that the projector may not have folded yet."""
        return f"{self.prefix}tail:{budget}"

    def call(self, call_id: str) -> str:
        """String: the state of one call, kept for the idempotency period."""
        return f"{self.prefix}call:{call_id}"

    def account(self, user_id: str) -> str:
        """Hash: plan, cap and credits that the ledger assigned to a user."""
        return f"{self.prefix}account:{user_id}"

    def result(self, task_id: str) -> str:
        """String: the task's result as JSON; also the channel on which its arrival is announced."""
        return f"{self.prefix}result:{task_id}"


def dead_letters(namespace: str) -> str:
    """Stream: tasks that cannot be executed, with the reason."""
    return f"{namespace}:dead-letters"


def projector_lease(namespace: str) -> str:
    """String: who folds the ledger, and where; gone when nobody does."""
    return f"{namespace}:projector"
