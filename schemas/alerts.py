"""Alerts: messages to people, in the form that receivers get. They hold no prompt, completion or key (G10)."""

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer

AlertKind = Literal["budget", "projector-behind", "dead-letters", "assumed-spend", "price-unknown", "test"]
"""What happened. `budget`: settled spend has reached a fraction of a cap. The others are about the system itself."""

_DecimalText = Annotated[Decimal, PlainSerializer("{:f}".format, return_type=str, when_used="json")]


class Alert(BaseModel):
    """One alert. In JSON, amounts and fractions are strings, since a JSON number is a float to most readers."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    id: str
    """Id of the alert; a repeated delivery has the same id. For a budget's alert: the id of its event on the ledger."""
    kind: AlertKind
    """What happened."""
    text: str
    """What happened, in words."""
    at_ms: int = Field(ge=0)
    """When it was raised, milliseconds since the epoch."""
    budget: str | None = None
    """Name of the budget, as in the policy."""
    value: str | None = None
    """Whose balance it is: a user, a team, or several attributes' values."""
    window: str | None = None
    """The budget's window, such as 2026-W48."""
    fraction: _DecimalText | None = None
    """The fraction of the cap that settled spend has reached."""
    cap_usd: _DecimalText | None = None
    """The cap, dollars."""
    settled_usd: _DecimalText | None = None
    """Settled spend, dollars."""

    @property
    def subject(self) -> str:
        """What the alert is about: alerts about one subject are delivered in their order."""
        return f"{self.kind}:{self.budget or ''}:{self.value or ''}"
