"""The processes of a run: each a real one, which can be killed, stopped, continued and started again."""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_END_S: Final = 30.0
_RESTART_S: Final = 0.5
_FOR_EVER_MS: Final = 1 << 62
_STARTED_MS: Final = 10_000
# A server that has come back loads its data before it answers.
_LOADING_MS: Final = 1_000


@dataclass(slots=True)
class Downtime:
    """A time in which a process or server was paused or down. Units: milliseconds since the epoch."""

    pid: int
    from_ms: int
    to_ms: int = _FOR_EVER_MS


@dataclass(frozen=True, slots=True)
class UnexpectedExit:
    """A process that ended by itself, or did not end when it was told to. Units: milliseconds since the epoch."""

    text: str
    from_ms: int
    to_ms: int
    code: int | None = None

    def is_caused_by(self, outages: Sequence[Downtime]) -> bool:
        """Whether it ended at its start, with an error, because the server was down. It is started again."""
        is_starting = self.code == 1 and self.to_ms - self.from_ms < _STARTED_MS
        return is_starting and any(
            outage.from_ms <= self.to_ms and outage.to_ms + _LOADING_MS >= self.from_ms for outage in outages
        )


class Program:
    """One command that is kept running. If it ends by itself, that is recorded, and it is started again."""

    def __init__(
        self, name: str, arguments: Sequence[str], env: Mapping[str, str], directory: Path, file: Path | None = None
    ) -> None:
        self.name = name
        self.pids: list[int] = []
        self.unexpected_exits: list[UnexpectedExit] = []
        self.downtimes: list[Downtime] = []
        self._arguments = tuple(arguments)
        self._env = dict(env)
        self._directory = directory
        self._file = file
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._is_wanted = asyncio.Event()

    async def start(self) -> None:
        """Start it and keep it running."""
        self._is_wanted.set()
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())

    async def inject(self, kind: str, for_s: float) -> None:
        """Make a fault of this kind; start or resume the process after `for_s` seconds."""
        if kind == "stop":
            await self._pause(for_s)
            return
        self._is_wanted.clear()
        self._send(signal.SIGTERM if kind == "end" else signal.SIGKILL)
        await self._wait()
        if kind == "lose" and self._file is not None:
            for file in self._file.parent.glob(f"{self._file.name}*"):
                file.unlink()
        await asyncio.sleep(for_s)
        self._is_wanted.set()

    def excuse_exits_during(self, outage: Downtime) -> None:
        """Remove the exits with an error during an outage: the process was right to refuse the store."""
        self.unexpected_exits = [
            each
            for each in self.unexpected_exits
            if each.to_ms < outage.from_ms or each.from_ms > outage.to_ms or each.code != 1
        ]

    async def end(self) -> None:
        """Shut it down for good. If it does not end, it is killed, and that is recorded."""
        self._is_wanted.clear()
        self._send(signal.SIGTERM)
        await self._wait()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None

    async def _pause(self, for_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        downtime = Downtime(process.pid, _now_ms())
        self.downtimes.append(downtime)
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(for_s)
        finally:
            downtime.to_ms = _now_ms()
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)

    async def _wait(self) -> None:
        """Wait for the end that was asked for."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            now_ms = _now_ms()
            text = f"{self.name} (pid {process.pid}) did not end within {_END_S} s"
            self.unexpected_exits.append(UnexpectedExit(text, now_ms, now_ms))
            self._send(signal.SIGKILL)
            await process.wait()

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep(self) -> None:
        log = self._directory / f"{self.name.replace(' ', '-')}.log"
        with log.open("ab") as output:
            while True:
                await self._is_wanted.wait()
                from_ms = _now_ms()
                self._process = await asyncio.create_subprocess_exec(
                    *self._arguments,
                    cwd=self._directory,
                    env=self._env,
                    # If this process dies, the pipe closes, and the other ends by itself (--supervised).
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                self.pids.append(self._process.pid)
                code = await self._process.wait()
                if self._is_wanted.is_set():
                    text = f"{self.name} (pid {self._process.pid}) ended by itself with code {code}"
                    self.unexpected_exits.append(UnexpectedExit(text, from_ms, _now_ms(), code))
                    await asyncio.sleep(_RESTART_S)


def tollbook(*arguments: str) -> tuple[str, ...]:
    """Return the arguments of a `tollbook` command that is run by this interpreter."""
    return (sys.executable, "-m", "tollbook", *arguments)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
