"""The assumptions of a what-if in words: only those that matter for the given changes."""

from tollbook.audit.what_if.alternatives import Alternatives
from tollbook.audit.what_if.totals import Totals


def assumptions(alternatives: Alternatives, total: Totals) -> list[str]:
    """Return one or two sentences for each assumption."""
    if not alternatives:
        return ["Nothing is changed, so these are the recorded numbers."]
    sentences = [
        "Users send the same tasks at the same times, and models answer the same: a call has its recorded usage, times "
        "and failures.",
        "A call that would be refused is not sent again; its later events do not count.",
    ]
    if alternatives.plan_caps_nanousd:
        sentences.append(
            "A plan's new cap applies to every call on that plan, from the start of the period; users with a cap of "
            "their own keep it. Credits are added to it."
        )
    if alternatives.user_caps_nanousd:
        sentences.append("A user's new cap replaces the cap in force in every period; credits are added to it.")
    if alternatives.policy is not None:
        sentences.append(
            "Calls of plans or task types that the file does not have are decided as recorded; the running system "
            "would refuse them. Billing periods are as recorded; time zone and first days count for other budgets."
        )
    if alternatives.prices or alternatives.repriced:
        sentences.append(
            "Attempts are priced again by their recorded tokens, rounded up to the nano-dollar; cached tokens cost as "
            "much as other prompt tokens. Assumed charges become the new bound, and later corrections change in the "
            "same ratio. Models whose price is not changed cost what was recorded."
        )
    if alternatives.routes:
        sentences.append(
            "Another model on a route answers as the recorded one did, with as many tokens and the same failures; real "
            "models count tokens differently and write more or less. A task that named a model of its own counts as "
            "one on the route."
        )
    if alternatives.changes_prices:
        sentences.append("No fallback is needed that was not needed then.")
    if alternatives.has_cheaper:
        sentences.append(
            "A call whose first model does not fit begins with the cheaper one of its route, with the recorded tokens; "
            "one that named a model of its own does not."
        )
    if alternatives.changes_budgets:
        sentences.append(
            "Budgets beside the user's billing period are the file's, as if they had been there from the ledger's "
            "beginning, by the attributes that calls stated; those that the policy kept alike are as recorded. Credits "
            "count where name and value of the budget are the same, and an expiry takes back what it took."
        )
    else:
        sentences.append("Budgets beside the user's billing period are as recorded.")
    sentences.append("The wait for other calls' holds is as set now.")
    if total.allowed:
        sentences.append(
            "The cost of a call that was refused is not known. It is estimated as the mean of the earlier calls of the "
            "same task type and plan, at most its bound; without such calls, as its bound. The estimate uses up the "
            "cap, but is not counted as spent."
        )
    if total.waited:
        sentences.append(
            "A call that only other calls' holds keep from fitting waits, first come first served, and then takes as "
            "long as recorded."
        )
    return sentences
