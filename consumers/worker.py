"""One worker: takes deliveries, runs each as a call, answers, acknowledges.

A delivery has one of its stream's slots while it works. It gives the slot back while it waits, for money or for another
run of the same task, so that waiting tasks never delay others. It is acknowledged only when its result is stored (late
acknowledgement); after any failure before that, it stays pending and is claimed again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

import structlog

from tollbook.consumers.answers import Answers
from tollbook.consumers.claims import Claims
from tollbook.consumers.dead_letters import DeadLetters
from tollbook.consumers.messages import Delivery, read_task
from tollbook.consumers.observer import TaskObserver, UnobservedTasks
from tollbook.consumers.overtaken_calls import OvertakenCalls
from tollbook.consumers.reply_streams import ReplyStreams
from tollbook.consumers.slots import Slot
from tollbook.consumers.throttled_warning import ThrottledWarning
from tollbook.inference.calls.call import Call, RunId, exhausted
from tollbook.inference.calls.holds import Hold
from tollbook.inference.calls.reservations import Reservations, WaitLimits
from tollbook.inference.calls.runner import CallRunner, CallTakenOver
from tollbook.inference.current_policy import CurrentPolicy
from tollbook.inference.task_deltas import DeltaStream
from tollbook.inference.user_ids import UserIds
from tollbook.ledger.errors import CallUnknown, IdempotencyConflict, LedgerRefused, LedgerUnavailable
from tollbook.ledger.gate.requests import OpenCall
from tollbook.ledger.results import Results
from tollbook.schemas.policy import check_task
from tollbook.schemas.results import ErrorCode, InferenceResult, TaskStatus
from tollbook.schemas.tasks import PING, RESERVED_STREAM_WORDS, InvalidTask, Task

# For settling calls that are cut off; without this limit, the ledger would be retried for minutes.
_SETTLING_S: Final = 10.0
OpenDeltas = Callable[[str, str], DeltaStream]
"""Returns the stream for the deltas of a task, by task id and user id."""
RecordResult = Callable[[InferenceResult], None]
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Concurrent calls per stream, limits of waiting, and how often a task is delivered before it is given up."""

    concurrency: Mapping[str, int]
    waiting: WaitLimits
    max_deliveries: int = 20


