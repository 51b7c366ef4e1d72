"""What people change on the ledger: the policy, plans, caps, credits and the gateway's keys.

Every command has an id, and a repeat under it is the same command.
"""

from collections.abc import Sequence
from typing import Any, Final

from tollbook.ledger.errors import (
    BudgetCreditTooLow,
    CreditNotDue,
    CreditTooLow,
    KeyAlreadyRevoked,
    KeyTaken,
    KeyUnknown,
    NoPlanAssigned,
    PolicyChanged,
)
from tollbook.ledger.gate.function_calls import GateFunctions
from tollbook.ledger.gate.packing import pack
from tollbook.ledger.gate.policies import EventsNotCounted, Opened, PolicyRequest
from tollbook.ledger.gate.replies import refusal
from tollbook.ledger.gate.requests import (
    AssignRequest,
    Baseline,
    CreateKeyRequest,
    CreditChange,
    CreditRequest,
    KeyCreation,
    KeyRevocation,
    RevokeKeyRequest,
    WithdrawRequest,
)
from tollbook.ledger.server.connection import as_map

# A payment may be reported again long after; its credit must not be granted twice.
_CREDIT_TTL_S: Final = 400 * 86_400


class PeopleCommands(GateFunctions):
    """The commands of people in one partition. Errors of every method: those of `Gate`."""

    async def apply_policy(self, request: PolicyRequest) -> bool:
        """Put a policy in force in this partition; return whether that is new.

        Errors: PolicyChanged where another one is in force than the request says; EventsNotCounted; CallsStopped.
        """
        opened = request.opened or Opened()
        reply = await self._call(
            "apply_policy",
            (
                self.keys.meta,
                self.keys.ledger,
                *(self.keys.tail(each.budget) for each in opened.openings),
                *(self.keys.call(hold.call_id) for each in opened.openings for hold in each.holds),
            ),
            (
                request.in_force,
                request.version,
                request.digest,
                request.payload,
                opened.counted,
                *(f"{each.spent_nanousd} {each.cap_nanousd} {each.budget}" for each in opened.openings),
                *(
                    f"{place} {hold.hold} {hold.amount_nanousd} {hold.call_id}"
                    for place, each in enumerate(opened.openings, 1)
                    for hold in each.holds
                ),
            ),
        )
        match reply[0]:
            case b"OK" | b"EXISTS":
                return reply[0] == b"OK"
            case b"MOVED":
                raise PolicyChanged(int(reply[1]))
            case b"BEHIND":
                raise EventsNotCounted(int(reply[1]))
            case _:
                raise refusal(reply, "", 0)

    async def assign(self, request: AssignRequest) -> bool:
        """Change a plan, cap or credit at once; return whether it is new. Errors: IdempotencyConflict."""
        reply = await self._change("assign", request, request.plan, request.amount_nanousd)
        if reply[0] in (b"OK", b"EXISTS"):
            return reply[0] == b"OK"
        raise refusal(reply, request.command_id, 0)

    async def withdraw(self, request: WithdrawRequest) -> bool:
        """Take back credit or an assigned plan at once; return whether it is new.

        Errors: IdempotencyConflict; CreditTooLow; NoPlanAssigned.
        """
        reply = await self._change("withdraw", request, request.amount_nanousd)
        match reply[0]:
            case b"OK" | b"EXISTS":
                return reply[0] == b"OK"
            case b"LESS":
                raise CreditTooLow(request.user_id, request.period, int(reply[1]))
            case b"NONE":
                raise NoPlanAssigned(request.user_id)
            case _:
                raise refusal(reply, request.command_id, 0)

    async def change_credit(self, request: CreditRequest, baselines: Sequence[Baseline]) -> CreditChange:
        """Grant, take back or expire a budget's credit.

        Errors: IdempotencyConflict; BudgetCreditTooLow; CreditNotDue; PolicyChanged.
        """
        keys = self.keys
        reply = await self._call(
            "change_credit",
            (keys.meta, keys.ledger, keys.waiters, keys.call(request.command_id), keys.tail(request.budget.name)),
            (
                request.command_id,
                request.content_hash,
                request.type,
                request.credit_id,
                request.amount_nanousd,
                request.expires_ms,
                max(self._idempotency_ttl_s, _CREDIT_TTL_S),
                request.payload,
                *pack((request.budget,), baselines),
            ),
            policy_version=request.policy_version,
        )
        match reply[0]:
            case b"OK":
                return CreditChange(is_new=True, change_nanousd=int(reply[2]))
            case b"EXISTS":
                return CreditChange(is_new=False)
            case b"LESS":
                raise BudgetCreditTooLow(request.credit_id, int(reply[1]))
            case b"EARLY":
                raise CreditNotDue(request.credit_id)
            case _:
                raise refusal(reply, request.command_id, 0)

    async def create_key(self, request: CreateKeyRequest) -> KeyCreation:
        """Make a key known. Errors: IdempotencyConflict; KeyTaken."""
        reply = await self._change_key("create_key", request, request.key_hash)
        match reply[0]:
            case b"OK":
                return "created"
            case b"EXISTS":
                return "before" if reply[1] == b"1" else "other"
            case b"TAKEN":
                raise KeyTaken(request.key_id)
            case _:
                raise refusal(reply, request.command_id, 0)

    async def revoke_key(self, request: RevokeKeyRequest) -> KeyRevocation:
        """Let a key end. Errors: IdempotencyConflict; KeyUnknown; KeyAlreadyRevoked."""
        reply = await self._change_key("revoke_key", request, request.after_ms, request.not_before_ms)
        match reply[0]:
            case b"OK":
                return KeyRevocation(int(reply[2]), is_new=True)
            case b"EXISTS":
                return KeyRevocation(int(reply[1] or 0), is_new=False)
            case b"UNKNOWN":
                raise KeyUnknown(request.key_id)
            case b"REVOKED":
                raise KeyAlreadyRevoked(request.key_id, int(reply[1]))
            case _:
                raise refusal(reply, request.command_id, 0)

    async def api_keys(self) -> dict[str, str]:
        """Return what this partition has of the gateway's keys, by the fields of their hash in Redis."""
        found: Any = as_map(await self._pipeline.execute("HGETALL", self.keys.api_keys))
        return {field.decode(): value.decode(errors="replace") for field, value in found.items()}

    async def _change_key(
        self, name: str, request: CreateKeyRequest | RevokeKeyRequest, argument: str | int, *further: int
    ) -> list[bytes]:
        keys = self.keys
        return await self._call(
            name,
            (keys.meta, keys.ledger, keys.call(request.command_id), keys.api_keys),
            (
                request.command_id,
                request.content_hash,
                request.key_id,
                argument,
                self._idempotency_ttl_s,
                request.payload,
                *further,
            ),
        )

    async def _change(self, name: str, request: AssignRequest | WithdrawRequest, *change: str | int) -> list[bytes]:
        keys = self.keys
        return await self._call(
            name,
            (
                keys.meta,
                keys.ledger,
                keys.account(request.user_id),
                keys.call(request.command_id),
                keys.tail(request.budget),
            ),
            (
                request.command_id,
                request.user_id,
                request.period,
                request.content_hash,
                request.type,
                *change,
                self._idempotency_ttl_s,
                request.payload,
            ),
        )
