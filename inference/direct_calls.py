"""Calls that a program makes itself, in its own process: `InferenceClient`, and the HTTP gateway.

The ledger decides and records as it does for a worker.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence

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

# Nothing announces the end of another run of the same call, so it is looked for this often.
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
) -> InferenceResult:
    """Make the call of a task and return its result, whatever its status.

    Where only other calls' holds stand in the way it waits for them, up to `hold_wait_s` (TOLLBOOK_HOLD_WAIT_S).
    Repeating a call with the same `task_id` and content returns the stored result and costs nothing. `stream` is the
    task stream under which reports count the call. `is_dead` decides about another run of the call that holds money:
    without it, that is waited for. `on_delta` takes the answer while it comes; a stored result has no deltas.

    Errors: InvalidTask; SettingsError without a provider's key; IdempotencyConflict; LedgerUnavailable; LedgerRefused;
        CallTakenOver where another run goes on with a call whose answer was passed on in part.
    """
    task = await runtime.user_ids.task(task)  # G10
    await runtime.policies.read_by(task.user_id, lambda policy: check_task(task, policy.policy))
    if task.task == PING:
        return InferenceResult(
            task_id=task.task_id or str(uuid.uuid4()), status=TaskStatus.DONE, content="pong", user_id=task.user_id
        )
    call = await _call_of(task, runtime, stream)
    # Before money is held: a key that is missing here is for whoever runs this process.
    check_providers(runtime.rules, runtime.settings, _providers_of(call))
    clock = asyncio.get_running_loop().time
    has_passed = False

    async def pass_on(delta: Delta) -> None:
        nonlocal has_passed
        has_passed = True
        assert on_delta is not None, "deltas are asked for where somebody takes them"
        await on_delta(delta)

    until = clock() + (runtime.settings.hold_wait_s if hold_wait_s is None else hold_wait_s)
    while True:
        # From the first try on: one that was taken over does not begin the wait anew.
        limits = WaitLimits(
            hold_wait_s=max(0.0, until - clock()), first_pause_s=_LOOK_AGAIN_S, max_pause_s=_LOOK_AGAIN_S
        )
        try:
            acquired = await runtime.reservations.acquire(call, limits, is_dead=is_dead or _is_never_dead)
        except (LedgerUnavailable, LedgerRefused):
            # The reply to a hold may have been lost before the refusal: a repeat goes on with that hold.
            _remember(runtime.unanswered, call)
            raise
        if acquired.hold is None:
            assert acquired.result is not None, "a program's calls may all wait"
            return acquired.result
        try:
            return await runtime.runner.run(
                acquired.call, acquired.hold, on_delta=pass_on if on_delta is not None else None
            )
        except CallTakenOver:
            if has_passed:
                raise  # Another run's answer would not go on where this one's ended.
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
