"""Requests and replies in the shapes of OpenRouter's chat completions and embeddings."""

import base64
import json
import random
import re
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from tollbook.standin.prices import EMBEDDINGS_PRICES, PRICES, charge_nanousd, usd_literal
from tollbook.standin.structured import json_answer, tool_call

_COMPLETION_TOKENS: Final = re.compile(r"\[\[completion_tokens=(\d{1,6})\]\]")
_FAULT: Final = re.compile(r"\[\[fault=([a-z0-9_:]{1,40})\]\]")
_TOKENS_PER_MESSAGE: Final = 4
_BYTES_PER_TOKEN: Final = 4
_DEFAULT_MAX_TOKENS: Final = 256


class BadRequest(Exception):
    """The request is refused with an HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A valid request, and the tokens that it uses.

    `json_text`: an answer in the requested JSON form; `call`: name and arguments of a tool to call.
    `has_words`: the answer has a word for each token.
    """

    model: str
    user: str
    prompt_tokens: int
    completion_tokens: int
    is_cut: bool
    fault: str | None
    is_streamed: bool = False
    json_text: str | None = None
    call: tuple[str, str] | None = None
    has_words: bool = False
    has_logprobs: bool = False

    @property
    def price_nanousd(self) -> int:
        """The cost by the price list, in nano-dollars."""
        return charge_nanousd(self.model, prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens)


