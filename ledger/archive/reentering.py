"""Re-entry: new events for what lost events charged and assigned, if newer events are on the stream already.

Each new event has the id of the lost event (`recovered_id`), so a second run enters nothing twice. Costs count in the
budgets and periods that the lost events charged. Open holds and refusals are not entered again: they are declared lost.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tollbook.ledger.archive.known_events import Row
from tollbook.ledger.archive.restoring import budgets_of, claim_calls
from tollbook.ledger.errors import (
    BudgetCreditTooLow,
    CreditTooLow,
    IdempotencyConflict,
    KeyAlreadyRevoked,
    KeyTaken,
    KeyUnknown,
    NoPlanAssigned,
)
from tollbook.ledger.gate.call_record import CallRecord
from tollbook.ledger.gate.gate import Gate
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.policies import Opened, Opening, OpeningHold, PolicyRequest
from tollbook.ledger.gate.requests import (
    AdjustRequest,
    AlreadySettled,
    AssignRequest,
    BudgetCap,
    ChargeRequest,
    CreateKeyRequest,
    CreditRequest,
    RevokeKeyRequest,
    SettleRequest,
    WithdrawRequest,
)
from tollbook.ledger.gate.unbooked import UnbookedCharge
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import (
    BudgetOpened,
    CostAdjusted,
    CostRecorded,
    CreditGranted,
    CreditRevoked,
    KeyCreated,
    KeyRevoked,
    PlanAssigned,
    PlanCleared,
    PolicyApplied,
    payload_json,
)
from tollbook.schemas.identifiers import budget_name, partition_of, read_values, split_budget_name
from tollbook.schemas.upcasters import payload_object

_NO_HASH: Final = "-"
_PLAN_EVENTS: Final = ("plan-assigned", "plan-cleared")
# Final errors of a repeated command: a person has decided again since then, or its subject is lost.
_REFUSALS: Final = (
    IdempotencyConflict, CreditTooLow, BudgetCreditTooLow, NoPlanAssigned, KeyTaken, KeyUnknown, KeyAlreadyRevoked,
)  # fmt: skip
_Command = PlanAssigned | PlanCleared | CreditGranted | CreditRevoked | KeyCreated | KeyRevoked
_COMMANDS: Final[dict[str, type[_Command]]] = {
    "plan-assigned": PlanAssigned,
    "plan-cleared": PlanCleared,
    "credit-granted": CreditGranted,
    "credit-revoked": CreditRevoked,
    "key-created": KeyCreated,
    "key-revoked": KeyRevoked,
}
# The gate fills in these fields.
_UNSTAMPED: Final[dict[str, Any]] = {
    "hold": 0, "hold_nanousd": 0, "budgets": (), "overage_nanousd": 0, "content_hash": None, "is_final": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LostCost:
    """A lost settlement or charge, lost corrections included. Amounts are nano-dollars."""

    row: Row
    hold: int
    budgets: tuple[str, ...]
    cost_nanousd: int
    assumed_nanousd: int
    is_final: bool
    payload: CostRecorded


@dataclass(slots=True)
class LostSteps:
    """The lost events that moved money or changed a cap, sorted for re-entry."""

    costs: dict[tuple[str, int], LostCost] = field(default_factory=dict[tuple[str, int], LostCost])
    corrections: list[Row] = field(default_factory=list[Row])
    """Corrections of holds whose settlement is not lost."""
    commands: list[Row] = field(default_factory=list[Row])
    policies: list[Row] = field(default_factory=list[Row])
    openings: dict[int, list[Opening]] = field(default_factory=dict[int, list[Opening]])
    """The budgets that a policy opened, by the policy's version."""
    reserved: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    hashes: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "LostSteps":
        """Sort lost events, given in order."""
        steps = cls()
        for row in rows:
            steps._add(row, payload_object(row["payload"]))
        return steps

    def _add(self, row: Row, payload: dict[str, Any]) -> None:
        key = (row["call_id"], payload.get("hold", 0))
        match row["type"]:
            case "budget-reserved" if payload.get("kind", "hold") == "hold":
                self.reserved.add(key)
                self.hashes[row["call_id"]] = payload.get("content_hash") or _NO_HASH
            case "cost-recorded":
                parsed = CostRecorded.model_validate(payload)
                self.costs[key] = LostCost(
                    row, key[1], tuple(budgets_of(row, payload)), row["amount"], parsed.assumed_nanousd,
                    parsed.is_final, parsed,
                )  # fmt: skip
            case "cost-adjusted" if key in self.costs:
                cost = self.costs[key]
                self.costs[key] = replace(
                    cost,
                    cost_nanousd=cost.cost_nanousd + row["amount"],
                    assumed_nanousd=max(0, cost.assumed_nanousd + payload.get("assumed_nanousd", 0)),
                    is_final=cost.is_final or payload.get("is_final", False),
                )
            case "cost-adjusted":
                self.corrections.append(row)
            case "policy-applied":
                self.policies.append(row)
            case "budget-opened":
                opened = BudgetOpened.model_validate(payload)
                for stamp in opened.budgets:
                    holds = tuple(OpeningHold(each.call_id, each.hold, each.amount_nanousd) for each in opened.holds)
                    opening = Opening(stamp.budget, row["amount"], stamp.cap_nanousd or 0, holds)
                    self.openings.setdefault(payload["policy_version"], []).append(opening)
            case kind if kind in _COMMANDS:
                self.commands.append(row)
            case _:
                pass


