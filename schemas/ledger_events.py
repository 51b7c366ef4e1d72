"""Events about a whole partition of the ledger: its archive, its recovery, and its policy."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tollbook.schemas.event_fields import (
    Amount,
    Balance,
    BudgetStamp,
    Count,
    Payload,
    RecoveredId,
)


class SegmentSealed(Payload):
    """A part of the ledger was archived; `chain_after` covers every event up to `last_id`. `amount` is zero."""

    type: Literal["segment-sealed"] = "segment-sealed"
    segment: str = Field(description="Name of the segment in the archive.")
    first_id: str = Field(description="Id of its first event.")
    last_id: str = Field(description="Id of its last event.")
    events: Count = Field(description="Number of its events.")
    chain_before: str = Field(description="Head of the hash chain before it, SHA-256 in hexadecimal.")
    chain_after: str = Field(description="Head of the hash chain after it.")


class LedgerRecovered(Payload):
    """The ledger had lost events, and a person repaired it with `tollbook recover`. `amount` is zero.

    Lost events either stand on the ledger again as they were, or what they charged is entered again by new events.
    """

    type: Literal["ledger-recovered"] = "ledger-recovered"
    first_id: str = Field(description="Id of the first event that was lost.")
    last_id: str = Field(description="Id of the last known event that was lost.")
    after_id: str | None = Field(
        default=None,
        description="Id of the event before them, the last one that was not lost; `0-0` where none was left.",
    )
    events: Count = Field(description="Number of known events that were lost.")
    restored: Count = Field(default=0, description="How many of them stand on the ledger again as they were.")
    entered: Count = Field(default=0, description="How many new events enter them again, by their `recovered_id`.")
    entered_nanousd: Balance = Field(default=0, description="Cost that these events enter again, nano-dollars.")
    lost_holds: Count = Field(default=0, description="Number of open holds that are lost for good.")
    lost_held_nanousd: Balance = Field(default=0, description="What they held, nano-dollars.")
    author: str = Field(description="Person who recovered the ledger.")
    reason: str = Field(description="Why.")


class PolicyApplied(Payload):
    """A policy is in force from here on, in this partition; every partition has the same versions. `amount` is zero.

    A ledger without such an event is at version 0: the default policy.
    """

    type: Literal["policy-applied"] = "policy-applied"
    version: Annotated[int, Field(strict=True, ge=1)] = Field(description="Number of the policy, from 1.")
    digest: str = Field(description="SHA-256 of the content, in hexadecimal; equal policies have equal digests.")
    content: dict[str, Any] = Field(
        description="The policy, in the shape of the policy file; amounts in dollars, as text."
    )
    definitions: dict[str, Count] = Field(
        default={},
        description="Budgets that were added or redefined after version 1, each with the version that did so: their "
        "balances began at zero there.",
    )
    backfilled: tuple[str, ...] = Field(
        default=(),
        description="Budgets that begin with what was spent before in their window: `budget-opened` events follow in "
        "the same step.",
    )
    takes_holds: bool = Field(
        default=False,
        description="Whether holds that are open at this moment count in the budgets in `backfilled` too, from here "
        "on. Absent in events of earlier programs.",
    )
    author: str = Field(description="Person or process that applied it.")
    reason: str = Field(description="Why.")
    recovered_id: RecoveredId = None


class OpenedHold(Payload):
    """A hold that was open when a policy opened a budget, and counts in that budget too from then on."""

    call_id: str = Field(description="Its call.")
    hold: Count = Field(description="Number of the hold within the call.")
    amount_nanousd: Amount = Field(description="What it held then, its extensions included, nano-dollars.")


class BudgetOpened(Payload):
    """A budget that a policy adds or changes begins with what was spent before, in the step that applies the policy.

    `amount` is what was settled in the budget's window until then. It is not new spend: it counts in this budget alone.
    Open holds count in the budget from here on.
    """

    type: Literal["budget-opened"] = "budget-opened"
    policy_version: Annotated[int, Field(strict=True, ge=1)] = Field(description="The policy that defines the budget.")
    hold_nanousd: Balance = Field(
        default=0,
        ge=0,
        description="What `holds` held together, nano-dollars. Absent: nothing, as in earlier events.",
    )
    holds: tuple[OpenedHold, ...] = Field(
        default=(), description="Holds that were open: they are extended, settled and corrected in this budget too."
    )
    budgets: tuple[BudgetStamp, ...] = Field(description="The budget, with its cap by the policy.")
