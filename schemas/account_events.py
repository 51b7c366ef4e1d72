"""Events about users, budgets and keys: plans, credits, alerts, and keys of the HTTP gateway."""

from typing import Literal

from pydantic import Field

from tollbook.schemas.event_fields import (
    Amount,
    Balance,
    ContentHash,
    Count,
    KeyAttribute,
    Payload,
    RecoveredId,
)


class PlanAssigned(Payload):
    """A person or an application sets a user's plan or cap. It overrides the plan of tasks. `amount` is zero."""

    type: Literal["plan-assigned"] = "plan-assigned"
    plan: str = Field(description="The plan.")
    cap_nanousd: Amount = Field(description="The user's cap from here on, nano-dollars.")
    author: str = Field(description="Person or application that set it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class PlanCleared(Payload):
    """The plan and cap that were set for a user no longer apply; the plan of tasks does again. `amount` is zero."""

    type: Literal["plan-cleared"] = "plan-cleared"
    author: str = Field(description="Person or application that cleared it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class CreditPayload(Payload):
    """Credit of a user's billing period; or, if `budget` is set, of a balance that is never reset."""

    budget: str | None = Field(
        default=None, description="The budget that has the credit; absent for a user's billing period."
    )
    credit: str | None = Field(default=None, description="Id of the credit, if it is a budget's.")
    expires_ms: Count | None = Field(
        default=None, description="When the credit expires, milliseconds since the epoch; absent: never."
    )
    cap_nanousd: Amount | None = Field(
        default=None, description="The budget's cap without credit at this event, nano-dollars."
    )
    settled_nanousd: Balance | None = Field(
        default=None, description="The budget's settled spend at this event, nano-dollars."
    )
    held_nanousd: Balance | None = Field(
        default=None, description="The budget's open holds at this event, nano-dollars."
    )


class CreditGranted(CreditPayload):
    """A user may spend more than the cap in one billing period, or a budget's cap rises. `amount` is the credit."""

    type: Literal["credit-granted"] = "credit-granted"
    author: str = Field(description="Person or application that granted it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class CreditRevoked(CreditPayload):
    """Credit of one billing period or of a budget is taken back. `amount` is the credit, below zero."""

    type: Literal["credit-revoked"] = "credit-revoked"
    grant: str | None = Field(
        default=None, description="Id of the `credit-granted` event that is taken back; absent for any credit."
    )
    author: str = Field(description="Person or application that took it back.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class CreditExpired(CreditPayload):
    """A budget's credit has expired. `amount` is what was left of it, below zero; zero if nothing was left.

    Spend uses up the credit that expires first. The part that open holds may need stays available to them.
    """

    type: Literal["credit-expired"] = "credit-expired"
    content_hash: ContentHash = None


class AlertRaised(Payload):
    """Settled spend has reached a fraction of a budget's cap. The first refusal raises the alert for the whole cap too.

    Appended in the step that moved the money, once for each fraction of a budget, whose window is part of its name.
    `amount` is zero.
    """

    type: Literal["alert-raised"] = "alert-raised"
    kind: Literal["budget"] = Field(description="What the alert is about.")
    budget: str = Field(description="The budget: `<name>:<value>:<window>`.")
    window: str = Field(description="The budget's window, for example `2026-W48`.")
    fraction: str = Field(description="The fraction of the cap, for example `0.8`.")
    cap_nanousd: Amount = Field(description="The budget's cap then, credits included, nano-dollars.")
    settled_nanousd: Balance = Field(description="The budget's settled spend then, nano-dollars.")
    cause: str = Field(description="The call whose cost or refusal raised it.")


class KeyCreated(Payload):
    """A key for the HTTP gateway exists from here on. `amount` is zero.

    The event is in partition 0, whichever user the key has. The key itself is shown to its creator and stored nowhere.
    """

    type: Literal["key-created"] = "key-created"
    key_id: str = Field(description="Public name of the key: `key-` and 12 hexadecimal digits.")
    hash: str = Field(description="SHA-256 of the key, in hexadecimal.")
    name: str | None = Field(default=None, description="What people call it.")
    user_id: str | None = Field(default=None, description="User whose budgets its calls count in.")
    plan: str | None = Field(default=None, description="Plan that its calls name.")
    campaign_id: str | None = Field(default=None, description="Campaign of its calls.")
    tags: dict[str, str] | None = Field(default=None, description="Tags of its calls.")
    models: tuple[str, ...] = Field(
        default=(), description="Models and task types that it may call; absent: whatever the gateway offers."
    )
    streams: tuple[str, ...] = Field(
        default=(), description="Task streams that its calls may name; the first is the default."
    )
    allows: tuple[KeyAttribute, ...] = Field(
        default=(), description="Attributes of a call that the client may give in place of the key's."
    )
    is_admin: bool = Field(
        default=False, description="Whether it may see everything, and change keys, credit and plans."
    )
    expires_ms: Count | None = Field(
        default=None, description="When it expires, milliseconds since the epoch; absent: never."
    )
    replaces: str | None = Field(default=None, description="Id of the key that it was created to replace.")
    author: str = Field(description="Person or application that created it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None


class KeyRevoked(Payload):
    """A key is no longer accepted from `at_ms` on. `amount` is zero.

    A later event of the same key can only set an earlier time.
    """

    type: Literal["key-revoked"] = "key-revoked"
    key_id: str = Field(description="Public name of the key.")
    at_ms: Count = Field(
        default=0, description="From when, milliseconds since the epoch, by the clock of Redis; the gate sets it."
    )
    author: str = Field(description="Person or application that revoked it.")
    reason: str = Field(description="Why.")
    content_hash: ContentHash = None
    recovered_id: RecoveredId = None
