"""Tasks: what a publisher puts on a stream, and how its fields are read.

Three spellings are one message: plain stream fields, one field `data` holding JSON,
and FastStream's binary envelope (opened by the consumer before it comes here).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from tollbook.schemas.identifiers import CampaignId, TaskId, UserId
from tollbook.schemas.plans import DEFAULT_PLAN, Plan


class TaskStream(StrEnum):
    """The four task streams."""

    SCRAPING = "scraping"
    ANALYSIS = "analysis"
    GENERATION = "generation"
    MONITORING = "monitoring"


class TaskType(StrEnum):
    """What is to be done; picks the route. `ping` answers "pong" and costs nothing."""

    CLASSIFY_ARCHETYPE = "classify_archetype"
    GENERATE_DRAFT = "generate_draft"
    SCORE_POST = "score_post"
    EXTRACT_PATTERNS = "extract_patterns"
    PING = "ping"


MAX_TEXT_BYTES: Final = 1_000_000
MAX_MESSAGES: Final = 1_000
MAX_METADATA_BYTES: Final = 16_384
MAX_JSON_DEPTH: Final = 32
_SHOWN_CHARACTERS: Final = 100
# Fields that are JSON when they arrive as text in a plain stream field.
_JSON_FIELDS: Final = ("messages", "metadata")


class InvalidTask(ValueError):
    """The message cannot be read as a task; the text says which field and why, and quotes no prompt."""


class Message(BaseModel):
    """One chat message. Content is text only: images, audio and files cannot be bounded in cost yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


ModelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,149}$")]
# No braces: a reply must never be appended to a key of the ledger, which all begin with one.
STREAM_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,199}$"
StreamName = Annotated[str, StringConstraints(pattern=STREAM_NAME_PATTERN)]
# Version 00 of W3C Trace Context: trace id and parent id are not all zeros.
_TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACESTATE: Final = re.compile(r"[\x20-\x7e\t]{1,512}")


def traceparent_or_none(value: object) -> str | None:
    """Return a W3C `traceparent`, or None for anything else: no task is refused for the sake of its trace."""
    return value if isinstance(value, str) and _TRACEPARENT.fullmatch(value) else None


def tracestate_or_none(value: object) -> str | None:
    """Return a W3C `tracestate` of at most 512 printable characters, or None for anything else."""
    return value if isinstance(value, str) and _TRACESTATE.fullmatch(value) else None


