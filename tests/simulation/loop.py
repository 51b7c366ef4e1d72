"""An asyncio event loop with a virtual clock and simulated processes, driven by a seed.

Time jumps to the next timer when nothing is ready. Callbacks belong to the process in whose
context they were scheduled. The seed decides which process runs next; within a process, callbacks
keep asyncio's order. A paused process runs nothing until it is resumed, as after SIGSTOP. A killed
one never runs again, not even a `finally`, as after SIGKILL.
"""

import asyncio
import heapq
from asyncio.events import Handle, TimerHandle
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")


class Stuck(AssertionError):
    """The simulation has not ended, although nothing is left to run or its time is over."""


class Process:
    """A simulated process: its tasks run, pause and die together. `paused_s` is the sum of its pauses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_paused = False
        self.is_dead = False
        self.paused_s = 0.0
        self.queue: deque[Handle] = deque()

    def __repr__(self) -> str:
        return f"Process({self.name})"

    @property
    def is_runnable(self) -> bool:
        return not self.is_paused and not self.is_dead


WORLD = Process("world")
_process: ContextVar[Process] = ContextVar("simulated_process", default=WORLD)


def current_process() -> Process:
    """The process whose code runs."""
    return _process.get()


class SimulatedTask(asyncio.Task[Any]):
    """A task whose hash is the number of its creation, not its address, so that sets have the same order each run."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, number: int, **options: Any) -> None:
        self.number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs one simulation. `steps` counts callbacks."""

    def __init__(self, random: Random, *, start_s: float = 0.0) -> None:
        self._random = random
        self._now_s = start_s
        self._timers: list[tuple[float, int, TimerHandle]] = []
        self._number = 0
        self._runnable: list[Process] = []
        self._context = copy_context()
        self._tasks: list[tuple[asyncio.Task[Any], Process]] = []
        self._is_running = False
        self.problems: list[BaseException] = []
        self.steps = 0
        self.is_ending = False

    # --- For the simulation ---

    def spawn(self, process: Process, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task as part of a process."""
        context = self._context.copy()
        context.run(_process.set, process)
        return self.create_task(work, context=context)

    def world_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> TimerHandle:
        """Call back outside all processes."""
        return self.call_at(self._now_s + delay_s, callback, *args, context=self._context)

    def pause(self, process: Process) -> None:
        """Pause a process where it is; its timers come due, but their callbacks wait."""
        assert process.is_runnable
        process.is_paused = True
        process.paused_s -= self._now_s
        if process in self._runnable:
            self._runnable.remove(process)

    def resume(self, process: Process) -> None:
        """Let a paused process go on."""
        if process.is_dead or not process.is_paused:
            return
        process.is_paused = False
        process.paused_s += self._now_s
        if process.queue:
            self._runnable.append(process)

    def kill(self, process: Process) -> None:
        """End a process at once. Its tasks stay referenced, so that not even the garbage collector ends them."""
        if process in self._runnable:
            self._runnable.remove(process)
        process.is_dead = True
        process.queue.clear()

    def run(self, main: Coroutine[Any, Any, T], *, until_s: float) -> T:
        """Run until `main` ends. Errors: what it raises; Stuck; what a task outside all processes raised."""
        asyncio.events._set_running_loop(self)
        try:
            task = self.spawn(WORLD, main)
            while not task.done():
                if self.problems:
                    raise self.problems[0]
                self._step(until_s)
            if self.problems:
                raise self.problems[0]
            return task.result()
        finally:
            asyncio.events._set_running_loop(None)

    def end(self) -> None:
        """Cancel all tasks that are left, also of killed processes, so that asyncio does not warn of pending tasks."""
        asyncio.events._set_running_loop(self)
        self.is_ending = True
        try:
            for _ in range(20):
                left = [(task, process) for task, process in self._tasks if not task.done()]
                if not left:
                    break
                for task, process in left:
                    if not process.is_runnable:
                        process.is_dead = process.is_paused = False
                        if process.queue:
                            self._runnable.append(process)
                    task.cancel()
                while self._runnable:
                    self._run_one()
        finally:
            asyncio.events._set_running_loop(None)
        for task, _ in self._tasks:
            # Task has no public way to switch off its warning.
            task._log_destroy_pending = False  # pyright: ignore[reportAttributeAccessIssue]
            if task.done() and not task.cancelled():
                task.exception()

    def _step(self, until_s: float) -> None:
        while self._timers and (self._timers[0][0] <= self._now_s or not self._runnable):
            at_s, _, handle = heapq.heappop(self._timers)
            if handle.cancelled():
                continue
            if at_s > until_s:
                raise Stuck(f"it is not over after {until_s:.0f} s")
            self._now_s = max(self._now_s, at_s)
            self._enqueue(handle)
        if not self._runnable:
            raise Stuck("nothing is left to happen")
        self._run_one()

    def _run_one(self) -> None:
        runnable = self._runnable
        place = self._random.randrange(len(runnable)) if len(runnable) > 1 else 0
        process = runnable[place]
        handle = process.queue.popleft()
        if not process.queue:
            runnable[place] = runnable[-1]
            runnable.pop()
        if not handle.cancelled():
            self.steps += 1
            handle._run()

    def _enqueue(self, handle: Handle) -> None:
        process: Process = handle._context.get(_process, WORLD)
        if process.is_dead:
            return
        process.queue.append(handle)
        if len(process.queue) == 1 and not process.is_paused:
            self._runnable.append(process)

    # --- For asyncio ---

    def time(self) -> float:
        return self._now_s

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:
        handle = Handle(callback, args, self, context)
        self._enqueue(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        handle = TimerHandle(when, callback, args, self, context)
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, handle))
        return handle

    def _timer_handle_cancelled(self, handle: TimerHandle) -> None:
        """Cancelled timers are dropped when they come due."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:
        self._number += 1
        task = SimulatedTask(coro, number=self._number, loop=self, name=name, context=context)
        self._tasks.append((task, context.get(_process, WORLD) if context else current_process()))
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep the exception of a callback. Those of tasks are checked where the task was started."""
        problem = context.get("exception")
        if not self.is_ending and problem is not None and "never retrieved" not in context.get("message", ""):
            self.problems.append(problem)
