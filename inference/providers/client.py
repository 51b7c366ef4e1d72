"""The provider's client: completions, and questions about generations, models and the key.

One call of `complete` is one HTTP request, which may cost money; its caller accounts for it (G3). It raises nothing for
what the provider or the network did: the Attempt says how the request ended.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

import httpx
import structlog
from pydantic import SecretStr

from tollbook.inference.attempts import Attempt, ChatRequest, EmbeddingsRequest
from tollbook.inference.errors import ProviderRefused, ProviderUnavailable
from tollbook.inference.models import ModelFacts, facts_of
from tollbook.inference.providers.bodies import read_json
from tollbook.inference.providers.replies import generation_id_of, read_reply
from tollbook.inference.providers.request_bodies import completion_body, embeddings_body
from tollbook.inference.providers.transport import Connection, Exchange
from tollbook.inference.providers.usage_report import read_cost
from tollbook.schemas.money import MoneyError, format_usd

if TYPE_CHECKING:
    from tollbook.inference.settings import Settings

__all__ = ["OPENROUTER_URL", "Attempt", "ChatRequest", "ProviderClient"]

OPENROUTER_URL: Final = "https://openrouter.ai/api/v1"

_log = structlog.get_logger(__name__)


class ProviderClient:
    """Asks OpenRouter, or another OpenAI-compatible server, for completions.

    Clocks are parameters: `monotonic` measures latency, `now_s` is the time of day.
    """

    def __init__(
        self,
        *,
        api_key: SecretStr | None = None,
        base_url: str = OPENROUTER_URL,
        is_openrouter: bool = True,
        is_openai: bool = False,
        attempt_timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        max_connections: int = 1024,
        app_title: str = "Tollbook",
        app_url: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """Prepare a client; it connects at its first request. Use it as an async context manager, or close it."""
        self._connection = Connection(
            base_url=base_url,
            api_key=api_key,
            app_title=app_title,
            app_url=app_url,
            timeout_s=attempt_timeout_s,
            connect_timeout_s=connect_timeout_s,
            max_connections=max_connections,
            transport=transport,
        )
        self._completions_url = self._connection.url("chat/completions")
        self._embeddings_url = self._connection.url("embeddings")
        self._is_openrouter = is_openrouter
        self._is_openai = is_openai
        self._monotonic = monotonic
        self._now_s = now_s

    @classmethod
    def from_settings(cls, settings: "Settings", *, concurrent_calls: int = 0) -> Self:
        """Make the client that the settings describe, for so many calls at a time."""
        return cls(
            api_key=settings.openrouter_api_key,
            base_url=settings.openrouter_base_url,
            is_openrouter=settings.is_openrouter,
            is_openai=settings.is_openai,
            attempt_timeout_s=settings.attempt_timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
            # Callers limit their concurrency; a wait for a connection would look like a provider that is unreachable.
            max_connections=max(2 * concurrent_calls, 1024),
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

    async def complete(self, request: ChatRequest) -> Attempt:
        """Send one completion request and return how it ended.

        Errors: none of the network's or the provider's; asyncio.CancelledError passes through, and the request
            may then have been charged.
        """
        body = completion_body(request, is_openrouter=self._is_openrouter, is_openai=self._is_openai)
        return await self._post(self._completions_url, body, request)

    async def embed(self, request: EmbeddingsRequest) -> Attempt:
        """Send one request for vectors and return how it ended. Errors: as `complete`."""
        body = embeddings_body(request, is_openrouter=self._is_openrouter)
        return await self._post(self._embeddings_url, body, request)

    async def _post(self, url: httpx.URL, body: bytes, request: ChatRequest | EmbeddingsRequest) -> Attempt:
        started = self._monotonic()
        exchange = await self._connection.exchange("POST", url, body)
        attempt = self._attempt(exchange, request, round(1000 * (self._monotonic() - started)))
        if attempt.usage_doubt is not None:
            _log.warning("provider.usage_doubted", model=request.model, problem=attempt.usage_doubt)
        if attempt.reason is not None:
            _log_failure(request.model, attempt)
        return attempt

    async def generation(self, generation_id: str) -> int | None:
        """Return what a generation cost in nano-dollars; None where OpenRouter does not know it (yet).

        Errors: ProviderUnavailable; ProviderRefused.
        """
        try:
            data = await self._data("generation", id=generation_id)
        except ProviderRefused as exc:
            if exc.http_status == 404:
                return None
            raise
        try:
            return read_cost(_table(data).get("total_cost"))
        except MoneyError as exc:
            raise ProviderUnavailable(f"the cost of generation {generation_id} is no amount of money") from exc

    async def models(self) -> dict[str, ModelFacts]:
        """Return the models that the provider offers, by id. Errors: ProviderUnavailable; ProviderRefused."""
        data = await self._data("models")
        if not isinstance(data, list):
            raise ProviderUnavailable("the list of models cannot be read")
        listed = [_table(model) for model in [*cast(list[Any], data), *await self._embeddings_models()]]
        return {model["id"]: facts_of(model) for model in listed if isinstance(model.get("id"), str)}

    async def _embeddings_models(self) -> list[Any]:
        """Return what OpenRouter lists apart: the models that make embeddings. Errors: ProviderUnavailable."""
        if not self._is_openrouter:
            return []
        try:
            data = await self._data("embeddings/models")
        except ProviderRefused:
            return []  # A stand-in for OpenRouter may have none.
        return cast(list[Any], data) if isinstance(data, list) else []

    async def check_key(self) -> str:
        """Return one line about the key, or about the server if it is not OpenRouter.

        Errors: ProviderUnavailable; ProviderRefused (the key is wrong).
        """
        if not self._is_openrouter:
            return f"{self._connection.base_url} answers and offers {len(await self.models())} models"
        data = await self._data("key")
        try:
            remaining = read_cost(_table(data).get("limit_remaining"))
        except MoneyError:
            return "the key is valid, but its limit is used up"
        return (
            "the key is valid" if remaining is None else f"the key is valid, {format_usd(remaining)} left of its limit"
        )

    def _attempt(self, exchange: Exchange, request: ChatRequest | EmbeddingsRequest, latency_ms: int) -> Attempt:
        status, fault = exchange.status, exchange.fault
        # Of a reply that broke, an error status says more than how it broke.
        if status is not None and (fault is None or not 200 <= status < 300):
            return read_reply(
                status,
                exchange.headers,
                exchange.body,
                model=request.model,
                is_openrouter=self._is_openrouter,
                latency_ms=latency_ms,
                now_s=self._now_s(),
                max_tokens=request.max_tokens if isinstance(request, ChatRequest) else None,
                inputs=len(request.inputs) if isinstance(request, EmbeddingsRequest) else None,
            )
        assert fault is not None, "an exchange has a status or a fault"
        return Attempt(
            outcome=fault.outcome,
            charge=fault.charge,
            error=fault.error,
            reason=fault.reason,
            latency_ms=latency_ms,
            http_status=status,
            generation_id=generation_id_of(exchange.headers),
            is_retryable=fault.is_retryable,
            may_fall_back=fault.may_fall_back,
        )

    async def _data(self, path: str, **parameters: str) -> Any:
        """Return the `data` of a reply. Errors: ProviderUnavailable; ProviderRefused. Nothing is charged."""
        url = self._connection.url(path, **parameters)
        exchange = await self._connection.exchange("GET", url)
        where = f"{self._connection.base_url}/{path}"
        if exchange.status is None or exchange.fault is not None:
            raise ProviderUnavailable(f"{where}: {exchange.fault.error if exchange.fault else 'no reply'}")
        if exchange.status >= 500 or exchange.status in (408, 429):
            raise ProviderUnavailable(f"{where}: HTTP {exchange.status}")
        if not 200 <= exchange.status < 300:
            raise ProviderRefused(f"{where}: HTTP {exchange.status}", http_status=exchange.status)
        try:
            document = read_json(exchange.body)
        except ValueError as exc:
            raise ProviderUnavailable(f"{where}: the reply is not JSON") from exc
        return _table(document).get("data")


def _log_failure(model: str, attempt: Attempt) -> None:
    """Say why a request has no answer, in words that hold nothing of the prompt (G10)."""
    details = attempt.error_details.model_dump(exclude_none=True) if attempt.error_details else {}
    _log.warning(
        "provider.request_failed",
        model=model,
        reason=attempt.reason,
        outcome=attempt.outcome,
        http_status=attempt.http_status,
        finish_reason=attempt.finish_reason,
        generation_id=attempt.generation_id,
        error=attempt.error,
        **{name if name == "provider" else f"provider_{name}": word for name, word in details.items()},
    )


def _table(value: object) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