def read_request(document: Any, models: Mapping[str, object] = PRICES) -> CompletionRequest:
    """Parse a request as OpenRouter would; `models` are the models on sale. Errors: BadRequest.

    A message has one prompt token for every four bytes, rounded up, and four more. Completion tokens come from the
    text's checksum, or from the mark `[[completion_tokens=N]]` in the text; at most `max_tokens`.
    """
    if not isinstance(document, dict):
        raise BadRequest(400, "the body is not a JSON object")
    body = cast(Mapping[str, Any], document)
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not isinstance(messages, list) or not messages:
        raise BadRequest(400, "model and messages are required")
    if model not in models:
        raise BadRequest(404, f"No endpoints found for {model}.")
    texts = [_content(message) for message in cast(list[Any], messages)]
    text = "\n".join(texts)
    max_tokens = body.get("max_tokens", body.get("max_completion_tokens", _DEFAULT_MAX_TOKENS))
    if type(max_tokens) is not int or max_tokens < 1:
        raise BadRequest(400, "max_tokens must be a positive integer")
    mark = _COMPLETION_TOKENS.search(text)
    wanted = int(mark[1]) if mark else 8 + zlib.crc32(text.encode()) % 192
    fault = _FAULT.search(text)
    try:
        json_text, call = json_answer(body), tool_call(body)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as exc:
        raise BadRequest(400, f"a schema is not valid: {type(exc).__name__}") from None
    return CompletionRequest(
        model=model,
        user=str(body.get("user", "")),
        prompt_tokens=sum(-(-len(part.encode()) // _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE for part in texts),
        completion_tokens=max(1, min(wanted, max_tokens)),
        is_cut=wanted > max_tokens,
        fault=fault[1] if fault else None,
        is_streamed=body.get("stream") is True,
        json_text=json_text,
        call=call,
        has_logprobs=body.get("logprobs") is True,
    )


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest(CompletionRequest):
    """A request for vectors: one for each of `inputs`, with `dimensions` numbers each."""

    inputs: tuple[str, ...] = ()
    dimensions: int = 8
    is_base64: bool = False


def read_embeddings_request(document: Any) -> EmbeddingsRequest:
    """Parse a request for embeddings as OpenRouter would. Errors: BadRequest.

    An input has one token for every four bytes, rounded up.
    """
    if not isinstance(document, dict):
        raise BadRequest(400, "the body is not a JSON object")
    body = cast(Mapping[str, Any], document)
    model, given = body.get("model"), body.get("input")
    if model not in EMBEDDINGS_PRICES:
        raise BadRequest(404, f"No endpoints found for {model}.")
    inputs = cast("list[Any]", given if isinstance(given, list) else [given])
    if not inputs or not all(isinstance(each, str) and each for each in inputs):
        raise BadRequest(400, "input must be a text or a list of texts")
    dimensions = body.get("dimensions", 8)
    if type(dimensions) is not int or not 1 <= dimensions <= 8_192:
        raise BadRequest(400, "dimensions must be a positive integer")
    fault = _FAULT.search("\n".join(inputs))
    return EmbeddingsRequest(
        model=str(model),
        user=str(body.get("user", "")),
        prompt_tokens=sum(-(-len(each.encode()) // _BYTES_PER_TOKEN) for each in inputs),
        completion_tokens=0,
        is_cut=False,
        fault=fault[1] if fault else None,
        inputs=tuple(inputs),
        dimensions=dimensions,
        is_base64=body.get("encoding_format") == "base64",
    )


def _content(message: Any) -> str:
    fields = cast(dict[str, Any], message) if isinstance(message, dict) else {}
    content = fields.get("content")
    if isinstance(content, list):
        parts = [cast(dict[str, Any], part) for part in cast(list[Any], content) if isinstance(part, dict)]
        if any(part.get("type") == "image_url" and not part.get("image_url") for part in parts):
            raise BadRequest(400, "an image has an image_url")
        return "\n".join(str(part.get("text", "")) for part in parts)
    if content is None and (fields.get("tool_calls") or fields.get("function_call") or fields.get("refusal")):
        return ""
    if not isinstance(content, str):
        raise BadRequest(400, "messages have a role and a content")
    return content


def filler(asked: CompletionRequest) -> str:
    """Return the text of a completion: JSON if the request asks for it, else placeholder text that says so."""
    if asked.json_text is not None:
        return asked.json_text
    if asked.has_words:
        return " ".join(["[stand-in]", *["nothing"] * (asked.completion_tokens - 1)])
    return f"[stand-in] {asked.completion_tokens} tokens of nothing."


def completion(asked: CompletionRequest, generation_id: str, charged_nanousd: int, fault: str | None) -> bytes:
    """Return the body of a completion, changed by the fault."""
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "length" if asked.is_cut else "stop",
        "message": {"role": "assistant", "content": filler(asked)},
    }
    if isinstance(asked, EmbeddingsRequest):
        return _embeddings(asked, generation_id, charged_nanousd, fault)
    if asked.has_logprobs:
        tokens: list[dict[str, Any]] = [
            {"token": word, "logprob": -0.5, "top_logprobs": []} for word in filler(asked).split()
        ]
        choice["logprobs"] = {"content": tokens, "refusal": None}
    if asked.call is not None and not asked.is_cut:
        choice |= {"finish_reason": "tool_calls", "message": _calling(asked.call, generation_id)}
    if fault == "error_finish":
        choice = {"index": 0, "finish_reason": "error", "error": {"code": 502, "message": "provider failed"}}
    document: dict[str, Any] = {
        "id": generation_id,
        "provider": "stand-in",
        "model": asked.model,
        "object": "chat.completion",
        "created": 0,
        "choices": [choice],
    }
    head = json.dumps(document)
    if fault == "missing_usage":
        return head.encode()
    total = asked.prompt_tokens + asked.completion_tokens
    cost = _cost(charged_nanousd, fault)
    usage = (
        f'{{"prompt_tokens": {asked.prompt_tokens}, "completion_tokens": {asked.completion_tokens}, '
        f'"total_tokens": {total}, "prompt_tokens_details": {{"cached_tokens": 0}}, '
        f'"completion_tokens_details": {{"reasoning_tokens": 0}}{cost}}}'
    )
    return f'{head[:-1]}, "usage": {usage}}}'.encode()


def _calling(call: tuple[str, str], generation_id: str) -> dict[str, Any]:
    function = {"name": call[0], "arguments": call[1]}
    called = {"id": f"call_{generation_id}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [called]}


def _cost(charged_nanousd: int, fault: str | None) -> str:
    # Written by hand, since a float could not hold the cost exactly.
    literals = {"missing_cost": "", "null_cost": ', "cost": null'}
    return literals.get(fault or "", f', "cost": {usd_literal(charged_nanousd)}')


def _embeddings(asked: EmbeddingsRequest, generation_id: str, charged_nanousd: int, fault: str | None) -> bytes:
    """Return the body of a reply with vectors. They are drawn from each text's checksum and have no meaning."""
    listed: list[dict[str, Any]] = []
    for index, text in enumerate(asked.inputs):
        draw = random.Random(zlib.crc32(text.encode()))  # noqa: S311 - repeatable, not secret.
        numbers = array("f", [draw.uniform(-1, 1) for _ in range(asked.dimensions)])
        vector = base64.b64encode(numbers.tobytes()).decode() if asked.is_base64 else [round(x, 6) for x in numbers]
        listed.append({"object": "embedding", "index": index, "embedding": vector})
    if fault == "error_finish":
        return error(502, "provider failed")
    head = json.dumps({"id": generation_id, "object": "list", "model": asked.model, "data": listed})
    if fault == "missing_usage":
        return head.encode()
    tokens = asked.prompt_tokens
    usage = f'{{"prompt_tokens": {tokens}, "total_tokens": {tokens}{_cost(charged_nanousd, fault)}}}'
    return f'{head[:-1]}, "usage": {usage}}}'.encode()


def error(code: int, message: str, metadata: Mapping[str, Any] | None = None) -> bytes:
    """Return the body of an error."""
    detail: dict[str, Any] = {"code": code, "message": message}
    if metadata is not None:
        detail["metadata"] = dict(metadata)
    return json.dumps({"error": detail}).encode()
