"""Deltas: pieces of an answer, passed on while the model still speaks."""

from collections.abc import Awaitable, Callable
from typing import Any

OnDelta = Callable[[dict[str, Any]], Awaitable[None]]
"""Takes one delta: a chunk of a chat completion in OpenAI's form, `{"choices": [{"index", "delta", "finish_reason"}]}`,
without usage. It is awaited, so that a slow reader slows the provider down."""
