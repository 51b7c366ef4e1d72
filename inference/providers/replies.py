"""Reading the provider's replies: status, headers and body become an Attempt.

A reply with status 200 can be an error, and a reply with an error status can be charged; `inference/attempts.py` says
what `charge` means. Invariant (G4): a reply that was paid for is the call's outcome. There is no retry because its text
is empty, cut off, filtered or a refusal. The provider's sentences go only into `provider_error`, since they may quote
the prompt, as OpenRouter's moderation errors do (G10).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Final, Self

from tollbook.inference.attempts import Attempt, ChargeStatus, ChatRequest, EmbeddingsRequest
from tollbook.inference.providers.answers import CONTENT_FILTER, LENGTH, Answer, read_answer
from tollbook.inference.providers.bodies import Body
from tollbook.inference.providers.embeddings import read_embeddings
from tollbook.inference.providers.json_values import as_table, first_table, says_error, tables_of
from tollbook.inference.providers.provider_errors import END_UNKNOWN, ProviderError, error_of, read_error
from tollbook.inference.providers.usage_report import UsageReport, joined_reports, read_usage
from tollbook.schemas.results import ErrorCode

_NAME: Final = re.compile(r"[\x21-\x7e]{1,200}")
_MAX_RETRY_AFTER_S: Final = 86_400.0
# `us`: Anthropic charges more if a workspace is served only in the US (November 2026).
_SERVICE_TIERS: Final = frozenset({"flex", "priority", "batch", "fast", "us"})
_NO_USAGE: Final = UsageReport()
_NOT_COUNTED: Final = "the reported usage is zero and was ignored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply, as far as it was received.

    `document` is the JSON object in its body; `body` is the text if there is no object. `is_cut_off`: its event stream
    ended in the middle of an answer. `latency_ms` is the time that the request took; `now_s` is the time of day, for a
    Retry-After with a date in a reply without a Date header.
    """

    status: int
    headers: Mapping[str, str]
    document: dict[str, Any] | None
    body: bytes = field(default=b"", repr=False)
    is_cut_off: bool = False
    latency_ms: int
    now_s: float

    @classmethod
    def of_body(cls, status: int, headers: Mapping[str, str], body: Body, *, latency_ms: int, now_s: float) -> Self:
        """Make a reply from a received body."""
        return cls(
            status=status,
            headers=headers,
            document=body.document,
            body=body.raw,
            is_cut_off=body.is_cut_off,
            latency_ms=latency_ms,
            now_s=now_s,
        )


def read_reply(
    reply: Reply, request: ChatRequest | EmbeddingsRequest, *, is_insured: bool, request_id: str | None = None
) -> Attempt:
    """Read the reply to a request for a completion or embeddings.

    `is_insured`: the provider bills no reply that ends in an error. `request_id` is the provider's id of the request
    from the headers.
    """
    status, document = reply.status, reply.document
    report = _usage_of(document) if document else _NO_USAGE
    common: dict[str, Any] = {
        "http_status": status,
        "latency_ms": reply.latency_ms,
        "generation_id": request_id or (document and name_of(document.get("id"))) or None,
        "model_used": (document and (name_of(document.get("model")) or name_of(document.get("modelVersion")))) or None,
        "service_tier": _service_tier(document) if document else "",
    }
    if not 200 <= status < 300:
        return _refused(reply, report, common)
    if document is None:
        problem = "the reply is not a JSON object"
        return Attempt(
            outcome="invalid_response",
            charge="unknown",
            error=problem,
            reason="unreadable",
            is_retryable=True,
            may_fall_back=True,
            **common,
        )
    answer = read_answer(document)
    common["finish_reason"] = answer.finish_reason
    error = _error_in(document, answer)
    if error is not None or answer.finish_reason == "error":
        return _failed(read_error(error), answer, report, common, is_insured)
    if reply.is_cut_off:
        # Its usage, if it has one, does not count all that was generated.
        problem = "the event stream broke off in mid-answer"
        return Attempt(
            outcome="connection_error",
            charge="unknown",
            error=problem,
            reason="connection_lost",
            is_retryable=True,
            may_fall_back=True,
            **answer_fields(answer),
            **common,
        )
    if isinstance(request, EmbeddingsRequest):
        return read_embeddings(document, report, common, model=request.model, inputs=len(request.inputs))
    if answer.is_answer:
        return _answered(answer, report, common, request.model)
    return _unanswered(answer, report, common, request)


