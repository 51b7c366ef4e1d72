"""Changes that admins make to a user: credit and plan. They use the commands' steps, are signed and idempotent."""

from tollbook.ledger.errors import IdempotencyConflict
from tollbook.schemas.money import NANOUSD_PER_USD, MoneyError, format_usd, nanousd_from_usd
from tollbook.schemas.tasks import InvalidTask
from tollbook.views.web.parts import link
from tollbook.views.web.visit import Visit
from tollbook.views.web.visitors import Refused


async def grant_credit(visit: Visit) -> str:
    """Grant a user credit for this billing period. Errors: Refused; LedgerUnavailable; LedgerRefused."""
    user_id, amount = _user(visit), _amount(visit.sent("amount"), "the credit")
    if not amount:
        raise Refused(400, "a credit must be greater than zero")
    _confirm(visit, amount)
    try:
        is_new = await visit.sources.administration.grant_credit(user_id, amount, visit.sign())
    except (ValueError, IdempotencyConflict) as exc:
        raise Refused(400, str(exc)) from None
    return link("/user", id=user_id, done="credit" if is_new else "repeated")


async def set_plan(visit: Visit) -> str:
    """Set a user's plan. Errors: Refused; LedgerUnavailable; LedgerRefused."""
    user_id, plan = _user(visit), visit.sent("plan") or ""
    administration, given = visit.sources.administration, visit.sent("cap")
    try:
        cap = administration.plan_cap_nanousd(plan) if given is None else _amount(given, "the cap")
        account = await administration.account(user_id)
        _confirm(visit, abs(cap - (account.cap_nanousd or 0)))
        is_new = await administration.set_plan(user_id, plan, visit.sign(), cap_nanousd=cap)
    except (InvalidTask, ValueError, IdempotencyConflict) as exc:
        raise Refused(400, str(exc)) from None
    return link("/user", id=user_id, done="plan" if is_new else "repeated")


def _user(visit: Visit) -> str:
    user_id = visit.asked("id")
    if user_id is None:
        raise Refused(400, "say which user: this address lacks an id")
    return user_id


def _amount(text: str | None, what: str) -> int:
    try:
        return nanousd_from_usd((text or "").removeprefix("$").replace(",", ""))
    except MoneyError as exc:
        raise Refused(400, f"{what}: {exc}") from None


def _confirm(visit: Visit, moved_nanousd: int) -> None:
    """Refuse a large amount that was not confirmed with the tick, as the commands ask for confirmation."""
    limit = visit.sources.runtime.settings.confirm_usd * NANOUSD_PER_USD
    if moved_nanousd > limit and visit.sent("sure") is None:
        text = f"this changes {format_usd(moved_nanousd)}, more than {format_usd(limit)}: go back and tick the box"
        raise Refused(400, text)
