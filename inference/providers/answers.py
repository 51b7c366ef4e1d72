"""What a model has answered: text, tool calls, a refusal, reasoning, and why it stopped."""

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, cast

from tollbook.inference.providers.json_values import as_list, as_table, storable, tables_of

LENGTH: Final = "length"
CONTENT_FILTER: Final = "content_filter"

_FINISH_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
# Other providers' words for OpenAI's (November 2026).
_FINISH_WORDS: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "model_length", "token_limit",
         "model_context_window_exceeded", "max_length"), LENGTH,
    ),
    **dict.fromkeys(
        ("content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii",
         "image_safety", "language", "guardrail_intervened", "refusal", "sensitive", "error_toxic", "moderation"),
        CONTENT_FILTER,
    ),
    **dict.fromkeys(("stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed"), "stop"),
    **dict.fromkeys(("tool_calls", "tool_use", "tool_call"), "tool_calls"),
}  # fmt: skip
_MAX_DEPTH: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a choice says; None where it says no such thing. `has_choice`: whether the reply has a choice at all."""

    has_choice: bool = False
    content: str | None = None
    images: tuple[str, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    refusal: str | None = None
    reasoning: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def is_answer(self) -> bool:
        """Whether there is text, an image, a tool call or a refusal. White space is no text."""
        return bool((self.content and self.content.strip()) or self.images or self.tool_calls or self.refusal)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was generated, as far as the reply shows."""
        return not (self.content or self.images or self.tool_calls or self.refusal or self.reasoning)


def read_answer(document: dict[str, Any]) -> Answer:
    """Read the choices of a completion: the first with an answer, else the first."""
    choices = [_choice(each) for each in as_list(document.get("choices")) or _other_form(document)]
    found = next((each for each in choices if each.is_answer), choices[0] if choices else Answer())
    if not found.is_answer and found.finish_reason is None and _is_prompt_blocked(document):
        return Answer(has_choice=True, finish_reason=CONTENT_FILTER)
    return found


