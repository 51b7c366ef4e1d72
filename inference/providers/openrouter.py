"""OpenRouter: chat completions with rules for its choice of endpoints, and for the cost of a reply with an error."""

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

from tollbook.inference.attempts import ChatRequest, EmbeddingsRequest
from tollbook.inference.bounds import Bound
from tollbook.inference.providers.adapter import Application, Question
from tollbook.inference.providers.compatible import ChatCompletions, with_arguments
from tollbook.inference.providers.json_values import as_table
from tollbook.inference.providers.usage_report import read_cost
from tollbook.schemas.messages import FilePart, Message
from tollbook.schemas.money import MoneyError, format_usd, usd_from_nanousd
from tollbook.schemas.policy import Dialect


class OpenRouter(ChatCompletions):
    """The dialect `openrouter`. A reply that ends in an error is free ("zero completion insurance", 2026)."""

    dialect: Dialect = "openrouter"
    # Models that make embeddings have their own list.
    models_questions = (Question("models"), Question("embeddings/models"))
    key_question = Question("key")
    _is_insured = True

    def headers(self, api_key: SecretStr | None, application: Application) -> dict[str, str]:
        """Return the headers of every request, with the application's name and address for the rankings."""
        address = {"HTTP-Referer": application.url} if application.url else {}
        return {**super().headers(api_key, application), "X-OpenRouter-Title": application.title, **address}

    def read_key(self, document: object) -> str:
        """Return how much is left of the key's limit."""
        try:
            remaining = read_cost(as_table(as_table(document).get("data")).get("limit_remaining"))
        except MoneyError:
            return "the key is valid, but its limit is used up"
        left = "" if remaining is None else f", {format_usd(remaining)} left of its limit"
        return f"the key is valid{left}"

    def _message(self, message: Message) -> dict[str, Any]:
        return with_arguments(message.as_json())

    def _preferences(self, request: ChatRequest) -> Mapping[str, Any]:
        # The cap needs endpoints that obey max_tokens and cost no more than the bound assumes. Without these
        # preferences, OpenRouter tries more expensive endpoints when a cheap one fails (November 2026).
        preferences: dict[str, Any] = {"require_parameters": True}  # G1
        if request.price_limit is not None:
            preferences["max_price"] = _max_price(request.price_limit)
        return {"provider": preferences, **_reading_of_files(request)}

    def _embeddings_preferences(self, request: EmbeddingsRequest) -> Mapping[str, Any]:
        if request.price_limit is None:
            return {}
        return {"provider": {"max_price": _max_price(request.price_limit)}}  # G1


def _reading_of_files(request: ChatRequest) -> dict[str, Any]:
    """Request that files go to the model unchanged, unless the hold covers the cost of reading them.

    For a model that takes no files, OpenRouter's parser would read them. Some of its engines cost two dollars per
    thousand pages, and `max_price` does not limit that (November 2026).
    """
    parts = (part for message in request.messages for part in message.media_parts)
    is_covered = request.price_limit is not None and request.price_limit.covers_reading_files
    if is_covered or not any(isinstance(part, FilePart) for part in parts):
        return {}
    return {"plugins": [{"id": "file-parser", "pdf": {"engine": "native"}}]}  # G1


def _max_price(bound: Bound) -> dict[str, str]:
    """Return the limits in dollars per million tokens, per request and per image, as exact strings."""
    limits = {
        "prompt": bound.endpoint_nanousd_per_mtok,
        "completion": bound.completion_nanousd_per_mtok,
        "request": bound.request_nanousd,
        **({"image": bound.image_nanousd} if bound.image_nanousd else {}),
    }
    return {name: f"{usd_from_nanousd(limit):f}" for name, limit in limits.items()}
