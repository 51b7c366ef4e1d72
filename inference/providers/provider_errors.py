"""Reading the errors of providers: a reason in Tollbook's words, the provider's codes, and the provider's sentence.

The sentence may quote the prompt, as moderation errors do: it goes into the publisher's result and nowhere else (G10).
Code, type, parameter, source of a limit and the provider's name are kept only if they look like single words.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

from tollbook.inference.providers.bodies import read_body
from tollbook.inference.providers.json_values import as_list, as_table, first_table, says_error
from tollbook.schemas.failures import ErrorDetails

TRANSIENT: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
END_UNKNOWN: Final = frozenset({408, 499, 504, 520, 524})
"""With these statuses, the provider accepted the request, but its end is unknown: it may have been billed in full."""

_IN_FLIGHT_BUDGET: Final = "in_flight_budget_exhausted"
_MAX_SENTENCE: Final = 1_000
_WORD: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{1,63}")
_PARAM: Final = re.compile(r"[A-Za-z][A-Za-z0-9_.\[\]-]{0,63}")
_PROVIDER: Final = re.compile(r"[A-Z0-9][A-Za-z0-9.-]{0,30}( [A-Z0-9][A-Za-z0-9.-]{0,30}){0,3}")

# Texts of providers that have no code for the error (November 2026). The texts are matched, never passed on.
_CONTEXT: Final = re.compile(
    r"\bcontext\b.{0,80}\d|\d.{0,80}\bcontext\b|context[ _-]?(length|window|size)|maximum context"
    r"|(prompt|input|request|messages?) (is |are |was )?too (long|large)|too many (input |prompt )?tokens"
    r"|reduce the length|exceeds? the (maximum|model).{0,40}tokens",
    re.IGNORECASE | re.DOTALL,
)
_CREDIT: Final = re.compile(
    r"insufficient[ _](balance|credits?|funds|quota)|no credits? left|credit balance is too low|out of credits?"
    r"|exceeded your current quota|used all available credits",
    re.IGNORECASE,
)
_AFFORDABLE: Final = re.compile(r"can only afford|fewer max_tokens", re.IGNORECASE)
_UNSUPPORTED: Final = re.compile(
    r"(unsupported|unknown|unrecognized|unexpected) (parameter|value|argument|field)|not supported with this model"
    r"|support(s)? the (requested )?parameters|extra inputs are not permitted",
    re.IGNORECASE,
)
_FILTERED: Final = re.compile(r"content[ _](filter|policy|management policy)|flagged|moderation", re.IGNORECASE)
_CREDIT_WORDS: Final = frozenset({"insufficient_quota", "insufficient_balance", "billing_hard_limit_reached"})
_CONTEXT_WORDS: Final = frozenset({"context_length_exceeded", "string_above_max_length", "request_too_large"})
_FILTER_WORDS: Final = frozenset(
    {"content_filter", "content_policy_violation", "responsible_ai_policy_violation", "moderation", "flagged",
     "content_filtered", "input_moderation"}
)  # fmt: skip
_UNSUPPORTED_WORDS: Final = frozenset({"unsupported_parameter", "unsupported_value", "unknown_parameter"})
_BY_STATUS: Final[dict[int, str]] = {
    401: "bad_key",
    402: "out_of_credit",
    403: "forbidden",
    404: "not_found",
    408: "timed_out",
    429: "rate_limited",
    503: "overloaded",
    504: "timed_out",
    524: "timed_out",
    529: "overloaded",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderError:
    """An error that a reply or its status reports.

    `words` are short machine-readable codes, `sentence` is the provider's own text. `is_retryable`: the same model may
    answer after a pause. `may_fall_back`: another model may answer; if the context is too long, only a model with a
    larger context.
    """

    reason: str
    words: tuple[str, ...] = ()
    details: ErrorDetails | None = None
    sentence: str | None = None
    code: int | None = None
    is_retryable: bool = False
    may_fall_back: bool = True


def error_of(document: dict[str, Any] | None) -> object:
    """Return the error that a document reports in any of the usual forms, or None.

    They are `error` (an object or a text), `errors`, FastAPI's `detail`, vLLM's `object: error`, and MiniMax's
    `base_resp`.
    """
    if not document:
        return None
    for name in ("error", "errors", "detail"):
        if says_error(document.get(name)):
            return document[name]
    base = as_table(document.get("base_resp"))
    if says_error(base.get("status_code")):
        return {"code": base["status_code"], "message": base.get("status_msg")}
    is_error = document.get("object") == "error" or document.get("type") == "error"
    message = document.get("message") or document.get("msg")
    # An empty message is no error: a reply that may have been charged must not count as free (G3).
    has_message = isinstance(message, str) and says_error(message) and "choices" not in document
    return document if is_error or has_message else None


def read_error(error: object, status: int | None = None, body: bytes = b"") -> ProviderError:
    """Read an error. `status` is the HTTP status if it is an error; `body` is the text if there is no JSON."""
    table = first_table(error)
    metadata = as_table(table.get("metadata"))
    code = status if status is not None else _number(table.get("code")) or _number(table.get("status"))
    found = (metadata.get("error_type"), metadata.get("reason"), metadata.get("limit_source"), table.get("type"),
             table.get("code"), as_table(table.get("innererror")).get("code"), table.get("error_type"))  # fmt: skip
    words = tuple(dict.fromkeys(word for word in map(_word, found) if word is not None))
    sentence = _sentence(error, table, metadata, body)
    reason = _reason(code or 500, words, sentence or "")
    is_retryable, may_fall_back = _next_steps(code or 500, reason, words, sentence or "")
    return ProviderError(
        reason=reason,
        words=words,
        details=_details(table, metadata),
        sentence=sentence,
        code=code,
        is_retryable=is_retryable,
        may_fall_back=may_fall_back,
    )


def _next_steps(code: int, reason: str, words: tuple[str, ...], sentence: str) -> tuple[bool, bool]:
    """Return whether the same model may answer after a pause, and whether another model may."""
    if reason == "bad_key":
        return False, False
    if code == 402 and (_IN_FLIGHT_BUDGET in words or _IN_FLIGHT_BUDGET in sentence):
        return True, True
    if reason == "out_of_credit":
        # The words or the sentence may show that the account's limit is reached, which is the same for every model.
        # Otherwise there may be enough money left for a cheaper model.
        is_account = bool(_CREDIT.search(sentence) or _CREDIT_WORDS & set(words) or len(words) > 0)
        return False, bool(_AFFORDABLE.search(sentence)) or not is_account
    return code in TRANSIENT and reason not in ("context_too_long", "content_filtered"), True


def _reason(code: int, words: tuple[str, ...], sentence: str) -> str:
    """Return the reason, one of schemas.failures.FAILURES."""
    known = {word.lower() for word in words}
    if code == 401:
        return "bad_key"
    if code == 402 or known & _CREDIT_WORDS or (code in (400, 403, 429) and _CREDIT.search(sentence)):
        return "out_of_credit"
    if "rate_limit_exceeded" in known:
        return "rate_limited"  # Groq's 413 is about tokens per minute.
    if known & _FILTER_WORDS or (code in (400, 403, 422) and _FILTERED.search(sentence)):
        return "content_filtered"
    if code in (400, 413, 422) and (known & _CONTEXT_WORDS or _CONTEXT.search(sentence)):
        return "context_too_long"
    is_unsupported = bool(known & _UNSUPPORTED_WORDS or _UNSUPPORTED.search(sentence))
    if code in (400, 404, 422) and is_unsupported:
        return "unsupported_parameter"
    return _BY_STATUS.get(code, "provider_failed" if code >= 500 or code < 400 else "bad_request")


def _details(table: dict[str, Any], metadata: dict[str, Any]) -> ErrorDetails | None:
    code = table.get("code")
    details = ErrorDetails(
        code=str(code) if _number(code) is not None else _word(code),
        type=_word(table.get("type")) or _word(metadata.get("error_type")),
        param=_matching(_PARAM, table.get("param")),
        limit_source=_word(metadata.get("limit_source")),
        provider=_matching(_PROVIDER, metadata.get("provider_name")),
    )
    return details if details != ErrorDetails() else None


def _sentence(error: object, table: dict[str, Any], metadata: dict[str, Any], body: bytes) -> str | None:
    """Return the provider's own text; behind a router, with the more detailed text of the upstream provider."""
    texts = list(_texts(error if isinstance(error, str) else table.get("message") or table.get("detail")))
    texts += _texts(table.get("msg"))
    raw = metadata.get("raw")
    if isinstance(raw, str) and raw.strip():
        texts.append(_inner_message(raw) or raw)
    if error is None and body and b"<" not in body[:200]:
        texts.append(body[:_MAX_SENTENCE].decode("utf-8", "replace"))
    sentence = ": ".join(dict.fromkeys(text.strip() for text in texts if text.strip()))
    cleaned = sentence.encode("utf-8", "replace").decode()[:_MAX_SENTENCE].replace("\0", "")
    return cleaned or None


def _inner_message(raw: str) -> str | None:
    """Return the message in the JSON text of an upstream provider's error."""
    inner = read_body(raw.encode("utf-8", "replace")).document
    message = first_table(error_of(inner)).get("message") if inner else None
    return message if isinstance(message, str) else None


def _texts(value: object) -> Iterable[str]:
    """Yield the texts of a message, which some servers send as an object or as a list of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in as_list(cast(object, value))[:10]:
            table = as_table(each)
            yield from [text for text in (table.get("msg"), table.get("message"), each) if isinstance(text, str)][:1]
    else:
        table = as_table(value)
        yield from [text for text in (table.get("message"), table.get("detail")) if isinstance(text, str)][:1]


def _word(value: object) -> str | None:
    return _matching(_WORD, value)


def _matching(pattern: re.Pattern[str], value: object) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _number(code: object) -> int | None:
    if isinstance(code, str) and code.isascii() and code.isdecimal():
        code = int(code[:4])
    return code if type(code) is int and 100 <= code <= 999 else None
