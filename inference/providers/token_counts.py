"""Reading the token counts of a reply in every provider's form.

Providers use different names, and count parts inside or beside the whole. OpenAI counts cached tokens inside the prompt
and reasoning inside the completion; Anthropic counts cache reads and writes beside the prompt; xAI and Gemini count
reasoning beside the completion, Gemini's OpenAI-compatible servers only in the total (November 2026). If there is a
total, it decides: each of its tokens was billed. If the numbers allow several readings, all are returned; the caller,
who knows the prices, takes the costliest.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any, Final, NamedTuple, cast

from tollbook.inference.providers.json_values import as_table
from tollbook.schemas.usage import MAX_TOKEN_COUNT, Usage

Path = tuple[str, ...]
TOTAL_ALONE: Final = "only the total number of tokens is reported"
PART_TOO_LARGE: Final = "a part of the tokens is larger than the whole"

_PROMPT: Final[tuple[Path, ...]] = (
    ("prompt_tokens",), ("input_tokens",), ("promptTokenCount",), ("prompt_token_count",), ("prompt_eval_count",),
    ("inputTokens",), ("inputTokenCount",), ("promptTokens",), ("tokens", "input_tokens"),
    ("billed_units", "input_tokens"),
)  # fmt: skip
_COMPLETION: Final[tuple[Path, ...]] = (
    ("completion_tokens",), ("output_tokens",), ("candidatesTokenCount",), ("candidates_token_count",),
    ("eval_count",), ("outputTokens",), ("outputTokenCount",), ("completionTokens",), ("tokens", "output_tokens"),
    ("billed_units", "output_tokens"),
)  # fmt: skip
_TOTAL: Final[tuple[Path, ...]] = (("total_tokens",), ("totalTokenCount",), ("total_token_count",), ("totalTokens",))
PROMPT_NAMES: Final = tuple(path[0] for path in _PROMPT if len(path) == 1)
COMPLETION_NAMES: Final = tuple(path[0] for path in _COMPLETION if len(path) == 1)
TOTAL_NAMES: Final = tuple(path[0] for path in _TOTAL)
_DETAILS: Final = ("prompt_tokens_details", "input_tokens_details", "prompt_token_details")
_ANTHROPIC_CACHED: Final = "cache_read_input_tokens"
_ANTHROPIC_WRITTEN: Final = "cache_creation_input_tokens"
_CACHED: Final[tuple[Path, ...]] = (
    *((details, name) for details in _DETAILS for name in ("cached_tokens", "cache_read_tokens")),
    (_ANTHROPIC_CACHED,), ("prompt_cache_hit_tokens",), ("cached_tokens",), ("num_cached_tokens",),
    ("cachedContentTokenCount",), ("cached_content_token_count",), ("cacheReadInputTokens",),
    ("cacheReadInputTokenCount",),
)  # fmt: skip
_WRITTEN: Final[tuple[Path, ...]] = (
    *((details, name) for details in _DETAILS for name in ("cache_write_tokens", "cache_creation_tokens")),
    (_ANTHROPIC_WRITTEN,), ("cache_write_tokens",), ("cache_write_input_tokens",), ("cacheWriteInputTokens",),
    ("cacheWriteInputTokenCount",),
)  # fmt: skip
_SPLITS: Final[tuple[Path, ...]] = (
    ("cache_creation",),
    *((details, "cache_creation_token_details") for details in _DETAILS),
)
_REASONING: Final[tuple[Path, ...]] = (
    ("completion_tokens_details", "reasoning_tokens"), ("output_tokens_details", "reasoning_tokens"),
    ("reasoning_tokens",), ("thoughtsTokenCount",), ("thoughts_token_count",),
)  # fmt: skip
_TOOL_PROMPT: Final[tuple[Path, ...]] = (("toolUsePromptTokenCount",), ("tool_use_prompt_token_count",))
_USUAL_NAMES: Final = frozenset(
    {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details", "cost",
     "cost_details", "is_byok"}
)  # fmt: skip
_USUAL_DETAILS: Final = frozenset(
    {"cached_tokens", "cache_write_tokens", "audio_tokens", "video_tokens", "image_tokens", "text_tokens"}
)
_DIGITS: Final = re.compile(r"\s*([0-9]{1,12}|[0-9]{1,3}(,[0-9]{3}){1,3})(\.0*)?\s*", re.ASCII)
_GEMINI: Final = ("promptTokenCount", "prompt_token_count", "candidatesTokenCount", "candidates_token_count")


class _Parts(NamedTuple):
    """Tokens that may be counted inside prompt and completion, or beside them."""

    cached: int
    written: int
    reasoning: int


@dataclass(frozen=True, slots=True)
class TokenReadings:
    """The possible readings of a usage report, the usual reading first; none if it cannot be read.

    `doubt` says which numbers disagree. `has_zero`: the report has zero prompt or completion tokens.
    """

    readings: tuple[Usage, ...] = ()
    doubt: str | None = None
    has_zero: bool = False


def count_of(value: object) -> int | None:
    """Return a count of tokens: a whole number, also `3.0`, or digits in a string (`1,500`); None for anything else."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        value = Decimal(value.replace(",", ""))
    if isinstance(value, Decimal) and value.is_finite() and abs(value) <= MAX_TOKEN_COUNT and value == int(value):
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_TOKEN_COUNT else None


