"""Translates requests of Responses into fields of a chat completion.

The gateway stores nothing between requests, so fields that refer to stored things are refused. `store` is accepted with
any value, because it is true by default; the answer says that nothing was stored. Fields that a chat completion has too
are passed on unchanged, and validated when they become a task.
"""

from collections.abc import Mapping
from typing import Any, Final

from tollbook.gateway.request_fields import Table, body_of, kind_of, list_at, refusal, refuse_fields, table_at, text_at
from tollbook.gateway.responses.content import NOTHING_KEPT
from tollbook.gateway.responses.items import messages_of
from tollbook.gateway.responses.tools import choice_of, functions_of
from tollbook.schemas.problems import shown
from tollbook.schemas.tasks import InvalidTask

OPTIONAL_FIELDS: Final = frozenset({"reasoning_effort", "verbosity", "parallel_tool_calls"})
"""Chat fields that SDKs and agents send by default: left out if the model does not support them."""
_WHOLE: Final = f"{NOTHING_KEPT}; send the whole conversation in `input`"
_REFUSED: Final = {
    "previous_response_id": _WHOLE,
    "conversation": _WHOLE,
    "background": f"{NOTHING_KEPT}, so an answer cannot be fetched later; stream it, or publish a task",
    "prompt": f"{NOTHING_KEPT}, no prompt templates either; send `instructions` and `input`",
    "moderation": "the gateway does not moderate answers",
    "service_tier": "it changes the price of a token, and the bound is computed from the standard price",
    "top_logprobs": "the gateway's answers have no log probabilities",
}
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "background": (False,),
    "service_tier": ("auto", "default", "standard"),
    "top_logprobs": (0,),
}
# These change neither the answer nor its price, or are for features that the gateway does not have: searches, things
# that OpenAI stores, groups of users. OpenAI's SDKs, Codex and other agents send them (November 2026).
_IGNORED: Final = frozenset(
    {"include", "truncation", "store", "safety_identifier", "user", "prompt_cache_options", "context_management",
     "stream_options", "max_tool_calls", "background_options", "client_metadata", "image", "access_programs"}
)  # fmt: skip
_TRANSLATED: Final = frozenset(
    {"input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "tool_choice", "parallel_tool_calls",
     "prompt_cache_key"}
)  # fmt: skip
_MAX_CACHE_KEY_CHARACTERS: Final = 64


def chat_fields(body: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """Translate a request's body into fields of a chat completion.

    `known` are items of earlier answers by id, to which the input may refer (`references.py`).
    Errors: InvalidTask, which names the field.
    """
    given = body_of(body)
    refuse_fields(given, _REFUSED, _NEUTRAL)
    if "message.output_text.logprobs" in list_at(given.get("include", []), "include"):
        raise refusal("include", f"cannot ask for log probabilities: {_REFUSED['top_logprobs']}")
    fields = {name: each for name, each in given.items() if name not in _IGNORED | _TRANSLATED | _REFUSED.keys()}
    if not given.get("stream", True):
        del fields["stream"]
    fields["messages"] = _messages(given, known or {})
    if "max_output_tokens" in given:
        fields["max_tokens"] = given["max_output_tokens"]
    return {**fields, **_tools(given), **_text(given), **_reasoning(given), **_cache_key(given)}


def _messages(given: Table, known: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    if "input" not in given:
        raise InvalidTask("'input' is missing")
    instructions = text_at(given.get("instructions", ""), "instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    messages = [*system, *messages_of(given["input"], known)]
    if not messages:
        raise InvalidTask("'input' must not be empty")
    return messages


def _tools(given: Table) -> Table:
    tools = functions_of(given)
    if not tools:
        return {}
    # Providers refuse fields about the use of tools if there are no tools.
    made: Table = {"tools": tools}
    if "parallel_tool_calls" in given:
        made["parallel_tool_calls"] = given["parallel_tool_calls"]
    if "tool_choice" in given:
        made["tool_choice"], made["tools"] = choice_of(given["tool_choice"], tools)
    return made if made["tools"] else {}


def _text(given: Table) -> Table:
    text = table_at(given.get("text", {}), "text")
    form = table_at(text.get("format", {"type": "text"}), "text.format")
    made: Table = {"verbosity": text["verbosity"]} if "verbosity" in text else {}
    match kind_of(form, "text.format"):
        case "text":
            return made
        case "json_object":
            return {**made, "response_format": {"type": "json_object"}}
        case "json_schema":
            schema = {name: form[name] for name in ("name", "description", "schema", "strict") if name in form}
            return {**made, "response_format": {"type": "json_schema", "json_schema": schema}}
        case kind:
            raise refusal("text.format", f"has the type {shown(kind)}, which cannot be translated to a chat completion")


def _reasoning(given: Table) -> Table:
    """Return the effort. `summary` is ignored: the provider decides on it, and all that it returns is passed on."""
    reasoning = table_at(given.get("reasoning", {}), "reasoning")
    if reasoning.get("mode", "standard") != "standard":
        raise refusal(
            "reasoning.mode", "cannot be set: it changes the cost of an answer, and the bound does not cover that"
        )
    return {"reasoning_effort": reasoning["effort"]} if "effort" in reasoning else {}


def _cache_key(given: Table) -> Table:
    key = given.get("prompt_cache_key")
    # The provider would refuse a longer key, and caching is optional.
    is_short = isinstance(key, str) and 0 < len(key) <= _MAX_CACHE_KEY_CHARACTERS
    return {"prompt_cache_key": key} if is_short else {}
