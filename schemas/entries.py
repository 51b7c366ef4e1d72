"""Task entries: what a publisher appends to a task stream, and the size that an entry may have.

An entry is made of plain text fields, then parsed by the same code as in a worker. So a publisher refuses before
sending what a worker would refuse, and each rule is in one place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from pydantic import BaseModel

from tollbook.schemas.identifiers import id_text
from tollbook.schemas.json_text import replace_surrogates
from tollbook.schemas.policy import Policy, check_stream, check_task
from tollbook.schemas.problems import shown
from tollbook.schemas.tasks import InvalidTask, check_entry_size, task_from_fields


class RequestFields(TypedDict, total=False):
    """The fields of a task that describe the request to the model, beside the prompt. None counts as absent.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2. `response_format` may be a pydantic model.
    """

    tags: Mapping[str, str | int | float] | None
    system: str | None
    messages: Sequence[BaseModel | Mapping[str, Any]] | str | None
    input: Sequence[str] | str | None
    max_tokens: int | None
    max_completion_tokens: int | None
    temperature: float | None
    model: str | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    top_a: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: Sequence[str] | str | None
    logit_bias: Mapping[str, float] | None
    logprobs: bool | None
    top_logprobs: int | None
    response_format: Mapping[str, Any] | type[BaseModel] | None
    structured_outputs: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: Mapping[str, Any] | str | None
    parallel_tool_calls: bool | None
    functions: Sequence[Mapping[str, Any]] | None
    function_call: Mapping[str, Any] | str | None
    reasoning: Mapping[str, Any] | None
    reasoning_effort: str | None
    include_reasoning: bool | None
    verbosity: str | None
    prediction: Mapping[str, Any] | None
    cache_control: Mapping[str, Any] | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None
    store: bool | None
    modalities: Sequence[str] | None
    image_config: Mapping[str, str | int] | None
    web_search_options: Mapping[str, Any] | None
    transforms: Sequence[str] | None
    dimensions: int | None
    encoding_format: str | None


class TaskFields(RequestFields, total=False):
    """The fields of a task beside its type and prompt, as a program gives them. None counts as absent.

    `streamed` becomes the field `stream` of the entry; in a program, `stream` is the name of the task stream.
    """

    user_id: str | int | None
    plan: str | None
    task_id: str | int | None
    campaign_id: str | int | None
    reply_to: str | None
    streamed: bool | None
    metadata: Mapping[str, Any] | str | None
    traceparent: str | None
    tracestate: str | None


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A valid task with its id and its stream. `fields` are appended to the stream, in this order."""

    stream: str
    task_id: str
    fields: Mapping[str, str]


def task_entry(stream: str, values: Mapping[str, object], *, new_id: str, policy: Policy) -> TaskEntry:
    """Make the entry of a task from its values; its task type, plan and stream must be in the policy.

    `new_id` becomes the task's id if the values have none. `messages` and `metadata` may be JSON text already.
    Errors: InvalidTask, for what a worker would refuse.
    """
    fields = {name: _text(name, value) for name, value in {"task_id": new_id, **_given(values)}.items()}
    check_entry_size(sum(len(part.encode("utf-8", "replace")) for pair in fields.items() for part in pair))
    task = check_task(task_from_fields(fields, policy.tag_names), policy)
    # Ids are sent in the spelling in which they are stored.
    ids = {name: getattr(task, name) for name in ("task_id", "user_id", "campaign_id") if name in fields}
    return TaskEntry(check_stream(stream, policy), ids["task_id"], {**fields, **ids})


def _given(values: Mapping[str, object]) -> dict[str, object]:
    # Empty text counts as absent, as it does in a stream entry. An empty prompt is an error of its own.
    return {name: value for name, value in values.items() if value is not None and (value != "" or name == "prompt")}


def _text(name: str, value: object) -> str:
    match value:
        case str() if name == "input" and value.startswith("["):
            return _json(name, [value])  # A worker would parse the plain text as a list.
        case str():
            return replace_surrogates(value)
        case bool():
            return str(value).lower()
        case bytes():
            raise InvalidTask(f"'{name}' must be text, a number or a JSON value, not bytes")
        case float():
            return str(value)
        case int():
            try:
                return str(value)
            except ValueError:  # Python turns no number of more than 4300 digits into text.
                raise InvalidTask(f"'{name}' must not be {shown(value)}") from None
        case _:
            named = id_text(value)
            return named if isinstance(named, str) else _json(name, value)


def _json(name: str, value: object) -> str:
    try:
        return replace_surrogates(
            json.dumps(value, default=_plain, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        )
    except (TypeError, ValueError, RecursionError):
        raise InvalidTask(f"'{name}' must contain only JSON values, without NaN and infinities") from None


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, Mapping):
        return dict(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    raise TypeError(f"a {type(value).__name__} is not JSON")
