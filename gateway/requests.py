"""Turns a request's body into a task, with the attributes of its key."""

import re
from collections.abc import Mapping
from typing import Any, Final

from tollbook.gateway.callers import Attributes, attributes_of, check_model
from tollbook.gateway.problems import invalid
from tollbook.inference.api_keys import ApiKey
from tollbook.schemas.parameters import REFUSED
from tollbook.schemas.policy import CHAT, EMBED, Policy
from tollbook.schemas.problems import did_you_mean, shown, shown_name
from tollbook.schemas.routes import EMBEDDINGS
from tollbook.schemas.tasks import MODEL_ID_PATTERN, MODEL_ID_WORDS, Task, task_from_fields

# Fields about the caller, and fields that the gateway handles itself. `usage` is OpenRouter's way to ask for usage,
# which is always sent.
_NOT_PARAMETERS: Final = ("model", "stream", "stream_options", "usage", "user", "metadata", "safety_identifier")
# Fields of tasks that a request must not have: the endpoints set them.
_TASK_ONLY: Final = frozenset(
    {"task", "prompt", "system", "reply_to", "task_type", "traceparent", "tracestate", "data"}
)
_KNOWN: Final = frozenset({*Task.model_fields, *REFUSED, "max_completion_tokens"})
# Values that ask for the default: see schemas.parameters.
_USUAL_TIERS: Final = ("auto", "default", "standard", "standard_only")


def is_streamed(fields: Mapping[str, Any]) -> bool:
    """Whether a request asks for a stream. Errors: Problem (400)."""
    value = fields.get("stream")
    if value is not None and not isinstance(value, bool):
        raise invalid(f"'stream' must be true or false, not {shown(value)}", param="stream")
    return bool(value)


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
    """Return the task of a request, and its attributes.

    `fields` are those of a chat completion or of embeddings, translated from `body`. `body` may name the user and tags.
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
    for name, value in given.items():
        if name in who or name in _TASK_ONLY:
            raise invalid(f"{name!r} is not a parameter of a completion", param=name)
        if name not in _KNOWN and value not in (None, ""):  # These count as absent.
            hint = (
                did_you_mean(name, _KNOWN - _TASK_ONLY - who.keys()) or "; /openapi.json lists each endpoint's fields"
            )
            raise invalid(f"unknown field {shown_name(name)}{hint}")
    return task_from_fields({**given, **chosen, **who, **_trace(headers)}), attributes


def _makes_embeddings(model: str, policy: Policy, *, is_embedding: bool) -> bool:
    route = policy.tasks.get(model)
    return is_embedding if route is None else route.kind == EMBEDDINGS


def _trace(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
