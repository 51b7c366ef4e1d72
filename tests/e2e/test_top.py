"""`tollbook top` as its users have it: on a terminal, through a pipe, and where there is nothing."""

import asyncio
import fcntl
import os
import re
import signal
import struct
import termios
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from tests.servers import PATIENCE_S, wait_until
from tests.system import REPLIES, RunningSystem, command_environment, run_cli, running_system, tollbook
from tollbook.ledger.keys import projector_lease
from tollbook.ledger.projection.snapshot import take_snapshot
from tollbook.views.top.gather import Gatherer
from tollbook.views.top.screen import draw

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENTER: Final = "\x1b[?1049h"
LEAVE: Final = "\x1b[?1049l"
SHOW_CURSOR: Final = "\x1b[?25h"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningSystem]:
    """A system with an embedded server of its own, which has made three calls; commands find it by its directory."""
    async with running_system(tmp_path_factory.mktemp("top") / "data", None) as system:
        tasks = [
            {"task": "score_post", "task_id": f"t{n}", "user_id": "u42", "prompt": "a post", "reply_to": REPLIES}
            for n in range(3)
        ]
        await system.publish("analysis", tasks)
        await system.answers(task["task_id"] for task in tasks)
        await system.fold_all()
        yield system


@pytest.fixture
def here(running: RunningSystem) -> Path:
    return running.system.runtime.settings.data_dir.parent


class Terminal:
    """A terminal with a command in it: the command's output, and the state in which it left the terminal."""

    def __init__(self, master: int, slave: int) -> None:
        self.output = ""
        self._master, self._slave = master, slave
        self.settings: list[Any] = termios.tcgetattr(slave)

    def read(self) -> None:
        self.output += os.read(self._master, 65_536).decode(errors="replace")

    @property
    def screen(self) -> str:
        """The latest whole screen, without escape codes."""
        screens = [part for part in self.output.split("\x1b[?2026h") if "\x1b[?2026l" in part]
        latest = screens[-1].partition("\x1b[?2026l")[0] if screens else ""
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", latest).replace("\r", "")

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self._slave) == self.settings

    async def shows(self, text: str) -> None:
        await wait_until(lambda: text in self.screen, what=f"{text!r} on the screen")


