"""However a stream is cut and mixed, the segments have the content of the whole answer, one after the other."""

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.golden import events_in
from tollbook.gateway.messages.document import document as message_document
from tollbook.gateway.messages.stream import Events as MessageEvents
from tollbook.gateway.responses.document import document as response_document
from tollbook.gateway.responses.stream import Events as ResponseEvents
from tollbook.gateway.segments import Closed, Grown, Opened, Segments
from tollbook.schemas.results import InferenceResult

TEXTS = st.none() | st.text(min_size=1, max_size=20)
ARGUMENTS = st.sampled_from(['{"city": "Paris"}', "{}", '{"a": {"b": [1, "}"]}}', '{"cut": "of', ""])
BODY = {"model": "m", "input": "x"}


def call(number: int, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": f"f{number}", "arguments": arguments}}


@st.composite
def results(draw: st.DrawFn) -> InferenceResult:
    calls = [call(number, arguments) for number, arguments in enumerate(draw(st.lists(ARGUMENTS, max_size=3)))]
    return InferenceResult.model_validate(
        {
            "task_id": "t",
            "status": "done",
            "content": draw(TEXTS),
            "reasoning": draw(TEXTS),
            "refusal": draw(TEXTS),
            "tool_calls": calls or None,
            "finish_reason": draw(st.sampled_from(["stop", "length", "content_filter", "tool_calls", None])),
        }
    )


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[InferenceResult, list[dict[str, Any]]]:
    """Draw a result and its chunks: each kind in its order, the kinds mixed at will, the end left out perhaps."""
    result = draw(results())
    cuts = st.lists(st.integers(0, 30), max_size=4)
    queues: list[list[dict[str, Any]]] = []
    for name in ("reasoning", "content", "refusal"):
        queues.append([{name: piece} for piece in pieces_of(getattr(result, name) or "", draw(cuts))])
    for number, each in enumerate(result.tool_calls or ()):
        function = each["function"]
        first = {"index": number, "id": each["id"], "function": {"name": function["name"], "arguments": ""}}
        more = [
            {"index": number, "function": {"arguments": piece}}
            for piece in pieces_of(function["arguments"], draw(cuts))
        ]
        queues.append([{"tool_calls": [piece]} for piece in (first, *more)])
    # Calls begin in their order, as servers number them.
    chunks = [queue.pop(0) for queue in queues[3:]] if draw(st.booleans()) else []
    is_mixed = draw(st.booleans()) and (chunks or not queues[3:])
    while any(queues):
        waiting = [queue for queue in queues if queue]
        chunks.append(draw(st.sampled_from(waiting)).pop(0) if is_mixed else waiting[0].pop(0))
    kept = draw(st.integers(0, len(chunks))) if draw(st.booleans()) else len(chunks)
    return result, [{"choices": [{"index": 0, "delta": delta}]} for delta in chunks[:kept]]


def contents_of(result: InferenceResult) -> dict[str, Any]:
    calls = [(each["id"], each["function"]["name"], each["function"]["arguments"]) for each in result.tool_calls or ()]
    texts = {name: getattr(result, name) or "" for name in ("reasoning", "content", "refusal")}
    return {**texts, "calls": calls}


@given(streams())
def test_one_segment_is_open_at_a_time_and_the_whole_answer_is_sent(
    stream: tuple[InferenceResult, list[dict[str, Any]]],
) -> None:
    result, chunks = stream
    segments = Segments("s")
    steps = [*(step for chunk in chunks for step in segments.add(chunk)), *segments.finish(result)]
    opened: list[int] = []
    texts: dict[int, str] = {}
    current: int | None = None
    for step in steps:
        match step:
            case Opened(_, index):
                assert current is None
                assert index == len(opened)
                opened.append(index)
                current, texts[index] = index, ""
            case Grown(_, index, text, is_first):
                assert current == index
                assert text
                assert is_first == (not texts[index])
                texts[index] += text
            case Closed(segment, index):
                assert current == index
                assert texts[index] == segment.text
                current = None
    assert current is None
    sent: dict[str, Any] = {"reasoning": "", "content": "", "refusal": "", "calls": []}
    for segment in segments.all:
        if segment.kind == "call":
            sent["calls"].append((segment.call_id, segment.name, segment.text))
        else:
            sent[segment.kind] += segment.text
    assert sent == contents_of(result)


@given(streams())
def test_a_response_streams_the_same_texts_and_calls_as_it_has_whole(
    stream: tuple[InferenceResult, list[dict[str, Any]]],
) -> None:
    result, chunks = stream
    events = ResponseEvents(response_id="resp_s", created_s=0, body=BODY)
    parts = [*events.begin(), *(part for chunk in chunks for part in events.delta(chunk)), *events.end(result)]
    sent = events_in(parts)
    whole = response_document(result, response_id="resp_s", created_s=0, body=BODY)
    streamed = sent[-1]["response"]
    assert sent[-1]["type"] == f"response.{whole['status']}"
    assert [event["item"] for event in sent if event["type"] == "response.output_item.done"] == streamed["output"]
    for kind, name in (("output_text", "text"), ("refusal", "refusal")):
        assert text_of(streamed["output"], kind, name) == text_of(whole["output"], kind, name)
        assert "".join(event["delta"] for event in sent if event["type"] == f"response.{kind}.delta") == (
            text_of(whole["output"], kind, name)
        )
    assert without_status(streamed["output"]) == without_status(whole["output"])
    assert {**streamed, "output": []} == {**whole, "output": []}


@given(streams())
def test_a_message_streams_the_same_texts_and_calls_as_it_has_whole(
    stream: tuple[InferenceResult, list[dict[str, Any]]],
) -> None:
    result, chunks = stream
    events = MessageEvents(message_id="msg_s", body=BODY)
    parts = [*events.begin(), *(part for chunk in chunks for part in events.delta(chunk)), *events.end(result)]
    sent = events_in(parts)
    whole = message_document(result, message_id="msg_s", body=BODY)
    thoughts = "".join(block["thinking"] for block in whole["content"] if block["type"] == "thinking")
    deltas = [event["delta"] for event in sent if event["type"] == "content_block_delta"]
    assert "".join(delta.get("thinking", "") for delta in deltas) == thoughts
    texts = [block["text"] for block in whole["content"] if block["type"] == "text"]
    assert sorted("".join(delta.get("text", "") for delta in deltas)) == sorted("".join(texts))
    begun = [event["content_block"] for event in sent if event["type"] == "content_block_start"]
    calls = [(block["id"], block["name"]) for block in whole["content"] if block["type"] == "tool_use"]
    assert [(block["id"], block["name"]) for block in begun if block["type"] == "tool_use"] == calls
    assert sent[-2]["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence", "stop_details")}
    assert sent[-1] == {"type": "message_stop"}


