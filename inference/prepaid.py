"""Prepaid balances: credits of budgets whose window is `total`. Credits are granted, revoked, and can expire.

Each credit has an id chosen by the caller, such as a payment's; the same id with the same content is granted once. The
limit of such a budget is its own cap, often zero, plus all its credits. Spend uses up the cap first, then the credit
that expires first. The gate tracks how much of each credit is left, and an expiry takes back no more than that.
"""

import hashlib
from dataclasses import dataclass, replace

from tollbook.inference.budgets import BudgetPolicy
from tollbook.inference.current_policy import CurrentPolicy, PolicyInForce
from tollbook.inference.user_ids import UserIds
from tollbook.ledger.errors import IdempotencyConflict
from tollbook.ledger.gate.ledger import Ledger
from tollbook.ledger.gate.requests import BudgetCap, CreditChange, CreditRequest
from tollbook.ledger.signature import Signature
from tollbook.schemas.events import CreditExpired, CreditGranted, CreditRevoked, payload_json
from tollbook.schemas.identifiers import check_id


@dataclass(frozen=True, slots=True)
class Credit:
    """A credit: its budget's name and value (None: one balance for all), its id, and its expiry (None: never)."""

    budget: str
    value: str | None
    credit_id: str
    expires_ms: int | None = None


class Prepaid:
    """Changes the credits of budgets; a change is in force in the gate at once.

    Errors of every method: ValueError for a budget that cannot have credit, or an invalid value of it;
        IdempotencyConflict; LedgerUnavailable; LedgerRefused.
    """

    def __init__(self, ledger: Ledger, policies: CurrentPolicy, user_ids: UserIds) -> None:
        self._ledger = ledger
        self._policies = policies
        self._user_ids = user_ids

    async def grant(self, credit: Credit, amount_nanousd: int, signature: Signature) -> CreditChange:
        """Grant a credit."""
        payload = CreditGranted(
            credit=credit.credit_id,
            expires_ms=credit.expires_ms,
            author=signature.author,
            reason=signature.reason,
        )
        return await self._change(credit, payload, amount_nanousd, _grant_id(credit))

    async def is_granted(self, credit: Credit) -> bool:
        """Whether a credit with this id was granted, by the gate's record."""
        _, user_id = await self._owned(credit)
        return await self._ledger.gate_of(user_id).call_record(_grant_id(credit)) is not None

    async def revoke(self, credit: Credit, signature: Signature, *, amount_nanousd: int = 0) -> CreditChange:
        """Take back a part of a credit; with amount 0, everything that is left of it.

        Errors: BudgetCreditTooLow if less is left than the amount, or nothing.
        """
        payload = CreditRevoked(credit=credit.credit_id, author=signature.author, reason=signature.reason)
        name = f"credit-revoked {credit.credit_id}" + (f" {signature.key}" if signature.key else "")
        return await self._change(credit, payload, amount_nanousd, name)

    async def _change(
        self, credit: Credit, payload: CreditGranted | CreditRevoked, amount_nanousd: int, command_id: str
    ) -> CreditChange:
        check_id(credit.credit_id)
        credit, user_id = await self._owned(credit)

        async def change(policy: PolicyInForce) -> CreditChange:
            key = policy.budgets.prepaid_key(credit.budget, credit.value)
            content = f"{payload.type}\n{key}\n{credit.credit_id}\n{amount_nanousd}\n{credit.expires_ms or 0}"
            request = CreditRequest(
                command_id=command_id,
                user_id=user_id,
                content_hash=hashlib.sha256(content.encode()).hexdigest()[:32],
                type=payload.type,
                credit_id=credit.credit_id,
                amount_nanousd=amount_nanousd,
                expires_ms=credit.expires_ms or 0,
                payload=payload_json(payload),
                budget=BudgetCap(key, policy.budgets.find_cap(key) or 0),
                policy_version=policy.version,
            )
            return await self._ledger.change_credit(request)

        try:
            return await self._policies.decide(user_id, change)
        except IdempotencyConflict as exc:
            raise IdempotencyConflict(credit.credit_id, kind="credit id") from exc

    async def _owned(self, credit: Credit) -> tuple[Credit, str]:
        """Return a credit with its value as on the ledger, and the user whose partition has its budget."""
        # Any partition's policy is good enough here: all get the same versions, and the gate refuses an old one.
        policy = self._policies.newest
        value = await self._user_ids.value_of(policy.policy.budgets, credit.budget, credit.value)  # G10
        return replace(credit, value=value), policy.budgets.prepaid_user(credit.budget, value)


def _grant_id(credit: Credit) -> str:
    return f"credit {credit.credit_id}"


def expiry_request(
    *, budget: str, credit_id: str, expires_ms: int, stamped_cap_nanousd: int, policy: BudgetPolicy, version: int
) -> CreditRequest:
    """Return the request that takes back the rest of an expired credit; the gate decides how much is left.

    `stamped_cap_nanousd` is the budget's cap when the credit was granted, used if the policy no longer has the budget.
    """
    cap = policy.find_cap(budget)
    return CreditRequest(
        command_id=f"credit-expired {credit_id}",
        user_id="",
        content_hash="expired",
        type="credit-expired",
        credit_id=credit_id,
        amount_nanousd=0,
        expires_ms=expires_ms,
        payload=payload_json(CreditExpired(credit=credit_id, expires_ms=expires_ms)),
        budget=BudgetCap(budget, stamped_cap_nanousd if cap is None else cap),
        policy_version=version,
    )
