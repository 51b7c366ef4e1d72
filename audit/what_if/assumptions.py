"""The assumptions of a what-if, in plain words: only those that matter for the given changes."""

from tollbook.audit.what_if.alternatives import Alternatives
from tollbook.audit.what_if.totals import Totals


def assumptions(alternatives: Alternatives, total: Totals) -> list[str]:
    """Return one or two sentences for each assumption."""
    if not alternatives:
        return ["Nothing is changed, so this is what was recorded."]
    said = [
        "Users would have sent the same tasks at the same moments, and models would have answered the same: a call "
        "that was made has its recorded usage, times and failures.",
        "Nobody tries a call again that would have been refused, and what was recorded of it later does not count.",
    ]
    if alternatives.plan_caps_nanousd:
        said.append(
            "A plan's other cap applies to every call made on that plan, from the first of its period; users with a "
            "cap of their own keep it. Credits stay on top."
        )
    if alternatives.user_caps_nanousd:
        said.append("A user's other cap replaces plan cap and own cap in every period; credits stay on top.")
    if alternatives.prices:
        said.append(
            "Attempts are priced anew by their recorded tokens, rounded up to the nano-dollar; cached tokens cost what "
            "other prompt tokens do. Charges that were assumed are assumed at the new bound, and later corrections "
            "change in the same ratio. Models whose price is not changed cost what was recorded."
        )
    if alternatives.routes:
        said.append(
            "Another model on a route would have answered as the recorded one did, with the same number of tokens and "
            "the same failures; in truth models count tokens differently and write more or less. A task that named a "
            "model of its own is taken for one on the route."
        )
    if alternatives.changes_prices:
        said.append("A fallback that was not needed would not have been needed.")
    said.append(
        "Caps of days and campaigns, and the time a call may wait for other calls' holds, are as recorded and set."
    )
    if total.allowed:
        said.append(
            "What a refused call would have cost is not known, since it was never made: estimated is the mean of the "
            "calls of the same task type and plan before it, or its bound where there are none, and at most its bound. "
            "The estimate takes up room under the cap, and is not part of what would have been spent."
        )
    if total.waited:
        said.append(
            "A call for which only other calls' holds left no room waits its turn, first come first served, and then "
            "takes no longer than recorded."
        )
    return said
