"""Shows the outcome of a what-if, as tables and as JSON."""

from typing import Any

from tollbook.audit.what_if import Outcome, Refusal, Totals
from tollbook.schemas.identifiers import EntryId, describe_budget
from tollbook.schemas.money import exact_places, format_usd, usd_text
from tollbook.views.tables import Printer, Row, printable, utc

_COLUMNS = ("", "calls>", "refused>", "spent>")


def what_if_document(outcome: "Outcome", top: int, assumed: list[str]) -> dict[str, Any]:
    """Return an outcome as a JSON document, with the `top` most affected users; dollars are text with nine places."""
    users = list(outcome.by_user().items())
    return {
        "events": outcome.events,
        "total": _numbers(outcome.total()),
        "plans": [
            {"plan": plan, "users": count, **_numbers(sums)} for plan, (count, sums) in outcome.by_plan().items()
        ],
        "affected_users": len(users),
        "users": [{"user_id": user_id, **_numbers(sums)} for user_id, sums in users[:top]],
        "first_refusals": [_refusal(refusal) for refusal in outcome.first_refusals()],
        "unexplained": outcome.unexplained,
        "assumes": assumed,
    }


def _numbers(sums: "Totals") -> dict[str, Any]:
    return {
        "calls": {"recorded": sums.calls, "what_if": sums.other_calls},
        "refused": {"recorded": sums.refused, "what_if": sums.other_refused},
        "spent_usd": {"recorded": usd_text(sums.spent_nanousd), "what_if": usd_text(sums.other_spent_nanousd)},
        "difference_usd": usd_text(sums.difference_nanousd),
        "newly_refused": sums.newly_refused,
        "newly_allowed": sums.allowed,
        "newly_allowed_estimate_usd": usd_text(sums.estimate_nanousd),
        "newly_allowed_at_most_usd": usd_text(sums.at_most_nanousd),
        "waited": sums.waited,
        "still_waiting": sums.still_waiting,
        "cut_short": sums.cut_short,
        "not_repriced": sums.not_repriced,
    }


def _refusal(refusal: "Refusal") -> dict[str, Any]:
    return {
        "id": refusal.entry_id,
        "at": utc(EntryId.parse(refusal.entry_id).ms).isoformat(timespec="milliseconds"),
        "user_id": refusal.account.user_id,
        "period": refusal.account.period,
        "plan": refusal.account.plan,
        "call_id": refusal.call_id,
        "task_type": refusal.task_type,
        "budget": refusal.budget,
        "amount_usd": usd_text(refusal.amount_nanousd),
        "settled_usd": usd_text(refusal.settled_nanousd),
        "held_usd": usd_text(refusal.held_nanousd),
        "cap_usd": usd_text(refusal.cap_nanousd),
        "reason": refusal.reason,
    }


def print_what_if(outcome: Outcome, top: int, assumed: list[str]) -> None:
    """Print recorded and what-if numbers, by plan and by user, and the first calls that would be refused."""
    printer = Printer()
    if not outcome.accounts:
        printer.line("no calls on the ledger for this")
        return
    plans = [(plan, f"{users:,}", sums) for plan, (users, sums) in outcome.by_plan().items()]
    rows = [row for name, users, sums in plans for row in _rows(sums, name, users)]
    if len(plans) > 1:
        first, *others = _rows(outcome.total(), "all", "")
        rows += [Row(first.cells, style=first.style, has_rule=True), *others]
    printer.table(("plan", "users>?", *_COLUMNS), rows, "By plan")
    if affected := outcome.by_user():
        shown = list(affected.items())[:top]
        rows = [row for user_id, sums in shown for row in _rows(sums, printable(user_id))]
        title = f"Most affected: {len(shown):,} of {len(affected):,} users"
        printer.table(("user", *_COLUMNS), rows, title)
    if refusals := outcome.first_refusals():
        columns = ("time (UTC)", "asked for>", "settled>", "cap>")
        places = exact_places(
            amount for each in refusals for amount in (each.amount_nanousd, each.settled_nanousd, each.cap_nanousd)
        )
        rows = [_refusal_row(each, places) for each in refusals]
        printer.table(columns, rows, "First calls that would have been refused")
    printer.line()
    for line in _notes(outcome):
        printer.text(line, hang=2)
    printer.text(f"Assumes: {' '.join(assumed)}", hang=2)


def _rows(sums: Totals, *names: str) -> list[Row]:
    """Return the rows of a plan or user: what was recorded, what would have been, and the difference."""
    blank = [""] * len(names)
    details = []
    if sums.allowed:
        about, most = (format_usd(nanousd, places=4) for nanousd in (sums.estimate_nanousd, sums.at_most_nanousd))
        what = "call that was refused" if sums.allowed == 1 else "calls that were refused"
        details = [f"{sums.allowed:,} {what} would have been made, for about {about}, at most {most}"]
    spent = (sums.spent_nanousd, sums.other_spent_nanousd, sums.difference_nanousd)
    recorded, other, difference = (format_usd(nanousd, places=4) for nanousd in spent)
    calls, refused = sums.other_calls - sums.calls, sums.other_refused - sums.refused
    return [
        Row([*names, "recorded", f"{sums.calls:,}", f"{sums.refused:,}", recorded]),
        Row([*blank, "what if", f"{sums.other_calls:,}", f"{sums.other_refused:,}", other]),
        Row([*blank, "difference", f"{calls:+,}", f"{refused:+,}", difference], details),
    ]


def _refusal_row(refusal: Refusal, places: int) -> Row:
    amounts = (refusal.amount_nanousd, refusal.settled_nanousd, refusal.cap_nanousd)
    at = f"{utc(EntryId.parse(refusal.entry_id).ms):%Y-%m-%d %H:%M:%S}"
    whose = f"{printable(refusal.account.user_id)} {printable(refusal.call_id)}"
    what = f"{printable(refusal.task_type)}, plan {printable(refusal.account.plan)}, {describe_budget(refusal.budget)}"
    return Row([at, *(format_usd(amount, places=places) for amount in amounts)], [f"{whose}: {what}"])


def _notes(outcome: "Outcome") -> list[str]:
    total = outcome.total()
    notes = (
        (total.waited, "calls would have waited for other calls' holds"),
        (total.still_waiting, "calls would still be waiting at the end of the ledger; they count as neither"),
        (total.cut_short, "calls would have ended before a retry or fallback that was made"),
        (
            total.not_repriced,
            "charges could not be priced again, because their tokens are unknown; they stay as recorded",
        ),
        (outcome.unexplained, "recorded decisions do not follow from the ledger's own numbers; see `tollbook verify`"),
    )
    return [f"{count:,} {text}" for count, text in notes if count]
