"""Chat completions over HTTP, whole: answers, refusals, keys, and what is left on the ledger."""

import base64
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from redis.asyncio import Redis

from tests.gateway.serving import KEY, MODEL, Served, api_key, open_served
from tests.quick import first_quick
from tollbook.gateway.chat import ChatCompletions
from tollbook.schemas.events import BudgetReserved
from tollbook.schemas.money import nanousd_from_usd


@pytest.fixture
async def served(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    prices = {"openai/text-embedding-3-small": {"prompt": Decimal("0.02"), "completion": 0}}
    async with open_served(server_url, tmp_path, hold_wait_s=5, gateway_wait_s=0.2, prices=prices) as served:
        yield served
        await served.calling.check_guarantees()


async def hold_of(served: Served, reply: httpx.Response) -> BudgetReserved:
    """Return what the ledger has of the hold of an answer's call."""
    payload = (await served.calling.events(reply.headers["x-tollbook-call-id"]))[0].payload
    assert isinstance(payload, BudgetReserved)
    return payload


async def test_an_answer_is_a_chat_completion_and_its_cost_is_on_the_ledger(served: Served) -> None:
    reply = await served.chat("Hello [[completion_tokens=7]]")

    assert reply.status_code == 200, reply.text
    document = reply.json()
    assert (document["object"], document["system_fingerprint"]) == ("chat.completion", None)
    assert document["choices"][0]["message"]["role"] == "assistant"
    assert document["choices"][0]["message"]["content"]
    assert document["choices"][0]["finish_reason"] == "stop"
    assert document["usage"]["completion_tokens"] == 7
    cost = Decimal(reply.headers["x-tollbook-cost-usd"])
    assert nanousd_from_usd(cost) == await served.calling.spent() == served.calling.booked()
    assert document["usage"]["cost"] == float(cost)
    events = await served.calling.events(reply.headers["x-tollbook-call-id"])
    assert [event.type for event in events] == ["budget-reserved", "model-called", "cost-recorded"]


async def test_a_task_type_is_called_by_its_route_with_fallback(served: Served) -> None:
    served.calling.script("http_500", "http_500", None)

    reply = await served.chat(model="generate_draft")

    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == "openai/gpt-4o-mini"


async def test_a_missing_limit_is_the_policys(served: Served) -> None:
    reply = await served.chat()

    assert (await hold_of(served, reply)).bound.completion_tokens == 4096


async def test_a_cap_that_is_reached_is_refused_with_its_numbers_and_not_tried_again(served: Served) -> None:
    await served.calling.set_cap(1_000)

    reply = await served.chat()

    assert reply.status_code == 402
    assert reply.headers["x-should-retry"] == "false"
    error = reply.json()["error"]
    assert (error["code"], error["type"]) == ("plan_limit_reached", "insufficient_quota")
    assert error["metadata"]["limit"] == "0.000001000"
    assert error["metadata"]["spent"] == "0.000000000"
    assert Decimal(error["metadata"]["bound"]) > Decimal("0.000001")
    assert error["metadata"]["resets_at"].endswith("+00:00")
    assert error["metadata"]["call_id"] == reply.headers["x-tollbook-call-id"]
    assert served.calling.provider.requests == 0


BAD_REQUESTS: Final[tuple[tuple[dict[str, Any], str], ...]] = (
    ({"temperature": 7}, "invalid_task"),
    ({"n": 2}, "invalid_task"),
    ({"stream": "false"}, "invalid_task"),
    ({"stream": {}}, "invalid_task"),
    ({"model": ""}, "invalid_task"),
    ({"model": "no model"}, "invalid_task"),
    ({"model": "mod\u00e8le"}, "invalid_task"),
    ({"model": f"{MODEL}@nobody"}, "price_unknown"),
    ({"model": "nobody/knows-this"}, "price_unknown"),
    ({"messages": []}, "invalid_task"),
    ({"task_id": "mine"}, "invalid_task"),
    ({"temperatur": 1}, "invalid_task"),
)


async def test_bad_requests_are_refused_and_hold_nothing(served: Served, subtests: pytest.Subtests) -> None:
    for body, code in BAD_REQUESTS:
        with subtests.test(body=body):
            reply = await served.chat(**body)

            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == code
            assert reply.headers["x-should-retry"] == "false"
    assert not [event for event in await served.calling.events() if event.type == "budget-reserved"]


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ("temperatur", "unknown field 'temperatur'; did you mean 'temperature'?"),
        ("frobnicate", "unknown field 'frobnicate'; /openapi.json lists each endpoint's fields"),
        ("x" * 200, "unknown field of 200 characters; /openapi.json lists each endpoint's fields"),
        ("prompt", "'prompt' is not a parameter of a completion"),
        ("provider", "'provider' cannot be set: Tollbook sets it, so that no endpoint costs more than the bound"),
    ],
)
async def test_an_unknown_field_is_named_without_suggesting_task_fields(
    served: Served, field: str, problem: str
) -> None:
    unknown: dict[str, Any] = {field: {"a": 1}}
    reply = await served.chat(**unknown)

    assert (reply.status_code, reply.json()["error"]["message"]) == (400, problem)


