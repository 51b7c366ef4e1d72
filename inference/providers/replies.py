"""Reading the provider's replies: from status, headers and body to an Attempt.

A 200 can carry an error, and an error status can carry a charge; see `inference/attempts.py`
for what `charge` promises. The provider's own texts are never passed on: they may quote the
prompt (OpenRouter's moderation errors do). Only its machine words are.
"""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any, Final, cast

from tollbook.inference.attempts import Attempt, ChargeStatus
from tollbook.inference.providers.usage_report import UsageReport, read_usage

# Floats become Decimals, so that a cost is exact; NaN and infinities too, to be refused as money and nothing more.
_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal)
_WORD: Final = re.compile(r"[a-z][a-z0-9_.-]{1,63}")
_NAME: Final = re.compile(r"[\x21-\x7e]{1,200}")

_TRANSIENT: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
# The request was taken on and nobody saw its end: it may have been billed in full.
_END_UNSEEN: Final = frozenset({408, 499, 504, 520, 524})
_IN_FLIGHT: Final = "in_flight_budget_exhausted"
_LONGEST_RETRY_AFTER_S: Final = 86_400.0


def read_json(body: bytes) -> Any:
    """Parse JSON with exact numbers. Errors: ValueError."""
    try:
        return _DECODER.decode(body.decode())
    except (RecursionError, ArithmeticError) as exc:
        raise ValueError("not JSON that can be read") from exc


def read_reply(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    model: str,
    is_openrouter: bool,
    latency_ms: int,
    now_s: float,
) -> Attempt:
    """Read a whole reply. `now_s` is the time of day, for a Retry-After that is a date without a Date beside it."""
    try:
        parsed = read_json(body)
    except ValueError:
        parsed = None
    document = cast(dict[str, Any], parsed) if isinstance(parsed, dict) else None
    report = read_usage(document.get("usage")) if document else UsageReport(None, None)
    generation_id = generation_id_of(headers) or (document and _name(document.get("id"))) or None
    common: dict[str, Any] = {
        "http_status": status,
        "latency_ms": latency_ms,
        "generation_id": generation_id,
        "model_used": (document and _name(document.get("model"))) or None,
        "usage": report.usage,
        "reported_cost_nanousd": report.cost_nanousd,
        "warning": report.warning,
    }
    if not 200 <= status < 300:
        return _refusal(status, headers, document, report, common, now_s)
    if document is None:
        return _unreadable("the reply is not a JSON object", common)
    return _completion(document, report, common, model, is_openrouter)


def generation_id_of(headers: Mapping[str, str]) -> str | None:
    """Return OpenRouter's id of the request: it is in the headers, so it is known even when the body breaks."""
    return _name(headers.get("x-generation-id"))


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return the pause that the provider asks for, at most a day; None where it asks for none."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            sent = headers.get("date")
            start_s = parsedate_to_datetime(sent).timestamp() if sent else now_s
            seconds = parsedate_to_datetime(value).timestamp() - start_s
        except (ValueError, OverflowError):
            return None
    # A NaN compares false with everything, so it ends up here as None.
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S) if seconds == seconds else None


def _refusal(
    status: int,
    headers: Mapping[str, str],
    document: dict[str, Any] | None,
    report: UsageReport,
    common: dict[str, Any],
    now_s: float,
) -> Attempt:
    error = _dict(document.get("error")) if document else None
    words = _words(error)
    # A bare 5xx comes from something in between, which cannot know what became of the request.
    is_end_unseen = status in _END_UNSEEN or (status >= 500 and error is None)
    charge: ChargeStatus = "known" if _is_told(report) else "unknown" if is_end_unseen else "none"
    is_retryable, may_fall_back = _what_next(status, words, error)
    return Attempt(
        outcome="http_error",
        charge=charge,
        error=" ".join([f"HTTP {status}", *words]),
        retry_after_s=retry_after_s(headers, now_s),
        is_retryable=is_retryable,
        may_fall_back=may_fall_back,
        **common,
    )


