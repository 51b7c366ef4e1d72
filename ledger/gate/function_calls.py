"""How the gate's functions are called, for one partition.

Every call tells which ledger this process means and what it has seen of it, and takes note of what it appended.
"""

from collections.abc import Iterable, Sequence
from typing import Final, cast

from redis.exceptions import ResponseError

from tollbook.ledger.gate.functions import function
from tollbook.ledger.gate.replies import FunctionsMissing
from tollbook.ledger.keys import Keys
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId

# The server-side names, made once: every step of every call needs one.
_FUNCTIONS: Final = {
    name: function(name)
    for name in (
        "reserve",
        "record",
        "note",
        "settle",
        "adjust",
        "release",
        "charge",
        "assign",
        "withdraw",
        "balance",
        "trim",
        "forget_alerts",
        "apply_policy",
        "change_credit",
        "create_key",
        "revoke_key",
    )
}
# After OK, they answer the id of the event that they appended, or nothing if there was none to append.
_APPENDING_FUNCTIONS: Final = frozenset(
    {
        "reserve",
        "record",
        "settle",
        "adjust",
        "release",
        "charge",
        "assign",
        "withdraw",
        "apply_policy",
        "change_credit",
        "create_key",
        "revoke_key",
    }
)


class GateFunctions:
    """The functions of one partition. `seen` is the newest event that this process knows to be on the ledger."""

    def __init__(
        self,
        pipeline: CommandPipeline,
        keys: Keys,
        ledger_id: str,
        *,
        idempotency_ttl_s: int,
        result_ttl_s: int,
        seen: EntryId = ZERO_ENTRY,
    ) -> None:
        """`seen` is kept up to date."""
        self.keys = keys
        self.ledger_id = ledger_id
        self.seen = seen
        self._identity = f"{ledger_id} {seen}"
        self._pipeline = pipeline
        self._idempotency_ttl_s = idempotency_ttl_s
        self._result_ttl_s = result_ttl_s

    def see(self, entry: EntryId) -> None:
        """Remember an event that is on the ledger, if it is the newest one yet."""
        if entry > self.seen:
            self.seen, self._identity = entry, f"{self.ledger_id} {entry.ms}-{entry.seq}"

    async def _call(
        self, name: str, keys: Sequence[str], arguments: Iterable[str | int], *, policy_version: int | None = None
    ) -> list[bytes]:
        # A process that has seen more than the ledger now has is told so, and nothing is written; so is one that
        # decides by another policy than the ledger's.
        identity = self._identity if policy_version is None else f"{self._identity} {policy_version}"  # G11
        try:
            reply = await self._pipeline.execute("FCALL", _FUNCTIONS[name], len(keys), *keys, identity, *arguments)
        except ResponseError as exc:
            if "Function not found" in str(exc):
                raise FunctionsMissing(str(exc)) from exc
            raise
        if name in _APPENDING_FUNCTIONS and reply[0] == b"OK" and reply[1]:
            self.see(EntryId.parse(reply[1].decode()))
        elif (reply[0] == b"EXISTS" or (name, reply[0]) == ("settle", b"SETTLED")) and reply[-1]:
            self.see(EntryId.parse(reply[-1].decode()))
        return cast("list[bytes]", reply)
