"""Reading the tokens of images, sound and videos in a usage report, in every provider's form.

OpenAI and OpenRouter report them in details (`prompt_tokens_details.audio_tokens`), Gemini in lists by modality
(`promptTokensDetails`). They are always a part of the prompt or the completion (November 2026).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from tollbook.inference.providers.json_values import as_table, tables_of
from tollbook.inference.providers.token_counts import count_of
from tollbook.schemas.usage import MediaUsage, Usage

_OF_PROMPT: Final = (
    "prompt_tokens_details", "input_tokens_details", "input_token_details", "prompt_token_details",
    "promptTokensDetails", "inputTokensDetails",
)  # fmt: skip
_OF_COMPLETION: Final = (
    "completion_tokens_details", "output_tokens_details", "output_token_details", "completion_token_details",
    "candidatesTokensDetails", "candidates_tokens_details", "responseTokensDetails", "outputTokensDetails",
)  # fmt: skip
_PARTS: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "prompt_image_tokens": (_OF_PROMPT, "image"),
    "prompt_audio_tokens": (_OF_PROMPT, "audio"),
    "prompt_video_tokens": (_OF_PROMPT, "video"),
    "completion_image_tokens": (_OF_COMPLETION, "image"),
    "completion_audio_tokens": (_OF_COMPLETION, "audio"),
}
_COUNTS: Final = ("tokenCount", "token_count", "tokens")


def media_counts(fields: Mapping[str, Any]) -> dict[str, int]:
    """Return the reported tokens of media, by their name in `MediaUsage`, without zeros."""
    found = {name: max(_counts(fields, paths, kind), default=0) for name, (paths, kind) in _PARTS.items()}
    return {name: count for name, count in found.items() if count}


def with_media(usage: Usage, counts: Mapping[str, int]) -> tuple[MediaUsage, bool]:
    """Return a usage with its tokens of media, and whether they fit into its totals, as they should.

    If there are more media tokens than the total, they are added to it, since a reported token was billed (G3).
    """
    prompt, completion = (
        sum(count for name, count in counts.items() if name.startswith(whole)) for whole in ("prompt", "completion")
    )
    fits = prompt <= usage.prompt_tokens and completion <= usage.completion_tokens
    wholes: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens + (prompt if prompt > usage.prompt_tokens else 0),
        "completion_tokens": usage.completion_tokens + (completion if completion > usage.completion_tokens else 0),
    }
    values: dict[str, Any] = {**dict(usage), **wholes, **counts}
    return MediaUsage.model_construct(None, **values), fits


def _counts(fields: Mapping[str, Any], paths: Iterable[str], kind: str) -> Iterable[int]:
    for path in paths:
        details = fields.get(path)
        if not details:
            continue
        count = count_of(as_table(details).get(f"{kind}_tokens"))
        if count is not None:
            yield count
        of_kind = [each for each in tables_of(details) if str(each.get("modality")).lower() == kind]
        yield sum(count_of(each.get(name)) or 0 for each in of_kind for name in _COUNTS)
