"""The provider's replies: an Attempt is made of status, headers and body.

A reply with status 200 can be an error, and one with an error status can be charged; `inference/attempts.py` says what
`charge` means. The provider's messages are never passed on, since they may quote the prompt, as OpenRouter's moderation
errors do (G10). Its error codes are.
"""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from email.utils import parsedate_to_datetime
from typing import Any, Final, cast

from tollbook.inference.attempts import Attempt, ChargeStatus
from tollbook.inference.providers.usage_report import UsageReport, read_usage

# Floats become Decimals, so that a cost is exact. NaN and infinities do too: they are then refused as a cost, and the
# rest of the reply is still read.
_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=Decimal)
_WORD: Final = re.compile(r"[a-z][a-z0-9_.-]{1,63}")
_NAME: Final = re.compile(r"[\x21-\x7e]{1,200}")

_TRANSIENT: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
# The provider accepted the request, but its end is not known: it may have been billed in full.
_END_UNKNOWN: Final = frozenset({408, 499, 504, 520, 524})
_IN_FLIGHT_BUDGET: Final = "in_flight_budget_exhausted"
_MAX_RETRY_AFTER_S: Final = 86_400.0


def read_json(body: bytes) -> Any:
    """Parse JSON with exact numbers. Errors: ValueError."""
    try:
        return _DECODER.decode(body.decode())
    except (RecursionError, ArithmeticError) as exc:
        raise ValueError("the body is not JSON") from exc


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
    """Read a whole reply. `now_s` is the time of day, for a Retry-After that is a date in a reply without a Date."""
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
    """Return OpenRouter's id of the request. It is a header, so it is known even if the body does not arrive."""
    return _name(headers.get("x-generation-id"))


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return the pause that the provider asks for, in seconds, at most a day; None where it asks for none."""
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
    # NaN is not equal to itself.
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER_S) if seconds == seconds else None


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
    # A 5xx without an error object comes from a proxy, which cannot know how the request ended.
    is_end_unknown = status in _END_UNKNOWN or (status >= 500 and error is None)
    charge: ChargeStatus = "known" if _is_reported(report) else "unknown" if is_end_unknown else "none"
    is_retryable, may_fall_back = _next_steps(status, words, error)
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
        reason = f" (finish reason {common['finish_reason']})" if common["finish_reason"] else ""
        return _unreadable(f"the reply has no completion{reason}", common)
    usage = report.usage
    if usage and report.cost_nanousd is None and not (usage.prompt_tokens and usage.completion_tokens):
        # Neither the prompt nor the completion is empty: a server that counts no tokens must not make the call free.
        common.update(usage=None, warning="the reported usage is zero and was ignored")
        report = UsageReport(None, None)
    common["model_used"] = common["model_used"] or model
    return Attempt(
        outcome="ok", charge="known" if _is_reported(report) else "unknown", content=_text(content), **common
    )


def _failure(error: dict[str, Any] | None, report: UsageReport, common: dict[str, Any], is_openrouter: bool) -> Attempt:
    """Read an error in a 200. OpenRouter bills no reply that ends in an error ("zero completion insurance", 2026)."""
    code, words = _code(error), _words(error)
    is_insured = is_openrouter or code is not None
    charge: ChargeStatus = (
        "known" if _is_reported(report) else "none" if is_insured and code not in _END_UNKNOWN else "unknown"
    )
    is_retryable, may_fall_back = _next_steps(code or 500, words, error)
    return Attempt(
        outcome="provider_error",
        charge=charge,
        error=" ".join(["the provider reported an error", *([str(code)] if code else []), *words]),
        is_retryable=is_retryable,
        may_fall_back=may_fall_back,
        **common,
    )


def _unreadable(problem: str, common: dict[str, Any]) -> Attempt:
    is_reported = common["usage"] is not None or common["reported_cost_nanousd"] is not None
    return Attempt(
        outcome="invalid_response",
        charge="known" if is_reported else "unknown",
        error=problem,
        is_retryable=True,
        may_fall_back=True,
        **common,
    )


def _next_steps(code: int, words: list[str], error: dict[str, Any] | None) -> tuple[bool, bool]:
    """Return whether the same model may answer after a pause, and whether another model may."""
    if code == 401:
        return False, False
    if code == 402:
        is_transient = _IN_FLIGHT_BUDGET in words or _IN_FLIGHT_BUDGET in str(error and error.get("message"))
        # The account may have enough money left for a cheaper model.
        return is_transient, True
    return code in _TRANSIENT, True


def _words(error: dict[str, Any] | None) -> list[str]:
    """Return the error codes that are words, such as `rate_limit_exceeded`."""
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


def _is_reported(report: UsageReport) -> bool:
    return report.usage is not None or report.cost_nanousd is not None


def _dict(value: object) -> dict[str, Any] | None:
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def _name(value: object) -> str | None:
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def _text(content: str) -> str:
    """Return text that UTF-8 can encode: JSON can escape half of a surrogate pair, which is replaced."""
    if content.isascii():
        return content
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
