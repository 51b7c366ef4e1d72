"""The example application of the documents, against a running system."""

import importlib.util
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import httpx
import pytest
import pytest_asyncio

from tests.integration.test_usage_service import Server
from tests.proxy import faulty_proxy
from tests.servers import wait_until
from tests.system import RunningSystem, running_system
from tollbook import CostTracker
from tollbook.ledger.server.connection import connect

pytestmark = pytest.mark.asyncio(loop_scope="module")
EXAMPLE: Final = Path(__file__).parents[2] / "docs" / "examples" / "fastapi_app.py"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningSystem]:
    async with connect(server_url) as client:
        await client.flushall()
        await client.function_flush()
    # Room for two drafts' bounds of 30,000,000 nano-dollars and a bit, but not for three.
    caps = {"plans": {"trial": "0.08"}}
    async with running_system(tmp_path_factory.mktemp("example") / "data", server_url, caps=caps) as system:
        yield system


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def served(
    running: RunningSystem, directory: Path, redis_url: str | None = None
) -> AsyncGenerator[httpx.AsyncClient]:
    """The application as it is written: its settings come from the environment."""
    settings = running.system.runtime.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setenv("TOLLBOOK_DATA_DIR", str(settings.data_dir))
        patch.setenv("REDIS_URL", redis_url or running.system.redis_url)
        patch.setenv("OPENROUTER_BASE_URL", settings.openrouter_base_url)
        patch.setenv("TOLLBOOK_CAPS", '{"plans": {"trial": "0.08"}}')
        async with Server(load_example().app).run() as client:
            yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(running: RunningSystem, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with served(running, tmp_path_factory.mktemp("elsewhere")) as client:
        yield client


def no_result(task_id: str) -> dict[str, str]:
    return {"code": "RESULT_TIMEOUT", "message": f"no result for {task_id} after 0 s"}


async def order(client: httpx.AsyncClient, user: str, **draft: Any) -> httpx.Response:
    return await client.post(f"/users/{user}/drafts", json={"prompt": "Write a haiku.", **draft})


async def test_a_draft_is_ordered_and_its_result_fetched_and_counted(client: httpx.AsyncClient) -> None:
    ordered = await order(client, "u1")
    assert ordered.status_code == 202
    task_id = ordered.json()["task_id"]
    result = await client.get(f"/users/u1/drafts/{task_id}", params={"wait_s": 50})
    assert (result.status_code, result.json()["status"]) == (200, "done")
    usage = (await client.get("/users/u1/usage")).json()
    assert usage["spent_usd"] == result.json()["cost_usd"]
    assert Decimal(usage["spent_usd"]) > 0
    assert (usage["cap_usd"], usage["reserved_usd"], usage["plan"]) == ("0.080000000", "0.000000000", "trial")
    others = await client.get(f"/users/u2/drafts/{task_id}")
    assert (others.status_code, others.json()) == (404, no_result(task_id)), "as if there were none"


async def test_a_request_that_is_sent_again_is_the_same_draft(
    running: RunningSystem, client: httpx.AsyncClient
) -> None:
    first, second = await order(client, "u3", request_id="r1"), await order(client, "u3", request_id="r1")
    assert first.json() == second.json() == {"task_id": "u3-r1"}
    await client.get("/users/u3/drafts/u3-r1", params={"wait_s": 50})
    assert await wait_until(lambda: is_idle(running), what="both entries acknowledged")
    assert sum(entry.user == "u3" for entry in running.provider.book.entries.values()) == 1


async def test_a_draft_is_read_while_it_is_written(client: httpx.AsyncClient) -> None:
    task_id = (await order(client, "u9", streamed=True)).json()["task_id"]
    streamed = await client.get(f"/users/u9/drafts/{task_id}/stream")
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [dict(line.split(": ", 1) for line in part.split("\n")) for part in streamed.text.strip().split("\n\n")]
    *deltas, end = [(event["event"], json.loads(event["data"])) for event in events]
    assert (end[0], end[1]["status"]) == ("result", "done")
    assert "".join(data["text"] for name, data in deltas if name == "delta") == end[1]["content"]
    assert (await client.get(f"/users/u1/drafts/{task_id}/stream")).status_code == 404


async def is_idle(running: RunningSystem) -> bool:
    return await running.pending() == 0


async def test_at_the_plans_limit_the_answer_is_402_and_says_the_numbers(
    running: RunningSystem, client: httpx.AsyncClient
) -> None:
    await CostTracker(running.system.runtime).record_usage("u4", "0.0799")
    published = await running.redis.xlen("generation")
    refused = await order(client, "u4")
    assert refused.status_code == 402
    body = refused.json()
    assert (body["code"], body["cap_usd"], body["spent_usd"]) == ("PLAN_LIMIT_REACHED", "0.080000000", "0.079900000")
    assert body["reserved_usd"] == "0.000000000"
    assert Decimal(body["spent_usd"]) + Decimal(body["estimated_cost_usd"]) > Decimal(body["cap_usd"])
    assert "user u4" in body["message"]
    assert "does not fit the cap of $0.08, of which $0.079900 are spent" in body["message"]
    assert await running.redis.xlen("generation") == published, "nothing was published"


async def test_while_only_open_holds_are_in_the_way_the_answer_is_429_and_later_202(
    running: RunningSystem, client: httpx.AsyncClient
) -> None:
    await running.provider.shut("u5")
    tasks = [(await order(client, "u5")).json()["task_id"] for _ in range(2)]
    await running.provider.wait_for_arrivals(2, user="u5")
    refused = await order(client, "u5")
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
    waiting = await client.get(f"/users/u5/drafts/{tasks[0]}")
    assert (waiting.status_code, waiting.json()) == (404, no_result(tasks[0]))
    await running.provider.open()
    for task_id in tasks:
        assert (await client.get(f"/users/u5/drafts/{task_id}", params={"wait_s": 50})).json()["status"] == "done"
    assert (await order(client, "u5")).status_code == 202


@pytest.mark.parametrize(("user", "draft"), [("a%0Ab", {}), ("u6", {"request_id": "two\nlines"})])
async def test_what_is_malformed_is_422_and_names_the_field(
    client: httpx.AsyncClient, user: str, draft: dict[str, str]
) -> None:
    refused = await order(client, user, **draft)
    assert (refused.status_code, refused.json()["code"]) == (422, "INVALID_TASK")
    assert ("task_id" if draft else "user_id") in refused.json()["message"]


async def test_it_starts_before_redis_does_and_answers_503_until_then(running: RunningSystem, tmp_path: Path) -> None:
    async with faulty_proxy(running.system.redis_url) as proxy:
        await proxy.stop()
        async with served(running, tmp_path, proxy.url) as client:
            for response in (
                await client.get("/users/u8/usage"),
                await order(client, "u8"),
                await client.get("/users/u8/drafts/t1"),
            ):
                assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
                assert response.json()["code"] == "LEDGER_UNAVAILABLE"
            await proxy.start()

            async def is_answered() -> bool:
                return (await client.get("/users/u8/usage")).status_code == 200

            await wait_until(is_answered, what="an answer once Redis is there")
            assert (await order(client, "u8")).status_code == 202


# The last one: a projector that looks at the ledger meanwhile stops for good.
async def test_without_a_ledger_the_answer_is_503(running: RunningSystem, client: httpx.AsyncClient) -> None:
    """The gate does not answer, so nothing is published (G8)."""
    await running.redis.rename(running.keys.meta, "kept")
    try:
        refused = await order(client, "u7")
        assert (refused.status_code, refused.json()["code"]) == (503, "LEDGER_UNAVAILABLE")
    finally:
        await running.redis.rename("kept", running.keys.meta)
