"""Scenarios: replies that the stand-in can play, with the outcomes, usage reports and errors of real providers.

Each follows a reply that a provider was seen to send (November 2026), and states the outcome in Tollbook. A scenario
bills the tokens of the request at the list price, split into the kinds that its usage report names, in whatever form;
so the book has the true cost.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from tollbook.standin.prices import charge_nanousd, usd_literal

Booked = Literal["reported", "priced", "doubted", "assumed", "nothing"]
"""How the cost is booked: as `reported`; `priced` from the usage; `doubted`, by the more expensive reading of an
inconsistent usage; `assumed` at the upper bound; or `nothing`, since nothing was charged."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one request. A quarter of the prompt is read from a cache, and a quarter is written to it."""

    model: str
    prompt: int
    completion: int
    cached: int = 0
    written: int = 0
    reasoning: int = 0

    @classmethod
    def of(cls, model: str, prompt: int, completion: int) -> "Tokens":
        """Split the tokens of a request into kinds."""
        return cls(model, prompt, completion, prompt // 4, prompt // 4, completion // 2)

    @property
    def fresh(self) -> int:
        """Tokens of the prompt that are neither read from a cache nor written to one."""
        return self.prompt - self.cached - self.written

    @property
    def text(self) -> int:
        """Tokens of the completion without reasoning."""
        return self.completion - self.reasoning

    @property
    def total(self) -> int:
        """All tokens."""
        return self.prompt + self.completion

    @property
    def charge_nanousd(self) -> int:
        """Their cost by the price list, nano-dollars."""
        return charge_nanousd(
            self.model,
            prompt_tokens=self.prompt,
            completion_tokens=self.completion,
            cached_tokens=self.cached,
            written_tokens=self.written,
        )


Choice = dict[str, Any]
Usage = Callable[[Tokens], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One reply. `result` is the task's outcome: `done`, or an error code.

    `is_asked_again`: whether Tollbook retries the same model. `kinds` are the kinds of tokens that are billed beside
    plain ones. `changes` are applied to the whole document, `wrap` to its bytes.
    """

    group: Literal["outcome", "usage", "form", "error"]
    meaning: str
    result: str = "done"
    booked: Booked = "reported"
    status: int = 200
    choice: Choice | None = None
    usage: Usage | None = None
    kinds: tuple[Literal["cached", "written", "reasoning"], ...] = ()
    changes: dict[str, Any] | None = None
    wrap: Callable[[bytes], bytes] | None = None
    error: Any = None
    is_asked_again: bool = False

    @property
    def is_charged(self) -> bool:
        """Whether the provider charges for the request."""
        return self.booked != "nothing" and self.error is None

    def tokens(self, model: str, prompt: int, completion: int) -> Tokens:
        """Return the tokens that are billed."""
        whole = Tokens.of(model, prompt, completion)
        none = {name: 0 for name in ("cached", "written", "reasoning") if name not in self.kinds}
        return replace(whole, **none)

    def body(self, tokens: Tokens, generation_id: str, text: str) -> bytes:
        """Return the reply's body."""
        if self.error is not None:
            return self.error if isinstance(self.error, bytes) else json.dumps(self.error).encode()
        choice = self.choice or _said(text)
        document: dict[str, Any] = {
            "id": generation_id,
            "object": "chat.completion",
            "model": tokens.model,
            "choices": [{"index": 0, **choice}],
            "usage": (self.usage or _openai)(tokens) | (_COST if self.booked == "reported" and not self.usage else {}),
            **(self.changes or {}),
        }
        # A float could not hold the cost exactly, so it is inserted as text.
        body = json.dumps(document).replace('"<gemini>"', json.dumps(_gemini(tokens)))
        for mark, nanousd in ((_COST_MARK, tokens.charge_nanousd), (_FEE_MARK, _fee(tokens))):
            body = body.replace(f'"{mark}"', usd_literal(nanousd))
        body = body.replace(f'"{_UPSTREAM_MARK}"', usd_literal(tokens.charge_nanousd - _fee(tokens)))
        return self.wrap(body.encode()) if self.wrap else body.encode()


_COST_MARK, _FEE_MARK, _UPSTREAM_MARK = "<cost>", "<fee>", "<upstream>"
_COST: Final = {"cost": _COST_MARK}
_CALL: Final = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"id": 7}'}}


_THOUGHT: Final = "Seven must be looked up first."
_CLAUDE: Final = "anthropic-claude-v1"
_DETAILS: Final = [
    {"type": "reasoning.text", "text": _THOUGHT, "signature": "c2lnbmVkIHRob3VnaHQ=", "format": _CLAUDE, "index": 0},
    {"type": "reasoning.encrypted", "data": "ZW5jcnlwdGVkIHRob3VnaHQ=", "format": _CLAUDE, "index": 1},
]
_TEXT: Final = {"type": "text", "text": "ok"}


def fee_of_own_key(charge_nanousd: int) -> int:
    """Return a router's fee for the use of the customer's own key: a twentieth of the charge."""
    return charge_nanousd // 20


def _fee(tokens: Tokens) -> int:
    return fee_of_own_key(tokens.charge_nanousd)


def _said(content: object, finish: str | None = "stop", **message: Any) -> Choice:
    return {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}


def _openai(tokens: Tokens) -> dict[str, Any]:
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.total,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
        "completion_tokens_details": {"reasoning_tokens": tokens.reasoning},
    }


