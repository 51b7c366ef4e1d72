"""The decisions of a what-if: which calls get a hold, wait or are refused, by the gate's rules."""

from collections import deque

from tollbook.audit.what_if.budgets import Budgets, Hold, Means, Verdict
from tollbook.audit.what_if.totals import Account, Outcome, Refusal, Totals


class Decisions:
    """One partition's calls: open, waiting, settled and refused."""

    def __init__(self, budgets: Budgets, outcome: Outcome, hold_wait_ms: int) -> None:
        self.budgets = budgets
        self.open: dict[tuple[str, int], Hold] = {}
        # Settled ones with another cost, or that a late answer may still correct.
        self.settled: dict[tuple[str, int], Hold] = {}
        # By call: its first hold that would have been refused.
        self._refused: dict[str, int] = {}
        self._outcome = outcome
        self._hold_wait_ms = hold_wait_ms
        self._means = Means()
        self._queues: dict[str, deque[Hold]] = {}
        self._waits: deque[tuple[int, Hold]] = deque()
        self._freed: list[str] = []

    def is_refused(self, call_id: str, hold: int | None) -> bool:
        """Whether a call would have been refused at this hold or an earlier one; at any hold if none is named."""
        refused = self._refused.get(call_id)
        return refused is not None and (hold is None or hold >= refused)

    def count_waiting(self) -> None:
        """Count the calls that still wait."""
        for _, hold in self._waits:
            if hold.is_waiting:
                self._totals(hold).still_waiting += 1

    def ask(self, hold: Hold, *, recorded: Verdict, is_final: bool = False) -> None:
        """Decide on a hold as the gate would, and apply the decision; `recorded` is the gate's recorded decision.

        Where something differs and the route has a cheaper model, the first of both that fits is taken.
        """
        is_as_recorded = hold.other_amount == hold.amount and self.budgets.are_as_recorded(hold)
        if hold.choices and not is_as_recorded:
            fitting = (each for each in hold.choices if self.budgets.weigh(hold, each.amount)[0] == "fits")
            hold.take(next(fitting, hold.choices[0]))
        self._carry_out(hold, self._decide(hold, hold.other_amount, hold.amount, recorded=recorded, is_final=is_final))

    def _decide(
        self, hold: Hold, amount: int, recorded_amount: int, *, recorded: Verdict, is_final: bool = False
    ) -> Verdict:
        """Return the gate's answer; if nothing differs from what was recorded, the recorded answer."""
        verdict, _, _ = self.budgets.weigh(hold, amount)
        if is_final and verdict == "wait":
            verdict = "denied"
        if verdict == recorded or amount != recorded_amount or not self.budgets.are_as_recorded(hold):
            return verdict
        self._outcome.unexplained += 1
        return recorded

    def _carry_out(self, hold: Hold, verdict: Verdict) -> None:
        """Open the hold, refuse it, or queue it."""
        match verdict:
            case "fits":
                self._begin(hold)
            case "denied":
                self._refuse(hold)
            case "wait":
                hold.is_waiting = True
                self._totals(hold).waited += 1
                self._waits.append((hold.ms + self._hold_wait_ms, hold))
                self._queue(hold)

    def _queue(self, hold: Hold) -> None:
        _, budget, _ = self.budgets.weigh(hold, hold.other_amount)
        self._queues.setdefault(budget, deque()).append(hold)

    def _begin(self, hold: Hold) -> None:
        hold.is_waiting = False
        totals = self._totals(hold)
        if not hold.is_made:
            estimate = self._means.estimate(hold)
            totals.allowed += 1
            totals.estimate_nanousd += estimate
            totals.at_most_nanousd += hold.other_amount
            # Its cost is not known, but it would have taken room under the cap.
            self.budgets.move(hold.names, settled=estimate)
            return
        if hold.number == 1:
            totals.other_calls += 1
        self.budgets.move(hold.names, held=hold.other_amount)
        if hold.is_ended:
            self.settle(hold)

    def _refuse(self, hold: Hold, reason: str = "cap") -> None:
        hold.is_waiting = False
        if not hold.is_made:
            self._totals(hold).other_refused += 1
            return
        is_counted = hold.call_id in self._refused
        self._refused[hold.call_id] = min(hold.number, self._refused.get(hold.call_id, hold.number))
        self.open.pop((hold.call_id, hold.number), None)
        self.settled.pop((hold.call_id, hold.number), None)
        if is_counted:  # A later hold of the same call was refused while this one waited; they are one call.
            return
        _, budget, cap = self.budgets.weigh(hold, hold.other_amount)
        balance = self.budgets[budget]
        self._outcome.add_refusal(
            Refusal(
                entry_id=hold.entry_id,
                account=hold.account,
                call_id=hold.call_id,
                task_type=hold.task_type,
                budget=budget,
                settled_nanousd=balance.settled,
                held_nanousd=balance.held,
                cap_nanousd=cap,
                amount_nanousd=hold.other_amount,
                reason=reason,
            )
        )

    def settle(self, hold: Hold) -> None:
        """Replace a hold by the cost that it would have had."""
        self.open.pop((hold.call_id, hold.number), None)
        hold.other_booked = hold.other_cost()
        if hold.is_changed:
            self.settled[hold.call_id, hold.number] = hold
        self._means.add(hold, hold.other_booked)
        self.budgets.move(hold.names, held=-hold.other_amount)
        self._freed += hold.names
        self.book(hold.account, hold.names, hold.other_booked)

    def book(self, account: Account, names: list[str], nanousd: int) -> None:
        """Book spend; a negative amount reduces it."""
        self._outcome.of(account).other_spent_nanousd += nanousd
        self.budgets.move(names, settled=nanousd)
        if nanousd < 0:
            self._freed += names

    def extend(self, hold: Hold, extension: int, attempt: int, *, recorded: int = 0) -> None:
        """Extend the hold for an attempt; if that does not fit, the attempt would not have been made."""
        if extension and not hold.is_waiting:
            # An extension that was not recorded was not needed then, so something differs.
            verdict = self._decide(hold, extension, recorded, recorded="fits")
            if verdict != "fits":
                self.cut(hold, attempt)
                return
            self.budgets.move(hold.names, held=extension)
        hold.other_amount += extension

    def cut(self, hold: Hold, attempt: int) -> None:
        """End a call before an attempt that was made."""
        hold.cut_from = attempt
        self._totals(hold).cut_short += 1

    def wake(self) -> None:
        """Try the holds that wait for freed money, in order; one that still does not fit blocks those behind it."""
        while self._freed:
            if not self._queues:
                self._freed.clear()
                return
            name = self._freed.pop()
            queue = self._queues.get(name)
            while queue:
                hold = queue[0]
                verdict, budget, _ = self.budgets.weigh(hold, hold.other_amount)
                if hold.is_waiting and verdict == "wait" and budget == name:
                    break
                queue.popleft()
                if not hold.is_waiting:
                    continue
                if verdict == "wait":
                    self._queue(hold)
                else:
                    self._carry_out(hold, verdict)
            if queue is not None and not queue:
                del self._queues[name]

    def end_waits(self, now_ms: int) -> None:
        """Make the final decision on the holds whose wait is over."""
        while self._waits and (not self._waits[0][1].is_waiting or self._waits[0][0] <= now_ms):
            _, hold = self._waits.popleft()
            if hold.is_waiting:
                verdict, _, _ = self.budgets.weigh(hold, hold.other_amount)
                if verdict == "fits":
                    self._begin(hold)
                else:
                    self._refuse(hold, "wait_timeout" if verdict == "wait" else "cap")
        self.wake()

    def _totals(self, hold: Hold) -> Totals:
        return self._outcome.of(hold.account)