def name_in(headers: Mapping[str, str], header: str) -> str | None:
    """Return the value of a header if it is a single word, such as an id; else None."""
    return name_of(headers.get(header))


def name_of(value: object) -> str | None:
    """Return a single word, such as an id or a model; None for anything else."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def retry_after_s(headers: Mapping[str, str], now_s: float) -> float | None:
    """Return the pause that the provider asks for, in seconds, at most a day; None if it asks for none."""
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


def _usage_of(document: dict[str, Any]) -> UsageReport:
    """Read the usage from all places in which servers report it.

    These are `usage`, Gemini's own name, Groq's and Moonshot's places in event streams, and fields of an error.
    Ollama's own form has counts beside the message; routers report a cost there.
    """
    error = first_table(document.get("error"))
    places = (
        document.get("usage"),
        document.get("usageMetadata"),
        document.get("usage_metadata"),
        as_table(document.get("x_groq")).get("usage"),
        document.get("amazon-bedrock-invocationMetrics"),
        *(choice.get("usage") for choice in tables_of(document.get("choices"))),
        *(place for table in (error, as_table(error.get("metadata"))) for place in (table.get("usage"), _costs(table))),
        document,
    )
    return joined_reports(map(read_usage, places))


def _costs(table: dict[str, Any]) -> dict[str, Any]:
    """Return only the cost fields of an error: its token counts may be the tokens that were too many."""
    return {name: table[name] for name in ("cost", "total_cost", "is_byok", "cost_details") if name in table}


def _service_tier(document: dict[str, Any]) -> str:
    """Return the service tier of the request if it has its own prices, else ''."""
    usage = as_table(document.get("usage"))
    named = (document.get("service_tier"), usage.get("service_tier"), usage.get("speed"), usage.get("inference_geo"))
    words = (name.lower() for name in named if isinstance(name, str))
    return next((word for word in words if word in _SERVICE_TIERS), "")


def _charged(report: UsageReport) -> dict[str, Any]:
    """Return the fields of an attempt that come from a usage report."""
    return {
        "usage": report.usage,
        "other_readings": report.readings[1:],
        "usage_doubt": report.doubt,
        "reported_cost_nanousd": report.cost_nanousd,
        "fee_nanousd": report.fee_nanousd,
    }


def _refused(reply: Reply, report: UsageReport, common: dict[str, Any]) -> Attempt:
    status, document = reply.status, reply.document
    error = read_error(error_of(document), status, b"" if document else reply.body)
    # A 5xx without an error object comes from a proxy, which cannot know how the request ended.
    has_error = document is not None and bool(first_table(document.get("error")))
    is_end_unknown = status in END_UNKNOWN or (status >= 500 and not has_error)
    charge: ChargeStatus = "known" if report.is_known else "unknown" if is_end_unknown else "none"
    return Attempt(
        outcome="http_error",
        charge=charge,
        retry_after_s=retry_after_s(reply.headers, reply.now_s),
        error=" ".join([f"HTTP {status}", *error.words]),
        **_of_error(error),
        **_charged(report),
        **common,
    )


def _failed(
    error: ProviderError, answer: Answer, report: UsageReport, common: dict[str, Any], is_insured: bool
) -> Attempt:
    """Read an error in a reply with status 200.

    No provider that was seen to send such an error with a code bills it (November 2026). But if the answer had begun,
    only an insured provider is known to bill nothing.
    """
    is_free = (is_insured or (error.code is not None and answer.is_empty)) and error.code not in END_UNKNOWN
    charge: ChargeStatus = "known" if report.is_known else "none" if is_free else "unknown"
    code = [str(error.code)] if error.code else []
    return Attempt(
        outcome="provider_error",
        charge=charge,
        error=" ".join(["the provider reported an error", *code, *error.words]),
        **_of_error(error),
        **answer_fields(answer),
        **_charged(report),
        **common,
    )


def _of_error(error: ProviderError) -> dict[str, Any]:
    return {
        "reason": error.reason,
        "error_details": error.details,
        "error_code": ErrorCode.CONTENT_FILTERED if error.reason == "content_filtered" else None,
        "provider_error": error.sentence,
        "is_retryable": error.is_retryable,
        "may_fall_back": error.may_fall_back,
    }


def _answered(answer: Answer, report: UsageReport, common: dict[str, Any], model: str) -> Attempt:
    report = _counted(report)
    common["model_used"] = common["model_used"] or model
    return Attempt(outcome="ok", charge=_charge(report), **answer_fields(answer), **_charged(report), **common)


def _unanswered(answer: Answer, report: UsageReport, common: dict[str, Any], request: ChatRequest) -> Attempt:
    """Read a reply without text, tool call or refusal: it is the outcome if it was paid for, or a retry cannot help."""
    usage = report.usage
    is_at_limit = usage is not None and usage.completion_tokens >= request.max_tokens
    is_limit = answer.finish_reason == LENGTH or (is_at_limit and answer.finish_reason != CONTENT_FILTER)
    is_filter = answer.finish_reason == CONTENT_FILTER
    has_generated = is_limit or not answer.is_empty
    report = _counted(report) if has_generated else report
    is_free = report.cost_nanousd == 0 and not report.fee_nanousd
    is_paid = (report.is_known or (answer.has_choice and answer.finish_reason is not None)) and not is_free
    if not (is_limit or is_filter or is_paid):
        finish = f" (finish reason {answer.finish_reason})" if answer.finish_reason else ""
        return Attempt(
            outcome="invalid_response",
            charge=_charge(report),
            error=f"the reply has no answer{finish}",
            reason="empty_answer",
            is_retryable=True,
            may_fall_back=True,
            **_charged(report),
            **common,
        )
    common["model_used"] = common["model_used"] or request.model
    code, reason, error = _why_no_answer(answer, report, is_limit=is_limit, is_filter=is_filter)
    return Attempt(
        outcome="ok",
        charge=_charge(report),
        error=error,
        error_code=code,
        reason=reason,
        **answer_fields(answer),
        **_charged(report),
        **common,
    )


def _why_no_answer(
    answer: Answer, report: UsageReport, *, is_limit: bool, is_filter: bool
) -> tuple[ErrorCode, str, str]:
    if is_limit:
        used = report.usage
        parts = f": {used.completion_tokens:,}, {used.reasoning_tokens:,} of them reasoning" if used else ""
        error = f"the limit of completion tokens was used up before an answer{parts}"
        return ErrorCode.OUTPUT_LIMIT_REACHED, "output_limit", error
    if is_filter:
        return ErrorCode.CONTENT_FILTERED, "content_filtered", "the provider's filter held the answer back"
    finish = f" (finish reason {answer.finish_reason})" if answer.finish_reason else ""
    return ErrorCode.INFERENCE_FAILED, "empty_answer", f"the reply has no answer{finish}"


def _counted(report: UsageReport) -> UsageReport:
    """Return a report without its usage if that has zero prompt or completion tokens, although there were some of both.

    A server that counts no tokens must not make the call free; a reported cost of zero does make it free.
    """
    is_wrong = report.has_zero and report.cost_nanousd is None
    return UsageReport(fee_nanousd=report.fee_nanousd, doubt=_NOT_COUNTED) if is_wrong else report


def answer_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of an attempt that come from an answer."""
    return {
        "content": answer.content,
        "images": answer.images,
        "tool_calls": answer.tool_calls,
        "refusal": answer.refusal,
        "reasoning": answer.reasoning,
        "reasoning_details": answer.reasoning_details,
        "logprobs": answer.logprobs,
    }


def _charge(report: UsageReport) -> ChargeStatus:
    return "known" if report.is_known else "unknown"


def _error_in(document: dict[str, Any], answer: Answer) -> object:
    """Return the error of a reply with status 200, or None. A message beside an answer is none: it says `success`."""
    for error in (first_table(document.get("choices")).get("error"), document.get("error")):
        if says_error(error):
            return error
    return None if document.get("choices") or answer.is_answer else error_of(document)
