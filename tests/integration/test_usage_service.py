"""Usage for an application's own pages: by itself, and as a dependency of FastAPI."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from redis.asyncio import Redis

from tests.calling import COMPLETION_TOKENS, PROMPT, PROMPT_BOUND, PROMPT_TOKENS, Calling, open_calling, period
from tollbook import (
    AppError,
    CostTracker,
    InferenceClient,
    InvalidTask,
    LedgerUnavailable,
    PlanLimitReached,
    PriceUnknown,
    UsageService,
    connect_runtime,
)
from tollbook.inference.cost_tracker import UsageSummary
from tollbook.inference.current_runtime import current_runtime
from tollbook.inference.settings import Settings
from tollbook.schemas.money import usd_from_nanousd
from tollbook.schemas.results import ErrorCode

PRICE = PROMPT_TOKENS * 3_000 + COMPLETION_TOKENS * 15_000
BOUND = PROMPT_BOUND * 3_750 + 2_000 * 15_000


@pytest.fixture
async def calling(redis_client: Redis, server_url: str, tmp_path: Path) -> AsyncGenerator[Calling]:
    async with open_calling(server_url, tmp_path, is_served=True) as calling:
        yield calling


@asynccontextmanager
async def connected(calling: Calling) -> AsyncGenerator[UsageService]:
    async with connect_runtime(calling.runtime.settings):
        yield UsageService()


async def test_usage_of_a_user(calling: Calling) -> None:
    async with connected(calling) as usage:
        await InferenceClient("generate_draft").call(PROMPT, "u1", "starter")
        summary = await usage.get_usage_for_user("u1", "starter")
    assert (summary.user_id, summary.period, summary.cap_usd) == ("u1", period(), 15)
    assert summary.spent_usd == usd_from_nanousd(PRICE)
    assert summary.remaining_usd == 15 - usd_from_nanousd(PRICE)


@pytest.mark.slow
@pytest.mark.parametrize(("room", "fits"), [(0, True), (-1, False)])
async def test_action_is_checked_as_the_gate_checks_it(calling: Calling, room: int, *, fits: bool) -> None:
    await calling.set_cap(BOUND + room)
    async with connected(calling) as usage:
        if fits:
            summary = await usage.check_action_limit("u1", "generate_draft", prompt=PROMPT)
            assert summary.cap_usd == usd_from_nanousd(BOUND)
            assert (await InferenceClient("generate_draft").call(PROMPT, "u1")).content
        else:
            with pytest.raises(PlanLimitReached) as refused:
                await usage.check_action_limit("u1", "generate_draft", prompt=PROMPT)
            assert refused.value.code is ErrorCode.PLAN_LIMIT_REACHED
            with pytest.raises(PlanLimitReached) as refused:
                await InferenceClient("generate_draft").call(PROMPT, "u1")
            assert refused.value.code is ErrorCode.PLAN_LIMIT_REACHED


async def test_action_that_costs_nothing_is_never_refused(calling: Calling) -> None:
    async with connected(calling) as usage:
        await CostTracker().record_usage("u1", "5")
        assert (await usage.check_action_limit("u1", "ping")).remaining_usd == 0
        with pytest.raises(PlanLimitReached) as refused:
            await usage.check_action_limit("u1", "score_post")
        assert refused.value.code is ErrorCode.PLAN_LIMIT_REACHED


@pytest.mark.slow
async def test_malformed_question_is_refused(calling: Calling) -> None:
    async with connected(calling) as usage:
        for arguments in (("u1", "fly", "trial"), ('u"1', "ping", "trial"), ("u1", "ping", "platinum")):
            with pytest.raises(InvalidTask) as refused:
                await usage.check_action_limit(*arguments)
            assert refused.value.code is ErrorCode.INVALID_TASK


async def test_action_whose_model_has_no_price_is_refused(redis_client: Redis, server_url: str, tmp_path: Path) -> None:
    routes = '{"score_post": {"model": "no/such-model"}}'
    async with (
        open_calling(server_url, tmp_path, is_served=True, routes=routes) as calling,
        connected(calling) as usage,
    ):
        with pytest.raises(PriceUnknown) as refused:
            await usage.check_action_limit("u1", "score_post")
    assert refused.value.code is ErrorCode.PRICE_UNKNOWN


async def test_service_without_a_runtime_says_what_to_do() -> None:
    with pytest.raises(LedgerUnavailable, match="connect_runtime") as refused:
        await UsageService().get_usage_for_user("u1")
    assert refused.value.code is ErrorCode.LEDGER_UNAVAILABLE


Usage = Annotated[UsageService, Depends(UsageService)]


def build_app(settings: Settings) -> FastAPI:
    """An application as its makers would write it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with connect_runtime(settings):
            yield

    app = FastAPI(lifespan=lifespan)

    @app.exception_handler(AppError)
    async def refuse(_: Request, error: AppError) -> JSONResponse:
        return JSONResponse({"code": error.code, "message": error.message}, status_code=402)

    @app.get("/usage/{user_id}")
    async def get_usage(user_id: str, usage: Usage) -> UsageSummary:
        return await usage.get_usage_for_user(user_id)

    @app.post("/drafts/{user_id}")
    async def write_draft(user_id: str, usage: Usage) -> dict[str, Any]:
        await usage.check_action_limit(user_id, "generate_draft", prompt=PROMPT)
        result = await InferenceClient("generate_draft").call(PROMPT, user_id)
        return result.model_dump(mode="json")

    return app


