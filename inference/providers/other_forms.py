"""Converting answers in the form of another API to the choices of a completion.

Servers with several APIs were seen to answer in the form of the wrong one, and gateways to put the reply into their own
envelope (November 2026). An answer that was paid for must not be lost because of its form (G4).
"""

from typing import Any, Final

from tollbook.inference.providers.json_values import as_list, as_table, tables_of

_ENVELOPES: Final = ("data", "result", "response", "body")
_TEXTS: Final = ("response", "generated_text", "output_text", "completion", "text")
"""The answer as one text: Ollama's and Hugging Face's generate, Anthropic's and Cohere's older forms."""
OF_ANSWERS: Final = frozenset({"choices", "candidates", "output", *_TEXTS})
"""Fields of a reply that have an answer or a part of it, and nothing else."""
_REASONS: Final = ("finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason")
_SIGNS: Final = (*_REASONS, "done", "usage", "details")
"""Fields that show that such a text is an answer: without one of them, it may be anything."""


def choices_of(document: dict[str, Any]) -> list[object]:
    """Return the choices of a reply, or of a chunk of an event stream, in any form."""
    choices = document.get("choices")
    if table := as_table(choices):
        return [table] if "message" in table or "delta" in table else list(table.values())
    return as_list(choices) or list(_other_form(document))


def unwrapped(document: dict[str, Any]) -> dict[str, Any]:
    """Return the reply inside a gateway's envelope, with the envelope's id, model, usage and error.

    Any other document is returned unchanged.
    """
    if choices_of(document):
        return document
    for name in _ENVELOPES:
        inner = as_table(document.get(name))
        if choices_of(inner):
            around = {name: value for name, value in document.items() if name in ("id", "model", "usage", "error")}
            return {**around, **inner}
    return document


def _other_form(document: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(document.get("candidates"), list):  # Gemini.
        return [_choice(each.get("content"), each) for each in tables_of(document["candidates"])]
    output = document.get("output")
    if isinstance(output, list):  # OpenAI's responses.
        why = as_table(document.get("incomplete_details")).get("reason")
        return [{"message": {"content": output}, "finish_reason": why or document.get("status")}]
    if inner := as_table(output):  # Bedrock's Converse, DashScope.
        return tables_of(inner.get("choices")) or _other_form({**document, **inner, "output": None})
    if document.get("type") == "message" and "content" in document:  # Anthropic's messages.
        return [_choice(document["content"], document)]
    if isinstance(document.get("message"), dict):  # Ollama's and Cohere's chat.
        return [{"message": document["message"], "finish_reason": _reason(document)}]
    for name in _TEXTS:
        if document.get(name) and isinstance(document[name], str) and any(sign in document for sign in _SIGNS):
            return [_choice(document[name], document)]
    return []


def _choice(content: object, document: dict[str, Any]) -> dict[str, Any]:
    return {"message": {"content": content}, "finish_reason": _reason(document)}


def _reason(document: dict[str, Any]) -> object:
    return next((document[name] for name in _REASONS if document.get(name)), None)
