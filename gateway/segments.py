"""Splits an answer into the blocks of other APIs: reasoning, text, images, a refusal, calls; one after the other.

Chat completions stream one message, whose parts may arrive in any order and mixed. Here they become segments, of which
one is open at a time. Invariant: the joined texts of each kind equal those of the chunks, or of the result if it has
more. So a stream has the same content however it was chunked, and the same as the complete answer.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from tollbook.gateway.reasoning_details import add_details, is_wanted_back, texts_of, with_earlier_parts
from tollbook.schemas.reasoning_details import Detail, Details
from tollbook.schemas.results import InferenceResult

Kind = Literal["reasoning", "content", "refusal", "image", "call"]
_TEXTS: Final[tuple[tuple[Kind, tuple[str, ...]], ...]] = (
    # Servers use one of two names; some send both, with the same text.
    ("reasoning", ("reasoning", "reasoning_content")),
    ("content", ("content",)),
    ("refusal", ("refusal",)),
)
_FAMILIES: Final[Mapping[Kind, str]] = {
    "reasoning": "reasoning",
    "content": "message",
    "refusal": "message",
    "image": "image",
    "call": "call",
}
CUT_OFF: Final = frozenset({"length", "content_filter"})
"""Finish reasons of an answer that was cut off."""


@dataclass(slots=True, eq=False)
class Segment:
    """One part of an answer. `text` is its text so far; for a call the arguments, for an image the address."""

    kind: Kind
    text: str = ""
    call_id: str = ""
    name: str = ""
    is_custom: bool = False
    """Whether it is a custom tool's call; then `text` is plain text."""
    is_cut: bool = False
    """Whether the answer was cut off in this segment."""
    number: int = 0
    """Its number among the segments of its kind, from 0; text and refusal count as one kind."""
    details: list[Detail] = field(default_factory=list[Detail])
    """For reasoning: the parts that the provider wants back with the next turn."""
    has_opened: bool = False
    """Whether it was opened; before that, it waits for earlier segments to end."""

    @property
    def may_end(self) -> bool:
        """Whether another segment may follow; False for a call with incomplete arguments."""
        if self.kind != "call" or self.is_custom:
            return True
        if not self.text.rstrip().endswith("}"):
            return False
        try:
            json.loads(self.text)
        except (ValueError, RecursionError):
            return False
        return True


@dataclass(frozen=True, slots=True)
class Opened:
    """A segment began, as number `index` of the answer."""

    segment: Segment
    index: int


@dataclass(frozen=True, slots=True)
class Grown:
    """The open segment got more text."""

    segment: Segment
    index: int
    text: str
    is_first: bool
    """Whether it is the first text of the segment."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The open segment is complete."""

    segment: Segment
    index: int


Step = Opened | Grown | Closed


@dataclass(slots=True)
class _Call:
    """A tool call while it is streamed, with the id that the provider has sent so far."""

    segment: Segment
    given_id: str