@dataclass(slots=True)
class Server:
    """Speaks ASGI to an application as a server does: its lifespan is a task of its own, and so is each request."""

    app: FastAPI
    started: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[httpx.AsyncClient]:
        lifespan = asyncio.create_task(self._live())
        await asyncio.wait({lifespan, asyncio.create_task(self.started.wait())}, return_when=asyncio.FIRST_COMPLETED)
        transport = httpx.ASGITransport(self.app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://app.test") as client:
                yield client
        finally:
            self.stop.set()
            await lifespan

    async def _live(self) -> None:
        messages = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> dict[str, Any]:
            message = next(messages)
            if message == "lifespan.shutdown":
                await self.stop.wait()
            return {"type": message}

        async def send(message: Any) -> None:
            assert not message["type"].endswith("failed"), message
            self.started.set()

        await self.app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, cast("Any", send))


async def test_service_is_a_dependency_of_fastapi(calling: Calling) -> None:
    async with Server(build_app(calling.runtime.settings)).run() as client:
        response = await client.post("/drafts/u1")
        assert (response.status_code, response.json()["cost_usd"]) == (200, f"{usd_from_nanousd(PRICE):f}")
        usage = (await client.get("/usage/u1")).json()
        assert usage["user_id"] == "u1"
        # Money leaves the application as text, not as a float.
        assert Decimal(usage["spent_usd"]) == usd_from_nanousd(PRICE)
        assert isinstance(usage["remaining_usd"], str)
        await calling.set_cap(PRICE)
        response = await client.post("/drafts/u1")
        assert (response.status_code, response.json()["code"]) == (402, "PLAN_LIMIT_REACHED")
        assert (await client.get("/usage/two%22words")).json()["code"] == "INVALID_TASK"
    assert calling.booked() == PRICE
    with pytest.raises(LedgerUnavailable, match="connect_runtime"):
        await current_runtime()


@pytest.mark.slow
async def test_runtime_of_the_nearest_connection_is_used(calling: Calling) -> None:
    async with connect_runtime(calling.runtime.settings) as outer:
        async with connect_runtime(calling.runtime.settings) as inner:
            assert await current_runtime() is await inner.get()
        assert await current_runtime() is await outer.get()

        async def of_a_task() -> object:
            async with connect_runtime(calling.runtime.settings) as own:
                return await current_runtime() is await own.get()

        assert await asyncio.gather(of_a_task(), of_a_task()) == [True, True]
        assert await current_runtime() is await outer.get()
