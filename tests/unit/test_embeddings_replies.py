"""Replies with embeddings: what is paid is the outcome, and all tokens are of the prompt."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replies import reply_of
from tollbook.inference.attempts import Attempt, EmbeddingsRequest
from tollbook.inference.providers import embeddings
from tollbook.inference.providers.replies import read_reply
from tollbook.schemas.results import ErrorCode
from tollbook.schemas.usage import Usage


def vector(index: Any = 0, value: Any = (0.5, -1)) -> dict[str, Any]:
    return {"embedding": value, **({} if index is None else {"index": index})}


def read(data: Any, usage: Any = None, *, inputs: int = 1, status: int = 200, **more: Any) -> Attempt:
    body = json.dumps({"data": data, "usage": usage, **more}).encode()
    request = EmbeddingsRequest(model="m", inputs=["text"] * inputs)
    return read_reply(reply_of(body, status), request, is_insured=False)


@pytest.mark.parametrize(
    ("data", "vectors"),
    [
        ([vector(1, [1]), vector(0, [2.5])], ([2.5], [1.0])),  # In the order of the inputs.
        ([vector(None, [1]), vector(None, [2])], ([1.0], [2.0])),
        ([vector(0, "AACAPw=="), vector(1, "AAAAQA==")], ("AACAPw==", "AAAAQA==")),
    ],
)
def test_vectors_are_read(data: Any, vectors: tuple[Any, ...]) -> None:
    found = read(data, {"prompt_tokens": 3, "total_tokens": 3}, inputs=2)
    assert (found.outcome, found.embeddings, found.usage_doubt) == ("ok", vectors, None)
    assert (found.usage, found.charge, found.model_used) == (Usage(prompt_tokens=3), "known", "m")


@pytest.mark.parametrize(
    "data",
    [
        None, [], [vector(0), vector(1)], [vector(1)], [vector(0, [])], [vector(0, [None])], [vector(0, ["1"])],
        [vector(0, [True])], [vector(0, "no base64!")], [vector("0")], ["x"],
    ],
)  # fmt: skip
def test_paid_reply_without_its_vectors_is_the_outcome(data: Any) -> None:
    """G4: the same request would be paid for again."""
    found = read(data, {"prompt_tokens": 3, "total_tokens": 3})
    assert (found.outcome, found.charge, found.error_code) == ("ok", "known", ErrorCode.INFERENCE_FAILED)
    assert (found.embeddings, found.reason, found.is_retryable) == ((), "empty_answer", False)
    unpaid = read(data)
    assert (unpaid.outcome, unpaid.charge, unpaid.is_retryable) == ("invalid_response", "unknown", True)
    free = read(data, {"prompt_tokens": 0, "total_tokens": 0, "cost": 0})
    assert (free.outcome, free.charge, free.reported_cost_nanousd) == ("invalid_response", "known", 0)


def test_vectors_that_no_result_can_hold_are_paid_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "MAX_VECTORS_BYTES", 10)
    found = read([vector(0, [0.123456789])], {"prompt_tokens": 3, "total_tokens": 3})
    assert (found.outcome, found.charge, found.embeddings) == ("ok", "known", ())
    assert found.error == "the vectors have 15 bytes as JSON; a result may have at most 10"


@pytest.mark.parametrize(
    ("usage", "tokens", "is_doubted"),
    [
        ({"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0}, 7, False),
        ({"prompt_tokens": 7, "total_tokens": 7}, 7, False),
        ({"total_tokens": 7}, 7, False),  # Voyage.
        ({"input_tokens": 7}, 7, False),
        ({"prompt_tokens": 7}, 7, False),
        ({"prompt_tokens": 7, "total_tokens": 9}, 9, False),
        ({"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 9}, 9, True),
        ({"prompt_tokens": 0, "total_tokens": 0}, None, True),
        (None, None, False),
    ],
)
def test_usage_is_all_prompt(usage: Any, tokens: int | None, is_doubted: bool) -> None:
    """G3: without a number of tokens the upper bound is assumed."""
    found = read([vector()], usage)
    assert (found.usage and found.usage.model_dump(exclude_defaults=True)) == (tokens and {"prompt_tokens": tokens})
    assert (found.charge, found.usage_doubt is not None) == ("known" if tokens else "unknown", is_doubted)


@given(prompt=st.integers(0, 10**6), more=st.integers(0, 10**6))
def test_tokens_are_never_fewer_than_any_number_reported(prompt: int, more: int) -> None:
    """G3."""
    found = read([vector()], {"prompt_tokens": prompt, "completion_tokens": more, "total_tokens": prompt + more})
    assert (found.usage.prompt_tokens if found.usage else 0) == prompt + more


def test_error_is_an_error_whatever_was_asked_for() -> None:
    found = read(None, status=404, error={"message": "no such model", "code": 404})
    assert (found.outcome, found.charge, found.may_fall_back) == ("http_error", "none", True)
    inside = read(None, error={"message": "failed", "code": 500})
    assert (inside.outcome, inside.charge) == ("provider_error", "none")
