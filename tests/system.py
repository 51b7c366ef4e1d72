"""A whole running system in this process, and the `tollbook` command as a real process.

In process, it is composed by app/processes.py as `tollbook up` composes it. Only the provider
differs: the stand-in, with a switch that holds answers back as long as a test wants requests to
be in flight.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from aiohttp import web
from redis.asyncio import Redis

from tests.forking import ForkedProcess, fork, run_command
from tests.servers import PATIENCE_S
from tollbook.app.processes import System, open_system
from tollbook.consumers.service import build_worker, serve_worker
from tollbook.consumers.worker import Worker
from tollbook.inference.settings import Settings
from tollbook.ledger.keys import Keys, dead_letters
from tollbook.ledger.server.connection import connect
from tollbook.ledger.server.servers import server_of
from tollbook.observability.process import observe_process
from tollbook.observability.tracing import Tracing
from tollbook.schemas.identifiers import EntryId
from tollbook.schemas.policy import default_policy
from tollbook.schemas.results import InferenceResult
from tollbook.standin import StandIn, StandInConfig
from tollbook.standin.apis import Api
from tollbook.standin.replies import CompletionRequest

STREAMS: Final = tuple(default_policy().streams)
REPLIES: Final = "replies"

Fields = Mapping[str, str]


class GatedStandIn(StandIn):
    """The stand-in with a switch: while it is shut for a user, that user's requests arrive and get no answer yet."""

    def __init__(self, config: StandInConfig | None = None) -> None:
        super().__init__(config)
        self.arrived: Counter[str] = Counter()
        self._shut_for: Collection[str] | None = ()
        self._change = asyncio.Condition()

    async def shut(self, *users: str) -> None:
        """Keep back the answers to these users, or to everybody where none is named."""
        async with self._change:
            self._shut_for = users or None

    async def open(self) -> None:
        """Answer everybody."""
        async with self._change:
            self._shut_for = ()
            self._change.notify_all()

    async def wait_for_arrivals(self, number: int, *, user: str) -> None:
        """Return once so many requests of a user have arrived, counted from the start."""
        async with asyncio.timeout(PATIENCE_S), self._change:
            await self._change.wait_for(lambda: self.arrived[user] >= number)

    async def _answer(
        self, request: web.Request, asked: CompletionRequest, generation_id: str, fault: str | None, api: Api
    ) -> web.StreamResponse:
        async with self._change:
            self.arrived[asked.user] += 1
            self._change.notify_all()
            await self._change.wait_for(lambda: self._shut_for is not None and asked.user not in self._shut_for)
        return await super()._answer(request, asked, generation_id, fault, api)


@dataclass
class RunningSystem:
    """A system that runs: its parts, and what a publisher and an auditor can do with it."""

    system: System
    provider: GatedStandIn
    workers: list[Worker]
    redis: Redis
    _answers: dict[str, InferenceResult] = field(default_factory=dict[str, InferenceResult])
    _last_reply: str = "0"

    @property
    def keys(self) -> Keys:
        """The keys of the first partition."""
        return self.system.handle.keys[0]

    async def publish(self, stream: str, tasks: Iterable[Fields]) -> list[str]:
        """Append tasks in one round trip; return the entries' ids."""
        pipe = (await server_of(self.redis, stream)).pipeline(transaction=False)
        for task in tasks:
            pipe.xadd(stream, dict(task))  # pyright: ignore[reportArgumentType]
        return [entry_id.decode() for entry_id in await pipe.execute()]

    async def answers(self, task_ids: Iterable[str], *, timeout_s: float = PATIENCE_S) -> list[InferenceResult]:
        """Wait until every one of these tasks is answered on the stream `REPLIES`; return the answers in this order."""
        wanted = list(task_ids)
        async with asyncio.timeout(timeout_s):
            while not self._answers.keys() >= set(wanted):
                reply: Any = await self.redis.xread({REPLIES: self._last_reply}, block=1000, count=1000)
                for entry_id, fields in reply[0][1] if reply else ():
                    result = InferenceResult.model_validate_json(fields[b"result"])
                    self._answers[result.task_id] = result
                    self._last_reply = entry_id.decode()
        return [self._answers[task_id] for task_id in wanted]

    async def fold_all(self) -> None:
        """Return once everything now on the ledger is folded."""
        for keys in self.system.handle.keys:
            newest: Any = await self.redis.xrevrange(keys.ledger, count=1)
            if newest:
                entry = EntryId.parse(newest[0][0].decode())
                await self.system.projection.projector.wait_for(keys.partition, entry)

    async def query(self, sql: str) -> list[dict[str, Any]]:
        """Fold everything, then ask DuckDB."""
        await self.fold_all()
        return await asyncio.to_thread(self.system.projection.store.query, sql)

    async def pending(self) -> int:
        """Return how many entries of all task streams are delivered and not acknowledged."""
        replies: list[Any] = [await self.redis.xpending(stream, "tollbook") for stream in STREAMS]
        return sum(reply["pending"] for reply in replies)

    async def dead_letters(self) -> list[dict[str, str]]:
        """Return the dead letters, as they stand on the stream."""
        entries: Any = await self.redis.xrange(dead_letters(self.system.runtime.settings.namespace))
        return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in entries]


def make_settings(data_dir: Path, provider: StandIn, **values: Any) -> Settings:
    """Return settings that point at the stand-in; nothing is read from this project's `.env`."""
    quick = {"backoff_base_s": 0.01, "backoff_max_s": 0.05, "stop_grace_s": 10.0, "metrics_port": "off"}
    given = {
        "data_dir": data_dir,
        "openrouter_base_url": provider.base_url,
        "openrouter_api_key": None,
        "dialect": "openrouter",
    }
    return Settings(_env_file=None, **{**quick, **given, **values})  # pyright: ignore[reportCallIssue]


