"""Joining the chunks of a completion, as they come, to the object that a reply without streaming would have been.

Invariant: the deltas that are passed on (`Delta`), joined, equal the object's content, reasoning with its details,
refusal and tool calls. So each chunk is first converted to one form, whatever names its server uses. Of other fields
than these and the usage, the last value is kept.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

from tollbook.inference.deltas import Delta
from tollbook.inference.providers.answers import Parts, finish_of, texts_in
from tollbook.inference.providers.event_streams import DONE
from tollbook.inference.providers.json_values import as_list, as_table, one_or_more, plain, says_error, tables_of
from tollbook.inference.providers.other_forms import OF_ANSWERS, choices_of, unwrapped
from tollbook.inference.providers.reasoning_details import DetailParts
from tollbook.inference.providers.tool_call_parts import TextParts, ToolCallParts
from tollbook.inference.providers.usage_parts import USAGE_NAMES, UsageParts

_REASONING: Final = ("reasoning", "reasoning_content", "reasoning_details", "thinking")
_OF_MESSAGE: Final = ("delta", "message", "text", "content", "logprobs")
_TEXTS: Final = ("content", "reasoning", "refusal")


class JoinedChunks:
    """Joins the chunks of one reply."""

    def __init__(self) -> None:
        self.has_error = False
        self.is_done = False
        self._fields: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}
        self._answering: int | None = None
        self._is_finish_passed = False
        self._usages = {name: UsageParts() for name in USAGE_NAMES}
        self._has_usage = False
        self._is_usage_last = False

    def add(self, event: object) -> Delta | None:
        """Add an event's data; return the delta to pass on. After the first error, nothing is passed on."""
        if event == DONE:
            self.is_done = True
            return None
        chunk = unwrapped(as_table(event))
        for name, value in chunk.items():
            if name in USAGE_NAMES and isinstance(value, dict):
                self._fields[name] = self._usages[name].add(cast("dict[str, Any]", value))
            elif name not in OF_ANSWERS and value is not None and (name != "error" or says_error(value)):
                self._fields[name] = value
        choices = tables_of(choices_of(chunk))
        # OpenAI's last chunk before the end has the first usage and no choice.
        is_first_usage = bool(chunk.get("usage")) and not self._has_usage
        self._is_usage_last = bool(self._choices) and not choices and (is_first_usage or self._is_usage_last)
        self._has_usage = self._has_usage or is_first_usage
        if says_error(chunk.get("error")) or (not choices and "error" in (chunk.get("object"), chunk.get("type"))):
            self._fail(chunk.get("error") or chunk)
        delta: Delta | None = None
        for place, choice in enumerate(choices):
            delta = self._add_choice(place, choice) or delta
        return None if self.has_error else delta

    def end(self) -> Delta | None:
        """Return the last delta to pass on at the end of the stream."""
        choice = self._choices.get(self._answering) if self._answering is not None else None
        left = choice.end() if choice is not None else {}
        return _delta(left) if left and not self.has_error else None

    @property
    def is_ended(self) -> bool:
        """Whether the stream or each of its choices says that it is over, or its last chunk has only the usage."""
        has_ended = bool(self._choices) and all(each.is_ended for each in self._choices.values())
        return self.is_done or has_ended or self._is_usage_last

    @property
    def is_cut_off(self) -> bool:
        """Whether the stream ended in the middle of an answer. A closed socket looks like an end."""
        return bool(self._choices) and not self.is_ended and not self.has_error

    @property
    def id(self) -> object:
        """The id of the completion; None until a chunk has it."""
        return self._fields.get("id")

    def document(self) -> dict[str, Any] | None:
        """Return the object that the chunks make up; None if there are no chunks.

        If one of several choices was passed on, the object has only that one.
        """
        if not self._fields and not self._choices:
            return None
        indexes = sorted(self._choices) if self._answering is None else [self._answering]
        choices = {"choices": [self._choices[index].joined() for index in indexes]} if indexes else {}
        return {**self._fields, **choices}

    def _fail(self, error: object) -> None:
        self.has_error = True
        self._fields.setdefault("error", error)

    def _add_choice(self, place: int, choice: dict[str, Any]) -> Delta | None:
        given = choice.get("index")
        index = given if type(given) is int else place
        joined = self._choices.get(index)
        if joined is None:
            joined = self._choices[index] = _Choice()
        output, finish, logprobs = joined.add(choice)
        if says_error(choice.get("error")) or finish == "error":
            self.has_error = True
        if output and self._answering is None:
            self._answering = index
        if self._answering not in (None, index) or self.has_error:
            return None
        if finish is not None and not self._is_finish_passed:
            self._is_finish_passed = True
        else:
            finish = None
        return _delta(output, finish, logprobs) if output or finish or logprobs else None


def _delta(output: dict[str, Any], finish: str | None = None, logprobs: object = None) -> Delta:
    return {"choices": [{"index": 0, "delta": output, "finish_reason": finish, "logprobs": logprobs}]}