def _other_form(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the answer of another API as a choice: OpenAI's responses, Anthropic's messages, Ollama's chat.

    Servers that speak several of them were seen to answer in the wrong one (November 2026).
    """
    if isinstance(document.get("output"), list):
        why = as_table(document.get("incomplete_details")).get("reason")
        return [{"message": {"content": document["output"]}, "finish_reason": why or document.get("status")}]
    if document.get("type") == "message" and "content" in document:
        return [{"message": {"content": document["content"]}, "finish_reason": document.get("stop_reason")}]
    if isinstance(document.get("message"), dict):
        return [{"message": document["message"], "finish_reason": document.get("done_reason")}]
    return []


def finish_word(value: object) -> str | None:
    """Return why a model stopped, in OpenAI's words where there is one; None where nothing is said.

    Gemini's OpenAI-compatible server appends its own word: `content_filter: RECITATION` (November 2026).
    """
    if not isinstance(value, str):
        return None
    match = _FINISH_WORD.match(value)
    if match is None or value[match.end() : match.end() + 1] not in ("", ":"):
        return None
    word = match[0]
    return _FINISH_WORDS.get(word.lower(), word)


def _choice(value: object) -> Answer:
    choice = as_table(value)
    message = choice.get("message") or choice.get("delta")
    if not isinstance(message, dict):
        text = choice.get("text")
        message = {"content": text} if isinstance(text, str) else None
    finish = finish_of(choice)
    if message is None:
        return Answer(has_choice=finish is not None, finish_reason=finish)
    parts = Parts()
    table = cast(dict[str, Any], message)
    parts.add(table.get("content"))
    for name in ("reasoning", "reasoning_content"):
        if not parts.reasoning:
            parts.add_reasoning(table.get(name))
    if not parts.reasoning:
        parts.add_reasoning(table.get("reasoning_details"))
    parts.add_refusal(table.get("refusal"))
    return Answer(
        has_choice=True,
        content=storable("".join(parts.texts)) or None,
        images=_images(table.get("images")),
        tool_calls=(*_tool_calls(table), *parts.tool_calls),
        refusal=storable("".join(parts.refusals)) or None,
        reasoning=storable("".join(parts.reasoning)) or None,
        finish_reason=finish,
        logprobs=cast("dict[str, Any]", plain(as_table(choice.get("logprobs")))) or None,
    )


def _images(value: object) -> tuple[str, ...]:
    """Return the URLs of images in OpenRouter's form: `[{"image_url": {"url": "data:..."}}]`."""
    urls = (as_table(each.get("image_url")).get("url") or each.get("image_url") for each in tables_of(value))
    return tuple(storable(url) for url in urls if isinstance(url, str) and url)


class Parts:
    """Gathers the parts of a message's content: texts, refusals, reasoning and tool calls."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.refusals: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []

    def add(self, content: object) -> None:
        """Take a content: a text, a part, or a list of them."""
        if isinstance(content, str):
            self.texts.append(content)
        elif isinstance(content, list):
            for part in cast(list[object], content):
                self.add(part)
        elif isinstance(content, dict):
            self._add_part(cast(dict[str, Any], content))

    def add_reasoning(self, value: object) -> None:
        """Take reasoning, in whatever form."""
        if value:
            self.reasoning += texts_in(value)

    def add_refusal(self, value: object) -> None:
        """Take a refusal, in whatever form."""
        if value:
            self.refusals += texts_in(value)

    def _add_part(self, part: dict[str, Any]) -> None:
        kind = part.get("type")
        if kind == "message":
            self.add(part.get("content"))
        elif kind == "function_call":
            function = {"name": part.get("name"), "arguments": part.get("arguments")}
            self.tool_calls += _tool_calls({"tool_calls": [{"id": part.get("call_id"), "function": function}]})
        elif kind == "refusal":
            self.add_refusal(part.get("refusal"))
        elif isinstance(kind, str) and kind.startswith(("thinking", "reasoning")):
            self.add_reasoning([part.get(name) for name in ("thinking", "reasoning", "text", "summary")])
        elif kind == "tool_use":
            function = {"name": part.get("name"), "arguments": part.get("input")}
            self.tool_calls += _tool_calls({"tool_calls": [{"id": part.get("id"), "function": function}]})
        else:
            self.texts += texts_in(part.get("text"))


def texts_in(value: object, depth: int = 0) -> list[str]:
    """Return the texts in a value: a string, an object with a text, or a list of them."""
    if isinstance(value, str):
        return [value]
    if depth > _MAX_DEPTH:
        return []
    if isinstance(value, list):
        return [text for each in cast(list[object], value) for text in texts_in(each, depth + 1)]
    table = as_table(value)
    inner = next((table[name] for name in ("text", "value", "summary", "thinking") if table.get(name)), None)
    return texts_in(inner, depth + 1) if inner is not None else []


def _tool_calls(message: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return tool calls in OpenAI's form, the arguments as JSON text; extra members are kept."""
    listed = message.get("tool_calls")
    calls = tables_of(listed)
    function = as_table(message.get("function_call"))
    if not calls and function.get("name"):
        calls = [{"function": function}]
    return tuple(_tool_call(call) for call in calls)


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    cleaned = {storable(name): plain(value) for name, value in call.items() if name != "index"}
    cleaned.setdefault("type", "function")
    function = cleaned.get("function")
    if isinstance(function, dict):
        arguments = cast(dict[str, Any], function).get("arguments")
        if not isinstance(arguments, str):
            function["arguments"] = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return cleaned


def plain(value: object, depth: int = 0) -> Any:
    """Return JSON values that can be stored: no Decimals, no half characters, nothing that is nested without end."""
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        return int(value) if value == value.to_integral_value() and abs(value) < 10**18 else float(value)
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {storable(name): plain(each, depth + 1) for name, each in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [plain(each, depth + 1) for each in cast(list[object], value)]
    return value


def finish_of(choice: dict[str, Any]) -> str | None:
    """Return why a choice ended, in OpenAI's words where there is one; None where it does not say."""
    word = finish_word(choice.get("finish_reason"))
    native = finish_word(choice.get("native_finish_reason"))
    # A router may call everything `stop`, while the provider's own word says that the reply was cut.
    return native if native in (LENGTH, CONTENT_FILTER) and word in (None, "stop") else word or native


def _is_prompt_blocked(document: dict[str, Any]) -> bool:
    """Whether Gemini's form says that the prompt was held back."""
    for name in ("promptFeedback", "prompt_feedback"):
        feedback = as_table(document.get(name))
        if feedback.get("blockReason") or feedback.get("block_reason"):
            return True
    return False
