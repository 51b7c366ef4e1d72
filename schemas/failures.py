"""Reasons why attempts fail, the same for every provider: for the ledger, metrics and `tollbook doctor`."""

from typing import Final

from pydantic import BaseModel, ConfigDict, Field

FAILURES: Final[dict[str, str]] = {
    "output_limit": "The limit of completion tokens was used up before an answer.",
    "content_filtered": "The provider's filter blocked the prompt or the answer.",
    "empty_answer": "The reply has neither text nor a tool call nor a refusal.",
    "unreadable": "The reply cannot be parsed.",
    "context_too_long": "The prompt is longer than the model's context.",
    "unsupported_parameter": "The model does not support a parameter of the request.",
    "bad_request": "The provider refused the request as wrong.",
    "bad_key": "The key is missing, wrong or revoked.",
    "out_of_credit": "The provider's account or key has no credit left.",
    "forbidden": "The key may not use the model, or the region is refused.",
    "not_found": "The provider does not offer the model.",
    "rate_limited": "Too many requests or tokens in a short time.",
    "overloaded": "The provider has no capacity at the moment.",
    "provider_failed": "The provider, or a proxy before it, failed.",
    "timed_out": "No complete reply came in time.",
    "connection_lost": "The connection broke before the reply was complete.",
    "no_connection": "There was no connection, so nothing was sent.",
}
"""Every reason that the event `model-called` can have, and what it means."""


class ErrorDetails(BaseModel):
    """The codes in a provider's error. The error's text has no field here, since it may quote the prompt (G10)."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: str | None = Field(default=None, description="The provider's code: a word or a number.")
    type: str | None = Field(default=None, description="The provider's type of error.")
    param: str | None = Field(default=None, description="The parameter of the request that is at fault.")
    limit_source: str | None = Field(default=None, description="Whose limit was reached, as OpenRouter names it.")
    provider: str | None = Field(default=None, description="The provider behind a router.")