def _plain(tokens: Tokens, **more: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion, "total_tokens": tokens.total}
    return {**counts, **more}


def _nothing(_: Tokens) -> dict[str, Any]:
    return {}


def _zeros(tokens: Tokens) -> dict[str, Any]:
    return dict.fromkeys(_plain(tokens), 0)


def _xai(tokens: Tokens) -> dict[str, Any]:
    return _openai(tokens) | {"completion_tokens": tokens.text}


def _anthropic(tokens: Tokens, **more: Any) -> dict[str, Any]:
    return {
        "input_tokens": tokens.fresh,
        "output_tokens": tokens.completion,
        "cache_read_input_tokens": tokens.cached,
        "cache_creation_input_tokens": tokens.written,
        **more,
    }


def _gemini(tokens: Tokens) -> dict[str, Any]:
    return {
        "promptTokenCount": tokens.prompt,
        "candidatesTokenCount": tokens.text,
        "thoughtsTokenCount": tokens.reasoning,
        "cachedContentTokenCount": tokens.cached,
        "totalTokenCount": tokens.total,
    }


def _stream(body: bytes) -> bytes:
    """Return a completion as an event stream of three parts."""
    document = json.loads(body)
    usage, choice = document.pop("usage"), document.pop("choices")[0]
    text = choice["message"]["content"]
    deltas = [{"role": "assistant", "content": text[:9]}, {"content": text[9:]}]
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices[-1]["finish_reason"] = choice["finish_reason"]
    parts = [document | {"choices": [each]} for each in choices] + [document | {"choices": [], "usage": usage}]
    events = [f"data: {json.dumps(part)}\n\n" for part in parts]
    return "".join([": PROCESSING\n\n", *events, "data: [DONE]\n\n"]).encode()


def _error(code: object, message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, **more}}


_NO_CREDIT: Final = _error(402, "the account has no credit left", metadata={"limit_source": "openrouter_credits"})

