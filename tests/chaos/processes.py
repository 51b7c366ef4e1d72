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
class Standstill:
    """A time in which a process did nothing. Units: milliseconds since the epoch."""

    pid: int
    from_ms: int
    to_ms: int = _FOR_EVER_MS


@dataclass(frozen=True, slots=True)
class Surprise:
    """A process that ended unasked, or did not end when asked. Units: milliseconds since the epoch."""

    text: str
    from_ms: int
    to_ms: int
    code: int | None = None

    def is_for_want_of(self, outages: Sequence[Standstill]) -> bool:
        """Whether it gave up at its start, with an error, since the server was away; it is then started again."""
        is_starting = self.code == 1 and self.to_ms - self.from_ms < _STARTED_MS
        return is_starting and any(
            outage.from_ms <= self.to_ms and outage.to_ms + _LOADING_MS >= self.from_ms for outage in outages
        )


class Program:
    """One command that is to run: started anew whenever it ends by itself, which is noted."""

    def __init__(
        self, name: str, arguments: Sequence[str], env: Mapping[str, str], directory: Path, file: Path | None = None
    ) -> None:
        self.name = name
        self.pids: list[int] = []
        self.surprises: list[Surprise] = []
        self.standstills: list[Standstill] = []
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

    async def strike(self, deed: str, for_s: float) -> None:
        """Do it harm, and let it go on after so many seconds."""
        if deed == "stop":
            await self._stand_still(for_s)
            return
        self._is_wanted.clear()
        self._send(signal.SIGTERM if deed == "end" else signal.SIGKILL)
        await self._wait()
        if deed == "lose" and self._file is not None:
            for file in self._file.parent.glob(f"{self._file.name}*"):
                file.unlink()
        await asyncio.sleep(for_s)
        self._is_wanted.set()

    def forget_ends_in(self, outage: Standstill) -> None:
        """Take its ends for right that had to do with it: it refused a store, and was started again meanwhile."""
        self.surprises = [
            each
            for each in self.surprises
            if each.to_ms < outage.from_ms or each.from_ms > outage.to_ms or each.code != 1
        ]

    async def end(self) -> None:
        """End it for good, in an orderly way; what does not end is killed, and noted."""
        self._is_wanted.clear()
        self._send(signal.SIGTERM)
        await self._wait()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None

    async def _stand_still(self, for_s: float) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        standstill = Standstill(process.pid, _now_ms())
        self.standstills.append(standstill)
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(for_s)
        finally:
            standstill.to_ms = _now_ms()
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
            self.surprises.append(Surprise(text, now_ms, now_ms))
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
                    # Where this process dies, the pipe closes and the other ends by itself (--supervised).
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                self.pids.append(self._process.pid)
                code = await self._process.wait()
                if self._is_wanted.is_set():
                    text = f"{self.name} (pid {self._process.pid}) ended by itself with code {code}"
                    self.surprises.append(Surprise(text, from_ms, _now_ms(), code))
                    await asyncio.sleep(_RESTART_S)


def tollbook(*arguments: str) -> tuple[str, ...]:
    """Return the arguments of a `tollbook` command that is run by this interpreter."""
    return (sys.executable, "-m", "tollbook", *arguments)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
