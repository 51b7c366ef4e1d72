"""Requests to the gate and its answers: plain values, no I/O."""

from dataclasses import dataclass
from typing import Literal

from tollbook.schemas.identifiers import ZERO_ENTRY, EntryId, Window


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a partition's ledger: the entry's id and its sequence number."""

    entry: EntryId = ZERO_ENTRY
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Baseline:
    """A budget's settled spend and open holds as folded into DuckDB at a position, in nano-dollars."""

    settled_nanousd: int
    held_nanousd: int
    position: Position


EMPTY_BASELINE = Baseline(0, 0, Position())


@dataclass(frozen=True, slots=True)
class BudgetCap:
    """A budget to hold against, and its cap in nano-dollars."""

    name: str
    cap_nanousd: int


@dataclass(frozen=True, slots=True)
class AttemptEvent:
    """A `model-called` or `fallback-used` event of one attempt; `payload` is its JSON object."""

    type: Literal["model-called", "fallback-used"]
    attempt: int
    payload: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveRequest:
    """Hold `amount_nanousd` for a call against every budget, the user's period first.

    `content_hash` binds the call id to its content; `worker` names this run of the call;
    `lease_ms` is how long the hold may stay open; `payload` is the BudgetReserved JSON object.
    With `is_final`, a call is refused even if only open holds are in the way. With `is_trial`, it is neither refused
    nor made to wait: where money is not held, the answer is Waiting, and the ledger is as before. Route, bound and
    budgets are by the policy of `policy_version`.
    """

    call_id: str
    user_id: str
    window: Window
    content_hash: str
    amount_nanousd: int
    worker: str
    lease_ms: int
    payload: str
    budgets: tuple[BudgetCap, ...]
    is_final: bool = False
    is_trial: bool = False
    policy_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRequest:
    """Record attempts while a hold stays open, and extend it by `extension_nanousd` (0: not) for the next.

    `attempts_begun` includes the attempt that starts now; `spent_nanousd` is what the recorded ones may have
    cost, `assumed_nanousd` the unconfirmed part of it. An extension's bound and caps are by the policy of
    `policy_version`.
    """

    call_id: str
    user_id: str
    hold: int
    attempts_begun: int
    spent_nanousd: int
    assumed_nanousd: int
    events: tuple[AttemptEvent, ...]
    budgets: tuple[BudgetCap, ...]
    extension_nanousd: int = 0
    extension_payload: str = "{}"
    policy_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteRequest:
    """Keep the provider's id of a request with the open hold that pays for it; `provider` by its name in the policy."""

    call_id: str
    user_id: str
    hold: int
    attempt: int
    provider: str
    generation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleRequest:
    """Replace a hold by its cost; `assumed_nanousd` is the unconfirmed part of it.

    `is_final` ends the call; `result` is the task's result as JSON ('' stores none).
    """

    call_id: str
    user_id: str
    hold: int
    cost_nanousd: int
    assumed_nanousd: int
    attempt: int
    is_final: bool
    payload: str
    budgets: tuple[str, ...]
    result: str = ""
    events: tuple[AttemptEvent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdjustRequest:
    """Correct a settled hold to `cost_nanousd`. The difference is appended; a repeat changes nothing.

    `result` is stored if the call was closed without one: the answer came after the hold had expired. `ends_call` ends
    such a call without one. `seen` is the cost and the assumed part that the caller has read, if it has: a correction
    that is repeated late does not undo a newer one.
    """

    call_id: str
    user_id: str
    hold: int
    cost_nanousd: int
    assumed_nanousd: int
    attempt: int
    payload: str
    budgets: tuple[str, ...]
    result: str = ""
    events: tuple[AttemptEvent, ...] = ()
    ends_call: bool = False
    seen: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChargeRequest:
    """Book spend that happened without a hold; it is recorded even if it passes the cap.

    Its budgets are by the policy of `policy_version`; None: by whatever policy, they are what they are. `cap_nanousd`
    is that of the user's period, for its alerts; 0 where it is not known.
    """

    call_id: str
    user_id: str
    period: str
    content_hash: str
    cost_nanousd: int
    assumed_nanousd: int
    payload: str
    budgets: tuple[str, ...]
    policy_version: int | None = None
    cap_nanousd: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignRequest:
    """Change a user's plan and cap, or grant credit for a period; `command_id` is the idempotency key."""

    command_id: str
    user_id: str
    period: str
    content_hash: str
    type: Literal["plan-assigned", "credit-granted"]
    plan: str
    amount_nanousd: int
    payload: str
    budget: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRequest:
    """Give back what one attempt of a settled hold was assumed to cost, if the hold stands as it was read.

    `hold_cost_nanousd` and `hold_assumed_nanousd` are the hold's cost and the assumed part of it, as read.
    """

    call_id: str
    user_id: str
    hold: int
    hold_cost_nanousd: int
    hold_assumed_nanousd: int
    attempt: int
    amount_nanousd: int
    payload: str
    budgets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WithdrawRequest:
    """Take back credit of a period, or a user's assigned plan and cap; `command_id` is the idempotency key."""

    command_id: str
    user_id: str
    period: str
    content_hash: str
    type: Literal["credit-revoked", "plan-cleared"]
    amount_nanousd: int
    payload: str
    budget: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditRequest:
    """Grant credit to a budget that never begins anew, take one back, or let it expire.

    `credit_id` names the credit, `command_id` is the idempotency key. `amount_nanousd`: granted, or to be taken back
    (0: what is left). `expires_ms`: when the credit expires, milliseconds since the epoch (0: never). `user_id` is that
    of a user's budget, '' for one of all users; it decides the partition. The cap is by the policy of `policy_version`.
    """

    command_id: str
    user_id: str
    content_hash: str
    type: Literal["credit-granted", "credit-revoked", "credit-expired"]
    credit_id: str
    amount_nanousd: int
    expires_ms: int
    payload: str
    budget: BudgetCap
    policy_version: int


@dataclass(frozen=True, slots=True)
class CreditChange:
    """By how much a budget's credit changed, in nano-dollars; `is_new` is False where this was done before."""

    is_new: bool
    change_nanousd: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateKeyRequest:
    """Make a key of the gateway known by `key_hash`, its SHA-256; `command_id` is the idempotency key."""

    command_id: str
    content_hash: str
    key_id: str
    key_hash: str
    payload: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeKeyRequest:
    """Let a key of the gateway be accepted no more after so many milliseconds; `command_id` is the idempotency key.

    It is accepted until `not_before_ms` at least, in ms by the clock of Redis.
    """

    command_id: str
    content_hash: str
    key_id: str
    payload: str
    after_ms: int = 0
    not_before_ms: int = 0


KeyCreation = Literal["created", "before", "other"]
"""What became of a key: created now; created before, by the same step; not created, the command made another one."""


@dataclass(frozen=True, slots=True)
class KeyRevocation:
    """From when a key is not accepted any more, in ms by the clock of Redis; `is_new` is False where it was before."""

    at_ms: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class Account:
    """What the ledger has assigned to a user: plan and cap, if any, and the credit of one period, in nano-dollars."""

    plan: str | None
    cap_nanousd: int | None
    credit_nanousd: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """Money is held against `budgets`. `attempt` is the number of the first attempt it pays for.

    `assigned_plan` is the plan that the ledger assigned to the user, if it did; it overrides the task's plan.
    """

    entry_id: str
    hold: int
    attempt: int
    amount_nanousd: int
    committed_nanousd: int
    cap_nanousd: int
    deadline_ms: int
    budgets: tuple[BudgetCap, ...]
    assigned_plan: str | None = None


@dataclass(frozen=True, slots=True)
class Denied:
    """The call is refused for good: settled spend plus the amount passes the cap, or the wait was over."""

    budget: str
    settled_nanousd: int
    held_nanousd: int
    cap_nanousd: int
    amount_nanousd: int
    reason: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Only other calls' open holds are in the way; freed money is announced on the waiters' channel."""

    budget: str
    settled_nanousd: int
    held_nanousd: int
    cap_nanousd: int


@dataclass(frozen=True, slots=True)
class OpenCall:
    """The call has an open hold: this run's own after a repeat, otherwise another worker's."""

    hold: int
    amount_nanousd: int
    worker: str
    deadline_ms: int
    attempts_recorded: int
    attempts_begun: int
    spent_nanousd: int
    assumed_nanousd: int
    budgets: tuple[str, ...]
    period: str
    provider: str | None = None
    generation_id: str | None = None
    """The provider's id of the attempt begun last, and the provider's name; None where its reply had not begun."""

    @property
    def may_be_under_way(self) -> bool:
        """Whether a provider request may have been sent whose outcome is not on the ledger."""
        return self.attempts_begun > self.attempts_recorded


@dataclass(frozen=True, slots=True)
class FinishedCall:
    """The call is over: settled, with the stored result ('' if that has expired), or denied."""

    state: Literal["settled", "denied"]
    result: str
    denial: Denied | None


@dataclass(frozen=True, slots=True)
class Settled:
    """The hold is settled. `entry_id` is '' if it already was, at exactly this cost."""

    entry_id: str
    committed_nanousd: int | None


@dataclass(frozen=True, slots=True)
class AlreadySettled:
    """The hold was settled before at another cost, by the sweeper or the worker that took over."""

    cost_nanousd: int
    assumed_nanousd: int


@dataclass(frozen=True, slots=True)
class Adjusted:
    """A settled cost was corrected by `difference_nanousd`; `is_call_over` if the call has its result."""

    difference_nanousd: int
    is_call_over: bool


Released = Literal["released", "before", "changed"]
"""What became of giving back an attempt's charge: done now; done before; not done, since the hold was corrected."""


@dataclass(frozen=True, slots=True)
class Balance:
    """A budget now, in nano-dollars."""

    settled_nanousd: int
    held_nanousd: int
    cap_nanousd: int

    @property
    def remaining_nanousd(self) -> int:
        """The cap less settled spend and open holds; never below zero."""
        return max(0, self.cap_nanousd - self.settled_nanousd - self.held_nanousd)


ReserveReply = Reserved | Denied | Waiting | OpenCall | FinishedCall
