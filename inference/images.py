"""The most tokens that one image can have, by model, as published by the providers.

An image for a model that is not listed is refused (G8). The numbers are for the largest image and the highest detail.
Each comment names the source, checked in November 2026.
"""

import re
from typing import Final

from tollbook.inference.errors import PriceUnknown

_MAX_TOKENS: Final[tuple[tuple[str, int], ...]] = (
    # platform.openai.com/docs/guides/images-vision: a base and at most 8 tiles of 512 pixels; mini bills more tokens.
    (r"gpt-4o-mini", 2_833 + 8 * 5_667),
    (r"(chat)?gpt-4o|gpt-4\.5|gpt-4-turbo", 85 + 8 * 170),
    (r"o1|o3", 75 + 8 * 150),
    # At most 1,536 patches of 32 pixels, times the model's factor, rounded up.
    (r"gpt-4\.1-mini", -(-1_536 * 162 // 100)),
    (r"gpt-4\.1-nano", -(-1_536 * 246 // 100)),
    (r"o4-mini", -(-1_536 * 172 // 100)),
    (r"gpt-5-mini", -(-1_536 * 162 // 100)),
    (r"gpt-5-nano", -(-1_536 * 246 // 100)),
    (r"gpt-4\.1", 85 + 8 * 170),
    (r"gpt-5(-chat)?", 70 + 8 * 140),
    # 10,000 patches at the detail "original", times 1.2.
    (r"gpt-5\.[45](-pro)?", 12_000),
    # platform.claude.com/docs/en/build-with-claude/vision: about 1,600 tokens; since Opus 4.7, 4,784.
    (r"claude-3([.-]\d)?(-(sonnet|opus|haiku))?", 2_048),
    (r"claude-(opus|sonnet|haiku)-4([.-][0-6])?", 2_048),
    (r"claude-(opus|sonnet|haiku)-(4[.-][78]|5([.-][05])?)", 5_120),
    # ai.google.dev/gemini-api/docs/tokens: tiles of 258 tokens, at most 16 at OpenRouter; Gemini 3: 2,240 tokens at the
    # highest resolution.
    (r"gemini-2\.[05](-flash|-pro)(-lite)?", 16 * 258),
    (r"gemini-3(\.\d)?(-flash|-pro)(-lite)?", 2_240),
    # docs.x.ai: six tiles of 448 pixels and the whole, 256 tokens each.
    (r"grok-(2-vision|4)", 7 * 256),
)
# A name with a date, "latest" or "preview" at its end is the same model.
_VERSION: Final = r"(-latest|-preview|-\d{4}-\d{2}-\d{2}|-\d{4,8}|-v\d+)*(:[a-z]+)?"
_PATTERNS: Final = tuple((re.compile(f"(?:{name}){_VERSION}"), tokens) for name, tokens in _MAX_TOKENS)


def image_tokens_at_most(model: str) -> int:
    """Return how many tokens one image can have at most. Errors: PriceUnknown for a model without a known limit."""
    name = model.lower().rsplit("/", 1)[-1]
    found = next((tokens for pattern, tokens in _PATTERNS if pattern.fullmatch(name)), None)
    if found is None:
        raise PriceUnknown(
            f"a call with images to {model} has no upper bound: how many tokens an image can have is not known",
            {"model": model},
        )
    return found
