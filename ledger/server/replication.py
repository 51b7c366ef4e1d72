"""What a process waits for before it believes a write: that so many replicas have it (G1, G3).

A primary answers before its replicas have a write. Should it die in that moment, a promoted replica lacks holds whose
requests went out, and charges that were told to callers. So a batch that may have written ends with WAIT, which counts
the replicas that have all writes of this connection up to then. The mark before it is such a write: a repeat that only
finds its call writes nothing, and without the mark WAIT would not cover what the first try wrote over another
connection. A replica has writes in their order, so one that has the mark has whatever was there before it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from tollbook.ledger.errors import LedgerUnavailable, TooFewReplicas
from tollbook.ledger.server.refusals import unavailable
from tollbook.ledger.server.slots import Command, key_of

WAIT_S: Final = 1.0
"""How long replicas are waited for. One that needs longer is as good as none: callers repeat by call id."""
# What changes nothing, and whose answer is told to nobody outside. GET is not among them: it reads results, and records
# of calls.
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
    """How many replicas must have a write, at least one; `is_on_disk`: synced to their disks, too.

    `mark` is the key that is written before each wait; None for a process whose every command writes by itself.
    `is_of_node`: on a cluster, where a mark has to be on the node that is waited for.
    """

    min_replicas: int
    is_on_disk: bool = False
    mark: str | None = None
    is_of_node: bool = False

    def is_needed_after(self, command: Command) -> bool:
        """Whether a command may have written, or tells what another may have."""
        # Without a mark, WAIT says nothing of others' writes.
        return command[0] not in _READS and (command[0] != "GET" or self.mark is not None)

    def of_node(self) -> Self:
        """Return the same for one node of a cluster, which has the marks of its own partitions alone."""
        return replace(self, is_of_node=True)

    def wait(self, within_s: float = WAIT_S) -> Command:
        """Return the command that waits for replicas."""
        return "WAIT", self.min_replicas, max(1, round(1000 * min(WAIT_S, within_s)))  # 0 would be for ever.

    def _mark_beside(self, commands: Iterable[Command]) -> str | None:
        """Return the mark of a partition that a batch is about; None where it is about none."""
        if not self.is_of_node or self.mark is None:
            return self.mark
        keys = (str(key_of(command)) for command in commands)
        found = next((match for key in keys if (match := _PARTITION.match(key))), None)
        return None if found is None else f"{found[0]}mark"

    def confirmation(self, commands: Iterable[Command], *, within_s: float) -> list[Command]:
        """Return the commands that end a batch."""
        beside, wait = self._mark_beside(commands), self.wait(within_s)
        mark: list[Command] = [] if beside is None else [("SET", beside, "")]
        # After WAIT: alone, it takes the second until replicas report what they have synced.
        synced: list[Command] = [("WAITAOF", 0, *wait[1:])] if self.is_on_disk else []
        return [*mark, wait, *synced]

    def problem_of(self, replies: Sequence[object]) -> LedgerUnavailable | None:
        """Return why a batch is not confirmed, from the replies to `confirmation`; None where it is."""
        for reply in replies:
            if isinstance(reply, LedgerUnavailable):
                # It says that nothing was done, which is so for the mark alone.
                return LedgerUnavailable(str(reply))
            if isinstance(reply, BaseException):
                return unavailable(reply)
        confirmed: Any = replies[-1]
        number: int = confirmed[-1] if self.is_on_disk else confirmed
        return TooFewReplicas(found=number, needed=self.min_replicas) if number < self.min_replicas else None