SCENARIOS: Final[dict[str, Scenario]] = {
    "reasoning_used_up_limit": Scenario(
        group="outcome", meaning="`content` is null, `finish_reason` is `length`: reasoning used up the limit.",
        result="OUTPUT_LIMIT_REACHED", choice=_said(None, "length", reasoning="..."), kinds=("reasoning",),
    ),
    "limit_before_text": Scenario(
        group="outcome", meaning="Empty text, and Gemini's word for the limit, `MAX_TOKENS`.",
        result="OUTPUT_LIMIT_REACHED", choice=_said("", "MAX_TOKENS"),
    ),
    "text_cut": Scenario(
        group="outcome", meaning="A part of a text, `finish_reason` is `length`.", choice=_said("half a sen", "length"),
    ),
    "answer_filtered": Scenario(
        group="outcome", meaning="Empty text, `finish_reason` is `content_filter`.", result="CONTENT_FILTERED",
        choice=_said("", "content_filter"),
    ),
    "text_filtered": Scenario(
        group="outcome", meaning="A part of a text, `finish_reason` is `content_filter`.",
        choice=_said("half a sen", "content_filter"),
    ),
    "recitation": Scenario(
        group="outcome", meaning="No message, and `content_filter: RECITATION` (Gemini).", result="CONTENT_FILTERED",
        choice={"finish_reason": "content_filter: RECITATION"},
    ),
    "prompt_blocked": Scenario(
        group="outcome", meaning="No choice, and a `promptFeedback` with a `blockReason` (Gemini).",
        result="CONTENT_FILTERED", changes={"choices": [], "promptFeedback": {"blockReason": "SAFETY"}},
    ),
    "refusal": Scenario(
        group="outcome", meaning="`refusal` has the model's words, `content` is null.",
        choice=_said(None, refusal="I cannot help with that."),
    ),
    "refusal_part": Scenario(
        group="outcome", meaning="`content` is a list with a part of type `refusal`.",
        choice=_said([{"type": "refusal", "refusal": "I cannot help with that."}]),
    ),
    "image_made": Scenario(
        group="outcome", meaning="`images` has an image that the model made, and there is no text.",
        choice=_said("", images=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
    ),
    "tool_calls": Scenario(
        group="outcome", meaning="Tool calls, `content` is null.", choice=_said(None, "tool_calls", tool_calls=[_CALL]),
    ),
    "signed_thinking": Scenario(
        group="outcome", meaning="A tool call, and reasoning that is to come back: signed, and encrypted.",
        choice=_said(None, "tool_calls", reasoning=_THOUGHT, reasoning_details=_DETAILS, tool_calls=[_CALL]),
        kinds=("reasoning",),
    ),
    "tool_calls_cut": Scenario(
        group="outcome", meaning="A tool call that the limit cut off.",
        choice=_said(None, "length", tool_calls=[{**_CALL, "function": {"name": "look_up", "arguments": '{"id"'}}]),
    ),
    "function_call": Scenario(
        group="outcome", meaning="OpenAI's older `function_call`.",
        choice=_said(None, "function_call", function_call=_CALL["function"]),
    ),
    "tool_use_part": Scenario(
        group="outcome", meaning="`content` is a list with a part of type `tool_use` (Anthropic).",
        choice=_said([{"type": "tool_use", "id": "t1", "name": "look_up", "input": {"id": 7}}], "tool_use"),
    ),
    "nothing_said": Scenario(
        group="outcome", meaning="`content` is null, `finish_reason` is `stop`.", result="INFERENCE_FAILED",
        choice=_said(None),
    ),
    "reasoning_alone": Scenario(
        group="outcome", meaning="Reasoning without a text, `finish_reason` is `stop` (DeepSeek).",
        result="INFERENCE_FAILED", choice=_said("", reasoning_content="..."), kinds=("reasoning",),
    ),
    "white_space": Scenario(
        group="outcome", meaning="White space alone.", result="INFERENCE_FAILED", choice=_said(" \n"),
    ),
    "no_choices": Scenario(
        group="outcome", meaning="An empty list of choices, with a usage (LiteLLM before Gemini).",
        result="INFERENCE_FAILED", changes={"choices": []},
    ),
    "nothing_for_nothing": Scenario(
        group="outcome", meaning="No text, and a cost of zero: OpenRouter bills no empty reply.",
        result="INFERENCE_FAILED", booked="nothing", choice=_said(""), is_asked_again=True,
        usage=lambda tokens: _plain(tokens, cost=0),
    ),
    "text_parts": Scenario(
        group="form", meaning="`content` is a list of parts, of types `text` and `output_text`.",
        choice=_said([{"type": "text", "text": "two "}, {"type": "output_text", "text": "parts"}]),
    ),
    "thinking_parts": Scenario(
        group="form", meaning="`content` is a list with a part of type `thinking` (Mistral).", kinds=("reasoning",),
        choice=_said([{"type": "thinking", "thinking": [_TEXT]}, _TEXT]),
    ),
    "byte_order_mark": Scenario(
        group="form", meaning="JSON after a byte-order mark.", wrap=lambda body: b"\xef\xbb\xbf" + body,
    ),
    "kept_alive": Scenario(
        group="form", meaning="JSON after white space and comments that kept the connection alive.",
        wrap=lambda body: b"\n  \n: OPENROUTER PROCESSING\n\n: OPENROUTER PROCESSING\n\n" + body,
    ),
    "event_stream": Scenario(
        group="form", meaning="An event stream that nobody asked for, with its usage at the end.", wrap=_stream,
    ),
    "cached": Scenario(
        group="usage", meaning="OpenAI: cached tokens and reasoning are parts.", booked="priced", usage=_openai,
        kinds=("cached", "reasoning"),
    ),
    "bare": Scenario(
        group="usage", meaning="vLLM, Ollama: details are null.", booked="priced",
        usage=lambda tokens: _plain(tokens, prompt_tokens_details=None),
    ),
    "hit_and_miss": Scenario(
        group="usage", meaning="DeepSeek: `prompt_cache_hit_tokens`, `prompt_cache_miss_tokens`.", booked="priced",
        kinds=("cached",),
        usage=lambda tokens: _plain(
            tokens, prompt_cache_hit_tokens=tokens.cached, prompt_cache_miss_tokens=tokens.fresh
        ),
    ),
    "num_cached": Scenario(
        group="usage", meaning="Mistral: `num_cached_tokens`.", booked="priced", kinds=("cached",),
        usage=lambda tokens: _plain(tokens, num_cached_tokens=tokens.cached),
    ),
    "reasoning_beside": Scenario(
        group="usage", meaning="xAI: reasoning is counted beside the completion.", booked="priced", usage=_xai,
        kinds=("reasoning",),
    ),
    "reasoning_in_total": Scenario(
        group="usage", meaning="Gemini's compatible server: reasoning is only in the total.", booked="doubted",
        kinds=("reasoning",),
        usage=lambda tokens: _plain(tokens) | {"completion_tokens": tokens.text},
    ),
    "gemini_names": Scenario(
        group="usage", meaning="Gemini's names: `promptTokenCount`, `thoughtsTokenCount`.", booked="priced",
        usage=_gemini, kinds=("cached", "reasoning"),
    ),
    "usage_metadata": Scenario(
        group="usage", meaning="The same as `usageMetadata`, without `usage`.", booked="priced",
        usage=_nothing, changes={"usageMetadata": "<gemini>"}, kinds=("cached", "reasoning"),
    ),
    "anthropic_names": Scenario(
        group="usage", meaning="Anthropic's names: cache reads and writes are beside the input, without a total.",
        booked="priced", usage=_anthropic, kinds=("cached", "written"),
    ),
    "anthropic_lifetimes": Scenario(
        group="usage", meaning="The same, with writes by lifetime (`ephemeral_5m_input_tokens`).", booked="priced",
        kinds=("cached", "written"),
        usage=lambda tokens: _anthropic(
            tokens, cache_creation={"ephemeral_5m_input_tokens": tokens.written, "ephemeral_1h_input_tokens": 0}
        ),
    ),
    "bedrock_names": Scenario(
        group="usage", meaning="Bedrock's names: `inputTokens`, with cache reads and writes beside them.",
        booked="priced", kinds=("cached", "written"),
        usage=lambda tokens: {
            "inputTokens": tokens.fresh,
            "outputTokens": tokens.completion,
            "totalTokens": tokens.total,
            "cacheReadInputTokens": tokens.cached,
            "cacheWriteInputTokens": tokens.written,
        },
    ),
    "gemini_snake_case": Scenario(
        group="usage", meaning="Gemini's names in snake case: `prompt_token_count`.", booked="priced",
        kinds=("cached", "reasoning"),
        usage=lambda tokens: {
            "prompt_token_count": tokens.prompt,
            "candidates_token_count": tokens.text,
            "thoughts_token_count": tokens.reasoning,
            "cached_content_token_count": tokens.cached,
            "total_token_count": tokens.total,
        },
    ),
    "ollama_names": Scenario(
        group="usage", meaning="Ollama's names: `prompt_eval_count`, `eval_count`.", booked="priced",
        usage=lambda tokens: {"prompt_eval_count": tokens.prompt, "eval_count": tokens.completion},
    ),
    "responses_names": Scenario(
        group="usage", meaning="OpenAI's responses: `input_tokens`, and details as parts.", booked="priced",
        kinds=("cached", "reasoning"),
        usage=lambda tokens: {
            "input_tokens": tokens.prompt,
            "output_tokens": tokens.completion,
            "total_tokens": tokens.total,
            "input_tokens_details": {"cached_tokens": tokens.cached},
            "output_tokens_details": {"reasoning_tokens": tokens.reasoning},
        },
    ),
    "both_names": Scenario(
        group="usage", meaning="LiteLLM: OpenAI's and Anthropic's names for the same tokens.", booked="priced",
        kinds=("cached", "written"),
        usage=lambda tokens: _plain(
            tokens, cache_read_input_tokens=tokens.cached, cache_creation_input_tokens=tokens.written,
            prompt_tokens_details={"cached_tokens": tokens.cached, "cache_creation_tokens": tokens.written},
        ),
    ),
    "writes_beside": Scenario(
        group="usage", meaning="Cache writes are beside the prompt, as the total shows.", booked="priced",
        kinds=("written",),
        usage=lambda tokens: _plain(tokens, prompt_tokens_details={"cache_write_tokens": tokens.written})
        | {"prompt_tokens": tokens.fresh},
    ),
    "floats": Scenario(
        group="usage", meaning="Counts such as `28.0`.", booked="priced",
        usage=lambda tokens: {name: float(count) for name, count in _plain(tokens).items()},
    ),
    "digits": Scenario(
        group="usage", meaning='Counts such as `"28"`.', booked="priced",
        usage=lambda tokens: {name: str(count) for name, count in _plain(tokens).items()},
    ),
    "total_alone": Scenario(
        group="usage", meaning="Only the total.", booked="doubted", usage=lambda tokens: {"total_tokens": tokens.total},
    ),
    "total_too_small": Scenario(
        group="usage", meaning="The total is less than prompt and completion.", booked="doubted",
        usage=lambda tokens: _plain(tokens) | {"total_tokens": tokens.prompt},
    ),
    "parts_too_large": Scenario(
        group="usage", meaning="More cached tokens than the prompt has.", booked="doubted", kinds=("cached",),
        usage=lambda tokens: _openai(tokens) | {"prompt_tokens_details": {"cached_tokens": 4 * tokens.prompt}},
    ),
    "names_disagree": Scenario(
        group="usage", meaning="Two names for cached tokens, with different counts.", booked="doubted",
        kinds=("cached",),
        usage=lambda tokens: _plain(
            tokens, cache_read_input_tokens=tokens.cached, prompt_tokens_details={"cached_tokens": 0}
        ),
    ),
    "nothing_counted": Scenario(
        group="usage", meaning="All counts are zero, although there is a text.", booked="assumed",
        usage=_zeros,
    ),
    "own_key": Scenario(
        group="usage", meaning="OpenRouter with an own key: `cost` is its fee, the provider bills the rest.",
        usage=lambda tokens: _plain(
            tokens, is_byok=True, cost=_FEE_MARK, cost_details={"upstream_inference_cost": _UPSTREAM_MARK}
        ),
    ),
    "own_key_without_flag": Scenario(
        group="usage", meaning="The same without `is_byok`: the provider's bill is above `cost`.",
        usage=lambda tokens: _plain(
            tokens, cost=_FEE_MARK, cost_details={"upstream_inference_cost": _UPSTREAM_MARK}
        ),
    ),
    "routers_key": Scenario(
        group="usage", meaning="OpenRouter's key: the provider's charge is in the cost, and is not added.",
        usage=lambda tokens: _plain(tokens, cost=_COST_MARK, cost_details={"upstream_inference_cost": _COST_MARK}),
    ),
    "ticks": Scenario(
        group="usage", meaning="xAI: the cost in ticks, 10,000,000,000 to the dollar.",
        usage=lambda tokens: _xai(tokens) | {"cost_in_usd_ticks": 10 * tokens.charge_nanousd}, kinds=("reasoning",),
    ),
    "cost_by_parts": Scenario(
        group="usage", meaning="Perplexity: the cost is an object with a `total_cost`.",
        usage=lambda tokens: _plain(tokens, cost={"input_tokens_cost": 0, "total_cost": _COST_MARK}),
    ),
    "out_of_credit": Scenario(
        group="error", meaning="402: the account has no credit left.", result="INFERENCE_FAILED", booked="nothing",
        status=402, error=_NO_CREDIT,
    ),
    "quota_used_up": Scenario(
        group="error", meaning="429 with `insufficient_quota` (OpenAI): no credit, and not too many requests.",
        result="INFERENCE_FAILED", booked="nothing", status=429,
        error=_error("insufficient_quota", "You exceeded your current quota", type="insufficient_quota"),
    ),
    "context_too_long": Scenario(
        group="error", meaning="400: the prompt is longer than the context.", result="INFERENCE_FAILED",
        booked="nothing", status=400,
        error=_error(400, "9000 tokens asked for, the context has 8192", param="messages"),
    ),
    "unsupported_parameter": Scenario(
        group="error", meaning="400: the model does not know a parameter.", result="INFERENCE_FAILED",
        booked="nothing", status=400,
        error=_error("unsupported_parameter", "Unsupported parameter", param="temperature"),
    ),
    "prompt_moderated": Scenario(
        group="error", meaning="403: the prompt was flagged; the message may quote it.", result="CONTENT_FILTERED",
        booked="nothing", status=403, error=_error(403, "Your input was flagged", metadata={"provider_name": "OpenAI"}),
    ),
    "error_in_list": Scenario(
        group="error", meaning="429, and the error is in a list (Gemini).", result="INFERENCE_FAILED",
        booked="nothing", status=429, error=[_error(429, "Resource exhausted", status="RESOURCE_EXHAUSTED")],
        is_asked_again=True,
    ),
    "error_text": Scenario(
        group="error", meaning="404, and the error is a text (Ollama).", result="INFERENCE_FAILED", booked="nothing",
        status=404, error={"error": "model not found, try pulling it first"},
    ),
    "proxy_page": Scenario(
        group="error", meaning="502 with a proxy's page: nobody knows whether the request was answered.",
        result="INFERENCE_FAILED", booked="assumed", status=502, error=b"<html>502</html>",
    ),
}  # fmt: skip
"""Every scenario by name."""
