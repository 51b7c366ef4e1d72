"""Replies as a client has received them, and requests that they answer."""

from collections.abc import Mapping
from typing import Any

from tollbook.inference.attempts import ChatRequest
from tollbook.inference.providers.bodies import read_body
from tollbook.inference.providers.replies import Reply

NO_LIMIT = 10**6


def reply_of(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, **changes: Any) -> Reply:
    times: dict[str, Any] = {"latency_ms": 1, "now_s": 0.0, **changes}
    return Reply.of_body(status, headers or {}, read_body(body), **times)


def chat_request(model: str = "m", max_tokens: int = NO_LIMIT) -> ChatRequest:
    return ChatRequest(model=model, messages=(), max_tokens=max_tokens)
