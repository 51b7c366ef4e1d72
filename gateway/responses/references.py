"""Resolves references to items of earlier answers.

Without `store: false`, Vercel's SDK sends only the id of an item that the server may have stored. The gateway stores no
items, but an item's id contains its answer's id, so the item can be rebuilt from the result while that is kept.
"""

from collections.abc import Mapping
from typing import Any, cast

from tollbook.gateway.request_fields import Table
from tollbook.gateway.responses.document import id_stem, items_of
from tollbook.gateway.responses.items import REFERENCE
from tollbook.gateway.responses.output import response_id_of
from tollbook.gateway.segments import segments_of
from tollbook.schemas.results import InferenceResult


def referenced_responses(body: Mapping[str, Any]) -> frozenset[str]:
    """Return the ids of the answers that a request's input refers to; none for a malformed input."""
    items = body.get("input")
    if not isinstance(items, list):
        return frozenset()
    tables = [cast("Table", each) for each in cast("list[object]", items) if isinstance(each, dict)]
    ids = [table.get("id") for table in tables if _is_reference(table)]
    return frozenset(response_id_of(item_id) for item_id in ids if isinstance(item_id, str))


def items_by_id(result: InferenceResult, *, response_id: str, body: Mapping[str, Any]) -> dict[str, Table]:
    """Return the items of an earlier answer, for `chat_fields` of a request of the same user."""
    return {
        item["id"]: item for item in items_of(segments_of(result, id_stem(response_id)), id_stem(response_id), body)
    }


def _is_reference(item: Table) -> bool:
    return item.get("type") == REFERENCE or (item.get("type") is None and "role" not in item)
