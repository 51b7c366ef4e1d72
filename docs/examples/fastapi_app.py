"""A web application on Tollbook: shows usage, refuses at the plan's limit, publishes tasks and returns their results.

    uvicorn --app-dir docs/examples fastapi_app:app

It finds the running system by the same settings as `tollbook publish`. It may start before Redis or the projector
does: until they answer, it answers 503.
Who the user is comes from your own log-in; here it is part of the path, so that the example stays short.
"""

import json
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from tollbook import (
    AppError,
    InferenceResult,
    PlanLimitReached,
    Publisher,
    ResultTimeout,
    UsageService,
    UsageSummary,
    connect_runtime,
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open once what every request shares; it connects with the first request."""
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
    streamed: bool = False
    """Whether it can be read while it is written."""


@app.get("/users/{user_id}/usage")
async def show_usage(user_id: str, usage: Usage) -> UsageSummary:
    """Show what the user has spent, and what is left."""
    return await usage.get_usage_for_user(user_id)


@app.post("/users/{user_id}/drafts", status_code=202)
async def order_draft(user_id: str, draft: Draft, usage: Usage, tasks: Tasks) -> dict[str, str]:
    """Publish a draft if the user's plan allows it; answer at once, with the task id of its result."""
    await usage.check_action_limit(user_id, "generate_draft", prompt=draft.prompt)
    # Request ids are unique for one user, task ids for all.
    task_id = f"{user_id}-{draft.request_id or uuid.uuid4()}"
    await tasks.publish(
        "generation", "generate_draft", draft.prompt, user_id=user_id, task_id=task_id, streamed=draft.streamed
    )
    return {"task_id": task_id}


@app.get("/users/{user_id}/drafts/{task_id}")
async def show_draft(
    user_id: str, task_id: str, tasks: Tasks, wait_s: Annotated[float, Query(ge=0, le=60)] = 0
) -> InferenceResult:
    """Return a draft's result; wait for it up to `wait_s` seconds. 404 if there is none, or it is another user's."""
    result = await tasks.wait(task_id, timeout_s=wait_s)
    if result.user_id != user_id:
        raise ResultTimeout(task_id, wait_s)
    return result


@app.get("/users/{user_id}/drafts/{task_id}/stream")
async def stream_draft(user_id: str, task_id: str, tasks: Tasks) -> StreamingResponse:
    """Send a draft to a browser while it is written, as server-sent events: `EventSource` in JavaScript reads them.

    `delta` has the next part of the text, `restarted` says to forget what came before, `result` is the end.
    """

    async def events() -> AsyncGenerator[str]:
        async for update in tasks.stream(task_id, timeout_s=600):
            match update.kind:
                case "delta" if update.text:
                    yield event("delta", {"text": update.text})
                case "restarted":
                    yield event("restarted", {})
                case "result" if update.result is not None:
                    yield event("result", update.result.model_dump(mode="json"))
                case _:
                    pass  # Reasoning, or a gap: the result has the whole text.

    # Task ids begin with the user's id, so that no user can read another's draft. No user id has a hyphen here.
    if "-" in user_id or not task_id.startswith(f"{user_id}-"):
        raise ResultTimeout(task_id, 0)
    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def event(name: str, data: object) -> str:
    """Return a server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


STATUS = {
    "PLAN_LIMIT_REACHED": 402,
    "RESULT_TIMEOUT": 404,
    "INVALID_TASK": 422,
    "IDEMPOTENCY_CONFLICT": 422,
}


@app.exception_handler(AppError)
async def refuse(_: Request, error: AppError) -> JSONResponse:
    """Say why there is no answer, with the amounts behind it; where a retry may help, say when.

    A draft with a `request_id` can be sent again without being paid twice.
    """
    # 429: only holds of open calls are in the way, and most of that money becomes free again. Codes that are not in
    # the table: no ledger, no price.
    is_temporary = isinstance(error, PlanLimitReached) and error.is_temporary
    status = 429 if is_temporary else STATUS.get(error.code, 503)
    amounts = {name: f"{value:f}" for name, value in error.data.items() if name.endswith("_usd")}
    headers = {"Retry-After": "5"} if status in (429, 503) else None
    return JSONResponse({"code": error.code, "message": error.message, **amounts}, status, headers)
