"""Translates requests of Anthropic's Messages into fields of a chat completion.

Fields that a chat completion has too are passed on unchanged, and validated when they become a task.
"""

from collections.abc import Mapping
from typing import Any, Final

from tollbook.gateway.messages.blocks import NOTHING_KEPT, mark_of
from tollbook.gateway.messages.conversation import messages_of
from tollbook.gateway.messages.tools import tool_fields
from tollbook.gateway.request_fields import Table, body_of, list_at, refusal, refuse_fields, table_at, word_at
from tollbook.schemas.tasks import InvalidTask

OPTIONAL_FIELDS: Final = frozenset({"reasoning", "parallel_tool_calls"})
"""Chat fields that SDKs and agents send by default: left out if the model does not support them."""

_REFUSED: Final = {
    "service_tier": "it changes the price of a token, and the bound is computed from the standard price",
    "speed": "it changes the price of a token, and the bound is computed from the standard price",
    "inference_geo": "it changes the price of a token, and the bound is computed from the standard price",
    "container": f"{NOTHING_KEPT}, no containers either",
    "mcp_servers": "the cost of tools that the provider runs has no upper bound",
}
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "inference_geo": ("global",),
    "mcp_servers": ([],),
}
# These change neither the answer nor its price, or are for features that the gateway does not have. Claude Code and
# Anthropic's SDKs send them (November 2026). The user in `metadata` is for Anthropic: the key decides who is charged.
_IGNORED: Final = frozenset(
    {"metadata", "betas", "anthropic_beta", "anthropic_version", "context_management", "diagnostics",
     "user_profile_id", "workspace_id", "fallbacks"}
)  # fmt: skip
_TRANSLATED: Final = frozenset(
    {"messages", "system", "stop_sequences", "thinking", "output_config", "output_format", "tools", "tool_choice",
     "cache_control"}
)  # fmt: skip
_SCHEMA_NAME: Final = "answer"
_THINKING: Final = ("enabled", "adaptive", "between_tools", "disabled")


def chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a request's body into fields of a chat completion. Errors: InvalidTask, which names the field."""
    given = body_of(body)
    if "max_tokens" not in given:
        raise InvalidTask("'max_tokens' is missing")
    return _fields(given)


def countable_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a request to count tokens, which has no `max_tokens`. Errors: InvalidTask."""
    return _fields(body_of(body))


def _fields(given: Table) -> Table:
    refuse_fields(given, _REFUSED, _NEUTRAL)
    if "messages" not in given:
        raise InvalidTask("'messages' is missing")
    fields = {name: each for name, each in given.items() if name not in _IGNORED | _TRANSLATED | _REFUSED.keys()}
    if not given.get("stream", True):
        del fields["stream"]
    if fields.get("temperature") == 1:
        # Anthropic's default, which Claude Code sends; many models refuse any temperature.
        del fields["temperature"]
    fields["messages"] = messages_of(given.get("system"), given["messages"])
    if given.get("stop_sequences"):
        fields["stop"] = list_at(given["stop_sequences"], "stop_sequences")
    output = table_at(given.get("output_config", {}), "output_config")
    form = output.get("format", given.get("output_format"))
    return {**fields, **mark_of(given), **tool_fields(given), **_response_format(form), **_reasoning(given, output)}


def _response_format(form: object) -> Table:
    if form is None:
        return {}
    table = table_at(form, "output_config.format")
    word_at(table.get("type"), "output_config.format.type", ("json_schema",))
    schema = table_at(table.get("schema"), "output_config.format.schema")
    named = {"name": _SCHEMA_NAME, "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _reasoning(given: Table, output: Table) -> Table:
    """Return how much the model may think: a number of tokens, an effort, or without a limit."""
    thinking = table_at(given.get("thinking", {}), "thinking")
    kind = word_at(thinking["type"], "thinking.type", _THINKING) if "type" in thinking else None
    if kind == "disabled":
        return {"reasoning": {"enabled": False}}
    if "budget_tokens" in thinking:
        budget = thinking["budget_tokens"]
        if type(budget) is not int:
            raise refusal("thinking.budget_tokens", "must be a whole number")
        return {"reasoning": {"max_tokens": budget}}
    if "effort" in output:
        return {"reasoning": {"effort": output["effort"]}}
    return {} if kind is None else {"reasoning": {"enabled": True}}
