"""Answers and their events are those that the SDKs' types and accumulators were seen to read."""

import pytest

from tests.gateway.golden import events_in, load, names
from tollbook.gateway.messages.document import document as message_document
from tollbook.gateway.messages.stream import Events as MessageEvents
from tollbook.gateway.responses.document import document as response_document
from tollbook.gateway.responses.stream import Events as ResponseEvents
from tollbook.schemas.results import InferenceResult

MESSAGE_ID = "msg_1a2b"


@pytest.mark.parametrize("name", names("transcripts", "responses"))
def test_responses_answer_as_the_transcript_does(name: str) -> None:
    golden = load("transcripts", name)
    result = InferenceResult.model_validate(golden["result"])
    assert (
        response_document(result, response_id="resp_1a2b", created_s=1_796_000_000, body=golden["body"])
        == (golden["document"])
    )


@pytest.mark.parametrize("name", names("transcripts", "responses"))
def test_responses_stream_as_the_transcript_does(name: str) -> None:
    golden = load("transcripts", name)
    events = ResponseEvents(response_id="resp_1a2b", created_s=1_796_000_000, body=golden["body"])
    parts = [*events.begin(), *(part for chunk in golden["chunks"] for part in events.delta(chunk))]
    sent = events_in([*parts, *events.end(InferenceResult.model_validate(golden["result"]))])
    assert sent == golden["events"]
    assert [event["sequence_number"] for event in sent] == list(range(len(sent)))


@pytest.mark.parametrize("name", names("transcripts", "messages"))
def test_messages_answer_as_the_transcript_does(name: str) -> None:
    golden = load("transcripts", name)
    result = InferenceResult.model_validate(golden["result"])
    assert message_document(result, message_id=MESSAGE_ID, body=golden["body"]) == golden["document"]


@pytest.mark.parametrize("name", names("transcripts", "messages"))
def test_messages_stream_as_the_transcript_does(name: str) -> None:
    golden = load("transcripts", name)
    events = MessageEvents(message_id=MESSAGE_ID, body=golden["body"], input_tokens=99)
    parts = [*events.begin(), *(part for chunk in golden["chunks"] for part in events.delta(chunk))]
    assert events_in([*parts, *events.end(InferenceResult.model_validate(golden["result"]))]) == golden["events"]


def test_a_response_that_breaks_off_fails_with_what_it_has_said() -> None:
    events = ResponseEvents(response_id="resp_1a2b", created_s=0, body={"model": "m", "input": "x"})
    events.begin()
    events.delta({"choices": [{"index": 0, "delta": {"content": "It is"}}]})
    failed, error = events_in(events.error("inference_failed", "the connection broke"))
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "the connection broke"}
    item = failed["response"]["output"][0]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "It is")
    # openai-python raises at the inner object, other clients read the outer fields.
    assert (error["code"], error["error"]["code"]) == ("inference_failed", "inference_failed")
    assert error["sequence_number"] == failed["sequence_number"] + 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("inference_failed", "api_error"),
        ("budget_wait_timeout", "rate_limit_error"),
        ("plan_limit_reached", "billing_error"),
        ("ledger_unavailable", "overloaded_error"),
        ("invalid_task", "invalid_request_error"),
    ],
)
def test_a_message_that_breaks_off_ends_with_an_error(code: str, kind: str) -> None:
    events = MessageEvents(message_id=MESSAGE_ID, body={})
    events.begin()
    (error,) = events_in(events.error(code, "it broke"))
    assert error == {"type": "error", "error": {"type": kind, "message": "it broke", "code": code}}
