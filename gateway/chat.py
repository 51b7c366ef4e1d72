"""OpenAI's chat completions: the form in which Tollbook's own calls are made, so that little is translated."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tollbook.gateway.apis import Asked
from tollbook.gateway.problems import Problem
from tollbook.gateway.sse import DONE, data_event
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.usage import Usage, media_details


class ChatCompletions:
    """The API of `/v1/chat/completions`."""

    dispensable: frozenset[str] = frozenset()

    def earlier_calls(self, body: Mapping[str, Any]) -> frozenset[str]:  # noqa: ARG002
        """Return none: a request has its whole conversation."""
        return frozenset()

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the request; a text to stop at in a list, since in a task's plain field it may be JSON of one."""
        stop = body.get("stop")
        return {**body, "stop": [stop]} if isinstance(stop, str) and stop else body

    def document(self, result: InferenceResult, asked: Asked) -> dict[str, Any]:
        """Return a completion."""
        choice = {
            "index": 0,
            "message": message_of(result),
            "finish_reason": finish_reason_of(result),
            "logprobs": result.logprobs,
        }
        return {
            **_head(asked, "chat.completion", result.model_used),
            "choices": [choice],
            "system_fingerprint": None,  # OpenRouter's SDK takes no answer without it (1.3.19, November 2026).
            "usage": usage_document(result),
        }

    def events(self, asked: Asked) -> "ChatEvents":
        """Return a writer of chunks."""
        return ChatEvents(asked)

    def error_body(self, problem: Problem, request_id: str) -> dict[str, Any]:  # noqa: ARG002 - OpenAI's has none.
        """Return a refusal in OpenAI's form."""
        return {"error": error_of(problem)}


class ChatEvents:
    """Writes the chunks of one completion. Usage always comes last, since a client that needs it may not ask.

    Why the answer ended is said once its cost is booked: many clients leave at that. Who asks for usage has it in a
    chunk of its own, without choices; others may read `choices[0]` of every chunk, as OpenAI lets them.
    """

    def __init__(self, asked: Asked) -> None:
        options = asked.body.get("stream_options")
        self._asked = asked
        self._wants_usage = isinstance(options, dict) and cast("dict[str, Any]", options).get("include_usage") is True
        self._finish_reason: str | None = None

    def begin(self) -> bytes:
        """Return the first chunk, which names the role."""
        return self._chunk([_choice({"role": "assistant", "content": ""})])

    def delta(self, chunk: Mapping[str, Any]) -> bytes:
        """Return one chunk, without why it ended; none where it says nothing else."""
        choices = [{**each, "finish_reason": None} for each in chunk["choices"]]
        self._finish_reason = next(
            (reason for each in chunk["choices"] if (reason := each.get("finish_reason"))), self._finish_reason
        )
        says_nothing = not any(each["delta"] or each.get("logprobs") for each in choices)
        return b"" if says_nothing else self._chunk(choices)

    def end(self, result: InferenceResult) -> bytes:
        """Return why it ended, and the usage."""
        ended = [_choice({}, self._finish_reason or finish_reason_of(result))]
        head = _head(self._asked, "chat.completion.chunk", result.model_used)
        usage = {"usage": usage_document(result)}
        if not self._wants_usage:
            return data_event({**head, "choices": ended, **usage}) + DONE
        return self._chunk(ended) + data_event({**head, "choices": [], **usage}) + DONE

    def broken(self, problem: Problem) -> bytes:
        """Return an error that every client was seen to notice: a closed socket is taken for an end.

        It comes twice: Vercel's AI SDK (November 2026) takes a chunk with choices for a part of the answer, whatever
        else is in it.
        """
        error = {"error": error_of(problem)}
        chunk = {**_head(self._asked, "chat.completion.chunk"), "choices": [_choice({}, "error")]}
        return data_event({**chunk, **error}) + data_event(error) + DONE

    def _chunk(self, choices: list[Any]) -> bytes:
        return data_event({**_head(self._asked, "chat.completion.chunk"), "choices": choices})


def _head(asked: Asked, kind: str, model: str | None = None) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{asked.call_id}",
        "object": kind,
        "created": asked.created_s,
        "model": model or asked.model,
    }


def _choice(
    delta: Mapping[str, Any], finish_reason: str | None = None, logprobs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}


def message_of(result: InferenceResult) -> dict[str, Any]:
    """Return what the model said as a message."""
    message: dict[str, Any] = {"role": "assistant", "content": result.content, "refusal": result.refusal}
    if result.tool_calls:
        message["tool_calls"] = result.tool_calls
    if result.reasoning:
        # Both names are in use for it.
        message |= {"reasoning": result.reasoning, "reasoning_content": result.reasoning}
    if result.reasoning_details:
        message["reasoning_details"] = result.reasoning_details
    if result.images:
        message["images"] = [{"type": "image_url", "image_url": {"url": url}} for url in result.images]
    return message


def delta_of(result: InferenceResult) -> dict[str, Any]:
    """Return a whole answer as one delta, for a stream of what is known already."""
    message = {name: value for name, value in message_of(result).items() if value is not None}
    if result.tool_calls:
        message["tool_calls"] = [{"index": index, **call} for index, call in enumerate(result.tool_calls)]
    return {"choices": [_choice(message, finish_reason_of(result), result.logprobs)]}


def finish_reason_of(result: InferenceResult) -> str:
    """Return why the model stopped; clients stumble over none."""
    return result.finish_reason or ("tool_calls" if result.tool_calls else "stop")


def usage_document(result: InferenceResult) -> dict[str, Any]:
    """Return tokens in OpenAI's form, and the cost in dollars as OpenRouter has it."""
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
    """Return a problem in OpenAI's form."""
    error: dict[str, Any] = {
        "message": problem.message,
        "type": problem.kind,
        "param": problem.param,
        "code": problem.code,
    }
    return {**error, "metadata": dict(problem.metadata)} if problem.metadata else error