class Segments:
    """The segments of one answer. Feed it the chunks of a chat completion's stream, and then the result."""

    def __init__(self, id_stem: str) -> None:
        """Begin an answer. A call without an id gets one from `id_stem` and its number."""
        self._id_stem = id_stem
        self.all: list[Segment] = []
        """All segments: closed ones, the open one, and those that wait for the open one to end."""
        self._begun = 0
        self._is_open = False
        self._numbers = Counter[str]()
        self._calls: list[_Call] = []
        self._call_of_index: dict[object, _Call] = {}
        self._details, self._earlier_details = Details(), Details()
        """Those of the last reasoning segment, and of the segments before it."""

    def add(self, chunk: Mapping[str, Any]) -> list[Step]:
        """Add a chunk; return the steps that are possible now."""
        steps: list[Step] = []
        for choice in _tables(chunk.get("choices")):
            if choice.get("index") in (0, None):
                steps += self._add_delta(_table(choice.get("delta")))
        return steps

    def finish(self, result: InferenceResult) -> list[Step]:
        """End the answer; return the steps for what no chunk had, and for waiting segments."""
        steps: list[Step] = []
        for kind, whole in _texts_of(result):
            told = "".join(segment.text for segment in self.all if segment.kind == kind)
            if whole.startswith(told):
                steps += self._add_text(kind, whole[len(told) :])
            if kind == "reasoning":
                steps += self._finish_details(result)
        for image in result.images or ():
            self._wait(Segment("image", image))
        for number, call in enumerate(result.tool_calls or ()):
            steps += self._finish_call(number, call)
        if self.all and result.finish_reason in CUT_OFF:
            self.all[-1].is_cut = True
        return [*steps, *self._advance(is_end=True), *self._close()]

    def _add_delta(self, delta: Mapping[str, Any]) -> Iterator[Step]:
        for kind, names in _TEXTS:
            text = next((delta[name] for name in names if isinstance(delta.get(name), str) and delta[name]), "")
            if kind == "reasoning":
                details = _tables(delta.get("reasoning_details"))
                yield from self._add_text(kind, text or texts_of(details))
                yield from self._add_details(details)
            else:
                yield from self._add_text(kind, text)
        for piece in _tables(delta.get("tool_calls")):
            yield from self._add_call(piece)

    def _add_text(self, kind: Kind, text: str) -> Iterable[Step]:
        if not text:
            return ()
        return self._grow(self._last(kind) or self._wait(Segment(kind)), text)

    def _add_details(self, details: Sequence[Mapping[str, Any]]) -> Iterable[Step]:
        last = self._last("reasoning")
        if last is None and not is_wanted_back(details):
            return ()
        last = last or self._wait(Segment("reasoning"))
        add_details(self._details, [with_earlier_parts(self._earlier_details, detail) for detail in details])
        return self._advance()

    def _finish_details(self, result: InferenceResult) -> Iterable[Step]:
        """Add the parts that the provider wants back, if no chunk had them."""
        has_been_told = any(segment.details for segment in self.all)
        return () if has_been_told else self._add_details(result.reasoning_details or [])

    def _last(self, kind: Kind) -> Segment | None:
        """Return the last segment if text of this kind can be added to it."""
        last = self.all[-1] if self.all else None
        can_grow = last is not None and last.kind == kind and (self._is_open or not last.has_opened)
        return last if can_grow else None

    def _wait(self, segment: Segment) -> Segment:
        family = _FAMILIES[segment.kind]
        segment.number = self._numbers[family]
        self._numbers[family] += 1
        self.all.append(segment)
        if segment.kind == "reasoning":
            for detail in self._details.known:
                self._earlier_details.begin(detail)
            self._details = Details(segment.details)
        return segment

    def _add_call(self, piece: Mapping[str, Any]) -> Iterable[Step]:
        function, is_custom = _called(piece)
        index, given_id = piece.get("index"), _text(piece.get("id"))
        call = self._call_of_index.get(index)
        # Some servers give parallel calls the same index.
        if call is None or (given_id and call.given_id not in (given_id, "")):
            segment = Segment("call", call_id=given_id or self._id(len(self._calls)), is_custom=is_custom)
            call = self._call_of_index[index] = _Call(segment, given_id)
            self._calls.append(call)
            self._wait(segment)
        call.given_id = call.given_id or given_id
        if not call.segment.has_opened:
            call.segment.name = call.segment.name or _text(function.get("name"))
            call.segment.call_id = call.given_id or call.segment.call_id
        return self._grow(call.segment, _text(function.get("input" if is_custom else "arguments")))

    def _finish_call(self, number: int, call: Mapping[str, Any]) -> Iterable[Step]:
        """Add what the result has of a call and its pieces did not have."""
        function, is_custom = _called(call)
        if number >= len(self._calls):
            return self._add_call({**call, "index": number, "id": call.get("id") or self._id(number)})
        segment = self._calls[number].segment
        if not segment.has_opened:
            segment.name = segment.name or _text(function.get("name"))
        whole = _text(function.get("input" if is_custom else "arguments"))
        return self._grow(segment, whole[len(segment.text) :]) if whole.startswith(segment.text) else ()

    def _id(self, number: int) -> str:
        return f"call_{self._id_stem}_{number}"

    def _grow(self, segment: Segment, text: str) -> Iterator[Step]:
        if self._is_open and segment is self.all[self._begun - 1]:
            if text:
                is_first = not segment.text
                segment.text += text
                yield Grown(segment, self._begun - 1, text, is_first)
        elif not segment.has_opened:
            segment.text += text
        # Text for a closed call is dropped: its arguments are already complete JSON.
        yield from self._advance()

    def _advance(self, *, is_end: bool = False) -> Iterator[Step]:
        """Open each waiting segment when the one before it is complete, or at the end of the answer."""
        while self._begun < len(self.all):
            first = self.all[self._begun]
            is_blocked = self._is_open and not self.all[self._begun - 1].may_end
            if not is_end and (is_blocked or (first.kind == "call" and not first.name)):
                return
            yield from self._close()
            first.has_opened = self._is_open = True
            index, self._begun = self._begun, self._begun + 1
            yield Opened(first, index)
            if first.text:
                yield Grown(first, index, first.text, is_first=True)

    def _close(self) -> Iterator[Step]:
        if self._is_open:
            self._is_open = False
            yield Closed(self.all[self._begun - 1], self._begun - 1)


def segments_of(result: InferenceResult, id_stem: str) -> list[Segment]:
    """Return the segments of a complete answer: reasoning, text, refusal, images, calls."""
    segments = Segments(id_stem)
    segments.finish(result)
    return segments.all


def _texts_of(result: InferenceResult) -> tuple[tuple[Kind, str], ...]:
    return (
        ("reasoning", result.reasoning or ""),
        ("content", result.content or ""),
        ("refusal", result.refusal or ""),
    )


def _called(call: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the function or custom tool that is called, and whether it is a custom tool."""
    custom = _table(call.get("custom"))
    return (custom, True) if custom else (_table(call.get("function")), False)


def _table(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _tables(value: object) -> list[Mapping[str, Any]]:
    listed = cast("list[object]", value) if isinstance(value, list | tuple) else []
    return [cast("Mapping[str, Any]", each) for each in listed if isinstance(each, Mapping)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