def read_tokens(fields: Mapping[str, Any]) -> TokenReadings:
    """Read a usage object in any provider's form."""
    usual = _usual_form(fields)
    if usual is not None:
        return TokenReadings((usual,), has_zero=not (usual.prompt_tokens and usual.completion_tokens))
    prompts, completions = _values(fields, _PROMPT), _values(fields, _COMPLETION)
    totals = _values(fields, _TOTAL)
    if _is_unreadable(fields, _PROMPT) or _is_unreadable(fields, _COMPLETION):
        return TokenReadings()
    tools = max(_values(fields, _TOOL_PROMPT), default=0)
    total = max(totals, default=None)
    reader = _Reader(fields, total, tools)
    # Gemini leaves out counts of zero.
    is_gemini = any(name in fields for name in _GEMINI)
    if prompts and not completions:
        completions = [total - max(prompts)] if total is not None else [0] if is_gemini else []
    elif completions and not prompts:
        prompts = [total - max(completions)] if total is not None else [0] if is_gemini else []
    elif not prompts and not completions and total is not None:
        readings = (Usage(completion_tokens=total), Usage(prompt_tokens=total))
        return TokenReadings(readings, TOTAL_ALONE, has_zero=not total)
    if not prompts or not completions or min(*prompts, *completions) < 0:
        return TokenReadings()
    return reader.read(prompts, completions)


def _usual_form(fields: Mapping[str, Any]) -> Usage | None:
    """Return the usage of a report in OpenAI's own form without cache writes; None for any other form.

    Nearly every report has this form, and reading it in the general way takes ten times as long.
    """
    if not fields.keys() <= _USUAL_NAMES:
        return None
    of_prompt, of_completion = fields.get("prompt_tokens_details"), fields.get("completion_tokens_details")
    prompt_details, completion_details = as_table(of_prompt), as_table(of_completion)
    if not prompt_details.keys() <= _USUAL_DETAILS or prompt_details.get("cache_write_tokens"):
        return None
    counts = (
        fields.get("prompt_tokens"),
        fields.get("completion_tokens"),
        prompt_details.get("cached_tokens", 0),
        completion_details.get("reasoning_tokens", 0),
    )
    if not all(type(count) is int and 0 <= count <= MAX_TOKEN_COUNT for count in counts):
        return None
    prompt, completion, cached, reasoning = cast(tuple[int, int, int, int], counts)
    if cached > prompt or reasoning > completion or fields.get("total_tokens") != prompt + completion:
        return None
    return _usage(prompt, completion, _Parts(cached, 0, reasoning))


class _Reader:
    """Reads one report. If several names of a number disagree, there are readings with each of the numbers."""

    def __init__(self, fields: Mapping[str, Any], total: int | None, tools: int) -> None:
        self._fields = fields
        self._total = total
        self._tools = tools
        self._splits = [split for path in _SPLITS if (split := _Split.of(_at(fields, path))) is not None]
        # With Anthropic's own names, or Bedrock's, cache reads and writes are counted beside the input.
        has_details = any(as_table(fields.get(name)) for name in _DETAILS)
        has_anthropic_cache = _ANTHROPIC_CACHED in fields or _ANTHROPIC_WRITTEN in fields
        self._is_anthropic = not has_details and (
            ("input_tokens" in fields and has_anthropic_cache) or "inputTokens" in fields or "inputTokenCount" in fields
        )
        self._is_mixed = "prompt_tokens" in fields and has_anthropic_cache and not has_details
        self._is_gemini = "candidatesTokenCount" in fields or "candidates_token_count" in fields

    def read(self, prompts: list[int], completions: list[int]) -> TokenReadings:
        cached = _values(self._fields, _CACHED) or [0]
        written = list(dict.fromkeys([*_values(self._fields, _WRITTEN), *(each.total for each in self._splits)])) or [0]
        reasoning = _values(self._fields, _REASONING) or [0]
        doubts: list[str] = []
        found: list[Usage] = []
        guessed: list[Usage] = []
        for prompt, completion, *parts in product(prompts, completions, cached, written, reasoning):
            exact, possible, doubt = self._readings(prompt + self._tools, completion, _Parts(*parts))
            found += exact
            guessed += possible
            doubts += [doubt] if doubt else []
        usages = list(dict.fromkeys(found or guessed))
        doubt = None if found or not doubts else doubts[0]
        if len(usages) > 1:
            doubt = doubt or "the numbers of tokens can be read in more than one way"
        if any(_is_unreadable(self._fields, paths) for paths in (_CACHED, _WRITTEN, _REASONING, _TOTAL)):
            doubt = "a number of tokens cannot be read"
            if _is_unreadable(self._fields, _WRITTEN):
                usages = [*usages, *(_all_written(usage) for usage in usages)]
        classed = [kind for usage in usages for kind in self._by_lifetime(usage)]
        has_zero = all(not (usage.prompt_tokens and usage.completion_tokens) for usage in usages)
        return TokenReadings(tuple(dict.fromkeys(classed)), doubt, has_zero=has_zero)

    def _readings(self, prompt: int, completion: int, parts: _Parts) -> tuple[list[Usage], list[Usage], str | None]:
        """Return the readings that agree with the total; else the possible readings, and a doubt."""
        possible = dict(_possible(prompt, completion, parts))
        usual = self._usual(possible)
        if self._total is None:
            if usual is not None:
                others = [usage for beside, usage in possible.items() if self._is_mixed and not beside[2]]
                return [usual, *others], [], None
            return [], list(possible.values()), PART_TOO_LARGE
        exact = [usage for usage in possible.values() if usage.total_tokens == self._total]
        if exact:
            # A total of only prompt and completion does not rule out parts that the provider counts beside them.
            native = usual is not None and (self._is_anthropic or self._is_gemini)
            return [*exact, usual] if native and usual is not None else exact, [], None
        below = [usage for usage in possible.values() if usage.total_tokens < self._total]
        if below:
            rest = [grown for usage in below for grown in _grown(usage, self._total)]
            return [], rest, "the total has more tokens than prompt and completion"
        return [], list(possible.values()), "the total has fewer tokens than prompt and completion"

    def _usual(self, possible: Mapping[tuple[bool, bool, bool], Usage]) -> Usage | None:
        """Return the usual reading for the names in the report, if the numbers allow it."""
        beside = (self._is_anthropic, self._is_anthropic, self._is_gemini)
        return possible.get(beside)

    def _by_lifetime(self, usage: Usage) -> list[Usage]:
        """Return a reading with its cache writes by lifetime; if the report has no lifetimes, one reading for each."""
        written = usage.cache_write_tokens
        if not written:
            return [usage]
        if self._splits:
            # Writes without a reported lifetime count as the more expensive kind.
            hours = {max(written - split.minutes, 0) for split in self._splits}
            return [usage.model_copy(update={"cache_write_1h_tokens": min(hour, written)}) for hour in sorted(hours)]
        return [usage, usage.model_copy(update={"cache_write_1h_tokens": written})]


