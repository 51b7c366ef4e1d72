"""The endpoints that make calls: the same steps for every API format."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tollbook.gateway.answers import EventStream, is_answer, wait_for_disconnect
from tollbook.gateway.apis import Api, ApiRequest
from tollbook.gateway.bodies import Bodies
from tollbook.gateway.callers import Attributes, Callers, attributes_of
from tollbook.gateway.idempotency import CallIdentity, Idempotency
from tollbook.gateway.problems import Problem, invalid, problem_of_error, problem_of_result, unwritable_answer
from tollbook.gateway.requests import is_streamed, model_in, task_of
from tollbook.gateway.running import RETRY_GRACE_S, RunningCall, WhileWaiting, shutting_down
from tollbook.inference.api_keys import ApiKey
from tollbook.inference.calls.call import RunId
from tollbook.inference.deltas import OnDelta
from tollbook.inference.direct_calls import make_call
from tollbook.inference.runtime import InferenceRuntime
from tollbook.ledger.errors import LedgerUnavailable
from tollbook.ledger.gate.requests import OpenCall
from tollbook.observability.gateway_counts import GatewayCounts
from tollbook.schemas.json_text import replace_surrogates_in
from tollbook.schemas.policy import CHAT
from tollbook.schemas.results import InferenceResult
from tollbook.schemas.tasks import Task
from tollbook.schemas.windows import end_of_window

CALL_ID_HEADER: Final = "x-tollbook-call-id"
COST_HEADER: Final = "x-tollbook-cost-usd"
_MAX_EARLIER: Final = 100
_MAY_BE_PAID: Final = ("ledger_unavailable", "gateway_stopping", "internal_error")
"""Codes of refusals after which money may be held for the call, or spent."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one gateway: concurrent calls, and the duration of each in seconds.

    `hold_wait_s` is part of `call_timeout_s`.
    """

    max_calls: int = 4096
    hold_wait_s: float = 30.0
    call_timeout_s: float = 600.0


class Calls:
    """Makes the calls of requests, and tracks the running ones."""

    def __init__(
        self,
        runtime: InferenceRuntime,
        callers: Callers,
        idempotency: Idempotency,
        limits: Limits,
        counts: GatewayCounts,
        bodies: Bodies,
        is_dead: Callable[[OpenCall], Awaitable[bool]],
    ) -> None:
        """`is_dead` tells whether the gateway of a run that holds money for a call has ended."""
        self._is_dead = is_dead
        self._runtime = runtime
        self._callers = callers
        self._idempotency = idempotency
        self._limits = limits
        self._counts = counts
        self._bodies = bodies
        self._is_stopping = False
        self._under_way: set[RunningCall] = set()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        """How many calls are running."""
        return len(self._under_way)

    @property
    def running(self) -> tuple[RunningCall, ...]:
        """The running calls."""
        return tuple(self._under_way)

    async def answer(self, request: Request, api: Api) -> Response | EventStream:
        """Answer a request that makes a call."""
        identity: CallIdentity | None = None
        try:
            key = await self._callers.admit(request.headers, address_of(request))
            self._check_capacity()
            body = await self._bodies.read(request)
            fields = self._drop_unsupported(
                api, api.chat_fields(body, await self._earlier_results(api, key, request, body))
            )
            is_stream = is_streamed(fields)
            identity = await self._idempotency.identify(key, request.url.path, request.headers, body)
            task, who = task_of(
                fields, body, call_id=identity.call_id, key=key, headers=request.headers, policy=self._runtime.rules
            )
            request.scope["tollbook"] |= {"key_id": key.key_id, "call_id": identity.call_id}
            call = self._begin(task, who, is_streamed=is_stream)
            # Answers repeat parts of the request, and must be valid UTF-8.
            api_request = ApiRequest(identity.call_id, int(time.time()), model_in(fields), replace_surrogates_in(body))
            if is_stream:
                return await self._answer_stream(request, call, api, api_request, identity)
            return await self._answer_whole(request, call, api, api_request, identity)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return self._refusal(request, api, problem_of_error(exc), identity)

    async def stop(self, grace_s: float, *, settling_s: float) -> None:
        """Shut down: refuse new calls, let running ones finish within the grace, then cancel them with an error.

        Cancelled calls are settled within `settling_s`. If Redis does not answer, their holds are left to the sweeper.
        """
        self._is_stopping = True
        tasks = {call.task for call in self._under_way}
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for call in tuple(self._under_way):
            call.end()
        ending = {*(call.task for call in self._under_way), *self._background}
        if ending:
            _, unsettled = await asyncio.wait(ending, timeout=settling_s)
            if unsettled:
                _log.warning("gateway.holds_left", number=len(unsettled))  # G3

    async def _earlier_results(
        self, api: Api, key: ApiKey, request: Request, body: Mapping[str, Any]
    ) -> list[InferenceResult]:
        """Return the user's earlier results that a request refers to."""
        calls = api.earlier_calls(body)
        if not calls:
            return []
        if len(calls) > _MAX_EARLIER:
            raise invalid(f"'input' refers to {len(calls):,} earlier answers; at most {_MAX_EARLIER} are allowed")
        user = attributes_of(key, request.headers, body, frozenset()).user_id
        kept = self._runtime.user_ids.on_ledger(user)
        found = [await self._runtime.handle.results.get_of(call_id, kept) for call_id in sorted(calls)]
        return [result for result in found if result is not None and result.user_id == kept]

    def _drop_unsupported(self, api: Api, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave out fields that clients send by default, if the first model is known not to support them."""
        given = {name: value for name, value in fields.items() if name in api.optional_fields}
        if not given:
            return fields
        policy, model = self._runtime.policies.newest, model_in(fields)
        route = policy.policy.route_of(model if model in policy.policy.tasks else CHAT, model)
        assert route is not None, "every model has a route"
        models = policy.prices.at(route.first.provider).models
        left_out = models.unsupported(route.first.model, given)
        return {name: value for name, value in fields.items() if name not in left_out}

    def _check_capacity(self) -> None:
        if self._is_stopping:
            raise shutting_down()
        if len(self._under_way) >= self._limits.max_calls:
            message = "this gateway has reached its limit of running calls; try again later"
            raise Problem(503, "overloaded", message, kind="server_error", retry_after_s=1)

    def _begin(self, task: Task, who: Attributes, *, is_streamed: bool) -> RunningCall:
        assert task.task_id is not None, "the gateway gives its calls ids"
        self._check_capacity()  # Again, because reading the body took time.

        async def is_dead(found: OpenCall) -> bool:
            # A run of this gateway itself is dead, unless another of its requests still makes the call.
            if RunId.parse(found.worker).process == self._runtime.name:  # G4
                return not any(other.call_id == call.call_id and other is not call for other in self._under_way)
            return await self._is_dead(found)

        async def make(on_delta: OnDelta | None, while_waiting: WhileWaiting) -> InferenceResult:
            async with asyncio.timeout(self._limits.call_timeout_s):
                return await make_call(
                    task,
                    self._runtime,
                    hold_wait_s=self._limits.hold_wait_s,
                    stream=who.stream,
                    on_delta=on_delta,
                    is_dead=is_dead,
                    while_waiting=while_waiting,
                )

        call = RunningCall(task.task_id, make, is_streamed=is_streamed)
        self._under_way.add(call)
        self._counts.calls_open += 1
        call.task.add_done_callback(lambda _: self._end(call))
        return call

    def _end(self, call: RunningCall) -> None:
        self._under_way.discard(call)
        self._counts.calls_open -= 1
        problem = None if call.task.cancelled() else call.task.exception()
        if problem is not None and call.is_abandoned:
            # No client waits for the exception, so log it here.
            _log.warning("gateway.call_failed", call_id=call.call_id, problem=type(problem).__name__)

    async def _answer_whole(
        self, request: Request, call: RunningCall, api: Api, api_request: ApiRequest, identity: CallIdentity
    ) -> Response:
        """Wait for the answer. If the client leaves, the call goes on: it is billed anyway, and a retry may join it."""
        if not await self._wait_for(request, asyncio.ensure_future(call.result())):
            call.detach_client()
            await self._idempotency.mark_abandoned(identity)
            return Response(status_code=499)
        result = await call.result()
        headers = _headers(result)
        if not is_answer(result):
            raise await self._failure_problem(result, identity)
        # Only after it is sent: if this process is killed before, a retry must find the call.
        sent = BackgroundTask(self._idempotency.mark_delivered, identity)
        try:
            return JSONResponse(api.document(result, api_request), headers=headers, background=sent)
        except Exception as exc:
            raise unwritable_answer(result) from exc  # G4

    async def _answer_stream(
        self, request: Request, call: RunningCall, api: Api, api_request: ApiRequest, identity: CallIdentity
    ) -> Response | EventStream:
        """Wait for the first delta, which decides the HTTP status, and stream from there."""
        if not await self._wait_for(request, asyncio.ensure_future(call.has_delta())):
            call.detach_client()
            await self._idempotency.mark_abandoned(identity)
            self._run_in_background(self._end_unless_joined(call, identity))
            return Response(status_code=499)
        headers = {CALL_ID_HEADER: identity.call_id}
        if not await call.has_delta():
            result = await call.result()
            headers = _headers(result)
            if not is_answer(result):
                raise await self._failure_problem(result, identity)

        async def on_end(has_all: bool) -> None:
            await (
                self._idempotency.mark_delivered(identity) if has_all else self._idempotency.mark_abandoned(identity)
            )

        return EventStream(call, api.events(api_request), headers, on_end)

    async def _wait_for(self, request: Request, waiting: "asyncio.Future[Any]") -> bool:
        """Wait for a future; return False if the client leaves first."""
        leaving = asyncio.create_task(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return waiting.done() and not leaving.done()
        finally:
            leaving.cancel()
            if not waiting.done():
                waiting.cancel()
            await asyncio.gather(leaving, waiting, return_exceptions=True)

    async def _end_unless_joined(self, call: RunningCall, identity: CallIdentity) -> None:
        """Cancel a stream whose client left before it began, unless a retry joins it within the grace."""
        done, _ = await asyncio.wait({call.task}, timeout=RETRY_GRACE_S)
        is_waited_for = any(other.call_id == call.call_id and other is not call for other in self._under_way)
        if not done and not is_waited_for and not await self._idempotency.is_joined(identity):
            call.end()

    async def _failure_problem(self, result: InferenceResult, identity: CallIdentity) -> Problem:
        """Return the problem of a call without an answer. If a retry may help, it must not find this result again."""
        problem = problem_of_result(result, resets_at=self._resets_at(result))
        if problem.should_retry is None and result.user_id is not None:
            try:
                # The result does not include what an earlier run of the call has cost, or is assumed to have cost.
                has_cost = bool(await self._runtime.ledger.settled_cost(result.user_id, result.task_id))
            except LedgerUnavailable:
                return problem  # A retry finds this same call.
            if has_cost:
                return replace(problem, should_retry=False)  # G4
            await self._idempotency.record_free_failure(identity)
        return problem

    def _resets_at(self, result: InferenceResult) -> str | None:
        if result.denial is None:
            return None
        calendar = self._runtime.policies.newest.budgets.calendar
        end_ms = end_of_window(result.denial.window, calendar, round(1000 * time.time()))
        return None if end_ms is None else datetime.fromtimestamp(end_ms / 1000, UTC).isoformat()

    def _refusal(self, request: Request, api: Api, problem: Problem, identity: CallIdentity | None) -> Response:
        scope = request.scope["tollbook"]
        if problem.status == 500:
            _log.exception("gateway.failed", path=request.url.path, request_id=scope["request_id"])
        if identity is not None:
            # The call may hold money, or be paid and settled, so its retry must find it.
            may_be_paid = problem.code in _MAY_BE_PAID  # G4
            self._run_in_background(
                self._idempotency.mark_abandoned(identity)
                if may_be_paid
                else self._idempotency.mark_delivered(identity)
            )
        call_id = {CALL_ID_HEADER: identity.call_id} if identity is not None else {}
        return JSONResponse(
            api.error_body(problem, scope["request_id"]),
            status_code=problem.status,
            headers={**problem.headers, **call_id},
        )

    def _run_in_background(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _headers(result: InferenceResult) -> dict[str, str]:
    return {CALL_ID_HEADER: result.task_id, COST_HEADER: f"{result.cost_usd:f}"}


def address_of(request: Request) -> str:
    """Return the address that a request comes from."""
    return request.client.host if request.client else ""
