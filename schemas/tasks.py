"""Tasks: what a publisher puts on a stream, and how its fields are parsed.

A message is a set of plain stream fields, or one field `data` with JSON. A consumer unpacks FastStream's binary
envelope before it calls this module.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Final, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from tollbook.schemas.errors import AppError
from tollbook.schemas.expectations import Expected
from tollbook.schemas.identifiers import CampaignId, TaskId, UserId
from tollbook.schemas.json_text import NotJson, RepeatedKey, is_deeper, json_children, parse_json, replace_surrogates_in
from tollbook.schemas.messages import Message
from tollbook.schemas.parameters import (
    EMBEDDINGS_PARAMETERS,
    JSON_PARAMETERS,
    MAX_SCHEMA_DEPTH,
    Parameters,
    drop_refused,
    parse_if_json,
    refuse_bool,
)
from tollbook.schemas.problems import UTF8_WORDS, as_text, problems_of
from tollbook.schemas.results import ErrorCode
from tollbook.schemas.tags import Tags

PING: Final = "ping"
"""Task type of every policy: it answers "pong", calls no model and is free."""
MAX_ENTRY_BYTES: Final = 2_000_000
MAX_TEXT_BYTES: Final = 1_000_000
MAX_MESSAGES: Final = 1_000
MAX_INPUTS: Final = 128
"""Texts of a task for embeddings: their vectors fit into a result, at up to 8,192 numbers each."""
MAX_METADATA_BYTES: Final = 16_384
MAX_JSON_DEPTH: Final = 32
# Hashed for a task without a plan, whatever the policy's default is: a hash must not change with a policy.
_PLAN_OF_HASH: Final = "trial"
_MAX_HARMLESS: Final = 3
"""Characters of the longest text that reveals nothing of a prompt that contains it."""
# Fields that are JSON text in a plain stream field.
_JSON_FIELDS: Final = ("messages", "metadata", "tags", *JSON_PARAMETERS)
# Fields whose surrogates are not replaced, since two different ids could become equal.
_KEEPS_SURROGATES: Final = frozenset({"task_id", "user_id", "campaign_id", "tags", "reply_to", "model"})
# Fields that may hold parts of the prompt. These must not be shown, even if they are in another field by mistake (G10).
_MAY_QUOTE: Final = (
    "prompt", "system", "messages", "input", "tools", "functions", "response_format", "prediction", "stop",
)  # fmt: skip


class InvalidTask(AppError, ValueError):
    """The message is not a valid task. The text names each wrong field, and quotes no prompt (G10)."""

    code = ErrorCode.INVALID_TASK


Name = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,49}$"),
    Expected("a name of 1 to 50 small letters, digits and any of _ -, a letter first"),
]
"""Name of a plan, task type, stream, budget, tag or provider."""
MODEL_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,149}$"
MODEL_ID_WORDS: Final = "a model id such as 'openai/gpt-4o-mini' (1 to 150 letters, digits and any of . _ : / @ -)"
ModelId = Annotated[str, StringConstraints(pattern=MODEL_ID_PATTERN), Expected(MODEL_ID_WORDS)]
# No braces: every key of the ledger begins with one, and a reply must never be appended to such a key.
_STREAM_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,199}$"
# The keys of a Tollbook of any namespace beside its ledger: see `ledger/keys.py`.
_TOLLBOOK_KEY: Final = re.compile(
    r"[a-z0-9][a-z0-9._-]{0,63}:(dead-letters|projector|tidying|processes|dropped-tasks|worker|task|gateway|web-session|web-link)(:|$)"
)
RESERVED_STREAM_WORDS: Final = "must not be a stream or a key of a Tollbook, as"


def check_reply_stream(name: str) -> str:
    """Return the name of a stream for replies, unless it has the form of a key of any Tollbook.

    A reply there would be read as a dead letter, or would break a lease. `schemas.policy.check_task` refuses task
    streams. Errors: ValueError.
    """
    if _TOLLBOOK_KEY.match(name):
        raise ValueError(f"{RESERVED_STREAM_WORDS} {name!r} is")
    return name


def reply_stream_or_none(value: object) -> str | None:
    """Return the name of a stream for replies, or None for anything else."""
    try:
        return check_reply_stream(value) if isinstance(value, str) and re.match(_STREAM_NAME_PATTERN, value) else None
    except ValueError:
        return None


ReplyStream = Annotated[
    str,
    StringConstraints(pattern=_STREAM_NAME_PATTERN),
    Expected("a stream name of 1 to 200 letters, digits and any of . _ : -"),
    AfterValidator(check_reply_stream),
]
# Version 00 of W3C Trace Context: trace id and parent id are not all zeros.
_TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE: Final = re.compile(r"[\x20-\x7e\t]{1,512}")


def traceparent_or_none(value: object) -> str | None:
    """Return a valid W3C `traceparent`, or None for anything else: a task is never refused for its trace."""
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None


def tracestate_or_none(value: object) -> str | None:
    """Return a W3C `tracestate` of at most 512 printable characters, or None for anything else."""
    return value if isinstance(value, str) and _TRACESTATE.fullmatch(value) else None


# `schemas.policy.check_task` checks that the policy has the name.
_AnyName = Annotated[
    str, StringConstraints(pattern=r"^\S{1,200}$"), Expected("a name of 1 to 200 characters without spaces")
]


def _inputs(value: object) -> object:
    """Return one text as a list. Token ids are refused: their number is a bound for one tokenizer only."""
    if isinstance(value, str):
        return (value,)
    listed = cast("list[object]", value) if isinstance(value, list) else []
    if any(type(each) is int or isinstance(each, list) for each in listed):
        raise ValueError("must be text or a list of texts, not token ids: they have a meaning for one tokenizer only")
    return cast("object", value)


class PlainTask(BaseModel):
    """A task without sampling and output parameters: what to do, for whom, with which text and limits."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: _AnyName
    """What to do: a task type of the policy, or `ping`. The name `task_type` is accepted too."""
    user_id: UserId = "anonymous"
    """Who is charged. Required, except for `ping`."""
    plan: _AnyName | None = None
    """The user's plan, which decides the cap. Without one, the policy's `default_plan`."""
    task_id: TaskId | None = None
    """Your own id, which makes a repeat harmless. Absent: `<stream>-<entry id>`."""
    campaign_id: CampaignId | None = None
    """The campaign, for reports and for a campaign's cap."""
    tags: Tags | None = None
    """Names and values for budgets and reports, as a JSON object of up to 16: `{"team": "red"}`."""
    prompt: str | None = Field(default=None, repr=False)  # G10
    """The text for the model. Give exactly one of `prompt`, `messages` and `input`."""
    system: str | None = Field(default=None, repr=False)
    """A system prompt, beside `prompt`."""
    messages: tuple[Message, ...] | None = Field(default=None, max_length=MAX_MESSAGES, repr=False)
    """Chat messages instead of a prompt, as JSON in OpenAI's form: `[{"role": "user", "content": "..."}]`."""
    input: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...] | None,
        BeforeValidator(_inputs),
        Expected(f"a text or a list of 1 to {MAX_INPUTS} texts, none of them empty"),
    ] = Field(default=None, min_length=1, max_length=MAX_INPUTS, repr=False)  # G10
    """For task types of kind `embeddings`: a text, or a JSON list of texts. Each text gets a vector."""
    max_tokens: Annotated[int | None, BeforeValidator(refuse_bool)] = Field(default=None, ge=1, le=200_000)
    """Maximum completion tokens, instead of the route's. The name `max_completion_tokens` is accepted too."""
    temperature: Annotated[float | None, BeforeValidator(refuse_bool)] = Field(
        default=None, ge=0, le=2, allow_inf_nan=False
    )
    """Sampling temperature, 0 to 2, instead of the route's."""
    model: ModelId | None = None
    """Model id, instead of the route's."""
    reply_to: ReplyStream | None = None
    """A stream to which the result is appended; not a stream of Tollbook's own."""
    stream: bool = False
    """Whether the answer can be read while it is generated: `Publisher.stream`, or the Redis stream of its deltas."""
    metadata: dict[str, Any] | None = Field(default=None, repr=False)
    """A JSON object of up to 16 KiB, returned with the result."""
    traceparent: Annotated[str | None, BeforeValidator(traceparent_or_none)] = None
    """W3C Trace Context of the publisher; the task's spans continue it. Ignored if malformed."""
    tracestate: Annotated[str | None, BeforeValidator(tracestate_or_none)] = None
    """W3C tracestate, beside `traceparent`. Ignored if malformed."""

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if is_deeper(value, MAX_JSON_DEPTH):
            raise ValueError(f"must not be nested deeper than {MAX_JSON_DEPTH} levels")
        try:
            size = len(json.dumps(value, allow_nan=False))
        except TypeError:
            raise ValueError("must contain only JSON values") from None
        except ValueError:
            # A number such as 1e999 is parsed as infinity, which the result's JSON could not contain.
            raise ValueError("must contain only finite numbers") from None
        if value is not None and size > MAX_METADATA_BYTES:
            raise ValueError(f"must have at most {MAX_METADATA_BYTES} bytes as JSON, not {size}")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            # JSON can escape half of a surrogate pair, which the result's JSON could not contain.
            raise ValueError(f"must be {UTF8_WORDS}") from None
        return value

    @model_validator(mode="after")
    def _has_one_input(self) -> Self:
        if self.task != PING:
            given = [name for name in ("prompt", "messages", "input") if getattr(self, name) is not None]
            if len(given) != 1:
                number_of = "only one" if given else "one"
                raise ValueError(f"give {number_of} of 'prompt' and 'messages' (or 'input', for embeddings)")
            if self.prompt == "" or self.messages == ():
                raise ValueError(f"'{'messages' if self.prompt is None else 'prompt'}' must not be empty")
            if self.prompt is None and self.system is not None:
                raise ValueError("'system' goes with 'prompt' only; put a system message into 'messages'")
            if "user_id" not in self.model_fields_set:
                raise ValueError("'user_id' is missing")
        return self

    @property
    def text_bytes(self) -> int:
        """Bytes of the prompt or the input, or of the messages without their media."""
        if self.input is not None:
            return sum(len(text.encode("utf-8", "surrogatepass")) for text in self.input)
        if self.messages is not None:
            return sum(message.text_bytes for message in self.messages)
        return sum(len((text or "").encode("utf-8", "surrogatepass")) for text in (self.system, self.prompt))

    def chat(self) -> tuple[Message, ...]:
        """Return the conversation as chat messages."""
        if self.messages is not None:
            return self.messages
        system = (Message(role="system", content=self.system),) if self.system else ()
        return (*system, Message(role="user", content=self.prompt or ""))


