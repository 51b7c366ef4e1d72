"""Reading replies with embeddings: a vector for each input, and a usage with only prompt tokens.

Invariant (G4): vectors that were paid for are the call's outcome. So is a paid reply without vectors: a retry would get
the same reply, and would be paid for again.
"""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, cast

from tollbook.inference.attempts import Attempt
from tollbook.inference.providers.json_values import tables_of
from tollbook.inference.providers.token_counts import TOTAL_ALONE
from tollbook.inference.providers.usage_report import UsageReport, read_usage
from tollbook.schemas.results import ErrorCode
from tollbook.schemas.usage import Usage

MAX_VECTORS_BYTES: Final = 16 * 1024 * 1024
"""The maximum size of the vectors of one result, as JSON."""
_BASE64: Final = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_NOT_COUNTED: Final = "the reported usage is zero and was ignored"


def read_embeddings(
    document: Mapping[str, Any], report: UsageReport, common: dict[str, Any], *, model: str, inputs: int
) -> Attempt:
    """Read a reply with status 200 that reports no error. `common` has the fields of the Attempt known so far."""
    if not report.readings and isinstance(document.get("usage"), dict):
        # For embeddings, a usage with only prompt tokens is complete.
        report = read_usage({"completion_tokens": 0, **document["usage"]})
    usage, doubt = _prompt_usage(report)
    is_known = usage is not None or report.cost_nanousd is not None
    charged: dict[str, Any] = {
        **common,
        "charge": "known" if is_known else "unknown",
        "usage": usage,
        "usage_doubt": doubt,
        "reported_cost_nanousd": report.cost_nanousd,
        "fee_nanousd": report.fee_nanousd,
    }
    vectors = _vectors(document, inputs)
    problem = f"the reply does not have one vector for each of {inputs} inputs" if not vectors else None
    if problem and not (usage is not None or report.cost_nanousd):
        return Attempt(
            outcome="invalid_response",
            error=problem,
            reason="empty_answer",
            is_retryable=True,
            may_fall_back=True,
            **charged,
        )
    charged["model_used"] = common["model_used"] or model
    size = len(json.dumps(vectors, separators=(",", ":")))
    if size > MAX_VECTORS_BYTES:
        problem = f"the vectors have {size:,} bytes as JSON; a result may have at most {MAX_VECTORS_BYTES:,}"
    if problem:
        code = ErrorCode.INFERENCE_FAILED
        return Attempt(outcome="ok", error=problem, error_code=code, reason="empty_answer", **charged)
    return Attempt(outcome="ok", embeddings=vectors, **charged)


def _prompt_usage(report: UsageReport) -> tuple[Usage | None, str | None]:
    """Return the usage with all tokens as prompt tokens, and a doubt if there is one.

    The largest total is taken. If a server counts no tokens, the usage is unknown: the call must not be free.
    """
    totals = {usage.total_tokens for usage in report.readings}
    tokens = max(totals, default=0)
    if not tokens:
        return None, _NOT_COUNTED if report.readings and report.cost_nanousd is None else report.doubt
    doubt = None if report.doubt == TOTAL_ALONE and len(totals) == 1 else report.doubt
    return Usage(prompt_tokens=tokens), doubt


def _vectors(document: Mapping[str, Any], inputs: int) -> tuple[Any, ...]:
    """Return one vector for each input, in the order of the inputs; () if one is missing or is no vector."""
    listed = tables_of(document.get("data"))
    indexes = [each.get("index", place) for place, each in enumerate(listed)]
    if len(listed) != inputs or not all(type(index) is int for index in indexes):
        return ()
    if sorted(indexes) != list(range(inputs)):
        return ()
    found = {index: _vector(each.get("embedding")) for index, each in zip(indexes, listed, strict=True)}
    vectors = tuple(found[index] for index in range(inputs))
    return vectors if all(vectors) and len({type(vector) for vector in vectors}) == 1 else ()


def _vector(value: object) -> list[float] | str | None:
    if isinstance(value, str):
        return value if _BASE64.fullmatch(value) else None
    if not isinstance(value, list):
        return None
    numbers = cast("list[object]", value)
    if not all(type(number) is int or (isinstance(number, Decimal) and number.is_finite()) for number in numbers):
        return None
    return [float(cast("Decimal", number)) for number in numbers]
