"""The stand-in for OpenRouter: its prices, its faults, and its book, with which other tests compare the ledger."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.quick import first_quick
from tests.servers import PATIENCE_S, wait_until
from tollbook.inference.prices.catalogue import PriceCatalogue
from tollbook.inference.routing import MODEL_ROUTING
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.usage import Usage
from tollbook.standin import FAULTS, FaultPlan, StandIn, StandInConfig
from tollbook.standin.faults import STATUS_CODES
from tollbook.standin.prices import PRICES, ListPrice, charge_nanousd

# Nano-dollars a token as OpenRouter publishes them: prompt, completion, cached prompt.
PUBLISHED = [
    ("anthropic/claude-3-haiku", 250, 1_250, 30),
    ("anthropic/claude-sonnet-4", 3_000, 15_000, 300),
    ("google/gemini-2.5-flash", 300, 2_500, 30),
    ("openai/gpt-4o-mini", 150, 600, 75),
]
MODEL = "anthropic/claude-3-haiku"
NOVEMBER_2026_MS = 1_795_000_000_000
# "Tell me [[completion_tokens=40]]" has 32 bytes: 8 tokens and 4 for the message.
PROMPT = "Tell me [[completion_tokens=40]]"
PROMPT_TOKENS = 8 + 4
PRICE = PROMPT_TOKENS * 250 + 40 * 1_250

# Status, whether the body is a completion, whether the money is taken; of the faults that answer at once.
ANSWERED = [
    *((f"http_{code}", code, False) for code in STATUS_CODES),
    ("in_flight", 402, False),
    ("slow", 200, True),
    ("broken_json", 200, False),
    ("cut_off", 200, False),
    ("html_body", 200, False),
    ("error_in_200", 200, False),
    ("error_finish", 200, False),
    ("missing_usage", 200, True),
    ("missing_cost", 200, True),
    ("null_cost", 200, True),
    ("zero_cost", 200, True),
    ("overcharge", 200, True),
]
UNANSWERED = ["stalled", "hang", "hang_charged", "reset_before_charge", "reset_after_charge", "reset_mid_body"]
CHARGED = {
    "slow": PRICE,
    "hang_charged": PRICE,
    "reset_after_charge": PRICE,
    "reset_mid_body": PRICE,
    "cut_off": PRICE,
    "broken_json": PRICE,
    "html_body": PRICE,
    "error_finish": PRICE,
    "missing_usage": PRICE,
    "missing_cost": PRICE,
    "null_cost": PRICE,
    "overcharge": 10 * PRICE,
}
# To connect and to send may take long on a busy machine; the answer never comes.
ONLY_READING = httpx.Timeout(PATIENCE_S, read=0.5)


def body(prompt: str = PROMPT, **changes: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 200,
        "user": "u1",
    } | changes


@asynccontextmanager
async def standin(**config: Any) -> AsyncIterator[tuple[StandIn, httpx.AsyncClient]]:
    async with (
        StandIn(StandInConfig(**config)) as server,
        httpx.AsyncClient(base_url=server.root_url, timeout=PATIENCE_S) as client,
    ):
        yield server, client


async def ask(client: httpx.AsyncClient, document: Any = None) -> httpx.Response:
    return await client.post("/api/v1/chat/completions", json=body() if document is None else document)


def usage_of(response: httpx.Response) -> dict[str, Any]:
    return json.loads(response.content, parse_float=Decimal)["usage"]


@pytest.mark.parametrize(("model", "prompt", "completion", "cached"), PUBLISHED)
def test_prices_are_the_published_ones_and_those_of_the_catalogue(
    model: str, prompt: int, completion: int, cached: int
) -> None:
    catalogue = PriceCatalogue()
    usage = Usage(prompt_tokens=1_000, completion_tokens=400)
    expected = 1_000 * prompt + 400 * completion
    assert charge_nanousd(model, prompt_tokens=1_000, completion_tokens=400) == expected
    assert catalogue.cost(model, usage, NOVEMBER_2026_MS) == expected

    # genai-prices has no price of cached tokens for Claude 3 Haiku; they then cost what others do.
    catalogued = prompt if model == "anthropic/claude-3-haiku" else cached
    usage = Usage(prompt_tokens=1_000, completion_tokens=400, cached_tokens=300)
    expected = 700 * prompt + 300 * cached + 400 * completion
    assert charge_nanousd(model, prompt_tokens=1_000, completion_tokens=400, cached_tokens=300) == expected
    assert catalogue.cost(model, usage, NOVEMBER_2026_MS) == expected + 300 * (catalogued - cached)


def test_every_routed_model_has_a_price() -> None:
    routed = {target.model for route in MODEL_ROUTING.values() for target in route.targets}
    assert routed == {model for model, *_ in PUBLISHED} == set(PRICES)


def test_the_tables_of_this_file_have_every_fault() -> None:
    assert {name for name, *_ in ANSWERED} | set(UNANSWERED) == set(FAULTS)
    assert {name for name, is_charged in FAULTS.items() if is_charged} == set(CHARGED)


async def test_completion_reports_what_the_book_charges() -> None:
    async with standin() as (server, client):
        response = await ask(client)
        assert response.status_code == 200
        document = response.json()
        assert document["choices"][0]["finish_reason"] == "stop"
        assert document["choices"][0]["message"]["content"]
        assert document["id"] == response.headers["x-generation-id"]
        assert usage_of(response) == {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": 40,
            "total_tokens": PROMPT_TOKENS + 40,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
            "cost": usd_from_nanousd(PRICE),
        }
        assert server.book.totals() == {"u1": PRICE}


async def test_completion_is_cut_at_max_tokens() -> None:
    async with standin() as (server, client):
        response = await ask(client, body(max_tokens=7))
        assert response.json()["choices"][0]["finish_reason"] == "length"
        assert usage_of(response)["completion_tokens"] == 7
        assert server.book.totals() == {"u1": PROMPT_TOKENS * 250 + 7 * 1_250}


@pytest.mark.parametrize(("fault", "status", "is_completion"), first_quick(12, ANSWERED))
async def test_fault_that_answers(fault: str, status: int, is_completion: bool) -> None:
    async with standin(faults=FaultPlan(script=[fault]), slow_ms=20) as (server, client):
        response = await ask(client)
        assert response.status_code == status
        assert response.headers["x-generation-id"]
        assert server.book.totals() == ({"u1": CHARGED[fault]} if fault in CHARGED else {})
        assert (b'"content"' in response.content and fault not in ("broken_json", "cut_off")) == is_completion
        if status != 200:
            assert response.json()["error"]["code"] == status
        # The fault was for one request only.
        assert (await ask(client)).status_code == 200


@pytest.mark.parametrize(
    ("fault", "cost"),
    [
        ("missing_cost", "absent"),
        ("null_cost", None),
        ("zero_cost", Decimal(0)),
        ("overcharge", usd_from_nanousd(10 * PRICE)),
        ("slow", usd_from_nanousd(PRICE)),
    ],
)
async def test_fault_in_the_reported_cost(fault: str, cost: object) -> None:
    async with standin(faults=FaultPlan(script=[fault]), slow_ms=1) as (_, client):
        assert usage_of(await ask(client)).get("cost", "absent") == cost


async def test_fault_in_the_body_is_what_its_name_says() -> None:
    async with standin() as (_, client):

        async def document(fault: str) -> Any:
            return json.loads((await ask(client, body(f"[[fault={fault}]]"))).content)

        assert "usage" not in await document("missing_usage")
        assert (await document("error_in_200"))["error"]["code"] == 502
        assert (await document("error_finish"))["choices"][0]["finish_reason"] == "error"
        assert (await document("in_flight"))["error"]["metadata"]["error_type"] == "in_flight_budget_exhausted"
        for fault in ("broken_json", "html_body"):
            with pytest.raises(json.JSONDecodeError):
                await document(fault)


@pytest.mark.parametrize(
    ("fault", "status", "retry_after"), [("http_429:7", 429, "7"), ("http_503", 503, None), ("in_flight", 402, "1")]
)
async def test_fault_with_a_pause_asked_for(fault: str, status: int, retry_after: str | None) -> None:
    async with standin(faults=FaultPlan(script=[fault])) as (_, client):
        response = await ask(client)
        assert (response.status_code, response.headers.get("retry-after")) == (status, retry_after)


@pytest.mark.parametrize("fault", ["reset_before_charge", "reset_after_charge", "reset_mid_body"])
async def test_fault_that_breaks_the_connection(fault: str) -> None:
    async with standin(faults=FaultPlan(script=[fault])) as (server, client):
        request = client.build_request("POST", "/api/v1/chat/completions", json=body())
        response: httpx.Response | None = None
        try:
            response = await client.send(request, stream=True)
            await response.aread()
            pytest.fail("the whole reply has arrived")
        except httpx.TransportError:
            # Only where the headers have arrived can the generation be asked for.
            assert (response is not None) == (fault == "reset_mid_body")
        if response is not None:
            assert response.headers["x-generation-id"] in server.book.entries
        assert server.book.totals() == ({"u1": PRICE} if fault in CHARGED else {})


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hang", "hang_charged"])
async def test_fault_that_never_answers(fault: str) -> None:
    async with standin(faults=FaultPlan(script=[fault])) as (server, client):
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/api/v1/chat/completions", json=body(), timeout=ONLY_READING)
        assert server.book.totals() == ({"u1": PRICE} if fault in CHARGED else {})


@pytest.mark.slow
async def test_a_stream_is_charged_as_its_usage_says_once_that_was_sent() -> None:
    """Also where the client leaves between the usage and the end: it has been told what it pays."""
    async with standin(chunk_ms=50) as (server, client):
        document = body(prompt="Tell me [[completion_tokens=40]]") | {"stream": True}
        async with client.stream("POST", "/api/v1/chat/completions", json=document) as response:
            async for line in response.aiter_lines():
                if '"usage"' in line:
                    break
        await wait_until(lambda: server.cut_off, what="that the client left")
        assert [entry.completion_tokens for entry in server.book.entries.values()] == [40]


async def test_slow_answer_is_charged_even_if_its_client_has_left() -> None:
    async with standin(faults=FaultPlan(script=["slow"]), slow_ms=60_000) as (server, client):
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/api/v1/chat/completions", json=body(), timeout=ONLY_READING)
        assert server.book.totals() == {"u1": PRICE}


async def test_stop_lets_hanging_requests_go() -> None:
    server = StandIn(StandInConfig(faults=FaultPlan(script=["hang"])))
    await server.start()
    async with httpx.AsyncClient(base_url=server.root_url, timeout=PATIENCE_S) as client:
        hanging = asyncio.create_task(ask(client))
        await wait_until(lambda: server.requests)
        await server.stop()
        assert (await hanging).status_code == 503


async def test_prompt_asks_for_its_own_fault_and_the_plan_is_not_used_up() -> None:
    async with standin(faults=FaultPlan(script=["http_500"])) as (_, client):
        assert (await ask(client, body("[[fault=http_403]]"))).status_code == 403
        assert (await ask(client)).status_code == 500


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"", 400),
        (b"not JSON", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b"[]", 400),
        (b"{}", 400),
        (json.dumps(body(model=7)).encode(), 400),
        (json.dumps(body(messages=[])).encode(), 400),
        (json.dumps(body(messages="hello")).encode(), 400),
        (json.dumps(body(messages=["hello"])).encode(), 400),
        (json.dumps(body(messages=[{"role": "user", "content": [{"type": "image_url"}]}])).encode(), 400),
        (json.dumps(body(max_tokens=0)).encode(), 400),
        (json.dumps(body(max_tokens=True)).encode(), 400),
        (json.dumps(body(max_tokens="5")).encode(), 400),
        (json.dumps(body(model="no/such-model")).encode(), 404),
        (json.dumps(body("[[fault=no_such_fault]]")).encode(), 400),
    ],
)
async def test_bad_request_is_refused_and_costs_nothing(raw: bytes, status: int) -> None:
    async with standin() as (server, client):
        response = await client.post("/api/v1/chat/completions", content=raw)
        assert response.status_code == status
        assert response.json()["error"]["code"] == status
        assert server.book.totals() == {}


@pytest.mark.parametrize("path", ["/api/v1/chat/completions", "/api/v1/key", "/api/v1/generation?id=gen-1"])
async def test_key_is_checked_where_one_is_set(path: str) -> None:
    async with standin(api_key="sk-right") as (server, client):
        method = "POST" if path.endswith("completions") else "GET"
        content = json.dumps(body()).encode() if method == "POST" else None
        for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "sk-right"}):
            response = await client.request(method, path, content=content, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, 401)
        assert server.book.totals() == {}
        response = await client.request(method, path, content=content, headers={"Authorization": "Bearer sk-right"})
        assert response.status_code == (404 if "generation" in path else 200)


async def test_models_lists_what_has_a_price() -> None:
    async with standin() as (_, client):
        listed = (await client.get("/api/v1/models")).json()["data"]
        assert {model["id"] for model in listed} == set(PRICES)
        assert not [model for model in listed if "pricing" in model]


async def test_models_lists_prices_where_it_is_told_to() -> None:
    async with standin(lists_prices=True) as (server, client):
        server.list_prices[MODEL] = ListPrice(prompt=500_000_000, completion=1, cached=0, written=500_000_001)
        listed = (await client.get("/api/v1/models")).json()["data"]
    pricing = {model["id"]: model["pricing"] for model in listed}
    assert pricing.keys() == PRICES.keys()
    # Dollars per token.
    assert pricing[MODEL] == {
        "prompt": "0.0000005",
        "completion": "0.000000000000001",
        "input_cache_read": "0",
        "input_cache_write": "0.000000500000001",
    }


async def test_generation_reports_charged_requests_only() -> None:
    async with standin(faults=FaultPlan(script=["overcharge", "http_500"])) as (_, client):

        async def known(response: httpx.Response) -> httpx.Response:
            return await client.get("/api/v1/generation", params={"id": response.headers["x-generation-id"]})

        charged = json.loads((await known(await ask(client))).content, parse_float=Decimal)["data"]
        assert charged["total_cost"] == usd_from_nanousd(10 * PRICE)
        assert (await known(await ask(client))).status_code == 404
        assert (await client.get("/api/v1/generation")).status_code == 404


async def test_book_is_kept_in_its_file_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    # A failed request between two charged ones: ids and charges do not count alike.
    async with standin(book_path=path, faults=FaultPlan(script=[None, "http_500", None])) as (_, client):
        first = [await ask(client) for _ in range(3)]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    async with standin(book_path=path) as (server, client):
        assert server.book.totals() == {"u1": 2 * PRICE}
        second = [await ask(client, body(user="u2")) for _ in range(3)]
        assert server.book.totals() == {"u1": 2 * PRICE, "u2": 3 * PRICE}
        shown = (await client.get("/standin/book")).json()
    assert shown["totals"] == {"u1": 2 * PRICE, "u2": 3 * PRICE}
    assert shown["requests"] == 3
    assert len(shown["entries"]) == 5
    ids = [response.headers["x-generation-id"] for response in (*first, *second)]
    assert len(set(ids)) == len(ids)


async def test_book_counts_every_charge_of_a_burst() -> None:
    rates = {"http_503": 0.2, "zero_cost": 0.1, "overcharge": 0.1}
    async with standin(faults=FaultPlan(rates=rates, seed=7)) as (server, client):
        responses = await asyncio.gather(*(ask(client, body(user=f"u{n % 3}")) for n in range(90)))
        booked = sum(
            (usage_of(response)["cost"] for response in responses if response.status_code == 200), start=Decimal(0)
        )
        assert usd_from_nanousd(sum(server.book.totals().values())) == booked
        assert server.requests == 90


def test_faults_are_the_same_for_the_same_seed() -> None:
    def drawn(seed: int) -> list[str | None]:
        plan = FaultPlan(rates={"http_503": 0.2, "hang": 0.1}, seed=seed)
        return [plan.next() for _ in range(500)]

    assert drawn(1) == drawn(1) != drawn(2)
    # 500 draws at 0.2: within five standard deviations of 9.
    assert abs(drawn(1).count("http_503") - 100) < 5 * 9


async def test_answers_are_the_same_for_the_same_prompt() -> None:
    async with standin() as (_, client):
        tokens = [usage_of(await ask(client, body(prompt)))["completion_tokens"] for prompt in ("a", "b", "a")]
    assert tokens[0] == tokens[2] != tokens[1]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"rates": {"no_such_fault": 0.1}}, "unknown fault 'no_such_fault'; known: http_400, "),
        ({"rates": {"over-charge": 0.1}}, "unknown fault 'over-charge'; did you mean 'overcharge'?"),
        ({"rates": {"hang": -0.1}}, "'rates.hang' must be a number from 0 to 1, not -0.1"),
        ({"rates": {"hang": 0.6, "slow": 0.6}}, "rates must be shares of requests"),
        ({"rates": 1}, "'rates' must be a JSON object, not 1"),
        ({"script": ["http_999"]}, "unknown fault 'http_999'"),
        ({"script": ["http_418"]}, "unknown fault 'http_418'"),
        ({"script": "hang"}, "'script' must be a list, not 'hang'"),
        ({"scripts": 1}, "unknown field 'scripts'; did you mean 'script'?"),
        ([], "the input must be a JSON object, not a list"),
    ],
)
async def test_wrong_fault_plan_is_refused_and_the_old_one_stays(document: Any, problem: str) -> None:
    async with standin(faults=FaultPlan(script=["http_500"])) as (_, client):
        refused = await client.post("/standin/faults", json=document)
        assert (refused.status_code, refused.json()["error"][: len(problem)]) == (400, problem)
        assert (await ask(client)).status_code == 500


async def test_faults_can_be_set_while_it_runs() -> None:
    async with standin() as (_, client):
        assert (await client.post("/standin/faults", json={"script": ["http_429"]})).status_code == 200
        assert [(await ask(client)).status_code for _ in range(2)] == [429, 200]