def _completion(
    document: dict[str, Any], report: UsageReport, common: dict[str, Any], model: str, is_openrouter: bool
) -> Attempt:
    choices = document.get("choices")
    choice = _dict(cast(list[object], choices)[0]) if isinstance(choices, list) and choices else None
    finish = choice.get("finish_reason") if choice else None
    common["finish_reason"] = _name(finish)
    error = document.get("error") or (choice.get("error") if choice else None)
    if error or finish == "error":
        return _failure(_dict(error), report, common, is_openrouter)
    message = _dict(choice.get("message")) if choice else None
    content = message.get("content") if message else None
    if not isinstance(content, str) or not content:
        told = f" (finish reason {common['finish_reason']})" if common["finish_reason"] else ""
        return _unreadable(f"the reply has no completion{told}", common)
    usage = report.usage
    if usage and report.cost_nanousd is None and not (usage.prompt_tokens and usage.completion_tokens):
        # No prompt is empty and neither is this completion: a server that counts nothing must not make it free.
        common.update(usage=None, warning="the reported usage is zero and was not taken")
        report = UsageReport(None, None)
    common["model_used"] = common["model_used"] or model
    return Attempt(outcome="ok", charge="known" if _is_told(report) else "unknown", content=_text(content), **common)


def _failure(error: dict[str, Any] | None, report: UsageReport, common: dict[str, Any], is_openrouter: bool) -> Attempt:
    """An error inside a 200. OpenRouter bills no reply that ends in an error ("zero completion insurance", 2026)."""
    code, words = _code(error), _words(error)
    is_insured = is_openrouter or code is not None
    charge: ChargeStatus = (
        "known" if _is_told(report) else "none" if is_insured and code not in _END_UNSEEN else "unknown"
    )
    is_retryable, may_fall_back = _what_next(code or 500, words, error)
    return Attempt(
        outcome="provider_error",
        charge=charge,
        error=" ".join(["the provider failed", *([str(code)] if code else []), *words]),
        is_retryable=is_retryable,
        may_fall_back=may_fall_back,
        **common,
    )


def _unreadable(problem: str, common: dict[str, Any]) -> Attempt:
    is_told = common["usage"] is not None or common["reported_cost_nanousd"] is not None
    return Attempt(
        outcome="invalid_response",
        charge="known" if is_told else "unknown",
        error=problem,
        is_retryable=True,
        may_fall_back=True,
        **common,
    )


def _what_next(code: int, words: list[str], error: dict[str, Any] | None) -> tuple[bool, bool]:
    """Return whether the same model may answer after a pause, and whether another model might."""
    if code == 401:
        return False, False
    if code == 402:
        is_transient = _IN_FLIGHT in words or _IN_FLIGHT in str(error and error.get("message"))
        # A cheaper model may fit into what is left of the account.
        return is_transient, True
    return code in _TRANSIENT, True


def _words(error: dict[str, Any] | None) -> list[str]:
    """Return the machine words of an error, such as `rate_limit_exceeded`."""
    if error is None:
        return []
    metadata = _dict(error.get("metadata")) or {}
    found = [metadata.get("error_type"), metadata.get("reason"), error.get("type"), error.get("code")]
    return list(dict.fromkeys(word for word in found if isinstance(word, str) and _WORD.fullmatch(word)))


def _code(error: dict[str, Any] | None) -> int | None:
    code = error.get("code") if error else None
    if isinstance(code, str) and code.isdecimal():
        code = int(code[:4])
    return code if type(code) is int and 100 <= code <= 999 else None


def _is_told(report: UsageReport) -> bool:
    return report.usage is not None or report.cost_nanousd is not None


def _dict(value: object) -> dict[str, Any] | None:
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def _text(content: str) -> str:
    """Return text that can be stored: a lone surrogate, which JSON can spell, has no UTF-8."""
    if content.isascii():
        return content
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