def text_of(output: list[dict[str, Any]], kind: str, name: str) -> str:
    parts = [part for item in output for part in item.get("content", ())]
    return "".join(part[name] for part in parts if part["type"] == kind)


def without_status(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the calls of tools; which item was cut depends on the order in which they came."""
    return [{**item, "status": ""} for item in output if item["type"] == "function_call"]


def test_a_call_waits_until_the_one_before_it_is_complete() -> None:
    segments = Segments("s")
    both = [{"index": number, "id": f"c{number}", "function": {"name": "f", "arguments": '{"a'}} for number in (0, 1)]
    steps = segments.add({"choices": [{"index": 0, "delta": {"tool_calls": both}}]})
    assert [type(step) for step in steps] == [Opened, Grown]
    more = [{"index": 1, "function": {"arguments": '": 1}'}}, {"index": 0, "function": {"arguments": '": 0}'}}]
    steps = segments.add({"choices": [{"index": 0, "delta": {"tool_calls": more}}]})
    assert [(type(step), step.segment.call_id) for step in steps] == [
        (Grown, "c0"), (Closed, "c0"), (Opened, "c1"), (Grown, "c1"),
    ]  # fmt: skip


def test_calls_of_one_number_with_different_ids_are_different_calls() -> None:
    """Gemini's compatible server was seen to send every call as the first."""
    segments = Segments("s")
    for name in ("a", "b"):
        piece = {"index": 0, "id": name, "function": {"name": name, "arguments": "{}"}}
        segments.add({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]})
    assert [segment.call_id for segment in segments.all] == ["a", "b"]


def test_calls_without_an_id_get_one_of_the_answer() -> None:
    result = InferenceResult.model_validate(
        {"task_id": "t", "status": "done", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2}
    )
    segments = Segments("s")
    segments.finish(result)
    assert [segment.call_id for segment in segments.all] == ["call_s_0", "call_s_1"]


def test_reasoning_under_two_names_is_sent_once() -> None:
    segments = Segments("s")
    segments.add({"choices": [{"index": 0, "delta": {"reasoning": "why", "reasoning_content": "why"}}]})
    assert [segment.text for segment in segments.all] == ["why"]


def test_reasoning_of_two_choices_in_a_chunk_is_one_part() -> None:
    events = ResponseEvents(response_id="resp_s", created_s=0, body=BODY)
    choices = [{"index": 0, "delta": {"reasoning": text}} for text in ("a", "b")]
    sent = [event["type"] for event in events_in(events.delta({"choices": choices}))]
    assert sent == [
        "response.output_item.added", "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta", "response.reasoning_summary_text.delta",
    ]  # fmt: skip


def test_a_call_waits_for_its_name() -> None:
    """Some servers send the id in a piece of its own."""
    segments = Segments("s")
    assert segments.add({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "c"}]}}]}) == []
    piece = {"index": 0, "function": {"name": "f", "arguments": "{}"}}
    opened, _ = segments.add({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]})
    assert (opened.segment.call_id, opened.segment.name) == ("c", "f")


CUSTOM_CALL = {"index": 0, "id": "c", "type": "custom", "custom": {"name": "write", "input": "plain text"}}
CUSTOM_RESULT = InferenceResult.model_validate({"task_id": "t", "status": "done", "tool_calls": [CUSTOM_CALL]})


def test_a_custom_tool_of_a_chat_completion_is_one_of_responses() -> None:
    events = ResponseEvents(response_id="resp_s", created_s=0, body=BODY)
    parts = events.delta({"choices": [{"index": 0, "delta": {"tool_calls": [CUSTOM_CALL]}}]})
    sent = events_in([*events.begin(), *parts, *events.end(CUSTOM_RESULT)])
    deltas = [event["delta"] for event in sent if event["type"] == "response.custom_tool_call_input.delta"]
    assert deltas == ["plain text"]
    (item,) = sent[-1]["response"]["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "write", "plain text")


def test_a_custom_tool_of_a_chat_completion_is_used_with_one_text_in_messages() -> None:
    events = MessageEvents(message_id="msg_s", body=BODY)
    parts = events.delta({"choices": [{"index": 0, "delta": {"tool_calls": [CUSTOM_CALL]}}]})
    sent = events_in([*parts, *events.end(CUSTOM_RESULT)])
    deltas = [event["delta"]["partial_json"] for event in sent if event["type"] == "content_block_delta"]
    assert deltas == ['{"input": "plain text"}']
    (block,) = message_document(CUSTOM_RESULT, message_id="msg_s")["content"]
    assert block["input"] == {"input": "plain text"}
