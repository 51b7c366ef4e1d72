"""Counts the input tokens of a request of Anthropic's Messages.

Anthropic's tokenizer is not public, and the model may be any provider's. So the count is an estimate, unless the
messages are plain texts and the model's own tokenizer is known.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from tollbook.gateway.messages.request import countable_fields
from tollbook.gateway.token_estimate import estimate_tokens
from tollbook.inference.tokenizers import Counter
from tollbook.schemas.messages import FilePart, MediaPart, Message
from tollbook.schemas.tasks import task_from_fields

# For OpenAI's models: the role and the markers around each message, and those of the answer (OpenAI's cookbook, "How to
# count tokens with tiktoken", November 2026). Other models have about as many.
_TOKENS_PER_MESSAGE: Final = 4
_TOKENS_PER_REQUEST: Final = 3
# Instructions that Anthropic puts before tools: 313 to 346 tokens (docs, "Tool use", November 2026).
_TOKENS_FOR_TOOLS: Final = 330
# An image is scaled down to 1,568 pixels (docs, "Vision"). A page of a PDF has 1,500 to 3,000 tokens (docs, "PDF
# support"), and usually about 50 KB.
_TOKENS_PER_IMAGE: Final = 1_600
_MIN_TOKENS_PER_FILE: Final = 3_000
_CHARACTERS_PER_FILE_TOKEN: Final = 25
_COUNTED_PARAMETERS: Final = ("tools", "response_format")


def count_tokens(body: Mapping[str, Any], counter: Counter | None = None) -> tuple[int, bool]:
    """Return the input tokens of a request, and whether that is an estimate.

    `counter` is the model's own tokenizer. Errors: InvalidTask, which names the field.
    """
    fields = {name: value for name, value in countable_fields(body).items() if name != "stream"}
    task = task_from_fields({**fields, "task": "count-tokens", "user_id": "anonymous"})
    told = {name: value for name, value in task.parameters().items() if name in _COUNTED_PARAMETERS}
    is_estimate = bool(told)
    tokens = _TOKENS_PER_REQUEST + (_TOKENS_FOR_TOOLS if "tools" in told else 0)
    tokens += _tokens_of_json(told) if told else 0
    for message in task.chat():
        counted = None if counter is None else _counted(message, counter)
        is_estimate |= counted is None
        tokens += _TOKENS_PER_MESSAGE + (_estimated(message) if counted is None else counted)
    return tokens, is_estimate


def _counted(message: Message, counter: Counter) -> int | None:
    """Return the exact tokens of a message that is one plain text; None for any other message."""
    if message.media_parts or message.structures or len(message.texts) != 1:
        return None
    return counter(message.texts[0])


def _estimated(message: Message) -> int:
    tokens = sum(estimate_tokens(text) for text in message.texts)
    tokens += sum(map(_tokens_of_medium, message.media_parts))
    return tokens + (_tokens_of_json(message.structures) if message.structures else 0)


def _tokens_of_medium(part: MediaPart) -> int:
    if not isinstance(part, FilePart):
        return _TOKENS_PER_IMAGE
    return max(_MIN_TOKENS_PER_FILE, len(part.file.file_data or "") // _CHARACTERS_PER_FILE_TOKEN)


def _tokens_of_json(value: object) -> int:
    return estimate_tokens(json.dumps(value, ensure_ascii=False))