class Worker:
    """Executes deliveries of the task streams. Clock and pauses come from outside."""

    def __init__(
        self,
        *,
        name: str,
        reservations: Reservations,
        runner: CallRunner,
        policies: CurrentPolicy,
        replies: ReplyStreams,
        open_deltas: OpenDeltas,
        results: Results,
        claims: Claims,
        dead_letters: DeadLetters,
        user_ids: UserIds,
        limits: WorkerLimits,
        now_ms: Callable[[], int],
        observer: TaskObserver | None = None,
        on_held_back: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        """`on_held_back` gets the reason each time that a task is held back."""
        self.name = name
        self._observer: TaskObserver = observer or UnobservedTasks()
        self.finished: Counter[TaskStatus] = Counter()
        self.claims = claims
        self.replies = replies
        self._reservations = reservations
        self._runner = runner
        self._policies = policies
        self.overtaken_calls = OvertakenCalls(reservations.record_of)
        self.dead_letters = dead_letters
        self._open_deltas = open_deltas
        self._user_ids = user_ids
        self._answers = Answers(results, dead_letters, user_ids, now_ms)
        self._limits = limits
        self._now_ms = now_ms
        self._concurrency: dict[str, int] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self.set_concurrency(limits.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._run_numbers = count(1)
        # Runs that may still send a request. This worker's other runs never will.
        self._active_runs: set[RunId] = set()
        # Bound once: making a logger takes half the time of a log line.
        self._log = _log.bind()
        self._held_back = ThrottledWarning("tasks.held_back", now_ms)
        self._on_held_back = on_held_back

    @property
    def in_flight(self) -> int:
        """How many deliveries this worker has, including waiting ones."""
        return len(self._tasks)

    @property
    def request_ids_lost(self) -> int:
        """Requests of this process whose ids could not be noted with their holds."""
        return self._runner.notes_lost

    @property
    def waiting(self) -> int:
        """How many tasks of this process wait for money."""
        return self._reservations.waiting

    @property
    def concurrency(self) -> Mapping[str, int]:
        """Concurrent calls per stream."""
        return self._concurrency

    def set_concurrency(self, concurrency: Mapping[str, int]) -> None:
        """Set the number of slots of each stream; running calls keep their old slots."""
        for stream, number in concurrency.items():
            if self._concurrency.get(stream) != number:
                self._concurrency[stream], self._slots[stream] = number, asyncio.Semaphore(number)

    async def take(self, deliveries: Sequence[Delivery]) -> None:
        """Start new deliveries of one stream, each as soon as a slot is free; return when all are started."""
        # All are claimed at once: a delivery that waits here for long must not look abandoned.
        waiting = [delivery for delivery in deliveries if self.claims.add(delivery)]
        try:
            while waiting:
                slots = self._slots[waiting[0].stream]
                await slots.acquire()
                if self._is_stopping:
                    return  # Deliveries that are not started stay pending, and other workers claim them.
                self._start(waiting.pop(0), Slot(slots, is_held=True))
        finally:
            for delivery in waiting:
                self.claims.drop(delivery)

    def take_claimed(self, delivery: Delivery) -> None:
        """Start a delivery taken over from a silent worker; returns at once, the delivery waits for its slot."""
        if not self._is_stopping and self.claims.add(delivery):
            self._start(delivery, Slot(self._slots[delivery.stream], is_held=False))

    async def drain(self, grace_s: float, *, settling_s: float = _SETTLING_S) -> None:
        """Start nothing more; let deliveries finish for `grace_s` seconds, then cancel them.

        Holds of cancelled calls are settled within `settling_s` seconds, and their tasks stay pending. If Redis does
        not answer, the workers that take the tasks over settle the holds.
        """
        self._is_stopping = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_s)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if not left:
            return
        _, unsettled = await asyncio.wait(left, timeout=settling_s)
        if unsettled:
            _log.warning("worker.holds_left", number=len(unsettled))

    def _start(self, delivery: Delivery, slot: Slot) -> None:
        task = asyncio.create_task(self._process(delivery, slot))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _process(self, delivery: Delivery, slot: Slot) -> None:
        """Work on a delivery until it is acknowledged or left pending. No error of a task gets past this function."""
        try:
            with self._observer.working(delivery) as record_result:
                await self._execute_with_retries(delivery, slot, record_result)
        except CallTakenOver as exc:
            _log.warning("task.taken_over", entry_id=delivery.entry_id, stream=delivery.stream, problem=str(exc))
        except Exception:  # noqa: BLE001 - one task's failure must not stop the others; it stays pending.
            _log.exception("task.crashed", entry_id=delivery.entry_id, stream=delivery.stream)
        finally:
            slot.release()
            self.claims.drop(delivery)

    async def _execute_with_retries(self, delivery: Delivery, slot: Slot, record_result: RecordResult) -> None:
        """Execute a delivery, and retry while the stores do not answer; the delivery stays pending meanwhile."""
        pause_s = self._limits.waiting.first_pause_s
        run = self._begin_run(self._now_ms())
        try:
            await slot.acquire()
            while True:
                try:
                    return await self._execute(delivery, slot, run, record_result)
                except (LedgerUnavailable, LedgerRefused, CallUnknown) as exc:  # G8
                    _log.debug("task.held_back", entry_id=delivery.entry_id, stream=delivery.stream, problem=str(exc))
                    self._held_back.warn(exc)
                    self._on_held_back(exc)
                async with slot.released():
                    if run.has_money:
                        self._active_runs.discard(run.id)
                        run = self._begin_run(run.taken_at_ms)
                    await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._limits.waiting.max_pause_s)
        finally:
            self._active_runs.discard(run.id)

    def _begin_run(self, taken_at_ms: int) -> "_Run":
        run = _Run(RunId(self.name, str(next(self._run_numbers))), taken_at_ms)
        self._active_runs.add(run.id)
        return run

    async def _execute(self, delivery: Delivery, slot: Slot, run: "_Run", record_result: RecordResult) -> None:
        """Read the task, make its call, answer, acknowledge."""
        try:
            task_id, task = await self._read(delivery)
            if self.replies.is_reserved(task.reply_to):
                raise InvalidTask(f"'reply_to' {RESERVED_STREAM_WORDS} {task.reply_to!r} is")  # noqa: TRY301 - as a field that cannot be read.
        except InvalidTask as exc:
            result, reply_to = await self._answers.malformed(delivery, str(exc))
        else:
            reply_to = task.reply_to
            try:
                result = await self._result_of(delivery, task_id, task, slot, run)
                if task.stream and result is not None:
                    await self._open_deltas(task_id, task.user_id).end(result.status.value)
            except IdempotencyConflict as exc:
                result = await self._answers.conflict(delivery, task_id, task, str(exc))
            except InvalidTask as exc:  # The policy no longer has its task type or plan.
                result, reply_to = await self._answers.malformed(delivery, str(exc))
        if result is None:
            return
        record_result(result)
        await self.replies.append(reply_to, result)
        with self._observer.acknowledging():
            await self.claims.acknowledge(delivery)  # G3
        self.finished[result.status] += 1
        self._log_finished(result, seconds=(self._now_ms() - run.taken_at_ms) / 1000)

    async def _read(self, delivery: Delivery) -> tuple[str, Task]:
        """Return the task id and the task, checked against the policy in force. Errors: InvalidTask."""
        try:
            task_id, task = read_task(delivery, self._policies.newest.policy.tag_names)
        except InvalidTask:
            if not await self._policies.refresh():  # G11
                raise
            task_id, task = read_task(delivery, self._policies.newest.policy.tag_names)
        task = await self._user_ids.task(task)  # G10
        await self._policies.read_by(task.user_id, lambda policy: check_task(task, policy.policy))
        return task_id, task

    def _log_finished(self, result: InferenceResult, *, seconds: float) -> None:
        """Log the result of a task. A malformed message already has a log line for its dead letter."""
        log = self._log.debug if result.error_code is ErrorCode.INVALID_TASK else self._log.info
        log(
            "task.finished",
            task_id=result.task_id,
            user_id=result.user_id,
            task_type=result.task_type,
            model=result.model_used,
            status=result.status.value,
            cost_usd=f"{result.cost_usd:f}",
            tokens=result.token_count,
            seconds=seconds,
        )

    async def _result_of(
        self, delivery: Delivery, task_id: str, task: Task, slot: Slot, run: "_Run"
    ) -> InferenceResult | None:
        """Return the task's result, or None if the task is left pending."""
        if task.task == PING:
            return await self._answers.ping(task_id, task)
        call = await self._policies.read_by(
            task.user_id,
            lambda policy: Call.of_task(task, call_id=task_id, run_id=run.id, policy=policy, stream=delivery.stream),
        )
        acquired = await self._reservations.acquire(
            call,
            self._limits.waiting,
            give_up=exhausted(delivery.deliveries) if delivery.deliveries > self._limits.max_deliveries else None,
            is_dead=partial(self._is_dead, delivery),
            while_waiting=slot.released,
        )
        if acquired.hold is not None:
            run.has_money = True
            can_be_cut_off = partial(self._runner.can_be_cut_off, acquired.call, acquired.hold)
            with self.overtaken_calls.running(
                delivery, task_id, user_id=call.user_id, hold=acquired.hold.number, can_be_cut_off=can_be_cut_off
            ):
                result = await self._run(acquired.call, acquired.hold, acquired.give_up)
        elif acquired.result is not None:
            result = acquired.result
        else:
            # Too many tasks wait to keep them all in memory. The claim loop delivers this one again later.
            slot.release()
            await self.claims.give_back(delivery)
            return None
        if result.error_code is ErrorCode.ATTEMPTS_EXHAUSTED and (
            # A claimed delivery too: the worker that gave up may have died before writing the dead letter.
            acquired.give_up or acquired.hold is not None or delivery.is_claimed
        ):
            problem = result.error or acquired.give_up or ""
            await self.dead_letters.put(
                delivery, reason="attempts_exhausted", error=problem, task_id=task_id, user_id=task.user_id
            )
        return result

    async def _run(self, call: Call, hold: Hold, give_up: str | None) -> InferenceResult:
        """Make a call; if its task wants streaming, append its deltas."""
        if not call.task.stream:
            return await self._runner.run(call, hold, give_up=give_up)
        deltas = self._open_deltas(call.call_id, call.user_id)
        deltas.begin(is_restart=hold.number > 1)
        result = await self._runner.run(call, hold, give_up=give_up, on_delta=deltas.take)
        await deltas.flush()
        return result

    async def _is_dead(self, delivery: Delivery, found: OpenCall) -> bool:
        """Whether the run that has the hold is dead.

        This worker knows which of its own runs are active. Another worker's run is dead once it is due and its worker
        has no heartbeat.
        """
        run = RunId.parse(found.worker)
        if run.process == self.name:
            return run not in self._active_runs  # G4
        is_due = delivery.is_claimed or self._now_ms() > found.deadline_ms
        return is_due and not await self.claims.is_alive(run.process)


@dataclass(slots=True)
class _Run:
    """One run of a task. Until it `has_money`, it sends no request and may be retried under the same run id."""

    id: RunId
    taken_at_ms: int
    """When this worker took the delivery, in milliseconds since the epoch; the delivery may have had earlier runs."""
    has_money: bool = False