@dataclass(slots=True)
class Entered:
    """What was entered again. `left` are ids of lost events that could not be entered, or need not be."""

    events: int = 0
    nanousd: int = 0
    left: list[str] = field(default_factory=list[str])


class Reentry:
    """Enters one partition's lost charges again. `since` are the ledger's events after the loss."""

    def __init__(
        self, ledger: Ledger, gate: Gate, pipeline: CommandPipeline, signature: Signature, since: Iterable[Row],
        *, idempotency_ttl_s: int, partitions: int,
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._gate = gate
        self._pipeline = pipeline
        self._signature = signature
        self._ttl_s = idempotency_ttl_s
        self._partitions = partitions
        self.entered = Entered()
        self._done, self._newer_plans = set[str](), set[str]()
        for row in since:
            recovered_id = payload_object(row["payload"]).get("recovered_id")
            if recovered_id:
                self._done.add(recovered_id)
            elif row["type"] in _PLAN_EVENTS:
                self._newer_plans.add(row["user_id"])

    async def enter(self, lost: LostSteps) -> None:
        """Enter all lost steps that are not entered yet. Errors: LedgerUnavailable; LedgerRefused."""
        for row in lost.policies:
            if row["id"] not in self._done:
                await self._apply_policy(row, lost)
        for row in lost.commands:
            if row["id"] not in self._done:
                await self._assign(row)
        for key, cost in lost.costs.items():
            if cost.row["id"] not in self._done:
                is_known = cost.hold > 0 and key not in lost.reserved
                await self._enter_cost(cost, lost.hashes.get(key[0]), is_known=is_known)
        for row in lost.corrections:
            if row["id"] not in self._done:
                await self._correct(row)

    async def _apply_policy(self, row: Row, lost: LostSteps) -> None:
        """Put a lost policy in force again, with the opening balances of its budgets, unless it was replaced since."""
        applied = PolicyApplied.model_validate(payload_object(row["payload"]))
        in_force = (await self._gate.policy()).version
        if applied.version <= in_force:
            self.entered.left.append(row["id"])
            return
        request = PolicyRequest(
            in_force=in_force,
            version=applied.version,
            digest=applied.digest,
            payload=payload_json(applied.model_copy(update={"recovered_id": row["id"]})),
            opened=Opened(
                tuple([await self._opening(opening, lost) for opening in lost.openings.get(applied.version, ())]),
                is_recovery=True,
            ),
        )
        await self._gate.apply_policy(request)
        self._count(0)

    async def _opening(self, opening: Opening, lost: LostSteps) -> Opening:
        """Return a budget's opening balance as of now: a hold that was open may be settled by now, or be lost."""
        spent, holds = opening.spent_nanousd, list[OpeningHold]()
        for each in opening.holds:
            record = await self._gate.call_record(each.call_id)
            if record is None or (each.call_id, each.hold) in lost.reserved:
                continue  # Its cost is entered separately, in the budgets in which it was settled.
            if (settled := record.settled.get(each.hold)) is not None:
                spent += settled.cost_nanousd
            elif record.has_hold(each.hold):
                holds.append(replace(each, amount_nanousd=record.hold.amount_nanousd))
        return replace(opening, spent_nanousd=spent, holds=tuple(holds))

    async def book(self, charge: UnbookedCharge, *, is_held_again: bool) -> bool:
        """Book a charge that was noted beside the ledger; return False if the workers' sweeper is to book it.

        If the hold is on the ledger, it is settled. If it is lost, the charge is entered under an id made of call and
        hold. With `is_held_again`, the hold with this number belongs to another run and is left alone.
        """
        record = await self._gate.call_record(charge.call_id)
        if charge.hold == 0:
            if await self._ledger.charge(charge.charge_request):
                self._count(charge.cost_nanousd)
        elif record is not None and record.has_hold(charge.hold) and not is_held_again:  # G3
            if await self._gate.is_on_stream(charge.seen):
                return False  # The process that wrote the note, or the sweeper, may settle it.
            await self._settle_noted(charge, record)
        else:
            payload = CostRecorded.model_validate(payload_object(charge.payload)).model_copy(
                update=_UNSTAMPED | {"outcome": "recorded", "reason": f"hold {charge.hold} of a call was lost"}
            )
            request = replace(
                charge.charge_request,
                call_id=f"unbooked {charge.call_id} {charge.hold}",
                content_hash="unbooked",
                payload=payload_json(payload),
            )
            if await self._ledger.charge(request):
                self._count(charge.cost_nanousd)
        return True

    async def _settle_noted(self, charge: UnbookedCharge, record: CallRecord) -> None:
        if charge.hold not in record.settled:
            reply = await self._ledger.settle(replace(charge.settle_request, budgets=record.hold.budgets))
            if not isinstance(reply, AlreadySettled):
                self._count(charge.cost_nanousd)
                return
            record = await self._gate.call_record(charge.call_id) or record
        if charge.knows_less(record.settled[charge.hold].assumed_nanousd):  # G1
            return
        payload = CostRecorded.model_validate(payload_object(charge.payload))
        request = AdjustRequest(
            call_id=charge.call_id,
            user_id=charge.user_id,
            hold=charge.hold,
            cost_nanousd=charge.cost_nanousd,
            assumed_nanousd=charge.assumed_nanousd,
            attempt=charge.attempt,
            payload=payload_json(
                CostAdjusted(basis=payload.basis, reason=self._signature.reason, author=self._signature.author)
            ),
            budgets=record.settled[charge.hold].budgets,
        )
        self._count_difference((await self._ledger.adjust(request)).difference_nanousd)

    async def _enter_cost(self, lost: LostCost, content_hash: str | None, *, is_known: bool) -> None:
        call_id = lost.row["call_id"]
        record = await self._gate.call_record(call_id)
        if is_known and record is not None and record.state == "open" and record.hold.hold == lost.hold:
            reply = await self._ledger.settle(self._settlement(lost, record))
            if not isinstance(reply, AlreadySettled):
                self._count(lost.cost_nanousd)
                return
            record = await self._gate.call_record(call_id)
        if is_known and record is not None and lost.hold in record.settled:
            await self._adjust(
                lost.row, record, lost.hold, lost.cost_nanousd, lost.assumed_nanousd, lost.payload,
                ends_call=lost.is_final,
            )  # fmt: skip
            return
        if record is not None and lost.hold == 0 and record.content_hash == lost.payload.content_hash:
            self.entered.left.append(lost.row["id"])  # The application has repeated the charge, so it is booked.
            return
        # Under the call's own id, a repeat of its task finds the call closed and is not charged again (G4).
        is_own = record is None and lost.is_final
        content_hash = content_hash or lost.payload.content_hash or _NO_HASH
        if record is not None and lost.is_final and record.content_hash == content_hash:
            await self._end(lost, record)
        await self._charge(lost, call_id if is_own else None, content_hash)

    def _settlement(self, lost: LostCost, record: CallRecord) -> SettleRequest:
        return SettleRequest(
            call_id=lost.row["call_id"],
            user_id=lost.row["user_id"],
            hold=lost.hold,
            cost_nanousd=lost.cost_nanousd,
            assumed_nanousd=lost.assumed_nanousd,
            attempt=lost.row["attempt"],
            is_final=lost.is_final,
            payload=_payload(lost, {}),
            budgets=record.hold.budgets,
        )

    async def _charge(self, lost: LostCost, call_id: str | None, content_hash: str) -> None:
        row = lost.row
        reason = lost.payload.reason or "entered again"
        request = ChargeRequest(
            # No task id can begin with this word and a space.
            call_id=call_id or f"recovered {row['id']}",
            user_id=row["user_id"],
            period=row["period"],
            content_hash=content_hash if call_id else row["id"],
            cost_nanousd=lost.cost_nanousd,
            assumed_nanousd=lost.assumed_nanousd,
            payload=_payload(lost, {"outcome": "recorded", "reason": reason}),
            budgets=lost.budgets,
        )
        if await self._ledger.charge(request):
            self._count(lost.cost_nanousd)
        if call_id is not None and self._partitions > 1:
            await claim_calls(self._pipeline, self._gate.keys, {call_id}, self._ttl_s)

    async def _correct(self, row: Row) -> None:
        payload = CostAdjusted.model_validate(payload_object(row["payload"]))
        record = await self._gate.call_record(row["call_id"])
        found = record.settled.get(payload.hold) if record is not None else None
        if record is not None and found is not None:
            cost = max(0, found.cost_nanousd + row["amount"])
            assumed = max(0, found.assumed_nanousd + payload.assumed_nanousd)
            await self._adjust(row, record, payload.hold, cost, assumed, payload, ends_call=payload.is_final)
        elif row["amount"] > 0:
            budgets = tuple(budgets_of(row, payload_object(row["payload"])))
            paid = CostRecorded(
                basis=payload.basis, outcome="recorded", reason=payload.reason, generation_id=payload.generation_id
            )
            await self._charge(LostCost(row, 0, budgets, row["amount"], 0, is_final=False, payload=paid), None, "")
        else:
            self.entered.left.append(row["id"])  # The call's record has expired, so its cost cannot be reduced.

    async def _end(self, lost: LostCost, record: CallRecord) -> None:
        """End a call whose last hold is lost, so that a repeat is not charged again (G4).

        The event has no `recovered_id`: if the command is killed before the charge, the next run must still enter it.
        """
        hold = record.hold.hold
        if record.state == "closed" and (found := record.settled.get(hold)) is not None:
            await self._adjust(
                lost.row, record, hold, found.cost_nanousd, found.assumed_nanousd, lost.payload,
                ends_call=True, is_recovery=False,
            )  # fmt: skip

    async def _adjust(
        self, row: Row, record: CallRecord, hold: int, cost: int, assumed: int, payload: CostRecorded | CostAdjusted,
        *, ends_call: bool = False, is_recovery: bool = True,
    ) -> None:  # fmt: skip
        adjusted = CostAdjusted(
            basis=payload.basis,
            reason=self._signature.reason,
            author=self._signature.author,
            generation_id=payload.generation_id,
            recovered_id=row["id"] if is_recovery else None,
        )
        request = AdjustRequest(
            call_id=row["call_id"],
            user_id=row["user_id"],
            hold=hold,
            cost_nanousd=cost,
            assumed_nanousd=assumed,
            attempt=row["attempt"],
            payload=payload_json(adjusted),
            budgets=record.settled[hold].budgets,
            ends_call=ends_call,
        )
        self._count_difference((await self._ledger.adjust(request)).difference_nanousd)

    async def _assign(self, row: Row) -> None:
        if row["type"] in _PLAN_EVENTS and row["user_id"] in self._newer_plans:
            self.entered.left.append(row["id"])  # A person has decided again since then.
            return
        try:
            is_new = await self._repeat_command(row)
        except _REFUSALS:
            is_new = False
        if is_new:
            self._count(0)
        else:
            # A person has repeated the command since then, or there is nothing left to take back.
            self.entered.left.append(row["id"])

    async def _repeat_command(self, row: Row) -> bool:
        payload = payload_object(row["payload"])
        model = _COMMANDS[row["type"]].model_validate(payload)
        if isinstance(model, CreditGranted | CreditRevoked) and model.budget is not None:
            return await self._repeat_credit(row, model)
        if isinstance(model, KeyCreated | KeyRevoked):
            return await self._repeat_key(row, model)
        command: dict[str, Any] = {
            "command_id": row["call_id"],
            "user_id": row["user_id"],
            "period": row["period"],
            "content_hash": payload.get("content_hash") or _NO_HASH,
            "type": row["type"],
            "payload": payload_json(model.model_copy(update={"content_hash": None, "recovered_id": row["id"]})),
            "budget": budget_name("user", row["user_id"], row["period"]),
        }
        match model:
            case PlanAssigned():
                return await self._ledger.assign(
                    AssignRequest(**command, plan=model.plan, amount_nanousd=model.cap_nanousd)
                )
            case CreditGranted():
                return await self._ledger.assign(AssignRequest(**command, plan="", amount_nanousd=row["amount"]))
            case PlanCleared() | CreditRevoked():
                return await self._ledger.withdraw(WithdrawRequest(**command, amount_nanousd=-row["amount"]))

    async def _repeat_key(self, row: Row, model: KeyCreated | KeyRevoked) -> bool:
        """Create or revoke a key again; a revocation keeps its time."""
        unstamped = model.model_copy(update={"content_hash": None, "recovered_id": row["id"]})
        content_hash = model.content_hash or _NO_HASH
        if isinstance(model, KeyCreated):
            request = CreateKeyRequest(
                command_id=row["call_id"],
                content_hash=content_hash,
                key_id=model.key_id,
                key_hash=model.hash,
                payload=payload_json(unstamped),
            )
            return await self._gate.create_key(request) == "created"
        request = RevokeKeyRequest(
            command_id=row["call_id"],
            content_hash=content_hash,
            key_id=model.key_id,
            payload=payload_json(unstamped.model_copy(update={"at_ms": 0})),  # The gate sets the time.
            not_before_ms=model.at_ms,
        )
        return (await self._gate.revoke_key(request)).is_new

    async def _repeat_credit(self, row: Row, model: CreditGranted | CreditRevoked) -> bool:
        """Grant or take back a budget's credit again. The projector then lets expired credit expire again."""
        assert model.budget is not None
        assert model.credit is not None
        # The budget belongs to this partition: it has one balance for all calls, or its value names a user.
        partition = self._gate.keys.partition
        value = split_budget_name(model.budget)[1]
        values = ["", value, *(read_values(value, 1 + value.count(",")) if "," in value else ())]
        user_id = next(each for each in values if partition_of(each, self._partitions) == partition)
        unstamped = dict.fromkeys(("budget", "cap_nanousd", "settled_nanousd", "held_nanousd", "content_hash"))
        request = CreditRequest(
            command_id=row["call_id"],
            user_id=user_id,
            content_hash=model.content_hash or _NO_HASH,
            type=model.type,
            credit_id=model.credit,
            amount_nanousd=abs(row["amount"]),
            expires_ms=model.expires_ms or 0,
            payload=payload_json(model.model_copy(update=unstamped | {"recovered_id": row["id"]})),
            budget=BudgetCap(model.budget, model.cap_nanousd or 0),
            policy_version=(await self._gate.policy()).version,
        )
        return (await self._ledger.change_credit(request)).is_new

    def _count_difference(self, nanousd: int) -> None:
        if nanousd:
            self._count(nanousd)

    def _count(self, nanousd: int) -> None:
        self.entered.events += 1
        self.entered.nanousd += nanousd


def _payload(lost: LostCost, changes: dict[str, Any]) -> str:
    own = {"recovered_id": lost.row["id"], "assumed_nanousd": lost.assumed_nanousd}
    return payload_json(lost.payload.model_copy(update=_UNSTAMPED | own | changes))