@dataclass(frozen=True, slots=True)
class _Split:
    """Cache writes by lifetime."""

    minutes: int
    hour: int

    @property
    def total(self) -> int:
        return self.minutes + self.hour

    @classmethod
    def of(cls, value: object) -> "_Split | None":
        table = as_table(value)
        minutes, hour = (count_of(table.get(f"ephemeral_{name}_input_tokens")) for name in ("5m", "1h"))
        return None if minutes is None and hour is None else cls(minutes or 0, hour or 0)


def _possible(prompt: int, completion: int, parts: _Parts) -> Iterator[tuple[tuple[bool, bool, bool], Usage]]:
    """Yield each reading without a contradiction, keyed by which parts are beside prompt and completion.

    A part that is zero is yielded both as inside and as beside, with the same usage.
    """
    for beside in product((False, True), (False, True), (False, True)):
        cached_beside, written_beside, reasoning_beside = beside
        inside = (0 if cached_beside else parts.cached) + (0 if written_beside else parts.written)
        if inside > prompt or (not reasoning_beside and parts.reasoning > completion):
            continue
        all_prompt = prompt + parts.cached + parts.written - inside
        all_completion = completion + (parts.reasoning if reasoning_beside else 0)
        if max(all_prompt, all_completion) <= MAX_TOKEN_COUNT:
            yield beside, _usage(all_prompt, all_completion, parts)


def _usage(prompt: int, completion: int, parts: _Parts) -> Usage:
    # Not validated again: every number is a valid count, and each part fits into its whole.
    return Usage.model_construct(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=parts.cached,
        cache_write_tokens=parts.written,
        cache_write_1h_tokens=0,
        reasoning_tokens=parts.reasoning,
    )


def _grown(usage: Usage, total: int) -> tuple[Usage, Usage]:
    """Return two readings with the rest of the total: as completion, and as prompt."""
    rest = total - usage.total_tokens
    return (
        usage.model_copy(update={"completion_tokens": usage.completion_tokens + rest}),
        usage.model_copy(update={"prompt_tokens": usage.prompt_tokens + rest}),
    )


def _all_written(usage: Usage) -> Usage:
    return usage.model_copy(update={"cache_write_tokens": usage.prompt_tokens - usage.cached_tokens})


def _at(fields: Mapping[str, Any], path: Path) -> object:
    value: object = fields
    for name in path:
        value = as_table(value).get(name)
    return value


def _values(fields: Mapping[str, Any], paths: Iterable[Path]) -> list[int]:
    """Return the distinct counts under several names, in their order."""
    counts = (count_of(value) for path in paths if (value := _at(fields, path)) is not None)
    return list(dict.fromkeys(count for count in counts if count is not None))


def _is_unreadable(fields: Mapping[str, Any], paths: Iterable[Path]) -> bool:
    """Whether one of these names has a value that is no count."""
    return any(count_of(value) is None for path in paths if (value := _at(fields, path)) is not None)