async def test_usage_may_be_asked_for_in_the_way_of_openrouter(served: Served) -> None:
    reply = await served.chat(usage={"include": True})

    assert reply.status_code == 200, reply.text
    assert round(reply.json()["usage"]["cost"] * 1e9) == served.calling.booked() > 0


@pytest.mark.slow
async def test_a_field_that_is_null_counts_as_absent_although_it_is_not_known(served: Served) -> None:
    assert (await served.chat(frobnicate=None, cache=None)).status_code == 200


@pytest.mark.parametrize(
    "body", first_quick(1, [b"{", b"\xff\xfe", b"[" * 100_000, b"", b"[]", b'{"model": "a", "model": "b"}'])
)
async def test_bodies_that_are_no_object_are_refused(served: Served, body: bytes) -> None:
    reply = await served.client.post("/v1/chat/completions", content=body)

    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_task"


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer tb-wrong"}, {"authorization": ""}, {"x-api-key": "t" * 300}]
)
async def test_wrong_keys_are_refused_late_and_counted(served: Served, headers: dict[str, str]) -> None:
    reply = await served.chat(headers={"authorization": "", **headers})

    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert served.gateway.counts.wrong_keys == 1


@pytest.mark.slow
async def test_a_key_in_the_other_header_is_one_too(served: Served) -> None:
    assert (await served.chat(headers={"authorization": "", "x-api-key": KEY})).status_code == 200


async def test_a_key_for_some_models_cannot_call_others(served: Served) -> None:
    served.keys.by_secret[KEY] = api_key(models=("generate_draft",))

    assert (await served.chat(model="generate_draft")).status_code == 200
    reply = await served.chat(model=MODEL)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "model_not_allowed")


async def test_attributes_that_a_client_sends_count_if_its_key_allows_them(served: Served) -> None:
    headers = {"x-tollbook-user": "u7", "x-tollbook-tags": "team=red"}
    refused = await served.chat(headers=headers)
    ignored = await served.chat(user="u7")
    served.keys.by_secret[KEY] = api_key(allows=frozenset({"user", "tags"}))
    allowed = await served.chat(headers=headers)

    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "attribute_not_allowed")
    users = {event.call_id: event.user_id for event in await served.calling.events()}
    assert users[ignored.headers["x-tollbook-call-id"]] == "u1"
    assert users[allowed.headers["x-tollbook-call-id"]] == "u7"
    assert (await hold_of(served, allowed)).tags == {"team": "red"}


async def test_a_failed_provider_is_reported_and_not_retried_if_it_was_paid(served: Served) -> None:
    served.calling.script("http_500", "http_500")
    free = await served.chat()
    served.calling.script("reset_after_charge", "reset_after_charge")
    paid = await served.chat()

    assert free.status_code == paid.status_code == 502
    assert "x-should-retry" not in free.headers
    assert paid.headers["x-should-retry"] == "false"


