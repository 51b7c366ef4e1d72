"""The interface to a provider's API. Each dialect implements it in a module of its own.

An adapter is pure: it makes requests and reads replies, and sends nothing; the client sends. Every adapter must pass
`tests/contract/test_provider_adapters.py`; CONTRIBUTING.md says how to add one.
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
    """A free GET request: a path under the base URL, and its parameters."""

    path: str
    parameters: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Application:
    """Facts about the application that are sent to a provider for its rankings."""

    title: str = "Tollbook"
    url: str | None = None


class Adapter(Protocol):
    """Makes requests and reads replies in one dialect."""

    @property
    def dialect(self) -> Dialect:
        """The dialect's name in the policy."""
        ...

    @property
    def completion_path(self) -> str:
        """The path for completions, under the base URL."""
        ...

    def headers(self, api_key: SecretStr | None, application: Application) -> dict[str, str]:
        """Return the headers of every request, including the key."""
        ...

    def completion_body(self, request: ChatRequest, *, is_streamed: bool = False) -> bytes:
        """Return the body of a request for a completion. It must limit what is billed as the bound assumes (G1).

        `is_streamed`: the reply is requested as an event stream, with its usage.
        """
        ...

    def embeddings_request(self, request: EmbeddingsRequest) -> tuple[str, bytes] | None:
        """Return the path for embeddings, under the base URL, and the body; None if the dialect has no embeddings."""
        ...

    def read_reply(self, reply: Reply, request: ChatRequest | EmbeddingsRequest) -> Attempt:
        """Read a reply: the answer or the embeddings, usage and cost; or what went wrong.

        For any reply, return an Attempt, whose `charge` says what is known of the cost (G3).
        """
        ...

    def id_of(self, headers: Mapping[str, str]) -> str | None:
        """Return the provider's id of a request from the headers, before the body is read; None if there is none."""
        ...

    def early_id(self, headers: Mapping[str, str], stream_id: object) -> str | None:
        """Return the id for `cost_question`, from the headers or the id in an event stream; None if not yet known."""
        ...

    def cost_question(self, generation_id: str) -> Question | None:
        """Return the request for the cost of a generation; None if the provider has no such request."""
        ...

    def read_cost(self, document: object) -> int | None:
        """Read the answer to `cost_question`: nano-dollars, or None if unknown. Errors: MoneyError."""
        ...

    @property
    def models_questions(self) -> tuple[Question, ...]:
        """The requests for lists of models; a server may not have any but the first."""
        ...

    def read_models(self, document: object) -> dict[str, ModelFacts]:
        """Read the answer to one of `models_questions`: the models by id. Errors: ValueError."""
        ...

    @property
    def key_question(self) -> Question:
        """The request that checks the key; for a wrong key, the provider answers with an error status."""
        ...

    def read_key(self, document: object) -> str:
        """Return a line about the key from the answer to `key_question`. Errors: ValueError."""
        ...
