"""Translates Anthropic's content blocks into parts of chat messages."""

from typing import Any, Final, cast

from tollbook.gateway.request_fields import Table, kind_of, list_at, refusal, table_at, text_at
from tollbook.schemas.problems import shown

NOTHING_KEPT: Final = "the gateway stores nothing between requests"
_CACHE_FIELDS: Final = ("type", "ttl")


def text_part(text: str, block: Table) -> Table:
    """Return a text part, with the block's cache mark."""
    return {"type": "text", "text": text, **mark_of(block)}


def mark_of(block: Table) -> Table:
    """Return the block's cache mark, with only the fields that every provider knows."""
    if not isinstance(block.get("cache_control"), dict):
        return {}
    mark = cast("Table", block["cache_control"])
    return {"cache_control": {name: mark[name] for name in _CACHE_FIELDS if mark.get(name) is not None}}


def parts_of(content: object, path: str) -> list[Table]:
    """Return content (text or blocks) as parts. Errors: InvalidTask."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[Table] = []
    for number, block in enumerate(list_at(content, path)):
        parts += part_of(table_at(block, f"{path}[{number}]"), f"{path}[{number}]")
    return parts


def part_of(block: Table, path: str) -> list[Table]:
    """Return a block of a user's message or of a tool's result as parts. Errors: InvalidTask."""
    match kind_of(block, path):
        case "text":
            return [text_part(text_at(block.get("text"), f"{path}.text"), block)]
        case "image":
            return [{"type": "image_url", "image_url": {"url": _url(block, path)}, **mark_of(block)}]
        case "document":
            return _document(block, path)
        case "search_result":
            texts = [part["text"] for part in parts_of(block.get("content"), f"{path}.content")]
            head = [text_at(block.get(name), f"{path}.{name}") for name in ("title", "source")]
            return [text_part("\n".join([*head, *texts]), block)]
        case "tool_reference":
            # All tools are sent to the model, including those that the search found.
            name = text_at(block.get("tool_name"), f"{path}.tool_name")
            return [text_part(f"The tool {name} is available.", block)]
        case kind:
            raise refusal(path, f"has the type {shown(kind)}, which cannot be translated to a chat completion")


def content_of(parts: list[Table]) -> str | list[Table]:
    """Return parts as content: a single plain text as a string, which every server accepts."""
    return parts[0]["text"] if len(parts) == 1 and parts[0].keys() == {"type", "text"} else parts


def _document(block: Table, path: str) -> list[Table]:
    source = table_at(block.get("source"), f"{path}.source")
    title = text_at(block.get("title", ""), f"{path}.title")
    context = text_at(block.get("context", ""), f"{path}.context")
    match source.get("type"):
        case "text":
            data = text_at(source.get("data"), f"{path}.source.data")
            return [text_part("\n".join(text for text in (title, context, data) if text), block)]
        case "content":
            parts = parts_of(source.get("content"), f"{path}.source.content")
            head: list[Table] = [text_part(text, {}) for text in (title, context) if text]
            return [*head, *parts[:-1], *({**part, **mark_of(block)} for part in parts[-1:])]
        case _:
            name: Any = {"filename": title} if title else {}
            file = {"type": "file", "file": {"file_data": _url(block, path), **name}, **mark_of(block)}
            return [*([text_part(context, {})] if context else []), file]


def _url(block: Table, path: str) -> str:
    source = table_at(block.get("source"), f"{path}.source")
    match source.get("type"):
        case "base64":
            kind = text_at(source.get("media_type"), f"{path}.source.media_type")
            return f"data:{kind};base64,{text_at(source.get('data'), f'{path}.source.data')}"
        case "url":
            return text_at(source.get("url"), f"{path}.source.url")
        case "file":
            raise refusal(
                f"{path}.source", f"cannot name a file: {NOTHING_KEPT}, no files either; send the data or a URL"
            )
        case kind:
            raise refusal(f"{path}.source", f"has the type {shown(kind)}: it must be 'base64' or 'url'")
