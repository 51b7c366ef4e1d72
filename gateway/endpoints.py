"""The endpoints that make calls: one way through, whatever the API's form."""

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

from tollbook.gateway.answers import EventStream, client_left, is_answer
from tollbook.gateway.apis import Api, Asked
from tollbook.gateway.bodies import Bodies
from tollbook.gateway.callers import Attributes, Callers, attributes_of
from tollbook.gateway.once import CallName, Once
from tollbook.gateway.problems import Problem, after_payment, invalid, problem_of_error, problem_of_result
from tollbook.gateway.requests import is_streamed, model_in, task_of
from tollbook.gateway.running import RETRY_GRACE_S, RunningCall, WhileWaiting, stopping
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
"""Refusals after which money may be held for a call, or spent."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one gateway takes: so many calls under way, each for so long. Units: seconds.

    `hold_wait_s` is part of `call_timeout_s`.
    """

    max_calls: int = 4096
    hold_wait_s: float = 30.0
    call_timeout_s: float = 600.0


class Calls:
    """Makes the calls of requests, and keeps those that are under way."""

    def __init__(
        self,
        runtime: InferenceRuntime,
        callers: Callers,
        once: Once,
        limits: Limits,
        counts: GatewayCounts,
        bodies: Bodies,
        is_dead: Callable[[OpenCall], Awaitable[bool]],
    ) -> None:
        """`is_dead` says whether the run that holds money for a call has ended with its gateway."""
        self._is_dead = is_dead
        self._runtime = runtime
        self._callers = callers
        self._once = once
        self._limits = limits
        self._counts = counts
        self._bodies = bodies
        self._is_stopping = False
        self._under_way: set[RunningCall] = set()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        """Calls that are under way."""
        return len(self._under_way)

    @property
    def running(self) -> tuple[RunningCall, ...]:
        """These calls."""
        return tuple(self._under_way)

    async def answer(self, request: Request, api: Api) -> Response | EventStream:
        """Answer a request that makes a call."""
        name: CallName | None = None
        try:
            key = await self._callers.admit(request.headers, address_of(request))
            self._check_room()
            body = await self._bodies.read(request)
            fields = self._supported(api, api.chat_fields(body, await self._earlier(api, key, request, body)))
            is_stream = is_streamed(fields)
            name = await self._once.name(key, request.url.path, request.headers, body)
            task, who = task_of(
                fields, body, call_id=name.call_id, key=key, headers=request.headers, policy=self._runtime.rules
            )
            request.scope["tollbook"] |= {"key_id": key.key_id, "call_id": name.call_id}
            call = self._begin(task, who, is_streamed=is_stream)
            # Answers repeat parts of the request, and have to be written as UTF-8.
            asked = Asked(name.call_id, int(time.time()), model_in(fields), replace_surrogates_in(body))
            if is_stream:
                return await self._stream(request, call, api, asked, name)
            return await self._whole(request, call, api, asked, name)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as exc:  # noqa: BLE001 - the edge of the server.
            return self._refusal(request, api, problem_of_error(exc), name)

    async def stop(self, grace_s: float, *, settling_s: float) -> None:
        """Take no further call; let those under way end within the grace, then end them: their clients are told so.

        What they cost is settled within `settling_s`. Where Redis does not answer, their holds are left to the sweeper.
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

    async def _earlier(self, api: Api, key: ApiKey, request: Request, body: Mapping[str, Any]) -> list[InferenceResult]:
        """Return the user's earlier answers to which a request refers."""
        calls = api.earlier_calls(body)
        if not calls:
            return []
        if len(calls) > _MAX_EARLIER:
            raise invalid(f"'input' refers to {len(calls):,} earlier answers; at most {_MAX_EARLIER} are looked up")
        user = attributes_of(key, request.headers, body, frozenset()).user_id
        kept = self._runtime.user_ids.on_ledger(user)
        found = [await self._runtime.handle.results.get_of(call_id, kept) for call_id in sorted(calls)]
        return [result for result in found if result is not None and result.user_id == kept]

    def _supported(self, api: Api, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Leave out what clients send unasked, where the first model is known not to support it."""
        given = {name: value for name, value in fields.items() if name in api.dispensable}
        if not given:
            return fields
        policy, model = self._runtime.policies.newest, model_in(fields)
        route = policy.policy.route_of(model if model in policy.policy.tasks else CHAT, model)
        assert route is not None, "every model has a route"
        models = policy.prices.at(route.first.provider).models
        left_out = models.unsupported(route.first.model, given)
        return {name: value for name, value in fields.items() if name not in left_out}

    def _check_room(self) -> None:
        if self._is_stopping:
            raise stopping()
        if len(self._under_way) >= self._limits.max_calls:
            message = "this gateway has as many calls under way as it takes"
            raise Problem(503, "overloaded", message, kind="server_error", retry_after_s=1)

    def _begin(self, task: Task, who: Attributes, *, is_streamed: bool) -> RunningCall:
        assert task.task_id is not None, "the gateway names its calls"
        self._check_room()  # Once more: the body took its time.

        async def is_dead(found: OpenCall) -> bool:
            # What this gateway left behind itself is dead, unless another of its requests still makes the call.
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
        if problem is not None and call.has_left:
            # Nobody else asks for it.
            _log.warning("gateway.call_failed", call_id=call.call_id, problem=type(problem).__name__)

    async def _whole(self, request: Request, call: RunningCall, api: Api, asked: Asked, name: CallName) -> Response:
        """Wait for the answer. A client that leaves does not end the call: it is billed in full, and may be joined."""
        if not await self._is_read(request, asyncio.ensure_future(call.result())):
            call.leave()
            await self._once.left(name)
            return Response(status_code=499)
        result = await call.result()
        headers = _headers(result)
        if not is_answer(result):
            raise await self._no_answer(result, name)
        # Not before it is sent: where this process is killed between, a retry must find the call.
        sent = BackgroundTask(self._once.delivered, name)
        try:
            return JSONResponse(api.document(result, asked), headers=headers, background=sent)
        except Exception as exc:
            raise after_payment(result) from exc  # G4

    async def _stream(
        self, request: Request, call: RunningCall, api: Api, asked: Asked, name: CallName
    ) -> Response | EventStream:
        """Wait for the first delta, by which the status is known, and stream from there."""
        if not await self._is_read(request, asyncio.ensure_future(call.begun())):
            call.leave()
            await self._once.left(name)
            self._later(self._end_unless_joined(call, name))
            return Response(status_code=499)
        headers = {CALL_ID_HEADER: name.call_id}
        if not await call.begun():
            result = await call.result()
            headers = _headers(result)
            if not is_answer(result):
                raise await self._no_answer(result, name)

        async def on_end(has_all: bool) -> None:
            await (self._once.delivered(name) if has_all else self._once.left(name))

        return EventStream(call, api.events(asked), headers, on_end)

    async def _is_read(self, request: Request, waiting: "asyncio.Future[Any]") -> bool:
        """Wait; return False where the client leaves first."""
        leaving = asyncio.create_task(client_left(request.receive))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return waiting.done() and not leaving.done()
        finally:
            leaving.cancel()
            if not waiting.done():
                waiting.cancel()
            await asyncio.gather(leaving, waiting, return_exceptions=True)

    async def _end_unless_joined(self, call: RunningCall, name: CallName) -> None:
        """Give a retry time to come for a stream whose client left before it began."""
        done, _ = await asyncio.wait({call.task}, timeout=RETRY_GRACE_S)
        is_waited_for = any(other.call_id == call.call_id and other is not call for other in self._under_way)
        if not done and not is_waited_for and not await self._once.is_joined(name):
            call.end()

    async def _no_answer(self, result: InferenceResult, name: CallName) -> Problem:
        """Return why a call has no answer. Where a retry may help, it must not find this result again."""
        problem = problem_of_result(result, resets_at=self._resets_at(result))
        if problem.should_retry is None and result.user_id is not None:
            try:
                # The result does not say what an earlier run of the call has cost, or is assumed to.
                has_cost = bool(await self._runtime.ledger.settled_cost(result.user_id, result.task_id))
            except LedgerUnavailable:
                return problem  # A retry finds this very call.
            if has_cost:
                return replace(problem, should_retry=False)  # G4
            await self._once.came_to_nothing(name)
        return problem

    def _resets_at(self, result: InferenceResult) -> str | None:
        if result.denial is None:
            return None
        calendar = self._runtime.policies.newest.budgets.calendar
        end_ms = end_of_window(result.denial.window, calendar, round(1000 * time.time()))
        return None if end_ms is None else datetime.fromtimestamp(end_ms / 1000, UTC).isoformat()

    def _refusal(self, request: Request, api: Api, problem: Problem, name: CallName | None) -> Response:
        scope = request.scope["tollbook"]
        if problem.status == 500:
            _log.exception("gateway.failed", path=request.url.path, request_id=scope["request_id"])
        if name is not None:
            # Such a call may hold money, or have been paid and settled: its retry must find it.
            may_be_paid = problem.code in _MAY_BE_PAID  # G4
            self._later(self._once.left(name) if may_be_paid else self._once.delivered(name))
        call_id = {CALL_ID_HEADER: name.call_id} if name is not None else {}
        return JSONResponse(
            api.error_body(problem, scope["request_id"]),
            status_code=problem.status,
            headers={**problem.headers, **call_id},
        )

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _headers(result: InferenceResult) -> dict[str, str]:
    return {CALL_ID_HEADER: result.task_id, COST_HEADER: f"{result.cost_usd:f}"}


def address_of(request: Request) -> str:
    """Return the address that a request comes from."""
    return request.client.host if request.client else ""