class Task(Parameters, PlainTask):
    """One unit of work.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2.
    One of `prompt` (with an optional `system`), `messages` and `input`; `ping` needs none.
    """

    @model_validator(mode="after")
    def _has_parameters_of_its_kind(self) -> Self:
        wrong = (
            _EMBEDDINGS_PARAMETERS & self.model_fields_set
            if self.input is None
            else self.model_fields_set & _CHAT_PARAMETERS
        )
        for name in sorted(wrong):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"'{name}' is for chat completions, and not for 'input'"
                    if self.input is not None
                    else f"'{name}' goes with 'input' only"
                )
        return self

    @model_validator(mode="after")
    def _is_not_too_large(self) -> Self:
        given = self.parameters()
        parameters = json.dumps(given, ensure_ascii=False) if given else ""
        size = self.text_bytes + len(parameters.encode("utf-8", "surrogatepass"))
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"the prompt must have at most {MAX_TEXT_BYTES} bytes, not {size}")
        return self

    def content_hash(self) -> str:
        """Return a digest of what the task asks for and of who pays.

        Stored with the call, so that the same task id with other content is detected (G4).
        `task_id`, `reply_to`, `stream`, `metadata` and the trace are left out: they change neither the work nor its
        price, so a repeat with another trace is the same task. A task without a plan has the hash of plan `trial`.
        Parameters and tags that are not set are left out too, so that older tasks keep their hash.
        """
        work: dict[str, Any] = self.model_dump(mode="json", include=set(_HASHED_ALWAYS))
        work["plan"] = self.plan or _PLAN_OF_HASH
        if self.messages is not None:
            work["messages"] = [message.model_dump(mode="json", exclude_none=True) for message in self.messages]
        if self.input is not None:
            work["input"] = self.input
        if self.tags:
            work["tags"] = self.tags
        work.update(self.parameters())
        canonical = json.dumps(work, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


_EMBEDDINGS_PARAMETERS: Final = frozenset(EMBEDDINGS_PARAMETERS)
_CHAT_PARAMETERS: Final = frozenset({*Parameters.model_fields, "max_tokens", "temperature"}) - _EMBEDDINGS_PARAMETERS
# Part of every digest, set or not, as in the digests on older ledgers.
_HASHED_ALWAYS: Final = (
    "task", "user_id", "plan", "campaign_id", "prompt", "system", "messages", "max_tokens", "temperature", "model",
)  # fmt: skip


def check_entry_size(size: int) -> None:
    """Refuse an entry whose names and values have more bytes than a worker accepts. Errors: InvalidTask."""
    if size > MAX_ENTRY_BYTES:
        raise InvalidTask(f"the message must have at most {MAX_ENTRY_BYTES} bytes, not {size}")


def task_from_fields(fields: Mapping[str, Any], tag_names: Collection[str] = ()) -> Task:
    """Parse a task from the fields of a stream entry; the fields in `tag_names` are tags.

    Errors: InvalidTask, which names each wrong field.
    """
    document: Mapping[str, Any] = fields
    if "data" in fields and "task" not in fields:
        document = _json_object(fields["data"], name="data")
    # Empty text and null count as absent. An empty prompt is an error of its own.
    given = {name: value for name, value in document.items() if value is not None and (value != "" or name == "prompt")}
    values, problems = drop_refused(given)
    if problems:
        raise InvalidTask(as_text(problems))
    for name, value in values.items():
        read = _parse_json(value, name=name) if name in _JSON_FIELDS and isinstance(value, str) else value
        if name == "input":
            read = _input_of(read)
        is_too_deep = is_deeper(read, MAX_SCHEMA_DEPTH)
        if is_too_deep and name != "metadata":
            raise InvalidTask(f"'{name}' must not be nested deeper than {MAX_SCHEMA_DEPTH} levels")
        values[name] = read if is_too_deep or name in _KEEPS_SURROGATES else replace_surrogates_in(read)
    for alias, name in (("task_type", "task"), ("max_completion_tokens", "max_tokens")):
        if alias in values:
            value = values.pop(alias)
            given = values.setdefault(name, value)
            if given != value and str(given) != str(value):
                raise InvalidTask(f"'{name}' and '{alias}' differ: give one of them")
    _collect_tags(values, tag_names)
    try:
        return Task.model_validate(values)
    except ValidationError as exc:
        raise InvalidTask(as_text(problems_of(exc, Task, hides=may_be_prompt(values)))) from None


def _collect_tags(values: dict[str, Any], tag_names: Collection[str]) -> None:
    """Move fields that are tags into `tags`. Errors: InvalidTask if a tag is given twice with different values."""
    fields = {name: values.pop(name) for name in tag_names if name in values and name not in Task.model_fields}
    tags = values.get("tags", {})
    if not fields or not isinstance(tags, dict):
        return
    tags = cast("dict[str, Any]", tags)
    for name, value in fields.items():
        if str(tags.get(name, value)) != str(value):
            raise InvalidTask(f"'{name}' and 'tags.{name}' differ: give one of them")
    values["tags"] = {**tags, **fields}


def may_be_prompt(values: Mapping[str, Any]) -> Callable[[object], bool]:
    """Return a function that says whether a value may be part of the prompt, even in another field (G10)."""
    texts: list[str] = []
    level: list[object] = [values.get(name) for name in _MAY_QUOTE]
    while level:
        texts += [item for item in level if isinstance(item, str) and len(item) > _MAX_HARMLESS]
        level = [child for item in level for child in json_children(_without_roles_and_types(item))]

    def is_part(value: object) -> bool:
        if not isinstance(value, str):
            return False
        has_space = any(character.isspace() for character in value)
        return has_space or (len(value) > _MAX_HARMLESS and any(value in text or text in value for text in texts))

    return is_part


def _without_roles_and_types(item: object) -> object:
    """Leave out fields whose value is one of a few words, so that a message may name a wrong value."""
    if not isinstance(item, dict):
        return item
    return {name: value for name, value in cast("dict[str, object]", item).items() if name not in ("role", "type")}


def _input_of(value: object) -> object:
    """Return the list in a JSON text; any other text is itself the input."""
    read = parse_if_json(value)
    return cast("object", read) if isinstance(read, list) else value


def _json_object(text: object, *, name: str) -> dict[str, Any]:
    value = _parse_json(text, name=name) if isinstance(text, str) else text
    if not isinstance(value, dict):
        raise InvalidTask(f"'{name}' must be a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def _parse_json(text: str, *, name: str) -> object:
    try:
        return parse_json(text)
    except (RepeatedKey, NotJson) as exc:
        raise InvalidTask(f"'{name}' {exc}") from None
    except (ValueError, RecursionError):
        raise InvalidTask(f"'{name}' is not JSON") from None
