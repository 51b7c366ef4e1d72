"""Requests made from the gateway's own OpenAPI document, and such with a part that is anything: each is answered as the
document says, none is a fault of the gateway's, and no money stays held.
"""

import json
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from tests.gateway.schema_values import ANYTHING, values
from tests.gateway.serving import MODEL, Served, open_served
from tollbook.gateway.openapi import document

pytestmark = pytest.mark.slow

DOCUMENT = document()
PATHS = [path for path, methods in DOCUMENT["paths"].items() if "post" in methods]
# One of chat completions, one of embeddings.
MODELS = [MODEL, "openai/text-embedding-3-small"]
QUICK = settings(
    max_examples=60,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # Shrinking over HTTP takes minutes.
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,  # All examples are sent to one gateway.
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with open_served(server_url, tmp_path, hold_wait_s=5, gateway_wait_s=0.2) as served:
        yield served
        await served.calling.check_guarantees()


@cache
def bodies(path: str) -> st.SearchStrategy[Any]:
    """Bodies by the document, for a model that can be called."""
    schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schemas = json.loads(json.dumps(DOCUMENT["components"]["schemas"]))
    schemas[schema["$ref"].rpartition("/")[2]]["properties"]["model"] = {"enum": MODELS}
    return values(schema, schemas)


@st.composite
def changed_bodies(draw: st.DrawFn, path: str) -> Any:
    """Bodies by the document of which one part is anything."""
    body = draw(bodies(path))
    place = body
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        if not keys:
            return body
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            place[key] = draw(ANYTHING)
            return body
        place = place[key]


def check(path: str, reply: httpx.Response) -> None:
    assert str(reply.status_code) in DOCUMENT["paths"][path]["post"]["responses"], reply.text
    # The stand-in refuses what a provider refuses, so there is always a model that answers.
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert reply.json()["error"]["message"]
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.rstrip().rpartition("\n")[2].startswith("data: ")


@pytest.mark.parametrize("path", PATHS)
@QUICK
@given(data=st.data())
async def test_a_request_by_the_document_is_answered_by_the_document(
    served: Served, path: str, data: st.DataObject
) -> None:
    check(path, await served.client.post(path, json=data.draw(bodies(path))))


@pytest.mark.parametrize("path", PATHS)
@QUICK
@given(data=st.data())
async def test_a_request_with_any_part_is_never_an_internal_error(
    served: Served, path: str, data: st.DataObject
) -> None:
    check(path, await served.client.post(path, json=data.draw(changed_bodies(path))))
