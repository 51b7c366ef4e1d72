"""The stand-in's APIs, one for each dialect, each under its own path; all share one book.

`/api/v1` behaves like OpenRouter. `/openai/v1` and `/anthropic/v1` sell models under these providers' own names, and
their replies have no cost. `/compatible/v1` behaves like a self-hosted server.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

from aiohttp import web

from tollbook.standin.event_streams import Cut, as_events
from tollbook.standin.message_events import as_message_events
from tollbook.standin.messages import message, message_error, read_message_request, scenario_message
from tollbook.standin.prices import ANTHROPIC_PRICES, COMPATIBLE_PRICES, OPENAI_PRICES, PRICES, ListPrice
from tollbook.standin.replies import BadRequest, CompletionRequest, completion, error, read_request
from tollbook.standin.scenarios import Scenario, Tokens

# Fields that OpenAI's own API refuses.
_NOT_AT_OPENAI: Final = ("max_tokens", "top_k", "reasoning", "cache_control", "provider", "transforms")
_OF_MESSAGES_AT_OPENAI: Final = frozenset(
    {"role", "content", "name", "refusal", "audio", "tool_calls", "tool_call_id", "function_call"}
)


@dataclass(frozen=True, slots=True)
class Api:
    """One API. `id_header` has a request's id; `states_costs`: replies have costs, and `/generation` returns them."""

    prefix: str
    id_header: str
    prices: Mapping[str, ListPrice]
    read_request: Callable[[Any], CompletionRequest]
    completion: Callable[[CompletionRequest, str, int, str | None], bytes]
    scenario_body: Callable[[Scenario, Tokens, str, str], bytes]
    error: Callable[..., bytes]
    events: Callable[[bytes, Cut], list[bytes] | None] = as_events
    error_event: Callable[[bytes], bytes] = b"data: %s\n\n".__mod__
    states_costs: bool = False
    completion_path: str = "chat/completions"
    key_header: str = "Authorization"
    key_scheme: str = "Bearer "

    def has_key(self, request: web.Request, api_key: str) -> bool:
        """Whether a request has the key."""
        return request.headers.get(self.key_header) == f"{self.key_scheme}{api_key}"

    def models(self) -> dict[str, Any]:
        """Return the list of models, without the fields that only OpenRouter has."""
        return {"object": "list", "data": [{"id": model, "display_name": "A stand-in"} for model in self.prices]}


def _read_openai(document: Any) -> CompletionRequest:
    for name in _NOT_AT_OPENAI if isinstance(document, dict) else ():
        if name in document:
            raise BadRequest(400, f"Unsupported parameter: '{name}' is not supported with this model.")
    asked = read_request(document, OPENAI_PRICES)
    messages = cast("dict[str, list[dict[str, Any]]]", document)["messages"]
    for number, said in enumerate(messages):
        for name in said:
            if name not in _OF_MESSAGES_AT_OPENAI:
                raise BadRequest(400, f"Unknown parameter: 'messages[{number}].{name}'.")
    return asked


def _costless(asked: CompletionRequest, generation_id: str, charged_nanousd: int, fault: str | None) -> bytes:
    return completion(asked, generation_id, charged_nanousd, fault or "missing_cost")


def _openai_scenario(scenario: Scenario, tokens: Tokens, generation_id: str, text: str) -> bytes:
    return scenario.body(tokens, generation_id, text)


def _chat(prefix: str, prices: Mapping[str, ListPrice], **changes: Any) -> Api:
    values: dict[str, Any] = {
        "id_header": "X-Request-Id", "read_request": partial(read_request, models=prices), "completion": _costless,
        "scenario_body": _openai_scenario, "error": error, **changes,
    }  # fmt: skip
    return Api(prefix, prices=prices, **values)


_OPENROUTER: Final[dict[str, Any]] = {"id_header": "X-Generation-Id", "completion": completion, "states_costs": True}
APIS: Final = (
    _chat("/api/v1", PRICES, **_OPENROUTER),
    _chat("/openrouter/v1", PRICES, **_OPENROUTER),
    _chat("/openai/v1", OPENAI_PRICES, read_request=_read_openai),
    _chat("/compatible/v1", COMPATIBLE_PRICES),
    Api(
        "/anthropic/v1",
        "request-id",
        ANTHROPIC_PRICES,
        read_request=partial(read_message_request, models=ANTHROPIC_PRICES),
        completion=message,
        scenario_body=scenario_message,
        error=message_error,
        events=as_message_events,
        error_event=b"event: error\ndata: %s\n\n".__mod__,
        completion_path="messages",
        key_header="x-api-key",
        key_scheme="",
    ),
)
"""Every API; the first is that of `base_url`."""
