"""One worker: takes deliveries, runs each as a call, answers, acknowledges.

A delivery holds one of its stream's slots while it works and gives it back while it
waits, for money or for another run of the same task, so that waiting tasks never hold
up others. It is acknowledged only when its result is stored (late acknowledgement);
whatever goes wrong before that leaves it pending, to be claimed again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import structlog
from redis.exceptions import ResponseError

from tollbook.consumers.claims import Claims
from tollbook.consumers.dead_letters import DeadLetters, Reason
from tollbook.consumers.messages import Delivery, read_task, salvage
from tollbook.consumers.observer import TaskObserver, UnobservedTasks
from tollbook.consumers.throttled_warning import SeldomWarning
from tollbook.inference.calls.outcomes import exhausted
from tollbook.inference.calls.runner import Call, CallRunner, CallTakenOver
from tollbook.ledger.errors import CallUnknown, IdempotencyConflict, LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.requests import OpenCall, Waiting
from tollbook.ledger.gate.wait_queue import FreedBudgets
from tollbook.ledger.server.pipeline import CommandPipeline
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.routes import Route
from tollbook.schemas.tasks import InvalidTask, Task, TaskStream, TaskType

# For the settlement of calls that are cut off; the ledger itself would be asked for minutes.
_SETTLING_S: Final = 10.0
Told = Callable[[InferenceResult], None]
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Units: seconds. `most_holds` bounds how often a task is begun, `most_deliveries` how often it is delivered."""

    concurrency: Mapping[str, int]
    hold_wait_s: float
    most_holds: int
    most_deliveries: int = 20
    most_parked: int = 20_000
    first_pause_s: float = 0.2
    longest_pause_s: float = 5.0


