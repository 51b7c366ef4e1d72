"""Converting the events of OpenAI's responses (November 2026) to chunks of a chat completion.

The texts come in deltas. The last event has the whole response; it adds what no delta had: tool calls, the usage, and
why the response ended.
"""

from typing import Any, Final

from tollbook.inference.providers.json_values import as_table
from tollbook.inference.providers.other_forms import choices_of

_KIND: Final = "response."
_DELTAS: Final = {
    "response.output_text.delta": "content",
    "response.refusal.delta": "refusal",
    "response.reasoning_text.delta": "reasoning",
    "response.reasoning_summary_text.delta": "reasoning",
}
_LAST: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "response.done"})


def response_chunk(event: Any) -> Any:
    """Return an event as a chunk; an event that is not of a response is returned unchanged."""
    table = as_table(event)
    kind = table.get("type")
    if not isinstance(kind, str) or not kind.startswith(_KIND):
        return event
    if kind in _DELTAS:
        delta = {_DELTAS[kind]: table.get("delta")}
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    response = as_table(table.get("response"))
    fields = {name: value for name, value in response.items() if name not in ("output", "status", "incomplete_details")}
    return {**fields, "choices": choices_of(response)} if kind in _LAST else {"id": response.get("id")}