class Task(BaseModel):
    """One unit of work.

    Units: `max_tokens` completion tokens; `temperature` 0 to 2.
    Either `prompt` (with an optional `system`) or `messages`; `ping` needs neither.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: TaskType
    """What to do: a task type. The name `task_type` is accepted too."""
    user_id: UserId = "anonymous"
    """Who is charged. Required, except for `ping`."""
    plan: Plan = DEFAULT_PLAN
    """The user's plan, which decides the cap."""
    task_id: TaskId | None = None
    """Your own id, which makes a repeat harmless. Without one it is `<stream>-<entry id>`."""
    campaign_id: CampaignId | None = None
    """The campaign, for reports and for a campaign's cap."""
    prompt: str | None = None
    """The text for the model. Give exactly one of `prompt` and `messages`."""
    system: str | None = None
    """A system prompt, beside `prompt`."""
    messages: tuple[Message, ...] | None = Field(default=None, max_length=MAX_MESSAGES)
    """Chat messages instead of a prompt, as JSON: `[{"role": "user", "content": "..."}]`. Text only."""
    max_tokens: int | None = Field(default=None, ge=1, le=200_000)
    """Maximum completion tokens, instead of the route's."""
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    """Sampling temperature, 0 to 2, instead of the route's."""
    model: ModelId | None = None
    """Model id, instead of the route's."""
    reply_to: StreamName | None = None
    """A stream to which the result is appended."""
    metadata: dict[str, Any] | None = None
    """A JSON object of up to 16 KiB, returned with the result."""
    traceparent: Annotated[str | None, BeforeValidator(traceparent_or_none)] = None
    """W3C Trace Context of the publisher; the task's spans continue it. Ignored if malformed."""
    tracestate: Annotated[str | None, BeforeValidator(tracestate_or_none)] = None
    """W3C tracestate, beside `traceparent`. Ignored if malformed."""

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if _depth(value) > MAX_JSON_DEPTH:
            raise ValueError(f"metadata is nested deeper than {MAX_JSON_DEPTH} levels")
        try:
            # A number such as 1e999 is read as infinity, which no JSON can hand back.
            size = len(json.dumps(value, allow_nan=False))
        except TypeError:
            raise ValueError("metadata is not JSON") from None
        if value is not None and size > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is larger than {MAX_METADATA_BYTES} bytes of JSON")
        # JSON can escape half of a surrogate pair, which no result can be written with.
        json.dumps(value, ensure_ascii=False).encode()
        return value

    @model_validator(mode="after")
    def _has_one_input(self) -> Self:
        if self.task is not TaskType.PING:
            if (self.prompt is None) == (self.messages is None):
                raise ValueError("give either prompt or messages")
            if self.prompt == "" or self.messages == ():
                raise ValueError("the prompt is empty")
            if self.messages is not None and self.system is not None:
                raise ValueError("system goes with prompt; put a system message into messages")
            if "user_id" not in self.model_fields_set:
                raise ValueError("user_id is missing")
        texts = [message.content for message in self.messages or ()] or [self.system or "", self.prompt or ""]
        text_bytes = sum(len(text.encode()) for text in texts)
        if text_bytes > MAX_TEXT_BYTES:
            raise ValueError(f"the prompt has {text_bytes} bytes, at most {MAX_TEXT_BYTES} are taken")
        return self

    def chat(self) -> tuple[Message, ...]:
        """Return the conversation as chat messages."""
        if self.messages is not None:
            return self.messages
        system = (Message(role="system", content=self.system),) if self.system else ()
        return (*system, Message(role="user", content=self.prompt or ""))

    def content_hash(self) -> str:
        """Return a digest of everything that makes this task what it is.

        Stored with the call, so that the same task id with other content is seen (G4).
        `task_id`, `reply_to`, `metadata` and the trace change neither the work nor its price and are left out: a
        repeat under another trace is the same task.
        """
        work = self.model_dump(mode="json", exclude={"task_id", "reply_to", "metadata", "traceparent", "tracestate"})
        canonical = json.dumps(work, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def task_from_fields(fields: Mapping[str, Any]) -> Task:
    """Read a task from a stream entry's fields.

    Errors: InvalidTask, with the fields at fault and no text of the prompt.
    """
    document: Mapping[str, Any] = fields
    if "data" in fields and "task" not in fields:
        document = _json_object(fields["data"], name="data")
    values = {name: value for name, value in document.items() if value != "" or name == "prompt"}
    for name in _JSON_FIELDS:
        if isinstance(values.get(name), str):
            values[name] = _parse_json(values[name], name=name)
    if "task" not in values and "task_type" in values:
        values["task"] = values.pop("task_type")
    try:
        return Task.model_validate(values)
    except ValidationError as exc:
        raise InvalidTask(_describe(exc)) from None


def _json_object(text: object, *, name: str) -> dict[str, Any]:
    value = _parse_json(text, name=name) if isinstance(text, str) else text
    if not isinstance(value, dict):
        raise InvalidTask(f"{name}: must be a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def _parse_json(text: str, *, name: str) -> object:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidTask(f"{name}: is not JSON ({type(exc).__name__})") from None


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _depth(value: object) -> int:
    """Return how deep lists and objects are nested, stopping just past the limit."""
    depth = 0
    level: list[object] = [value]
    while level and depth <= MAX_JSON_DEPTH:
        depth += any(isinstance(item, dict | list) for item in level)
        level = [child for item in level for child in _children(item)]
    return depth


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return cast("dict[str, object]", value).values()
    return cast("list[object]", value) if isinstance(value, list) else ()


def _describe(exc: ValidationError) -> str:
    problems: list[str] = []
    for error in exc.errors(include_url=False, include_context=False, include_input=False)[:5]:
        # The name of an unknown field is the publisher's: of any length, and perhaps with half a surrogate pair in it.
        location = ".".join(str(part) for part in error["loc"])[:_SHOWN_CHARACTERS] or "task"
        problems.append(f"{location}: {error['msg'].removeprefix('Value error, ')}")
    return "; ".join(problems).encode("utf-8", "backslashreplace").decode()
