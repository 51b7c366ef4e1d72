"""Builds the items of Responses' `output`: one for each segment of an answer."""

import json
import re
from dataclasses import replace
from typing import Any, Final, Literal, assert_never, cast

from tollbook.gateway.reasoning_details import pack
from tollbook.gateway.request_fields import Table
from tollbook.gateway.responses.tools import INPUT, ToolNames
from tollbook.gateway.segments import Segment

Status = Literal["in_progress", "completed", "incomplete"]
ID_PREFIX: Final = "resp_"
_IMAGE_HEAD: Final = re.compile(r"data:image/(png|webp|jpeg|gif)\b")


def item_of(segment: Segment, *, stem: str, names: ToolNames, status: Status | None = None) -> Table:
    """Return the item of a segment. `stem` makes its id unique over all answers."""
    status = status or ("incomplete" if segment.is_cut else "completed")
    item_id = item_id_of(segment, stem=stem, names=names)
    match segment.kind:
        case "reasoning":
            summary = [summary_part(segment.text)] if segment.text else []
            kept = pack(segment.details)
            return {
                "id": item_id,
                "type": "reasoning",
                "summary": summary,
                **({"encrypted_content": kept} if kept else {}),
            }
        case "content" | "refusal":
            content = [part_of(segment, segment.text)]
            return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}
        case "image":
            return {"id": item_id, "type": "image_generation_call", "status": status, **_image(segment.text)}
        case "call":
            return {"id": item_id, **_call(segment, names), "status": status}
        case _:
            assert_never(segment.kind)


def opened_item(segment: Segment, *, stem: str, names: ToolNames) -> Table:
    """Return the item as it is announced, without its text."""
    begun = replace(segment, text="", is_cut=False, details=[])
    item = item_of(begun, stem=stem, names=names, status="in_progress")
    return {**item, **{name: [] for name in ("content", "summary") if name in item}}


def item_id_of(segment: Segment, *, stem: str, names: ToolNames) -> str:
    """Return the id of an item, with OpenAI's prefix. `response_id_of` is the inverse."""
    match segment.kind:
        case "reasoning":
            prefix = "rs"
        case "content" | "refusal":
            prefix = "msg"
        case "image":
            prefix = "ig"
        case "call":
            prefix = "ctc" if is_custom(segment, names) else "fc"
        case _:
            assert_never(segment.kind)
    return f"{prefix}_{stem}_{segment.number}"


def response_id_of(item_id: str) -> str:
    """Return the id of the answer that an item belongs to."""
    return ID_PREFIX + item_id.partition("_")[2].rpartition("_")[0]


def part_of(segment: Segment, text: str) -> Table:
    """Return a message part with this text."""
    if segment.kind == "refusal":
        return {"type": "refusal", "refusal": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def summary_part(text: str) -> Table:
    """Return reasoning as a summary, because few clients show the reasoning itself."""
    return {"type": "summary_text", "text": text}


def is_custom(segment: Segment, names: ToolNames) -> bool:
    """Whether a custom tool is called, directly or as a function."""
    return segment.is_custom or names.of(segment.name).is_custom


def custom_input(segment: Segment) -> str:
    """Return the input text of a custom tool, from the arguments of its function."""
    if segment.is_custom:
        return segment.text
    try:
        arguments: object = json.loads(segment.text)
    except (ValueError, RecursionError):
        return segment.text
    text = cast("dict[str, Any]", arguments).get(INPUT) if isinstance(arguments, dict) else None
    return text if isinstance(text, str) else segment.text


def _image(address: str) -> Table:
    """Return an image in OpenAI's format: only the data of a `data:` URL, and the image format."""
    head, _, data = address.rpartition(",")
    found = _IMAGE_HEAD.match(head)
    return {"result": data or None, **({"output_format": found[1]} if found else {})}


def _call(segment: Segment, names: ToolNames) -> Table:
    name = names.of(segment.name)
    called: Table = {"call_id": segment.call_id, "name": name.name}
    if name.namespace is not None:
        called["namespace"] = name.namespace
    if is_custom(segment, names):
        return {"type": "custom_tool_call", **called, "input": custom_input(segment)}
    return {"type": "function_call", **called, "arguments": segment.text}