class Worker:
    """Executes deliveries of the task streams. Clock and pauses come from outside."""

    def __init__(
        self,
        *,
        name: str,
        runner: CallRunner,
        routes: Mapping[TaskType, Route],
        pipeline: CommandPipeline,
        claims: Claims,
        freed: FreedBudgets,
        dead_letters: DeadLetters,
        limits: WorkerLimits,
        now_ms: Callable[[], int],
        observer: TaskObserver | None = None,
    ) -> None:
        self.name = name
        self._observer: TaskObserver = observer or UnobservedTasks()
        self.finished: Counter[TaskStatus] = Counter()
        self.claims = claims
        self._runner = runner
        self._routes = routes
        self._pipeline = pipeline
        self._freed = freed
        self._dead_letters = dead_letters
        self._limits = limits
        self._now_ms = now_ms
        self._slots = {stream: asyncio.Semaphore(number) for stream, number in limits.concurrency.items()}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._runs = count(1)
        # Runs that may still send a request; of all others of this worker it is known that they do not.
        self._active: set[str] = set()
        self._held_back = SeldomWarning("tasks.held_back", now_ms)
        # All task streams, whichever this worker serves; and what belongs to a ledger beside its partitions.
        self._no_reply = frozenset((*limits.concurrency, *TaskStream))
        self._own_keys = dead_letters.key.removesuffix("dead-letters")

    @property
    def in_flight(self) -> int:
        """Deliveries in hand, waiting ones included."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """Tasks of this process that wait for other calls' holds."""
        return self._freed.waiting

    async def take(self, deliveries: Sequence[Delivery]) -> None:
        """Take new deliveries of one stream, each as soon as there is a free slot; reading goes on from there."""
        # All are claimed at once: one that waits here for long must not look abandoned.
        waiting = [delivery for delivery in deliveries if self.claims.add(delivery)]
        try:
            while waiting:
                await self._slots[waiting[0].stream].acquire()
                if self._is_stopping:
                    return  # What has not begun stays pending, and is claimed by others.
                self._start(waiting.pop(0), has_slot=True)
        finally:
            for delivery in waiting:
                self.claims.drop(delivery)

    def take_claimed(self, delivery: Delivery) -> None:
        """Take over a delivery whose worker gave no sign of life; it waits for its slot by itself."""
        if not self._is_stopping and self.claims.add(delivery):
            self._start(delivery, has_slot=False)

    async def drain(self, grace_s: float) -> None:
        """Let what is in flight finish for `grace_s` seconds, then cancel: holds are settled, tasks stay pending.

        Nothing more is begun. Where Redis does not answer, the holds are left to whoever takes the tasks over.
        """
        self._is_stopping = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_s)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if not left:
            return
        _, unsettled = await asyncio.wait(left, timeout=_SETTLING_S)
        if unsettled:
            _log.warning("worker.holds_left", number=len(unsettled))

    def _start(self, delivery: Delivery, *, has_slot: bool) -> None:
        task = asyncio.create_task(self._process(delivery, has_slot=has_slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _process(self, delivery: Delivery, *, has_slot: bool) -> None:
        slot = _Slot(self._slots[delivery.stream], is_held=has_slot)
        try:
            with self._observer.working(delivery) as told:
                await self._work(delivery, slot, told)
        except CallTakenOver as exc:
            _log.warning("task.taken_over", entry_id=delivery.entry_id, stream=delivery.stream, problem=str(exc))
        except Exception:  # noqa: BLE001 - see below.
            # The edge of the worker: one task's trouble must not stop the others. It stays pending.
            _log.exception("task.crashed", entry_id=delivery.entry_id, stream=delivery.stream)
        finally:
            slot.release()
            self.claims.drop(delivery)

    async def _work(self, delivery: Delivery, slot: "_Slot", told: Told) -> None:
        pause_s = self._limits.first_pause_s
        run = self._begin_run()
        try:
            await slot.acquire()
            while True:
                try:
                    return await self._execute(delivery, slot, run, told)
                except (LedgerUnavailable, LedgerRefused, CallUnknown) as exc:
                    # Nothing is lost while the task stays pending; it is tried again when the stores answer.
                    _log.debug("task.held_back", entry_id=delivery.entry_id, stream=delivery.stream, problem=str(exc))
                    self._held_back.tell(exc)
                    slot.release()
                    if run.has_money:
                        self._active.discard(run.id)
                        run = self._begin_run()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, self._limits.longest_pause_s)
                    await slot.acquire()
        finally:
            self._active.discard(run.id)

    def _begin_run(self) -> "_Run":
        run = _Run(f"{self.name}.{next(self._runs)}")
        self._active.add(run.id)
        return run

    async def _execute(self, delivery: Delivery, slot: "_Slot", run: "_Run", told: Told) -> None:
        try:
            task_id, task = read_task(delivery)
        except InvalidTask as exc:
            result, reply_to = await self._refuse_malformed(delivery, str(exc))
        else:
            reply_to = task.reply_to
            try:
                result = await self._result_of(delivery, slot, run, task_id, task)
            except IdempotencyConflict as exc:
                result = await self._refuse_conflict(delivery, task_id, task, str(exc))
        if result is None:
            return
        told(result)
        await self._answer(reply_to, result)
        with self._observer.acknowledging():
            await self.claims.acknowledge(delivery)
        self._count(result)

    async def _result_of(
        self, delivery: Delivery, slot: "_Slot", run: "_Run", task_id: str, task: Task
    ) -> InferenceResult | None:
        """Return the task's result, or None where it is left pending for another time."""
        if task.task is TaskType.PING:
            return await self._pong(task_id, task)
        call = Call.of_task(
            task,
            call_id=task_id,
            run_id=run.id,
            route=self._routes[task.task],
            stream=delivery.stream,
        )
        return await self._run(delivery, call, slot, run)

    async def _run(self, delivery: Delivery, call: Call, slot: "_Slot", run: "_Run") -> InferenceResult | None:
        waits_until_ms = self._now_ms() + round(1000 * self._limits.hold_wait_s)
        budget: str | None = None
        pause_s = self._limits.first_pause_s
        problem = exhausted(delivery.deliveries) if delivery.deliveries > self._limits.most_deliveries else None

        def let_next_try() -> None:
            if budget is not None:
                self._freed.next(budget)

        def on_reserved() -> None:
            run.has_money = True
            let_next_try()

        while True:
            is_final = budget is not None and self._now_ms() >= waits_until_ms
            reply = await self._runner.run(
                call,
                is_final=is_final,
                on_reserved=on_reserved,
                give_up=problem,
                most_holds=self._limits.most_holds,
            )
            if isinstance(reply, InferenceResult):
                let_next_try()
                has_given_up = reply.error_code is ErrorCode.ATTEMPTS_EXHAUSTED
                if has_given_up and (problem or run.has_money or delivery.is_claimed):
                    # A claimed one too: whoever gave up may have died before it could do this.
                    await self._bury(
                        delivery, "attempts_exhausted", reply.error or problem or "", call.call_id, call.user_id
                    )
                return reply
            if isinstance(reply, OpenCall) and await self._may_take_over(delivery, reply):
                if reply.hold >= self._limits.most_holds:
                    problem = problem or exhausted(reply.hold)
                await self._runner.take_over(call, reply, give_up=problem)
                continue
            slot.release()
            if isinstance(reply, Waiting):
                if self._freed.waiting >= self._limits.most_parked:
                    # Too many to keep in memory; the claim loop brings it back later.
                    await self.claims.give_back(delivery)
                    return None
                await self._wait_for_money(reply.budget, is_first=budget == reply.budget, until_ms=waits_until_ms)
                budget = reply.budget
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._limits.longest_pause_s)
            await slot.acquire()

    async def _may_take_over(self, delivery: Delivery, found: OpenCall) -> bool:
        """Whether the run that holds money is dead.

        One of this worker's own has ended, or is known to live. Another's is due and its worker shows no sign of life.
        """
        owner = found.worker.rpartition(".")[0]
        if owner == self.name:
            return found.worker not in self._active
        is_due = delivery.is_claimed or self._now_ms() > found.deadline_ms
        return is_due and not await self.claims.is_alive(owner)

    async def _wait_for_money(self, budget: str, *, is_first: bool, until_ms: int) -> None:
        try:
            async with asyncio.timeout(max(0, until_ms - self._now_ms()) / 1000):
                await self._freed.wait(budget, is_first=is_first)
        except TimeoutError:
            pass  # The next try is the final one.

    async def _pong(self, task_id: str, task: Task) -> InferenceResult:
        result = InferenceResult(
            task_id=task_id,
            status=TaskStatus.DONE,
            content="pong",
            user_id=task.user_id,
            task_type=task.task.value,
            finished_at_ms=self._now_ms(),
            metadata=task.metadata,
        )
        if await self._runner.results.put(result):
            return result
        # The first answer stands, to the letter (G4); an id that a call was published under is not a ping's.
        stored = await self._runner.results.get_of(task_id, task.user_id)
        if stored is None or (stored.task_type, stored.user_id) != (TaskType.PING.value, task.user_id):
            raise IdempotencyConflict(task_id)
        return stored

    async def _refuse_malformed(self, delivery: Delivery, problem: str) -> tuple[InferenceResult, str | None]:
        """Return the answer and where it goes, as far as that can be read."""
        known = salvage(delivery)
        await self._bury(delivery, "invalid_task", problem, known.task_id, known.user_id)
        result = InferenceResult(
            task_id=known.task_id,
            status=TaskStatus.INVALID,
            error_code=ErrorCode.INVALID_TASK,
            error=problem,
            user_id=known.user_id,
            finished_at_ms=self._now_ms(),
        )
        if not await self._runner.results.put(result):
            # A redelivery repeats the first answer (G4); a task that was published well under this id keeps its own.
            stored = await self._runner.results.get_of(known.task_id, known.user_id) or result
            result = stored if stored.status is TaskStatus.INVALID and stored.error == problem else result
        return result, known.reply_to

    async def _refuse_conflict(self, delivery: Delivery, task_id: str, task: Task, problem: str) -> InferenceResult:
        """The first task's result stands under its key; only the reply stream hears of the conflict."""
        await self._bury(delivery, "idempotency_conflict", problem, task_id, task.user_id)
        return InferenceResult(
            task_id=task_id,
            status=TaskStatus.INVALID,
            error_code=ErrorCode.IDEMPOTENCY_CONFLICT,
            error=problem,
            user_id=task.user_id,
            task_type=task.task.value,
            finished_at_ms=self._now_ms(),
            metadata=task.metadata,
        )

    def _count(self, result: InferenceResult) -> None:
        self.finished[result.status] += 1
        _log.debug("task.finished", task_id=result.task_id, status=result.status.value)

    async def _bury(self, delivery: Delivery, reason: Reason, error: str, task_id: str, user_id: str | None) -> None:
        await self._dead_letters.put(delivery, reason=reason, error=error, task_id=task_id, user_id=user_id)

    async def _answer(self, reply_to: str | None, result: InferenceResult) -> None:
        """Append the result to the publisher's reply stream; at least once, so consumers go by `task_id`."""
        if reply_to is None or reply_to in self._no_reply or reply_to.startswith(self._own_keys):
            return
        try:
            await self._pipeline.execute(
                "XADD", reply_to, "*", "task_id", result.task_id, "result", result.model_dump_json()
            )
        except ResponseError as exc:
            # The key is no stream. The result stands under its own key, so the task is not held up for it.
            _log.warning("reply.refused", task_id=result.task_id, reply_to=reply_to, problem=str(exc))


@dataclass(slots=True)
class _Run:
    """One run of a task. Until it `has_money` it sends no request, and may be repeated under the same id."""

    id: str
    has_money: bool = False


class _Slot:
    """One place of a stream, taken and given back by one delivery."""

    def __init__(self, slots: asyncio.Semaphore, *, is_held: bool) -> None:
        self._slots = slots
        self._is_held = is_held

    async def acquire(self) -> None:
        if not self._is_held:
            await self._slots.acquire()
            self._is_held = True

    def release(self) -> None:
        if self._is_held:
            self._is_held = False
            self._slots.release()