@asynccontextmanager
async def running_system(
    data_dir: Path,
    redis_url: str | None,
    *,
    provider: GatedStandIn | None = None,
    workers: int = 1,
    tracing: Tracing | None = None,
    **values: Any,
) -> AsyncIterator[RunningSystem]:
    """Run server (unless one is given), stand-in, projector and workers; `values` are settings.

    Metrics and health are served if `metrics_port` is set; `tracing` traces the tasks. At the end
    everything is stopped in order; a failed worker fails the test.
    """
    async with provider or GatedStandIn() as standin:
        settings = make_settings(data_dir, standin, redis_url=redis_url, **values)
        async with observe_process(settings, "up") as state:
            state.tracing = tracing
            async with open_system(settings, state=state) as system, connect(system.redis_url) as redis:
                running = RunningSystem(system, standin, [], redis)
                async with serving(running, workers):
                    yield running


@asynccontextmanager
async def serving(running: RunningSystem, workers: int) -> AsyncIterator[Sequence[Worker]]:
    """Run workers beside those that run already; they are stopped at the end."""
    runtime, state, stop = running.system.runtime, running.system.state, asyncio.Event()
    names = [f"worker-{len(running.workers) + number}" for number in range(workers)]
    streams = tuple(runtime.rules.streams)
    made = [build_worker(runtime, streams, name, observer=state.tracing) for name in names]
    running.workers += made
    url = running.system.redis_url
    served = [
        asyncio.create_task(serve_worker(runtime, worker, stop, redis_url=url, observer=state)) for worker in made
    ]
    try:
        yield made
    finally:
        stop.set()
        await asyncio.gather(*served)


@dataclass(frozen=True, slots=True)
class Finished:
    """Exit code and output of a command that has ended."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Read standard output as JSON."""
        return json.loads(self.stdout)


def tollbook() -> Path:
    """Return the command as it is installed beside the interpreter."""
    return Path(sys.executable).with_name("tollbook")


def command_environment(variables: Mapping[str, str] | None) -> dict[str, str]:
    """Return this process's environment without any setting of Tollbook's, and `variables`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TOLLBOOK_", "OPENROUTER_", "REDIS_URL"))
    }
    # The suite's servers spare the disk (tests/servers.py).
    return {
        **kept,
        "TOLLBOOK_ALLOW_UNSYNCED": "1",
        "TOLLBOOK_PROVIDER_USER": "plain",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        **(variables or {}),
    }


async def run_cli(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout_s: float | None = None,
) -> Finished:
    """Run `tollbook ...` to its end as a process of its own, in the directory `cwd`.

    It is forked. `run_installed` is slower, and runs the installed command as users do.
    """
    if timeout_s is None:
        # `tollbook sql` uses only the processor time that others leave, which may be little.
        timeout_s = PATIENCE_S * (4 if arguments[:1] == ("sql",) else 1)
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory, name) for name in ("stdin", "stdout", "stderr")]
        for file, text in zip(files, (stdin or "", "", ""), strict=True):
            file.write_text(text, encoding="utf-8")
        process = await asyncio.to_thread(fork, run_command, arguments, cwd, command_environment(env), tuple(files))
        await asyncio.to_thread(process.join, timeout_s)
        if process.exitcode is None:
            process.kill()
            await asyncio.to_thread(process.join)
            raise TimeoutError(f"tollbook {' '.join(arguments)} did not end within {timeout_s} s")
        return Finished(process.exitcode, *(file.read_text(encoding="utf-8") for file in files[1:]))


async def run_installed(
    *arguments: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    timeout_s: float = PATIENCE_S,
) -> Finished:
    """Run the command that is installed, as `run_cli` does."""
    process = await asyncio.create_subprocess_exec(
        tollbook(),
        *arguments,
        cwd=cwd,
        env=command_environment(env),
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(timeout_s):
            output, errors = await process.communicate(None if stdin is None else stdin.encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return Finished(process.returncode or 0, output.decode(), errors.decode())


class BackgroundCommand:
    """A `tollbook` command that keeps running in a process of its own. Its output goes to files: no pipe fills up."""

    def __init__(self, process: asyncio.subprocess.Process | ForkedProcess, output: Path, errors: Path) -> None:
        self.process = process
        self._output = output
        self._errors = errors

    @classmethod
    async def start(
        cls, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, is_installed: bool = False
    ) -> Self:
        """Start the command in the directory `cwd`: forked, or with `is_installed` as users start it."""
        number = len(list(cwd.parent.glob(f"{cwd.name}.*.out")))
        output, errors = (cwd.with_name(f"{cwd.name}.{number}.{kind}") for kind in ("out", "err"))
        with output.open("wb") as out, errors.open("wb") as err:
            if not is_installed:
                files = (Path(os.devnull), output, errors)
                environment = command_environment(env)
                # Its own session, so that a test can send it what a terminal sends.
                forked = await asyncio.to_thread(
                    fork, run_command, arguments, cwd, environment, files, has_session=True
                )
                return cls(ForkedProcess(forked), output, errors)
            process = await asyncio.create_subprocess_exec(
                tollbook(),
                *arguments,
                cwd=cwd,
                env=command_environment(env),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        return cls(process, output, errors)

    @property
    def stdout(self) -> str:
        """Standard output so far."""
        return self._output.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """Standard error so far."""
        return self._errors.read_text(encoding="utf-8")

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    async def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for the end; return the exit code."""
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()

    async def end(self) -> None:
        """Stop it as a user would; kill it if it does not end."""
        if self.process.returncode is None:
            self.terminate()
            try:
                await self.wait(20)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()
