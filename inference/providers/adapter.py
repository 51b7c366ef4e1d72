"""What Tollbook needs of a provider's API: one interface, which each dialect has a module for.

An adapter is pure: it makes requests and reads replies, and sends nothing itself. The client beside it
sends. All must pass `tests/contract/test_provider_adapters.py`; CONTRIBUTING.md says how to add one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import SecretStr

from tollbook.inference.attempts import Attempt, ChatRequest, EmbeddingsRequest
from tollbook.inference.models import ModelFacts
from tollbook.inference.providers.replies import Reply
from tollbook.schemas.policy import Dialect


@dataclass(frozen=True, slots=True)
class Question:
    """A GET request that costs nothing: a path under the base URL, and its parameters."""

    path: str
    parameters: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Application:
    """What a provider may be told of the application, for its rankings."""

    title: str = "Tollbook"
    url: str | None = None


class Adapter(Protocol):
    """How to speak to providers of one dialect."""

    @property
    def dialect(self) -> Dialect:
        """Its name in the policy."""
        ...

    @property
    def completion_path(self) -> str:
        """Where a completion is asked for, under the base URL."""
        ...

    def headers(self, api_key: SecretStr | None, application: Application) -> dict[str, str]:
        """Return the headers of every request, the key among them."""
        ...

    def completion_body(self, request: ChatRequest, *, is_streamed: bool = False) -> bytes:
        """Return the body that asks for a completion. It must limit what is billed as the bound assumes (G1).

        `is_streamed`: the reply is asked for as an event stream, with its usage.
        """
        ...

    def embeddings_request(self, request: EmbeddingsRequest) -> tuple[str, bytes] | None:
        """Return where vectors are asked for, under the base URL, and the body; None where the dialect has none."""
        ...

    def read_reply(self, reply: Reply, request: ChatRequest | EmbeddingsRequest) -> Attempt:
        """Read a reply: the answer or the vectors that were asked for, usage and cost; or what went wrong.

        Whatever stands in it, it returns an Attempt, whose `charge` says what is known of the cost (G3).
        """
        ...

    def id_of(self, headers: Mapping[str, str]) -> str | None:
        """Return the provider's id of a request, which is known before the body; None where it sends none."""
        ...

    def early_id(self, headers: Mapping[str, str], stream_id: object) -> str | None:
        """Return the id for `cost_question`, from the headers, or from what an event stream calls its completion.

        None while neither has come.
        """
        ...

    def cost_question(self, generation_id: str) -> Question | None:
        """Return how to ask what a generation cost; None where the provider does not tell."""
        ...

    def read_cost(self, document: object) -> int | None:
        """Read the answer to `cost_question`: nano-dollars, or None. Errors: MoneyError."""
        ...

    @property
    def models_questions(self) -> tuple[Question, ...]:
        """How to ask for the models; a server may lack all lists but the first."""
        ...

    def read_models(self, document: object) -> dict[str, ModelFacts]:
        """Read the answer to each of `models_questions`: what is offered, by id. Errors: ValueError."""
        ...

    @property
    def key_question(self) -> Question:
        """How to find out whether the key is good; a wrong one is answered with a status that says so."""
        ...

    def read_key(self, document: object) -> str:
        """Read the answer to `key_question`: a line about the key. Errors: ValueError."""
        ...
