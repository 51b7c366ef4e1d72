"""Requests of Anthropic's Messages as fields of a chat completion.

Fields that a chat completion has too are passed on as they are, and judged where a task is made of them.
"""

from collections.abc import Mapping
from typing import Any, Final

from tollbook.gateway.messages.blocks import NOTHING_KEPT, mark_of
from tollbook.gateway.messages.conversation import messages_of
from tollbook.gateway.messages.tools import tool_fields
from tollbook.gateway.request_fields import Table, body_of, list_at, refusal, refuse_set, table_at, word_at
from tollbook.schemas.tasks import InvalidTask

DISPENSABLE: Final = frozenset({"reasoning", "parallel_tool_calls"})
"""Chat fields that SDKs and agents send unasked: may be left out where the model does not support them."""

_REFUSED: Final = {
    "service_tier": "it changes the price of a token, and the bound is computed from the standard price",
    "speed": "it changes the price of a token, and the bound is computed from the standard price",
    "inference_geo": "it changes the price of a token, and the bound is computed from the standard price",
    "container": f"{NOTHING_KEPT}, no containers either",
    "mcp_servers": "tools that the provider runs have no bound",
}
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "inference_geo": ("global",),
    "mcp_servers": ([],),
}
# They change neither the answer nor its price, or are for what is not here. Claude Code and Anthropic's SDKs send them
# (November 2026). The name of a user in `metadata` is for Anthropic: who is charged is the key's to say.
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
    """Return the body of a request as fields of a chat completion. Errors: InvalidTask, which names the field."""
    given = body_of(body)
    if "max_tokens" not in given:
        raise InvalidTask("'max_tokens' is missing")
    return _fields(given)


def countable_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same of a request to count tokens, which has no `max_tokens`. Errors: InvalidTask."""
    return _fields(body_of(body))


def _fields(given: Table) -> Table:
    refuse_set(given, _REFUSED, _NEUTRAL)
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
    """Return how much the model may think: as many tokens, with as much effort, or as it likes."""
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