@asynccontextmanager
async def top_on_a_terminal(
    *options: str, cwd: Path, env: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Terminal, asyncio.subprocess.Process]]:
    master, slave = os.openpty()
    terminal = Terminal(master, slave)
    terminal.resize(80, 24)
    environment = {**command_environment(env), "TERM": "xterm-256color"}
    process = await asyncio.create_subprocess_exec(
        tollbook(), "top", *options, cwd=cwd, env=environment, stdin=slave, stdout=slave, stderr=slave,
        # The terminal becomes the command's own, which is what sends it Ctrl-C and changes of the size.
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    loop.add_reader(master, terminal.read)
    try:
        yield terminal, process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(master)
        os.close(master)
        os.close(slave)


async def ended(terminal: Terminal, process: asyncio.subprocess.Process) -> int:
    """Wait for the end; see that the terminal is as it was."""
    async with asyncio.timeout(PATIENCE_S):
        code = await process.wait()
    await wait_until(lambda: LEAVE in terminal.output, what="the way back from the alternate screen")
    assert terminal.output.count(ENTER) == terminal.output.count(LEAVE)
    assert terminal.output.rindex(SHOW_CURSOR) > terminal.output.rindex(ENTER)
    assert terminal.is_as_before()
    return code


@pytest.mark.slow
async def test_q_ends_it_and_gives_the_terminal_back(running: RunningSystem, here: Path) -> None:
    async with top_on_a_terminal("--interval", "0.2", cwd=here) as (terminal, process):
        await terminal.shows(" u42 ")
        assert len(terminal.screen.splitlines()) == 24
        assert not terminal.is_as_before()
        assert "USER  1, by spend" in terminal.screen
        terminal.press(b"s")
        await terminal.shows("USER  1, by part of cap")
        terminal.resize(120, 40)
        await terminal.shows("OLDEST s")
        assert len(terminal.screen.splitlines()) == 40
        terminal.press(b"\x1a")
        await wait_until(lambda: state_of(process.pid) == "T", what="the stop that Ctrl-Z asks for")
        assert terminal.is_as_before(), "while it is stopped, the terminal is the shell's"
        process.send_signal(signal.SIGCONT)
        await wait_until(lambda: terminal.output.count(ENTER) == 2, what="the alternate screen")

        async def is_told() -> bool:
            # Again and again, since the projector takes its lease anew every few seconds.
            await running.redis.delete(projector_lease("tollbook"))
            return "! no projector runs" in terminal.screen

        await wait_until(is_told, what="the missing projector on the screen")
        terminal.press(b"q")
        assert await ended(terminal, process) == 0
        assert terminal.output.rstrip().endswith(LEAVE), "nothing is left on the screen, no error above all"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ctrl-c", "SIGTERM", "error"])
async def test_every_way_out_gives_the_terminal_back(here: Path, tmp_path: Path, way: str) -> None:
    env = {"PYTHONPATH": str(tmp_path)}
    if way == "error":
        # Python imports this by itself: a fault in the middle of drawing.
        fault = "import tollbook.views.top.screen as screen\nscreen._freshness = lambda figures: 1 // 0\n"
        (tmp_path / "sitecustomize.py").write_text(fault, encoding="utf-8")
    async with top_on_a_terminal("--interval", "0.2", cwd=here, env=env) as (terminal, process):
        if way == "error":
            assert await ended(terminal, process) == 1
            await wait_until(lambda: "ZeroDivisionError" in terminal.output, what="the error")
            return
        await terminal.shows(" u42 ")
        if way == "ctrl-c":
            terminal.press(b"\x03")
        else:
            process.send_signal(signal.SIGTERM)
        assert await ended(terminal, process) == 0


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


@pytest.mark.slow
async def test_through_a_pipe_it_is_one_plain_snapshot(here: Path) -> None:
    finished = await run_cli("top", "--once", cwd=here)
    assert (finished.code, finished.stderr) == (0, "")
    assert "\x1b" not in finished.stdout
    lines = finished.stdout.splitlines()
    assert lines[0].startswith(" tollbook top  tollbook in ")
    assert next(line for line in lines if line.startswith(" u42")).split()[1] == "trial"
    assert next(line for line in lines if line.startswith(" calls")).split()[3] == "3"
    assert not any(line != line.rstrip() for line in lines)


async def test_json_is_one_document_of_everything(here: Path) -> None:
    document = (await run_cli("top", "--json", cwd=here)).json()
    assert document["spend"]["calls"] == 3
    assert document["spend"]["by_spend"][0]["user_id"] == "u42"
    assert document["spend"]["spent_usd"] == document["spend"]["by_spend"][0]["spent_usd"] > "0"
    assert [stream["length"] for stream in document["redis"]["streams"]] == [0, 3, 0, 0]
    assert document["redis"]["workers"] == 1


async def test_without_data_it_prints_one_line_and_has_exit_code_1(tmp_path: Path) -> None:
    finished = await run_cli("top", cwd=tmp_path, env={"REDIS_URL": "redis://:geheim@127.0.0.1:1/0"})
    assert (finished.code, finished.stdout) == (1, "")
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert "geheim" not in finished.stderr


async def test_data_of_a_stopped_system_is_shown_and_missing_parts_are_named(
    running: RunningSystem, here: Path, tmp_path: Path
) -> None:
    """DuckDB at rest, Redis never seen."""
    copied = tmp_path / "data"
    copied.mkdir()
    await asyncio.to_thread(take_snapshot, here / "data" / "tollbook.duckdb", copied / "tollbook.duckdb")
    settings = running.system.runtime.settings.model_copy(update={"data_dir": copied, "redis_url": None})
    gatherer = Gatherer(settings)
    await gatherer.check()
    figures = await gatherer.gather(must_copy=True)
    await gatherer.aclose()
    shown = "\n".join(line.plain for line in draw(figures, width=80, height=24))
    assert " ! no Tollbook runs in" in shown
    assert " u42 " in shown
    assert " Redis not seen · spend now" in shown
