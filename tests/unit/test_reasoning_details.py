"""Reasoning that a provider wants back: which pieces are one detail, and what results and logs have of it."""

import json
from typing import Any

import pytest

from tests.replies import chat_request, reply_of
from tollbook.inference.attempts import Attempt
from tollbook.inference.providers.bodies import Body
from tollbook.inference.providers.dialects import ADAPTERS
from tollbook.schemas.results import InferenceResult

TEXT: dict[str, Any] = {"type": "reasoning.text", "index": 0}
ENCRYPTED: dict[str, Any] = {"type": "reasoning.encrypted", "index": 0}


def read(pieces: list[Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what is passed on of a stream, and the details of its result."""
    chunks: list[Any] = [{"choices": [{"delta": {"reasoning_details": [piece]}}]} for piece in pieces]
    chunks.append({"choices": [{"delta": {"content": "Yes."}, "finish_reason": "stop"}]})
    stream = b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks)
    body = Body()
    deltas = [*body.feed(stream), *body.end()]
    passed = [part for delta in deltas for part in delta["choices"][0]["delta"].get("reasoning_details", ())]
    return passed, list(whole(stream).reasoning_details)


def whole(body: bytes) -> Attempt:
    return ADAPTERS["openrouter"].read_reply(reply_of(body), chat_request("a/b", 100))


def test_a_signature_that_comes_last_is_with_its_text() -> None:
    text = {**TEXT, "format": "f"}
    pieces = [{**text, "text": "Hm"}, {**text, "text": "."}, {**TEXT, "signature": "c2ln"}]
    passed, details = read(pieces)
    assert details == [{**TEXT, "text": "Hm.", "format": "f", "signature": "c2ln"}]
    # Client libraries add up texts that are repeated: a format is said once.
    assert passed == [pieces[0], {**TEXT, "text": "."}, pieces[2]]


def test_a_text_after_a_signature_is_another() -> None:
    pieces = [{**TEXT, "text": "a", "signature": "1"}, {**TEXT, "text": "b", "signature": "2"}, {**TEXT, "text": "c"}]
    assert read(pieces) == (pieces, pieces)


def test_a_text_whose_pieces_are_all_signed_is_one() -> None:
    pieces = [{**TEXT, "text": "a", "signature": "1"}, {**TEXT, "text": "b", "signature": "1"}]
    assert read(pieces) == (pieces, [{**TEXT, "text": "ab", "signature": "1"}])


@pytest.mark.parametrize("ids", [("a", "b"), (None, None)])
def test_parts_of_one_index_with_data_of_their_own_are_different(ids: tuple[str | None, str | None]) -> None:
    """As of parallel calls (Gemini over a router)."""
    pieces = [{**ENCRYPTED, "data": data, "id": given} for data, given in zip(("x", "y"), ids, strict=True)]
    expected = [{name: value for name, value in piece.items() if value is not None} for piece in pieces]
    assert read(pieces) == (expected, expected)


def test_pieces_without_an_index_continue_the_last_one() -> None:
    text, encrypted = {"type": "reasoning.text"}, {"type": "reasoning.encrypted", "data": "x"}
    _, details = read([{**text, "text": "a"}, {**text, "text": "b"}, encrypted, {**text, "text": "c"}])
    assert details == [{**text, "text": "ab"}, encrypted, {**text, "text": "c"}]


def test_summaries_are_continued_and_count_as_reasoning() -> None:
    summary = {"type": "reasoning.summary", "index": 0}
    passed, details = read([{**summary, "summary": "I "}, {**summary, "summary": "think."}])
    assert details == [{**summary, "summary": "I think."}]
    assert len(passed) == 2


def test_a_character_that_was_cut_in_two_is_one() -> None:
    _, details = read([{**TEXT, "text": "\ud83d"}, {**TEXT, "text": "\ude00"}, {**TEXT, "text": "\ud83d"}])
    assert details == [{**TEXT, "text": "\U0001f600\ufffd"}]


@pytest.mark.parametrize("piece", [{**TEXT, "text": ""}, {**TEXT, "signature": None}, {"format": "f"}, {}, "x", None])
def test_empty_parts_are_left_out(piece: Any) -> None:
    assert read([piece]) == ([], [])
    message = {"content": "Yes.", "reasoning_details": [piece]}
    assert whole(json.dumps({"choices": [{"message": message}]}).encode()).reasoning_details == ()


def test_encrypted_reasoning_alone_was_generated() -> None:
    """G3: a usage of zeros does not make it free."""
    message = {"content": None, "reasoning_details": [{**ENCRYPTED, "data": "x"}]}
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    document = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
    attempt = whole(json.dumps(document).encode())
    assert (attempt.charge, attempt.usage) == ("unknown", None)
    assert attempt.reasoning_details == ({**ENCRYPTED, "data": "x"},)


def test_reasoning_details_are_in_no_repr() -> None:
    """G10."""
    attempt = whole(json.dumps({"choices": [{"message": {"content": "Yes.", "reasoning_details": [
        {**TEXT, "text": "secret thought", "signature": "secret signature"}]}}]}).encode())  # fmt: skip
    assert len(attempt.reasoning_details) == 1
    result = InferenceResult.model_validate(
        {"task_id": "t", "status": "done", "reasoning_details": list(attempt.reasoning_details)}
    )
    assert "secret" not in repr(attempt) + repr(result) + str(result)
    assert "secret signature" in result.model_dump_json()
