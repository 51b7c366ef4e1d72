"""Reading a model's answer: text, images, tool calls, a refusal, reasoning, and why the model stopped."""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final, cast

from tollbook.inference.providers.json_values import (
    MAX_DEPTH,
    as_list,
    as_table,
    one_or_more,
    plain,
    storable,
)
from tollbook.inference.providers.other_forms import choices_of
from tollbook.inference.providers.reasoning_details import details_in, redacted_detail, thinking_detail
from tollbook.inference.providers.tool_call_parts import in_openai_form
from tollbook.schemas.reasoning_details import Detail

LENGTH: Final = "length"
CONTENT_FILTER: Final = "content_filter"

_FINISH_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_ENUM: Final = re.compile(r"^(finish_?reason|stop_?reason|reason)[._](?=.)")
"""Prefixes of enumeration names: `FinishReason.MAX_TOKENS`, `FINISH_REASON_STOP`, `REASON_MAX_LEN`."""
_PART_FIELDS: Final = frozenset({"type", "text", "parts", "content"})
# OpenAI's finish reason for each other provider's (November 2026).
_FINISH_WORDS: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("length", "max_tokens", "max_output_tokens", "max_completion_tokens", "max_new_tokens", "model_length",
         "token_limit", "model_context_window_exceeded", "context_length_exceeded", "max_length", "max_len",
         "length_limit", "error_limit", "limit"), LENGTH,
    ),
    **dict.fromkeys(
        ("content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii",
         "image_safety", "image_prohibited_content", "image_recitation", "language", "guardrail_intervened",
         "refusal", "sensitive", "error_toxic", "moderation", "model_armor", "blocked"),
        CONTENT_FILTER,
    ),
    **dict.fromkeys(("stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed"), "stop"),
    **dict.fromkeys(("tool_calls", "tool_use", "tool_call"), "tool_calls"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The content of a choice; a missing part is None. `has_choice`: whether the reply has a choice at all."""

    has_choice: bool = False
    content: str | None = None
    images: tuple[str, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_details: tuple[Detail, ...] = field(default=(), repr=False)  # G10
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def is_answer(self) -> bool:
        """Whether there is text, an image, a tool call or a refusal. White space does not count as text."""
        return bool((self.content and self.content.strip()) or self.images or self.tool_calls or self.refusal)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was generated, as far as the reply shows."""
        output = self.content or self.images or self.tool_calls or self.refusal
        return not (output or self.reasoning or self.reasoning_details)


def read_answer(document: dict[str, Any]) -> Answer:
    """Read the answer of a completion: its first choice with an answer, else its first choice."""
    choices = [_choice(each) for each in choices_of(document)]
    found = next((each for each in choices if each.is_answer), choices[0] if choices else Answer())
    if not found.is_answer and found.finish_reason is None and _is_prompt_blocked(document):
        return Answer(has_choice=True, finish_reason=CONTENT_FILTER)
    return found


def finish_word(value: object) -> str | None:
    """Return why a model stopped: OpenAI's finish reason if there is one, else the provider's word; None if missing.

    Gemini's OpenAI-compatible server appends its own word: `content_filter: RECITATION` (November 2026).
    """
    if not isinstance(value, str):
        return None
    value = value.strip()
    match = _FINISH_WORD.match(value)
    if match is None or value[match.end() : match.end() + 1] not in ("", ":"):
        return None
    word = match[0]
    return _FINISH_WORDS.get(_ENUM.sub("", word.lower()).replace("-", "_"), word)


def _choice(value: object) -> Answer:
    choice = as_table(value)
    message = choice.get("message") or choice.get("delta")
    if not isinstance(message, dict):
        given: tuple[object, ...] = (message, choice.get("text"), choice.get("content"))
        found = next((each for each in given if isinstance(each, str) or as_list(each)), None)
        message = {"content": found} if found is not None else None
    finish = finish_of(choice)
    if message is None:
        return Answer(has_choice=finish is not None, finish_reason=finish)
    parts = Parts()
    table = cast(dict[str, Any], message)
    parts.add(table.get("content"))
    parts.add_object(table.get("content"))
    for name in ("reasoning", "reasoning_content", "thinking"):
        if not parts.reasoning:
            parts.add_reasoning(table.get(name))
    if not parts.reasoning:
        parts.add_reasoning(table.get("reasoning_details"))
    parts.add_refusal(table.get("refusal"))
    return Answer(
        has_choice=True,
        content=storable("".join(parts.texts)) or None,
        images=(*_images(table.get("images")), *_images(parts.images)),
        tool_calls=(*_tool_calls(table), *parts.tool_calls),
        refusal=storable("".join(parts.refusals)) or None,
        reasoning=storable("".join(parts.reasoning)) or None,
        reasoning_details=details_in(table.get("reasoning_details") or parts.details),
        finish_reason=finish,
        logprobs=cast("dict[str, Any]", plain(as_table(choice.get("logprobs")))) or None,
    )


def _images(value: object) -> tuple[str, ...]:
    """Return the URLs of images in OpenRouter's form: `[{"image_url": {"url": "data:..."}}]`."""
    urls = (_image_url(each) for each in as_list(value))
    return tuple(storable(url) for url in urls if isinstance(url, str) and url)


def _image_url(value: object) -> object:
    image = as_table(value)
    if data := image.get("b64_json"):
        return f"data:image/png;base64,{data}"
    return as_table(image.get("image_url")).get("url") or image.get("image_url") or image.get("url") or value


class Parts:
    """Collects the parts of a message's content: texts, images, refusals, reasoning with its details, tool calls."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.refusals: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.details: list[Detail] = []
        self.images: list[dict[str, Any]] = []
        self._depth = 0

    def add(self, content: object) -> None:
        """Add a content: a text, a part, or a list of these. Content that is nested too deep is ignored."""
        self._depth += 1
        if isinstance(content, str):
            self.texts.append(content)
        elif isinstance(content, list) and self._depth <= MAX_DEPTH:
            for part in cast(list[object], content):
                self.add(part)
        elif isinstance(content, dict) and self._depth <= MAX_DEPTH:
            self._add_part(cast(dict[str, Any], content))
        self._depth -= 1

    def add_object(self, content: object) -> None:
        """Add a content as text if it is no message part but the requested JSON object itself."""
        found = self.texts or self.refusals or self.reasoning or self.tool_calls or self.details or self.images
        if isinstance(content, dict) and content and not found and not content.keys() & _PART_FIELDS:
            self.texts.append(json.dumps(plain(cast("dict[str, Any]", content)), ensure_ascii=False))

    def add_reasoning(self, value: object) -> None:
        """Add reasoning in any form."""
        if value:
            self.reasoning += texts_in(value)

    def add_refusal(self, value: object) -> None:
        """Add a refusal in any form."""
        if value:
            self.refusals += texts_in(value)

    def _add_part(self, part: dict[str, Any]) -> None:
        kind = part.get("type")
        if kind == "message":
            self.add(part.get("content"))
        elif kind == "function_call":
            self._add_call(part.get("call_id"), part.get("name"), part.get("arguments"))
        elif kind == "custom_tool_call":
            custom = {"name": part.get("name"), "input": part.get("input")}
            self.tool_calls.append(plain({"id": part.get("call_id"), "type": "custom", "custom": custom}))
        elif kind == "refusal":
            self.add_refusal(part.get("refusal"))
        elif isinstance(kind, str) and kind.startswith(("thinking", "reasoning")):
            self.add_reasoning([part.get(name) for name in ("thinking", "reasoning", "text", "summary")])
            if "signature" in part:
                self.details.append(thinking_detail(len(self.details), part))
        elif kind == "redacted_thinking":
            self.details.append(redacted_detail(len(self.details), part))
        elif kind == "tool_use":
            self._add_call(part.get("id"), part.get("name"), part.get("input"))
        elif kind in ("image_url", "output_image", "image"):
            self.images.append(part)
        elif kind is None and self._add_untyped(part):
            pass
        else:
            text = texts_in(part.get("text"))
            self.texts += text or (texts_in(part.get("content")) if kind in (None, "text", "output_text") else [])

    def _add_untyped(self, part: dict[str, Any]) -> bool:
        """Add a part in the form of Gemini's API or Bedrock's Converse, which has no type; return False for others."""
        if isinstance(part.get("parts"), list):
            self.add(part["parts"])
        elif part.get("thought") is True:
            self.add_reasoning(part.get("text"))
        elif isinstance(part.get("reasoningContent"), dict):
            self.add_reasoning(part["reasoningContent"].get("reasoningText"))
        elif call := as_table(part.get("functionCall")):
            self._add_call(call.get("id"), call.get("name"), call.get("args"))
        elif call := as_table(part.get("toolUse")):
            self._add_call(call.get("toolUseId"), call.get("name"), call.get("input"))
        elif data := as_table(part.get("inlineData")):
            self.images.append({"image_url": {"url": f"data:{data.get('mimeType')};base64,{data.get('data')}"}})
        else:
            return False
        return True

    def _add_call(self, call_id: object, name: object, arguments: object) -> None:
        function = {"name": name, "arguments": arguments}
        self.tool_calls += _tool_calls({"tool_calls": [{"id": call_id, "function": function}]})


def texts_in(value: object, depth: int = 0) -> list[str]:
    """Return the texts in a value: a string, an object with a text, or a list of them."""
    if isinstance(value, str):
        return [value]
    if depth > MAX_DEPTH:
        return []
    if isinstance(value, list):
        return [text for each in cast(list[object], value) for text in texts_in(each, depth + 1)]
    table = as_table(value)
    inner = next((table[name] for name in ("text", "value", "summary", "thinking") if table.get(name)), None)
    return texts_in(inner, depth + 1) if inner is not None else []


def _tool_calls(message: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return tool calls in OpenAI's form, with the arguments as JSON text; extra fields are kept."""
    calls = one_or_more(message.get("tool_calls"))
    function = as_table(message.get("function_call"))
    if not calls and function.get("name"):
        calls = [{"function": function}]
    return tuple(_tool_call(call) for call in calls)


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    call = in_openai_form(call)
    cleaned = {storable(name): plain(value) for name, value in call.items() if name != "index"}
    if not isinstance(cleaned.get("type"), str):
        cleaned["type"] = "custom" if isinstance(cleaned.get("custom"), dict) else "function"
    function = cleaned.get("function")
    if isinstance(function, dict):
        arguments = cast(dict[str, Any], function).get("arguments")
        if not isinstance(arguments, str) or not arguments.strip():
            arguments = None if isinstance(arguments, str) else arguments
            function["arguments"] = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return cleaned


def finish_of(choice: dict[str, Any]) -> str | None:
    """Return why a choice ended, as `finish_word`; None if it does not say."""
    word = finish_word(choice.get("finish_reason"))
    native = finish_word(choice.get("native_finish_reason"))
    # A router may always say `stop`, while the provider's own word says that the reply was cut off.
    return native if native in (LENGTH, CONTENT_FILTER) and word in (None, "stop") else word or native


def _is_prompt_blocked(document: dict[str, Any]) -> bool:
    """Whether a reply in Gemini's form says that the prompt was blocked."""
    for name in ("promptFeedback", "prompt_feedback"):
        feedback = as_table(document.get(name))
        if feedback.get("blockReason") or feedback.get("block_reason"):
            return True
    return False
