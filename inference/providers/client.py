"""The client of a provider: completions, embeddings, and free requests for costs, models and the key.

One call of `complete` is one HTTP request, which may cost money; the caller books it (G3). Failures of the provider or
the network raise nothing: the Attempt says how the request ended.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import httpx
import structlog
from pydantic import SecretStr

from tollbook.inference.attempts import Attempt, ChatRequest, EmbeddingsRequest
from tollbook.inference.deltas import OnDelta
from tollbook.inference.errors import ProviderRefused, ProviderUnavailable
from tollbook.inference.models import ModelFacts
from tollbook.inference.provider_access import access_of
from tollbook.inference.providers.adapter import Application, Question
from tollbook.inference.providers.answers import read_answer
from tollbook.inference.providers.bodies import read_json
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.inference.providers.receiver import Receiver
from tollbook.inference.providers.replies import Reply, answer_fields
from tollbook.inference.providers.transport import Connection, Exchange
from tollbook.schemas.money import MoneyError
from tollbook.schemas.policy import Dialect, default_policy
from tollbook.schemas.routes import DEFAULT_PROVIDER

if TYPE_CHECKING:
    from tollbook.inference.provider_access import ProviderAccess
    from tollbook.inference.settings import Settings

__all__ = ["OPENROUTER_URL", "Attempt", "ChatRequest", "ProviderClient"]

OPENROUTER_URL: Final = "https://openrouter.ai/api/v1"

_log = structlog.get_logger(__name__)


class ProviderClient:
    """Sends requests to one provider in its dialect.

    Clocks are parameters: `monotonic` measures latency, `now_s` is the time of day.
    """

    def __init__(
        self,
        *,
        api_key: SecretStr | None = None,
        base_url: str = OPENROUTER_URL,
        dialect: Dialect = "openrouter",
        name: str = DEFAULT_PROVIDER,
        asks_for_costs: bool = True,
        streams_replies: bool = False,
        attempt_timeout_s: float = 60.0,
        idle_timeout_s: float | None = None,
        connect_timeout_s: float = 10.0,
        app_title: str = "Tollbook",
        app_url: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """Prepare a client; it connects at its first request. Use it as an async context manager, or close it.

        `name` is the provider's name in the policy, for log lines. Without `asks_for_costs`, `generation` returns None.
        With `streams_replies`, replies are requested as event streams; `idle_timeout_s` is how long the next byte of a
        stream may take.
        """
        self._name = name
        self._adapter = ADAPTERS[dialect]
        self._asks_for_costs = asks_for_costs
        self._streams_replies = streams_replies
        self._connection = Connection(
            base_url=base_url,
            headers=self._adapter.headers(api_key, Application(app_title, app_url)),
            timeout_s=attempt_timeout_s,
            idle_timeout_s=idle_timeout_s,
            connect_timeout_s=connect_timeout_s,
            transport=transport,
        )
        self._completions_url = self._connection.url(self._adapter.completion_path)
        self._monotonic = monotonic
        self._now_s = now_s

    @classmethod
    def from_settings(cls, settings: "Settings") -> Self:
        """Make the client of the default provider."""
        access = access_of(DEFAULT_PROVIDER, default_policy(), settings)
        return cls.from_access(access, settings)

    @classmethod
    def from_access(cls, access: "ProviderAccess", settings: "Settings") -> Self:
        """Make the client of a provider, with the limits of the settings."""
        return cls(
            api_key=access.api_key,
            base_url=access.base_url,
            dialect=access.dialect,
            name=access.name,
            asks_for_costs=access.asks_for_costs,
            streams_replies=access.streams_replies,
            attempt_timeout_s=settings.attempt_timeout_s,
            idle_timeout_s=settings.idle_timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
            app_title=settings.app_title,
            app_url=settings.app_url,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the pooled connections."""
        await self._connection.aclose()

    def __repr__(self) -> str:
        return f"ProviderClient(base_url={self._connection.base_url!r})"

    async def complete(
        self,
        request: ChatRequest,
        on_id: Callable[[str], None] | None = None,
        on_delta: OnDelta | None = None,
    ) -> Attempt:
        """Send one completion request and return how it ended.

        `on_id` is called once with the id for `generation`, as soon as it is known. With `on_delta`, the reply is
        requested as an event stream, and its deltas are passed on as they come. Errors are not passed on. If the reply
        is not a stream after all, there are no deltas, and the Attempt has the answer.
        Errors: ReaderFailed if `on_delta` fails; asyncio.CancelledError. After both, the request may have been charged.
            Failures of the network or the provider are no errors here.
        """
        is_streamed = self._streams_replies or on_delta is not None
        body = self._adapter.completion_body(request, is_streamed=is_streamed)
        find_id = self._adapter.early_id if on_id is not None and self.can_be_asked else None
        receiver = Receiver(find_id=find_id, on_id=on_id, on_delta=on_delta)
        return await self._post(self._completions_url, body, request, receiver, is_streamed=is_streamed)

    async def embed(self, request: EmbeddingsRequest) -> Attempt:
        """Send one request for embeddings and return how it ended. Errors: as `complete`."""
        path_and_body = self._adapter.embeddings_request(request)
        assert path_and_body is not None, "no money is reserved for embeddings at a provider without them"
        path, body = path_and_body
        return await self._post(self._connection.url(path), body, request)

    async def _post(
        self,
        url: httpx.URL,
        body: bytes,
        request: ChatRequest | EmbeddingsRequest,
        receiver: Receiver | None = None,
        *,
        is_streamed: bool = False,
    ) -> Attempt:
        started = self._monotonic()
        exchange = await self._connection.exchange("POST", url, body, receiver=receiver, is_streamed=is_streamed)
        attempt = self._attempt(exchange, request, round(1000 * (self._monotonic() - started)))
        if attempt.usage_doubt is not None:
            _log.warning("provider.usage_doubted", asked=self._name, model=request.model, problem=attempt.usage_doubt)
        if attempt.reason is not None:
            _log_failure(self._name, request.model, attempt)
        return attempt

    async def generation(self, generation_id: str) -> int | None:
        """Return what a generation cost, in nano-dollars; None if the provider does not say, or not yet.

        Errors: ProviderUnavailable; ProviderRefused.
        """
        question = self._adapter.cost_question(generation_id) if self._asks_for_costs else None
        if question is None:
            return None
        try:
            document = await self._ask(question)
        except ProviderRefused as exc:
            if exc.http_status == 404:
                return None
            raise
        try:
            return self._adapter.read_cost(document)
        except MoneyError as exc:
            raise ProviderUnavailable(f"the cost of generation {generation_id} is no amount of money") from exc

    @property
    def can_be_asked(self) -> bool:
        """Whether the provider can be asked afterwards what a request has cost."""
        return self._asks_for_costs and self._adapter.cost_question("") is not None

    async def models(self) -> dict[str, ModelFacts]:
        """Return the models that the provider offers, by id. Errors: ProviderUnavailable; ProviderRefused."""
        questions = self._adapter.models_questions
        found = self._listed(await self._ask(questions[0]))
        for question in questions[1:]:
            try:
                found |= self._listed(await self._ask(question))
            except ProviderRefused:
                continue  # A compatible server may not have the further lists.
        return found

    def _listed(self, document: object) -> dict[str, ModelFacts]:
        try:
            return self._adapter.read_models(document)
        except ValueError as exc:
            raise ProviderUnavailable(str(exc)) from exc

    async def check_key(self) -> str:
        """Return one line about the key, or about the server if it says nothing about the key.

        Errors: ProviderUnavailable; ProviderRefused (the key is wrong).
        """
        document = await self._ask(self._adapter.key_question)
        try:
            return self._adapter.read_key(document)
        except ValueError as exc:
            raise ProviderUnavailable(str(exc)) from exc

    def _attempt(self, exchange: Exchange, request: ChatRequest | EmbeddingsRequest, latency_ms: int) -> Attempt:
        status, fault, body = exchange.status, exchange.fault, exchange.body
        # If a reply broke off, an error status, or a stream that had already ended its answer, is worth more than the
        # fault.
        if status is not None and (fault is None or not 200 <= status < 300 or body.is_decided):
            reply = Reply.of_body(status, exchange.headers, body, latency_ms=latency_ms, now_s=self._now_s())
            return self._adapter.read_reply(reply, request)
        assert fault is not None, "an exchange has a status or a fault"
        return Attempt(
            outcome=fault.outcome,
            charge=fault.charge,
            error=fault.error,
            reason=fault.reason,
            latency_ms=latency_ms,
            http_status=status,
            generation_id=self._id_of(exchange),
            is_retryable=fault.is_retryable,
            may_fall_back=fault.may_fall_back,
            **answer_fields(read_answer(body.document or {})),
        )

    def _id_of(self, exchange: Exchange) -> str | None:
        return self._adapter.early_id(exchange.headers, exchange.body.id) or self._adapter.id_of(exchange.headers)

    async def _ask(self, question: Question) -> Any:
        """Return the answer to a free request. Errors: ProviderUnavailable; ProviderRefused."""
        url = self._connection.url(question.path, **question.parameters)
        exchange = await self._connection.exchange("GET", url)
        where = f"{self._connection.base_url}/{question.path}"
        if exchange.status is None or exchange.fault is not None:
            raise ProviderUnavailable(f"{where}: {exchange.fault.error if exchange.fault else 'no reply'}")
        if exchange.status >= 500 or exchange.status in (408, 429):
            raise ProviderUnavailable(f"{where}: HTTP {exchange.status}")
        if not 200 <= exchange.status < 300:
            raise ProviderRefused(f"{where}: HTTP {exchange.status}", http_status=exchange.status)
        try:
            return read_json(exchange.body.raw)
        except ValueError as exc:
            raise ProviderUnavailable(f"{where}: the reply is not JSON") from exc


def _log_failure(asked: str, model: str, attempt: Attempt) -> None:
    """Log why a request has no answer, without any text of the prompt (G10)."""
    details = attempt.error_details.model_dump(exclude_none=True) if attempt.error_details else {}
    _log.warning(
        "provider.request_failed",
        asked=asked,
        model=model,
        reason=attempt.reason,
        outcome=attempt.outcome,
        http_status=attempt.http_status,
        finish_reason=attempt.finish_reason,
        generation_id=attempt.generation_id,
        error=attempt.error,
        **{name if name == "provider" else f"provider_{name}": word for name, word in details.items()},
    )
