"""A web application on Tollbook: shows usage, refuses at the plan's limit, publishes tasks and returns their results.

    uvicorn --app-dir docs/examples fastapi_app:app

It finds the running system by the same settings as `tollbook publish`, and runs on the projector's machine.
Who the user is comes from your own log-in; here it is part of the path, so that the example stays short.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from tollbook import AppError, InvalidTask, LedgerUnavailable, Publisher, ResultTimeout, UsageService
from tollbook.inference.cost_tracker import UsageSummary
from tollbook.inference.runtime import connect_runtime
from tollbook.schemas.results import ErrorCode, InferenceResult


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Connect once; every request shares the connections."""
    async with connect_runtime(), Publisher() as publisher:
        app.state.publisher = publisher
        yield


def opened_publisher(request: Request) -> Publisher:
    """Return the application's publisher, for Depends."""
    publisher: Publisher = request.app.state.publisher
    return publisher


app = FastAPI(title="Drafts", lifespan=lifespan)
Usage = Annotated[UsageService, Depends()]
Tasks = Annotated[Publisher, Depends(opened_publisher)]


class Draft(BaseModel):
    """What a user asks for."""

    prompt: str = Field(min_length=1, max_length=20_000)
    request_id: str | None = None
    """The client's own id of this request: sent again, it is the same draft and is paid once."""


@app.get("/users/{user_id}/usage")
async def show_usage(user_id: str, usage: Usage) -> UsageSummary:
    """Show what the user has spent, and what is left."""
    return await usage.get_usage_for_user(user_id)


@app.post("/users/{user_id}/drafts", status_code=202)
async def order_draft(user_id: str, draft: Draft, usage: Usage, tasks: Tasks) -> dict[str, str]:
    """Publish a draft where the user's plan allows it; answer at once, with the id under which its result will be."""
    await usage.check_action_limit(user_id, "generate_draft", prompt=draft.prompt)
    # Request ids are unique for one user, task ids for all.
    task_id = f"{user_id}-{draft.request_id}" if draft.request_id else None
    return {
        "task_id": await tasks.publish("generation", "generate_draft", draft.prompt, user_id=user_id, task_id=task_id)
    }


@app.get("/users/{user_id}/drafts/{task_id}")
async def show_draft(
    user_id: str, task_id: str, tasks: Tasks, wait_s: Annotated[float, Query(ge=0, le=60)] = 0
) -> InferenceResult:
    """Return a draft's result, waiting for it up to `wait_s` seconds; 404 while there is none, or it is another's."""
    try:
        result = await tasks.wait(task_id, timeout_s=wait_s)
    except ResultTimeout as error:
        raise HTTPException(404, str(error)) from error
    if result.user_id != user_id:
        raise HTTPException(404, f"no result for {task_id}")
    return result


@app.exception_handler(AppError)
async def refuse(_: Request, error: AppError) -> JSONResponse:
    """Say why a call was refused: 402 at the plan's limit, 429 while only other calls' holds are in the way."""
    match error.code:
        case ErrorCode.PLAN_LIMIT_REACHED:
            status = 429 if error.data.get("is_temporary") else 402
        case ErrorCode.INVALID_TASK | ErrorCode.IDEMPOTENCY_CONFLICT:
            status = 422
        case _:
            status = 503
    numbers = {name: f"{value:f}" for name, value in error.data.items() if name.endswith("_usd")}
    headers = {"Retry-After": "5"} if status in (429, 503) else None
    return JSONResponse({"code": error.code, "message": error.message, **numbers}, status, headers)


@app.exception_handler(InvalidTask)
async def reject(_: Request, error: InvalidTask) -> JSONResponse:
    """Say which field cannot be taken."""
    return JSONResponse({"code": ErrorCode.INVALID_TASK, "message": str(error)}, 422)


@app.exception_handler(LedgerUnavailable)
async def put_off(_: Request, error: LedgerUnavailable) -> JSONResponse:
    """Ask the client to come again; a draft with a `request_id` can be sent again without being paid twice."""
    body = {"code": ErrorCode.LEDGER_UNAVAILABLE, "message": str(error)}
    return JSONResponse(body, 503, {"Retry-After": "5"})
