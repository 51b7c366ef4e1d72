"""What a provider wants back of reasoning goes through a client as one opaque text."""

import base64
import json
from typing import Any

import pytest

from tests.gateway.golden import events_in
from tollbook.gateway.reasoning_details import pack, unpack
from tollbook.gateway.responses.request import chat_fields
from tollbook.gateway.responses.stream import Events
from tollbook.schemas.results import InferenceResult

ENCRYPTED = {"type": "reasoning.encrypted", "data": "ZW5j", "id": "rs_1", "format": "openai-responses-v1", "index": 0}
DONE = InferenceResult.model_validate({"task_id": "t", "status": "done", "content": "Sunny.", "finish_reason": "stop"})


def test_encrypted_reasoning_goes_through_a_client_of_responses_and_back() -> None:
    """Codex keeps no other reasoning: `include` asks for it, and it comes back with the next turn."""
    events = Events(response_id="resp_1", created_s=0, body={"model": "m", "input": "hi"})
    deltas: list[dict[str, Any]] = [{"reasoning_details": [ENCRYPTED]}, {"content": "Sunny."}]
    parts = [part for delta in deltas for part in events.delta({"choices": [{"index": 0, "delta": delta}]})]
    sent = events_in([*events.begin(), *parts, *events.end(DONE)])
    output = sent[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message"]
    assert output[0]["summary"] == []
    assert not [event for event in sent if event["type"].startswith("response.reasoning_summary")]
    messages = chat_fields({"model": "m", "input": [*output, {"role": "user", "content": "and Rome?"}]})["messages"]
    assert messages[0] == {"role": "assistant", "reasoning_details": [ENCRYPTED], "content": "Sunny."}


def test_a_signature_that_comes_after_the_text_is_kept_with_what_it_signs() -> None:
    events = Events(response_id="resp_1", created_s=0, body={"model": "m", "input": "hi"})
    text = {"type": "reasoning.text", "text": "Hm.", "index": 0}
    signature = {"type": "reasoning.text", "signature": "c2ln", "index": 0}
    deltas: list[dict[str, Any]] = [
        {"reasoning": "Hm.", "reasoning_details": [text]}, {"content": "Sunny."}, {"reasoning_details": [signature]},
    ]  # fmt: skip
    for delta in deltas:
        events.delta({"choices": [{"index": 0, "delta": delta}]})
    output = events_in(events.end(DONE))[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "reasoning"]
    assert unpack(output[2]["encrypted_content"]) == [{**text, "signature": "c2ln"}]


def test_unsigned_reasoning_need_not_come_back() -> None:
    assert pack([{"type": "reasoning.text", "text": "Hm.", "index": 0}]) == ""


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "c2ln",
        "tollbook1.%%%",
        "tollbook1.AAAA",
        "tollbook1." + base64.urlsafe_b64encode(b'{"a": 1}').decode(),
        "tollbook1." + base64.urlsafe_b64encode(json.dumps(["a"]).encode()).decode(),
    ],
)
def test_texts_of_other_providers_are_unchanged(text: object) -> None:
    assert unpack(text) is None


def test_packed_reasoning_can_be_unpacked() -> None:
    assert unpack(pack([ENCRYPTED])) == [ENCRYPTED]
