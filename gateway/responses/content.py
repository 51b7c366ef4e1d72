"""Translates the content of Responses' items into content of chat messages."""

from typing import Any, Final

from tollbook.gateway.request_fields import Table, kind_of, list_at, refusal, table_at, text_at
from tollbook.schemas.problems import shown

NOTHING_KEPT: Final = "the gateway stores nothing between requests"
SEE_NEXT: Final = "The result follows in the next message."
"""The text of a tool message whose result is not text."""


def message_content(content: object, path: str) -> str | list[Table]:
    """Return the content of a user, developer or system message. Errors: InvalidTask."""
    if isinstance(content, str):
        return content
    parts = [_part(part, f"{path}[{number}]") for number, part in enumerate(list_at(content, path))]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def answer_content(content: object, path: str) -> tuple[str, str]:
    """Return the text and the refusal of a model's message. Errors: InvalidTask."""
    if isinstance(content, str):
        return content, ""
    texts: list[str] = []
    refusals: list[str] = []
    for number, value in enumerate(list_at(content, path)):
        inner = f"{path}[{number}]"
        part = table_at(value, inner)
        match kind_of(part, inner):
            case "output_text" | "input_text" | "text":
                texts.append(text_at(part.get("text"), f"{inner}.text"))
            case "refusal":
                refusals.append(text_at(part.get("refusal"), f"{inner}.refusal"))
            case kind:
                raise refusal(inner, f"has the type {shown(kind)}, which a model's message cannot have")
    return "".join(texts), "".join(refusals)


def tool_output(output: object, path: str) -> tuple[str, list[Table]]:
    """Return the result of a tool as text, and the images and files in it. Errors: InvalidTask.

    A tool message of a chat completion has only text.
    """
    if isinstance(output, str):
        return output, []
    parts = [_part(part, f"{path}[{number}]") for number, part in enumerate(list_at(output, path))]
    media = [part for part in parts if part["type"] != "text"]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    return text or (SEE_NEXT if media else ""), media


def _part(value: object, path: str) -> Table:
    part = table_at(value, path)
    match kind_of(part, path):
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": text_at(part.get("text"), f"{path}.text")}
        case "input_image":
            return {"type": "image_url", "image_url": _image(part, path)}
        case "input_file":
            return {"type": "file", "file": _file(part, path)}
        case "input_audio":
            return {"type": "input_audio", "input_audio": table_at(part.get("input_audio"), f"{path}.input_audio")}
        case kind:
            raise refusal(path, f"has the type {shown(kind)}, which cannot be translated to a chat completion")


def _image(part: Table, path: str) -> Table:
    _refuse_file_id(part, path)
    detail = {"detail": part["detail"]} if "detail" in part else {}
    return {"url": text_at(part.get("image_url"), f"{path}.image_url"), **detail}


def _file(part: Table, path: str) -> Table:
    _refuse_file_id(part, path)
    data: Any = part.get("file_data", part.get("file_url"))
    name = {"filename": part["filename"]} if "filename" in part else {}
    return {"file_data": text_at(data, f"{path}.file_data"), **name}


def _refuse_file_id(part: Table, path: str) -> None:
    if "file_id" in part:
        raise refusal(f"{path}.file_id", f"cannot be set: {NOTHING_KEPT}, no files either; send the data or a URL")
