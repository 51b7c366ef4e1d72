"""Reading a task from a stream entry, in every form that a publisher may use.

The forms are: plain fields; one field `data` with JSON; FastStream's binary envelope (`__data__`). An entry that cannot
be read is kept whole.
"""

import base64
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from tollbook.schemas.identifiers import check_id, check_task_id, id_text, task_id_from_entry
from tollbook.schemas.json_text import RepeatedKey, parse_json
from tollbook.schemas.tasks import (
    InvalidTask,
    Task,
    check_entry_size,
    reply_stream_or_none,
    task_from_fields,
    traceparent_or_none,
    tracestate_or_none,
)

_ENVELOPE: Final = b"__data__"
_SALVAGED: Final = ("task_id", "user_id", "reply_to", "traceparent", "tracestate")
# FastStream puts these beside the body; a plain publisher puts them among the fields.
_HEADERS: Final = ("reply_to", "traceparent", "tracestate")


@dataclass(frozen=True, slots=True)
class Delivery:
    """One delivery of a stream entry to this worker. `deliveries` counts the entry's deliveries, including this one."""

    stream: str
    entry_id: str
    fields: Mapping[bytes, bytes]
    deliveries: int = 1

    @property
    def is_claimed(self) -> bool:
        """Whether the entry was delivered before, to a worker that fell silent."""
        return self.deliveries > 1

    @property
    def key(self) -> tuple[str, str]:
        """Stream and id of the entry, which identify it."""
        return self.stream, self.entry_id


@dataclass(frozen=True, slots=True)
class Salvage:
    """The readable part of a malformed message: enough to answer its publisher."""

    task_id: str
    user_id: str | None = None
    reply_to: str | None = None


def read_task(delivery: Delivery, tag_names: Collection[str] = ()) -> tuple[str, Task]:
    """Return the task id and the task; fields named in `tag_names` are tags.

    Errors: InvalidTask; its message never quotes a prompt.
    """
    task = task_from_fields(_open(delivery), tag_names)
    return task.task_id or task_id_from_entry(delivery.stream, delivery.entry_id), task


def salvage(delivery: Delivery) -> Salvage:
    """Read the ids of a malformed message as far as possible; without a task id, the entry id takes its place."""
    fields = _readable(delivery)
    return Salvage(
        task_id=_id(fields.get("task_id"), check_task_id) or task_id_from_entry(delivery.stream, delivery.entry_id),
        user_id=_id(fields.get("user_id")),
        reply_to=reply_stream_or_none(fields.get("reply_to")),
    )


def trace_of(delivery: Delivery) -> dict[str, str]:
    """Return the publisher's W3C trace context as headers; empty if it is missing or malformed."""
    fields = _readable(delivery)
    parent = traceparent_or_none(fields.get("traceparent"))
    if parent is None:
        return {}
    state = tracestate_or_none(fields.get("tracestate"))
    return {"traceparent": parent, **({"tracestate": state} if state else {})}


def _readable(delivery: Delivery) -> Mapping[str, Any]:
    try:
        fields: Mapping[str, Any] = _open(delivery)
        if "data" in fields and "task" not in fields:
            document = json.loads(fields["data"]) if isinstance(fields["data"], str) else fields["data"]
            fields = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    except (ValueError, RecursionError):
        # A field that is too large or not UTF-8 does not make the others unreadable.
        return {name: delivery.fields.get(name.encode(), b"").decode(errors="replace") for name in _SALVAGED}
    return fields


def fields_as_json(fields: Mapping[bytes, bytes]) -> str:
    """Return an entry's fields as JSON without loss: bytes that are not UTF-8 become {"base64": ...}."""
    return json.dumps({_name(name): _value(value) for name, value in fields.items()})


def fields_from_json(text: str) -> dict[bytes, bytes]:
    """Undo `fields_as_json`."""
    fields: dict[bytes, bytes] = {}
    for name, value in json.loads(text).items():
        raw_name = base64.b64decode(name[7:]) if name.startswith("base64:") else name.encode()
        fields[raw_name] = base64.b64decode(value["base64"]) if isinstance(value, dict) else value.encode()  # pyright: ignore[reportUnknownArgumentType]
    return fields


def _open(delivery: Delivery) -> dict[str, Any]:
    size = sum(len(name) + len(value) for name, value in delivery.fields.items())
    check_entry_size(size)
    envelope = delivery.fields.get(_ENVELOPE)
    if envelope is not None:
        return _open_envelope(envelope)
    try:
        return {name.decode(): value.decode() for name, value in delivery.fields.items()}
    except UnicodeDecodeError:
        raise InvalidTask("the message is not UTF-8") from None


def _open_envelope(envelope: bytes) -> dict[str, Any]:
    # Imported here: `tollbook dead-letters` reads messages too, and FastStream is slow to import.
    from faststream.redis.parser import BinaryMessageFormatV1

    try:
        body, headers = BinaryMessageFormatV1.parse(envelope)
        document = parse_json(body)
    except RepeatedKey as exc:
        raise InvalidTask(f"the FastStream message {exc}") from None
    except Exception as exc:  # noqa: BLE001 - FastStream's reader fails in many ways on bytes that are not its own.
        raise InvalidTask(f"the FastStream envelope cannot be read ({type(exc).__name__})") from None
    if not isinstance(document, dict):
        raise InvalidTask("the FastStream message must be a JSON object")
    for name in _HEADERS:
        if headers.get(name):
            document.setdefault(name, headers[name])  # pyright: ignore[reportUnknownMemberType]
    return document  # pyright: ignore[reportUnknownVariableType]


def _id(value: object, check: Callable[[str], str] = check_id) -> str | None:
    text = id_text(value)
    if not isinstance(text, str) or "\ufffd" in text:  # A replaced byte: the id was not UTF-8, so it is unknown.
        return None
    try:
        return check(text)
    except ValueError:
        return None


def _name(name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = "base64:"
    return "base64:" + base64.b64encode(name).decode() if text.startswith("base64:") else text


def _value(value: bytes) -> str | dict[str, str]:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