async def test_models_task_types_and_the_keys_budgets_can_be_asked_for(served: Served) -> None:
    listed = (await served.client.get("/v1/models")).json()["data"]
    await served.chat()
    key = (await served.client.get("/v1/key")).json()

    assert {"generate_draft", MODEL} <= {each["id"] for each in listed}
    assert (await served.client.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL
    assert (await served.client.get("/v1/models/none")).status_code == 404
    [own] = key["budgets"]
    assert own["limit_usd"] == "5.000000000"
    assert nanousd_from_usd(own["spent_usd"]) == await served.calling.spent()


async def test_models_have_the_form_of_both_apis(served: Served) -> None:
    listed = (await served.client.get("/v1/models")).json()
    shown = (await served.client.get(f"/v1/models/{MODEL}")).json()

    assert shown in listed["data"]
    assert (shown["object"], shown["owned_by"], shown["created"]) == ("model", "openai", 0)
    assert (shown["type"], shown["display_name"]) == ("model", MODEL)
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert (listed["first_id"], listed["last_id"]) == (listed["data"][0]["id"], listed["data"][-1]["id"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "use /v1/chat/completions: correct the base URL"),
        ("/v1/v1/messages", "use /v1/messages: correct the base URL"),
        ("/v1/completions", "/openapi.json lists the endpoints"),
        ("/v1/messages/batches", "/openapi.json lists the endpoints"),
    ],
)
async def test_an_unknown_endpoint_is_reported_once(served: Served, path: str, hint: str) -> None:
    reply = await served.client.post(path, json={})

    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == f"POST {path}: there is no such endpoint; {hint}"
    assert reply.headers["x-should-retry"] == "false"


async def test_the_page_and_the_document_need_no_key(served: Served) -> None:
    page = await served.client.get("/", headers={"authorization": ""})
    document = await served.client.get("/openapi.json", headers={"authorization": ""})

    assert "curl" in page.text
    assert "/v1/chat/completions" in document.json()["paths"]
    assert (await served.client.get("/nowhere")).json()["error"]["code"] == "not_found"


async def test_embeddings_are_made_and_paid(served: Served) -> None:
    body = {"model": "openai/text-embedding-3-small", "input": ["one", "two"]}
    reply = await served.client.post("/v1/embeddings", json=body)

    assert reply.status_code == 200, reply.text
    assert [each["index"] for each in reply.json()["data"]] == [0, 1]
    assert [type(each["embedding"]) for each in reply.json()["data"]] == [list, list]
    assert await served.calling.spent() == served.calling.booked() > 0


@pytest.mark.slow
@pytest.mark.parametrize("text", ['["one", "two"]', "[1, 2]", '{"a": 1}'])
async def test_a_text_that_looks_like_json_stays_a_text(served: Served, text: str) -> None:
    # OpenAI's SDK for Python asks for base64 where its caller says nothing.
    body = {"model": "openai/text-embedding-3-small", "input": text, "encoding_format": "base64"}
    embedded = await served.client.post("/v1/embeddings", json=body)
    stopped = await served.chat(stop=text)

    assert embedded.status_code == 200, embedded.text
    [vector] = embedded.json()["data"]
    assert len(base64.b64decode(vector["embedding"])) == 8 * 4
    assert stopped.status_code == 200, stopped.text
    assert ChatCompletions().chat_fields({"stop": text}, ())["stop"] == [text]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "'input' is missing: give a text, or a list of texts"),
        ({"input": ""}, "'input' is empty: give a text, or a list of texts"),
        ({"input": []}, "'input' is empty: give a text, or a list of texts"),
        ({"input": ["x"] * 129}, "'input' has 129 texts, at most 128: send several requests"),
    ],
)
async def test_embeddings_of_nothing_or_of_too_many_texts_are_refused(
    served: Served, given: dict[str, Any], problem: str
) -> None:
    reply = await served.client.post("/v1/embeddings", json={"model": "openai/text-embedding-3-small", **given})

    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": problem,
        "type": "invalid_request_error",
        "param": "input",
        "code": "invalid_task",
    }
