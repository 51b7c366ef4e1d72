"""OpenAI's own API, and Azure's: chat completions that refuse unknown fields."""

from collections.abc import Mapping
from typing import Any, Final, cast

from tollbook.inference.attempts import ChatRequest
from tollbook.inference.providers.adapter import Question
from tollbook.inference.providers.compatible import ChatCompletions, without
from tollbook.schemas.messages import Message
from tollbook.schemas.policy import Dialect

# Fields of other servers' replies that OpenAI refuses in requests.
_NOT_FOR_OPENAI: Final = (
    "reasoning", "reasoning_content", "reasoning_details", "thinking_blocks", "cache_control", "index",
)  # fmt: skip


class OpenAI(ChatCompletions):
    """The dialect `openai`."""

    dialect: Dialect = "openai"
    _id_headers = ("x-request-id", "apim-request-id")

    def cost_question(self, generation_id: str) -> Question | None:  # noqa: ARG002
        """Return None: OpenAI cannot be asked what a request cost."""
        return None

    def _is_empty(self, message: Message) -> bool:
        return message.is_empty

    def _message(self, message: Message) -> dict[str, Any]:
        fields = without(super()._message(message), _NOT_FOR_OPENAI)
        if isinstance(fields["content"], list):
            parts = cast("list[dict[str, Any]]", fields["content"])
            fields["content"] = [without(part, _NOT_FOR_OPENAI) for part in parts]
        if "tool_calls" in fields:
            fields["tool_calls"] = [without(call, ("extra_content",)) for call in fields["tool_calls"]]
        return fields

    def _preferences(self, request: ChatRequest) -> Mapping[str, Any]:  # noqa: ARG002
        # Without this, the project's setting decides, and `priority` processing costs twice as much (2026).
        return {"service_tier": "default"}  # G1

    def _parameters(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Convert OpenRouter's parameters to OpenAI's. OpenAI's cache needs no marks."""
        changed = without(parameters, ("reasoning", "cache_control"))
        effort = parameters.get("reasoning", {}).get("effort")
        if effort is not None:
            changed.setdefault("reasoning_effort", effort)
        if changed.get("tool_choice") == "any":
            changed["tool_choice"] = "required"  # Mistral calls it `any`.
        if "tools" in changed:
            changed["tools"] = [without(tool, ("cache_control",)) for tool in changed["tools"]]
        return changed
