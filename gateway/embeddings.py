"""OpenAI's embeddings: vectors of texts, whole and never streamed."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tollbook.gateway.apis import Asked
from tollbook.gateway.chat import ChatCompletions, ChatEvents, usage_document
from tollbook.gateway.problems import invalid
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import MAX_INPUTS


class Embeddings(ChatCompletions):
    """The API of `/v1/embeddings`. Its refusals have the form of chat completions."""

    def chat_fields(self, body: Mapping[str, Any], earlier: Sequence[InferenceResult]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the request, which must have texts. Errors: Problem (400)."""
        given = body.get("input")
        if given in (None, "", []):
            raise invalid(
                f"'input' is {'missing' if given is None else 'empty'}: give a text, or a list of texts", param="input"
            )
        if isinstance(given, list) and (texts := len(cast("list[object]", given))) > MAX_INPUTS:
            raise invalid(
                f"'input' has {texts:,} texts; a request takes at most {MAX_INPUTS}: send several", param="input"
            )
        if body.get("stream"):
            raise invalid("embeddings are not streamed", param="stream")
        # In a list, a text that is JSON is a text all the same: in a task's plain field it would be a list of texts.
        return {**body, "input": [given]} if isinstance(given, str) else body

    def document(self, result: InferenceResult, asked: Asked) -> dict[str, Any]:
        """Return the vectors in the order of the texts."""
        vectors = enumerate(result.embeddings or ())
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in vectors],
            "model": result.model_used or asked.model,
            "usage": {
                name: value
                for name, value in usage_document(result).items()
                if name in ("prompt_tokens", "total_tokens", "cost")
            },
        }

    def events(self, asked: Asked) -> ChatEvents:
        """There are none: a request for a stream is refused."""
        raise NotImplementedError(asked.call_id)
