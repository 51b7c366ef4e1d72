"""Waiting for replicas: a write counts as done only when enough replicas have it (G1, G3).

A primary answers before its replicas have a write. If it dies at that moment, a promoted replica lacks holds whose
requests were sent, and charges that callers know of. So a batch that may have written ends with WAIT, which counts the
replicas that have all earlier writes of this connection. The mark before WAIT is such a write. It is needed since a
retry that finds its call writes nothing itself: without the mark, WAIT would not cover the write of the first try over
another connection. Replicas apply writes in order, so a replica that has the mark has everything before it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from tollbook.ledger.errors import LedgerUnavailable, TooFewReplicas
from tollbook.ledger.server.refusals import unavailable
from tollbook.ledger.server.slots import Command, key_of

WAIT_S: Final = 1.0
"""How long to wait for replicas. A slower replica does not count: callers retry with the same call id."""
# Commands that change nothing, and whose answers do not leave Tollbook. GET is not among them: it reads results and
# records of calls.
_READS: Final = frozenset(
    {
        "PING", "TIME", "INFO", "CONFIG", "EXISTS", "TYPE", "PTTL", "SCAN", "HGET", "HMGET", "HGETALL", "HLEN",
        "HEXISTS", "ZCARD", "ZRANGE", "ZRANGEBYSCORE", "LINDEX", "LLEN", "LRANGE", "XLEN", "XRANGE", "XREVRANGE",
        "XINFO", "XPENDING",
    }
)  # fmt: skip
# How the keys of a partition begin; see ledger/keys.py.
_PARTITION: Final = re.compile(r"\{[^{}]+:\d+\}:")


@dataclass(frozen=True, slots=True)
class Replication:
    """How many replicas must have a write, at least one; `is_on_disk`: they must also have synced it to disk.

    `mark` is the key that is written before each wait; None for a process all of whose commands write.
    `is_of_node`: for one node of a cluster, where the mark must be on that node.
    """

    min_replicas: int
    is_on_disk: bool = False
    mark: str | None = None
    is_of_node: bool = False

    def is_needed_after(self, command: Command) -> bool:
        """Whether a command may have written, or its reply may show another client's write."""
        # Without a mark, WAIT does not cover other clients' writes.
        return command[0] not in _READS and (command[0] != "GET" or self.mark is not None)

    def of_node(self) -> Self:
        """Return the same for one node of a cluster, which has only the marks of its own partitions."""
        return replace(self, is_of_node=True)

    def wait(self, within_s: float = WAIT_S) -> Command:
        """Return the command that waits for replicas."""
        return "WAIT", self.min_replicas, max(1, round(1000 * min(WAIT_S, within_s)))  # 0 would be for ever.

    def _mark_beside(self, commands: Iterable[Command]) -> str | None:
        """Return the mark of a partition in a batch; None if the batch is about no partition."""
        if not self.is_of_node or self.mark is None:
            return self.mark
        keys = (str(key_of(command)) for command in commands)
        found = next((match for key in keys if (match := _PARTITION.match(key))), None)
        return None if found is None else f"{found[0]}mark"

    def confirmation(self, commands: Iterable[Command], *, within_s: float) -> list[Command]:
        """Return the commands that end a batch."""
        beside, wait = self._mark_beside(commands), self.wait(within_s)
        mark: list[Command] = [] if beside is None else [("SET", beside, "")]
        # WAITAOF comes after WAIT: alone, it takes up to a second, until replicas report what they have synced.
        synced: list[Command] = [("WAITAOF", 0, *wait[1:])] if self.is_on_disk else []
        return [*mark, wait, *synced]

    def problem_of(self, replies: Sequence[object]) -> LedgerUnavailable | None:
        """Return why a batch is not confirmed, from the replies to `confirmation`; None if it is."""
        for reply in replies:
            if isinstance(reply, LedgerUnavailable):
                # RedisCannotServe would say that nothing was done, which is true for the mark only.
                return LedgerUnavailable(str(reply))
            if isinstance(reply, BaseException):
                return unavailable(reply)
        confirmed: Any = replies[-1]
        number: int = confirmed[-1] if self.is_on_disk else confirmed
        return TooFewReplicas(found=number, needed=self.min_replicas) if number < self.min_replicas else None
