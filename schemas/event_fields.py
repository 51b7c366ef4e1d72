"""Types of fields that several ledger events share, and the base of all payloads."""

from typing import Annotated, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from tollbook.schemas.money import MAX_NANOUSD

Amount = Annotated[int, Field(strict=True, ge=0, le=MAX_NANOUSD)]
SignedAmount = Annotated[int, Field(strict=True, ge=-MAX_NANOUSD, le=MAX_NANOUSD)]
Balance = Annotated[int, Field(strict=True)]
"""A sum of amounts, in nano-dollars; it may be larger than one amount can be."""
Count = Annotated[int, Field(strict=True, ge=0)]

Basis = Literal["reported", "priced", "assumed", "released"]
"""Where a cost comes from. `reported`: by the provider. `priced`: computed from the usage that the provider reported.
`assumed`: the upper bound, since the cost is unknown (a worker died, a connection broke). `released`: nothing was
spent."""

Outcome = Literal[
    "ok", "http_error", "provider_error", "invalid_response", "timeout", "connection_error", "not_sent", "abandoned"
]
"""How an attempt ended. `ok`: with a complete reply; if the reply has no answer, `reason` says why.
`not_sent`: there was no connection, so nothing was charged. `abandoned`: the worker stopped before the reply came."""

FailureReason = Literal["http_error", "provider_error", "invalid_response", "timeout", "connection_error", "not_sent"]

KeyAttribute = Literal["user", "campaign", "tags", "plan"]
"""What a client may set for its own call, if its key allows it."""
KEY_ATTRIBUTES: Final[tuple[KeyAttribute, ...]] = get_args(KeyAttribute)


class Payload(BaseModel):
    """Base of all payloads. Unknown fields are ignored, since a later version may add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")


ContentHash = Annotated[
    str | None,
    Field(
        description="Digest of the content that the id of the call or command is bound to. "
        "Absent in events of version 1, and where the event does not begin a call."
    ),
]
PriceSource = Annotated[
    str | None,
    Field(
        description="Where the price comes from: the `policy`, the `provider` and when its list was fetched, or the "
        "`catalogue` and its version. Absent in events of earlier programs, and where nothing was priced."
    ),
]
ProviderName = Annotated[str | None, Field(description="Provider by its name in the policy; absent: the default one.")]
RecoveredId = Annotated[
    str | None, Field(description="Id of the lost event that `tollbook recover` replaced by this event.")
]


class BudgetStamp(Payload):
    """What the gate adds for each budget of a hold beside the user's billing period."""

    budget: str = Field(description="The budget: `<name>:<value>:<window>`, for example `team-week:red:2026-W48`.")
    cap_nanousd: Amount | None = Field(
        default=None, description="Its cap, nano-dollars; only in events that hold money."
    )
    committed_nanousd: Balance = Field(description="Its settled spend and open holds after the event, nano-dollars.")
