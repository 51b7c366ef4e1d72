"""OpenAI's chat completions. Tollbook's own calls have the same format, so that little is translated."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tollbook.gateway.apis import ApiRequest
from tollbook.gateway.problems import Problem
from tollbook.gateway.sse import DONE, data_event
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.usage import Usage, media_details


class ChatCompletions:
    """The API of `/v1/chat/completions`."""

    optional_fields: frozenset[str] = frozenset()

    def earlier_calls(self, body: Mapping[str, Any]) -> frozenset[str]:  # noqa: ARG002
        """Return no ids: a request has its whole conversation."""
        return frozenset()

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the request, with `stop` as a list: a task's plain text could be parsed as the JSON of a list."""
        stop = body.get("stop")
        return {**body, "stop": [stop]} if isinstance(stop, str) and stop else body

    def document(self, result: InferenceResult, api_request: ApiRequest) -> dict[str, Any]:
        """Return a completion."""
        choice = {
            "index": 0,
            "message": message_of(result),
            "finish_reason": finish_reason_of(result),
            "logprobs": result.logprobs,
        }
        return {
            **_head(api_request, "chat.completion", result.model_used),
            "choices": [choice],
            "system_fingerprint": None,  # OpenRouter's SDK requires it (1.3.19, November 2026).
            "usage": usage_document(result),
        }

    def events(self, api_request: ApiRequest) -> "ChatEvents":
        """Return a writer of the answer's chunks."""
        return ChatEvents(api_request)

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:  # noqa: ARG002 - OpenAI's has none.
        """Return a refusal in OpenAI's format."""
        return {"error": error_of(problem)}


class ChatEvents:
    """Writes the chunks of one completion. The last chunk always has the usage, even if the client did not ask for it.

    `finish_reason` is sent only after the cost is booked, because many clients leave when they receive it. A client
    that asked for usage gets it in a chunk of its own, without choices. Other clients may read `choices[0]` of every
    chunk, as with OpenAI.
    """

    def __init__(self, api_request: ApiRequest) -> None:
        options = api_request.body.get("stream_options")
        self._api_request = api_request
        self._wants_usage = isinstance(options, dict) and cast("dict[str, Any]", options).get("include_usage") is True
        self._finish_reason: str | None = None

    def begin(self) -> bytes:
        """Return the first chunk, which names the role."""
        return self._chunk([_choice({"role": "assistant", "content": ""})])

    def delta(self, chunk: Mapping[str, Any]) -> bytes:
        """Return one chunk without its finish reason; no bytes if the chunk has nothing else."""
        choices = [{**each, "finish_reason": None} for each in chunk["choices"]]
        self._finish_reason = next(
            (reason for each in chunk["choices"] if (reason := each.get("finish_reason"))), self._finish_reason
        )
        says_nothing = not any(each["delta"] or each.get("logprobs") for each in choices)
        return b"" if says_nothing else self._chunk(choices)

    def end(self, result: InferenceResult) -> bytes:
        """Return the finish reason and the usage."""
        ended = [_choice({}, self._finish_reason or finish_reason_of(result))]
        head = _head(self._api_request, "chat.completion.chunk", result.model_used)
        usage = {"usage": usage_document(result)}
        if not self._wants_usage:
            return data_event({**head, "choices": ended, **usage}) + DONE
        return self._chunk(ended) + data_event({**head, "choices": [], **usage}) + DONE

    def broken(self, problem: Problem) -> bytes:
        """Return an error that every client notices: a socket that just closes looks like a normal end.

        The error is sent twice: Vercel's AI SDK (November 2026) takes every chunk with choices as a part of the answer.
        """
        error = {"error": error_of(problem)}
        chunk = {**_head(self._api_request, "chat.completion.chunk"), "choices": [_choice({}, "error")]}
        return data_event({**chunk, **error}) + data_event(error) + DONE

    def _chunk(self, choices: list[Any]) -> bytes:
        return data_event({**_head(self._api_request, "chat.completion.chunk"), "choices": choices})


def _head(api_request: ApiRequest, kind: str, model: str | None = None) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{api_request.call_id}",
        "object": kind,
        "created": api_request.created_s,
        "model": model or api_request.model,
    }


def _choice(
    delta: Mapping[str, Any], finish_reason: str | None = None, logprobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}


def message_of(result: InferenceResult) -> dict[str, Any]:
    """Return the model's answer as a message."""
    message: dict[str, Any] = {"role": "assistant", "content": result.content, "refusal": result.refusal}
    if result.tool_calls:
        message["tool_calls"] = result.tool_calls
    if result.reasoning:
        # Clients use either name.
        message |= {"reasoning": result.reasoning, "reasoning_content": result.reasoning}
    if result.reasoning_details:
        message["reasoning_details"] = result.reasoning_details
    if result.images:
        message["images"] = [{"type": "image_url", "image_url": {"url": url}} for url in result.images]
    return message


def delta_of(result: InferenceResult) -> dict[str, Any]:
    """Return a complete answer as one delta, for a stream whose answer is already known."""
    message = {name: value for name, value in message_of(result).items() if value is not None}
    if result.tool_calls:
        message["tool_calls"] = [{"index": index, **call} for index, call in enumerate(result.tool_calls)]
    return {"choices": [_choice(message, finish_reason_of(result), result.logprobs)]}


def finish_reason_of(result: InferenceResult) -> str:
    """Return why the model stopped; never None, which breaks some clients."""
    return result.finish_reason or ("tool_calls" if result.tool_calls else "stop")


def usage_document(result: InferenceResult) -> dict[str, Any]:
    """Return tokens in OpenAI's format, and the cost in dollars in OpenRouter's field."""
    usage = result.usage or Usage(prompt_tokens=0, completion_tokens=0)
    media = media_details(usage)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            **media["prompt"],
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, **media["completion"]},
        "cost": float(result.cost_usd),
    }


def error_of(problem: Problem) -> dict[str, Any]:
    """Return a problem in OpenAI's format."""
    error: dict[str, Any] = {
        "message": problem.message,
        "type": problem.kind,
        "param": problem.param,
        "code": problem.code,
    }
    return {**error, "metadata": dict(problem.metadata)} if problem.metadata else error
