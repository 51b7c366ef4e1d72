"""OpenAI's embeddings: vectors of texts, never streamed."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tollbook.gateway.apis import ApiRequest
from tollbook.gateway.chat import ChatCompletions, ChatEvents, usage_document
from tollbook.gateway.problems import invalid
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import MAX_INPUTS


class Embeddings(ChatCompletions):
    """The API of `/v1/embeddings`. Its refusals have the format of chat completions."""

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the request. Errors: Problem (400) if it has no texts, too many, or asks for a stream."""
        given = body.get("input")
        if given in (None, "", []):
            raise invalid(
                f"'input' is {'missing' if given is None else 'empty'}: give a text, or a list of texts", param="input"
            )
        if isinstance(given, list) and (texts := len(cast("list[object]", given))) > MAX_INPUTS:
            raise invalid(f"'input' has {texts:,} texts, at most {MAX_INPUTS}: send several requests", param="input")
        if body.get("stream"):
            raise invalid("embeddings cannot be streamed", param="stream")
        # As a list: a task's plain text that is a JSON list would be parsed as a list of texts.
        return {**body, "input": [given]} if isinstance(given, str) else body

    def document(self, result: InferenceResult, api_request: ApiRequest) -> dict[str, Any]:
        """Return the vectors in the order of the texts."""
        vectors = enumerate(result.embeddings or ())
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in vectors],
            "model": result.model_used or api_request.model,
            "usage": {
                name: value
                for name, value in usage_document(result).items()
                if name in ("prompt_tokens", "total_tokens", "cost")
            },
        }

    def events(self, api_request: ApiRequest) -> ChatEvents:
        """Never called: `chat_fields` refuses a request for a stream."""
        raise NotImplementedError(api_request.call_id)