class _Choice:
    """One choice, joined."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}
        self._texts = {name: TextParts() for name in _TEXTS}
        self._calls = ToolCallParts()
        self._details = DetailParts()
        self._images: list[object] = []
        self._logprobs: dict[str, Any] = {}
        self._reasoning_source: str | None = None
        self._has_deltas = False

    @property
    def is_ended(self) -> bool:
        return bool(self._fields.get("finish_reason") or self._fields.get("error"))

    def add(self, choice: dict[str, Any]) -> tuple[dict[str, Any], str | None, object]:
        """Add a chunk's choice; return its new output, why the choice ended if it did, and log probabilities."""
        for name, value in choice.items():
            if name not in _OF_MESSAGE and value is not None and (name != "error" or says_error(value)):
                self._fields[name] = value
        output: dict[str, Any] = {}
        if delta := as_table(choice.get("delta")):
            self._add_message(delta, output)
            self._has_deltas = self._has_deltas or bool(output)
        if message := as_table(choice.get("message")):
            self._add_message(self._new_parts_of(message) if self._has_deltas else message, output)
        # Completions without messages have a text here.
        given = (choice.get("message"), choice.get("text"), choice.get("content"))
        found = next((each for each in given if isinstance(each, str) or as_list(each)), None)
        if found is not None and not (delta or message):
            self._add_parts(found, output)
        finish = finish_of(choice)
        if finish is not None:
            output = _with_rest(output, self.end())
        return output, finish, self._add_logprobs(choice.get("logprobs"))

    def end(self) -> dict[str, Any]:
        """Return the output that is still to be passed on at the end."""
        output: dict[str, Any] = {name: left for name, text in self._texts.items() if (left := text.end())}
        further = {"tool_calls": self._calls.end(), "reasoning_details": self._details.end()}
        return output | {name: parts for name, parts in further.items() if parts}

    def joined(self) -> dict[str, Any]:
        message: dict[str, Any] = {name: str(text) for name, text in self._texts.items() if text}
        if self._calls:
            message["tool_calls"] = self._calls.joined()
        if details := self._details.joined():
            message["reasoning_details"] = details
        if self._images:
            message["images"] = self._images
        return {
            **self._fields,
            **({"logprobs": self._logprobs} if self._logprobs else {}),
            **({"message": message} if message else {}),
        }

    def _add_message(self, message: dict[str, Any], output: dict[str, Any]) -> None:
        content = message.get("content")
        if isinstance(content, str):
            self._add_text(output, "content", content)
        elif content is not None:
            self._add_parts(content, output)
        for name in _REASONING:
            if message.get(name):
                self._add_reasoning(name, texts_in(message[name]), output)
        self._add_details(tables_of(message.get("reasoning_details")), output)
        if refusal := message.get("refusal"):
            self._add_text(output, "refusal", *texts_in(refusal))
        for call in one_or_more(message.get("tool_calls")):
            _add_call(output, self._calls.add(call))
        if function := as_table(message.get("function_call")):
            _add_call(output, self._calls.add_old_form(function))
        self._add_images(as_list(message.get("images")), output)

    def _new_parts_of(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a message that the deltas did not have: Perplexity repeats the whole answer each time."""
        parts = Parts()
        parts.add(message.get("content"))
        text, content = "".join(parts.texts), self._texts["content"]
        new_parts: dict[str, Any] = {}
        if len(text) >= content.length and text.startswith(known := str(content)):
            new_parts["content"] = text.removeprefix(known)
        if not self._texts["refusal"]:
            new_parts["refusal"] = message.get("refusal") or parts.refusals
        if not self._texts["reasoning"]:
            new_parts |= {name: message.get(name) for name in _REASONING}
            new_parts["reasoning"] = message.get("reasoning") or parts.reasoning
        if not self._calls:
            new_parts["tool_calls"] = [*as_list(message.get("tool_calls")), *parts.tool_calls]
            new_parts["function_call"] = message.get("function_call")
        if not self._images:
            new_parts["images"] = [*as_list(message.get("images")), *parts.images]
        return new_parts

    def _add_parts(self, content: object, output: dict[str, Any]) -> None:
        parts = Parts()
        parts.add(content)
        self._add_text(output, "content", *parts.texts)
        self._add_text(output, "refusal", *parts.refusals)
        self._add_reasoning("content", parts.reasoning, output)
        self._add_details(parts.details, output)
        for call in parts.tool_calls:
            _add_call(output, self._calls.add(call))
        self._add_images(parts.images, output)

    def _add_images(self, images: Sequence[object], output: dict[str, Any]) -> None:
        if images:
            self._images += images
            output["images"] = [*output.get("images", ()), *cast("list[object]", plain(list(images)))]

    def _add_reasoning(self, source: str, texts: list[str], output: dict[str, Any]) -> None:
        """Add reasoning only from the first field that has some: other fields repeat it."""
        if any(texts) and self._reasoning_source in (None, source):
            self._reasoning_source = source
            self._add_text(output, "reasoning", *texts)

    def _add_details(self, details: list[dict[str, Any]], output: dict[str, Any]) -> None:
        passed = [part for detail in details if (part := self._details.add(detail)) is not None]
        if passed:
            output["reasoning_details"] = [*output.get("reasoning_details", ()), *passed]

    def _add_text(self, output: dict[str, Any], name: str, *texts: str) -> None:
        for text in texts:
            if passed := self._texts[name].add(text):
                output[name] = output.get(name, "") + passed

    def _add_logprobs(self, value: object) -> object:
        logprobs = as_table(value)
        if not logprobs:
            return None
        clean = cast("dict[str, Any]", plain(logprobs))
        for name, each in clean.items():
            joined = self._logprobs.get(name)
            if not isinstance(each, list):
                self._logprobs[name] = each or joined
            elif isinstance(joined, list):
                cast("list[object]", joined).extend(cast("list[object]", each))
            else:
                # A copy, since the list that is passed on must not grow.
                self._logprobs[name] = list(cast("list[object]", each))
        return clean


def _add_call(output: dict[str, Any], part: dict[str, Any] | None) -> None:
    if part is not None:
        output.setdefault("tool_calls", []).append(part)


def _with_rest(output: dict[str, Any], left: dict[str, Any]) -> dict[str, Any]:
    """Return the output of a chunk, with the remaining output at the end added."""
    for name, value in left.items():
        output[name] = output[name] + value if name in output else value
    return output
