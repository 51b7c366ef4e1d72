"""Requests: a body becomes a task, for whom its key says."""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any, Final, cast

from starlette.requests import Request

from tollbook.gateway.callers import Attributes, attributes_of, check_model
from tollbook.gateway.problems import Problem, invalid
from tollbook.inference.api_keys import ApiKey
from tollbook.schemas.json_text import NotJson, RepeatedKey, json_children, parse_json
from tollbook.schemas.policy import CHAT, EMBED, Policy
from tollbook.schemas.problems import shown
from tollbook.schemas.routes import EMBEDDINGS
from tollbook.schemas.tasks import MODEL_ID_PATTERN, MODEL_ID_WORDS, Task, task_from_fields

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
"""Images and files come inside bodies."""
_MAX_VALUES: Final = 50_000
"""Each is looked at in the process's one loop: millions of small ones would hold up everybody for minutes."""
# What says who asks, or what the gateway sees to itself.
_NOT_PARAMETERS: Final = ("model", "stream", "stream_options", "user", "metadata", "safety_identifier")
# An SDK's or a person's way of asking for what is so anyway: see schemas.parameters.
_USUAL_TIERS: Final = ("auto", "default", "standard", "standard_only")


async def read_body(request: Request) -> dict[str, Any]:
    """Return the JSON object of a request. Errors: Problem (400, 413)."""
    too_large = Problem(413, "request_too_large", f"a request has at most {MAX_BODY_BYTES:,} bytes", should_retry=False)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    try:
        document = parse_json(bytes(body), parse_float=_finite)
    except (NotJson, RepeatedKey) as exc:
        raise invalid(f"the body {exc}") from None
    except (ValueError, RecursionError):
        raise invalid("the body is not JSON") from None
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    table = cast("dict[str, Any]", document)
    if _has_more_values(table, _MAX_VALUES):
        raise invalid(f"the body must have at most {_MAX_VALUES:,} values and lists")
    return table


def _has_more_values(document: object, limit: int) -> bool:
    """Whether a JSON value has more than `limit` values within it; counting stops just past it."""
    found, left = 0, [document]
    while left and found <= limit:
        children = json_children(left.pop())
        found += len(children)
        if found <= limit:
            left.extend(children)
    return found > limit


def _finite(text: str) -> float:
    """Return a number that JSON can write again. Errors: NotJson."""
    number = float(text)
    if not isfinite(number):
        raise NotJson("has a number that is too large")
    return number


def model_in(body: Mapping[str, Any]) -> str:
    """Return the model id or task type that a request names. Errors: Problem (400)."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise invalid("'model' is missing: name a model, or a task type of the policy", param="model")
    if not re.fullmatch(MODEL_ID_PATTERN, model):
        raise invalid(f"'model' must be a task type or {MODEL_ID_WORDS}, not {shown(model)}", param="model")
    return model


def task_of(
    fields: Mapping[str, Any],
    body: Mapping[str, Any],
    *,
    call_id: str,
    key: ApiKey,
    headers: Mapping[str, str],
    policy: Policy,
) -> tuple[Task, Attributes]:
    """Return the task of a request, and for whom it is.

    `fields` are those of a chat completion or of embeddings, into which `body` was translated: that says who asks.
    Errors: InvalidTask; Problem (400, 403).
    """
    model = model_in(fields)
    check_model(key, model)
    attributes = attributes_of(key, headers, body, policy.tag_names)
    is_embedding = "input" in fields
    given = {
        name: value
        for name, value in fields.items()
        if name not in _NOT_PARAMETERS and not (name == "service_tier" and value in _USUAL_TIERS)
    }
    if is_embedding != _makes_embeddings(model, policy, is_embedding=is_embedding):
        raise invalid(
            f"{model!r} is a task type for {'chat completions' if is_embedding else 'embeddings'}", param="model"
        )
    chosen = {"task": model} if model in policy.tasks else {"task": EMBED if is_embedding else CHAT, "model": model}
    who = {
        "user_id": attributes.user_id,
        "plan": attributes.plan,
        "campaign_id": attributes.campaign_id,
        "tags": dict(attributes.tags) or None,
        "task_id": call_id,
    }
    for name in (*chosen, *who, "prompt", "system", "reply_to", "task_type", "traceparent", "tracestate", "data"):
        if name in given:
            raise invalid(f"{name!r} is no parameter of a completion", param=name)
    return task_from_fields({**given, **chosen, **who, **_trace(headers)}), attributes


def _makes_embeddings(model: str, policy: Policy, *, is_embedding: bool) -> bool:
    route = policy.tasks.get(model)
    return is_embedding if route is None else route.kind == EMBEDDINGS


def _trace(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
