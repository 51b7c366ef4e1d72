"""Direct calls: made by a program in its own process, through `InferenceClient` or the HTTP gateway.

The ledger decides and records as for a worker.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from tollbook.inference.calls.call import Call, RunId
from tollbook.inference.calls.reservations import WaitLimits
from tollbook.inference.calls.runner import CallTakenOver
from tollbook.inference.deltas import Delta, OnDelta
from tollbook.inference.provider_access import check_providers
from tollbook.inference.runtime import InferenceRuntime
from tollbook.ledger.errors import LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.requests import OpenCall
from tollbook.schemas.policy import check_task
from tollbook.schemas.results import InferenceResult, TaskStatus
from tollbook.schemas.tasks import PING, Task

# How often to look whether another run of the same call has ended: nothing announces it.
_LOOK_AGAIN_S = 0.5
_MAX_REMEMBERED = 10_000


async def make_call(
    task: Task,
    runtime: InferenceRuntime,
    *,
    hold_wait_s: float | None = None,
    stream: str | None = None,
    is_dead: Callable[[OpenCall], Awaitable[bool]] | None = None,
    on_delta: OnDelta | None = None,
    while_waiting: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
) -> InferenceResult:
    """Make the call of a task and return its result, whatever its status.

    If only other calls' holds leave too little, the call waits for them, up to `hold_wait_s` seconds (by default
    TOLLBOOK_HOLD_WAIT_S). Repeating a call with the same `task_id` and content returns the stored result and is free.
    `stream` is the task stream under which reports count the call. `is_dead` says whether another run of the call that
    has a hold is dead; without it, the call waits for that run. `on_delta` takes the answer while it comes; a stored
    result has no deltas. The context `while_waiting` is entered during each wait for money or for another run.

    Errors: InvalidTask; SettingsError without a provider's key; IdempotencyConflict; LedgerUnavailable; LedgerRefused;
        CallTakenOver if another run continues a call whose answer was passed on in part.
    """
    task = await runtime.user_ids.task(task)  # G10
    await runtime.policies.read_by(task.user_id, lambda policy: check_task(task, policy.policy))
    if task.task == PING:
        return InferenceResult(
            task_id=task.task_id or str(uuid.uuid4()), status=TaskStatus.DONE, content="pong", user_id=task.user_id
        )
    call = await _call_of(task, runtime, stream)
    # Before money is reserved: the person who runs this process must set a missing key.
    check_providers(runtime.rules, runtime.settings, _providers_of(call))
    clock = asyncio.get_running_loop().time
    has_passed = False

    async def pass_on(delta: Delta) -> None:
        nonlocal has_passed
        has_passed = True
        assert on_delta is not None, "deltas are requested only with a reader"
        await on_delta(delta)

    until = clock() + (runtime.settings.hold_wait_s if hold_wait_s is None else hold_wait_s)
    while True:
        # The limit counts from the first try: after a takeover, the wait does not start again.
        limits = WaitLimits(
            hold_wait_s=max(0.0, until - clock()), first_pause_s=_LOOK_AGAIN_S, max_pause_s=_LOOK_AGAIN_S
        )
        try:
            acquired = await runtime.reservations.acquire(
                call, limits, is_dead=is_dead or _is_never_dead, while_waiting=while_waiting
            )
        except (LedgerUnavailable, LedgerRefused):
            # The reply to an earlier reservation may be lost; a retry with the same run id resumes its hold.
            _remember(runtime.unanswered, call)
            raise
        if acquired.hold is None:
            assert acquired.result is not None, "direct calls have no limit of waiting calls"
            return acquired.result
        try:
            return await runtime.runner.run(
                acquired.call, acquired.hold, on_delta=pass_on if on_delta is not None else None
            )
        except CallTakenOver:
            if has_passed:
                raise  # Another run's answer would not continue the part that was passed on.
            await asyncio.sleep(_LOOK_AGAIN_S)


async def _call_of(task: Task, runtime: InferenceRuntime, stream: str | None) -> Call:
    call_id = task.task_id or str(uuid.uuid4())
    run_id = runtime.unanswered.pop(call_id, None) or RunId(runtime.name, uuid.uuid4().hex[:12])
    return await runtime.policies.read_by(
        task.user_id, lambda policy: Call.of_task(task, call_id=call_id, run_id=run_id, policy=policy, stream=stream)
    )


async def _is_never_dead(_found: OpenCall) -> bool:
    return False


def _providers_of(call: Call) -> Sequence[str]:
    return [target.provider for target in call.route.targets]


def _remember(unanswered: dict[str, RunId], call: Call) -> None:
    if len(unanswered) >= _MAX_REMEMBERED:
        del unanswered[next(iter(unanswered))]
    unanswered[call.call_id] = call.run_id
