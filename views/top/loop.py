"""The live view on a terminal: the alternate screen, the keyboard, and the loop that draws until a key or signal.

Invariant: the terminal is restored on every exit: a key, an error, and every signal that can be caught. A screen is
written in one piece over the last one, so that nothing flickers.
"""

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Generator, Sequence
from typing import Any, Final, Self

from rich.console import Console
from rich.text import Text

from tollbook.views.top.figures import Figures
from tollbook.views.top.gather import Gatherer
from tollbook.views.top.screen import draw
from tollbook.views.top.users import Order

_KEYS: Final = "q quit  s order"
_ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[2J"
_LEAVE: Final = "\x1b[0m\x1b[?25h\x1b[?1049l"
# Terminals with synchronized output (mode 2026) show the text in between at once; others ignore these codes.
_BEGIN: Final = "\x1b[?2026h\x1b[H"
_END: Final = "\x1b[?2026l"
_REST_OF_LINE: Final = "\x1b[K"
_REST_OF_SCREEN: Final = "\x1b[J"
_LEAST_PAUSE_S: Final = 0.1
_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def terminal_console() -> Console:
    """Return a console that uses the terminal's size, not COLUMNS and LINES, because the size may change."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return Console(highlight=False, _environ=environment)


async def run_screen(gatherer: Gatherer, console: Console, *, interval_s: float) -> None:
    """Draw every `interval_s` seconds until `q` or a signal. The loop must be asyncio's own.

    uvloop would make the keyboard non-blocking, and also the screen, because both are the same file.
    """
    terminal = _Terminal()
    screen = _Screen(gatherer, console, interval_s, terminal)
    with _signals(screen), terminal:
        await screen.run()


class _Terminal:
    """The alternate screen without a cursor, and a keyboard that sends each key at once; both restored at the end."""

    def __init__(self) -> None:
        self.keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
        self._before: list[Any] | None = None

    def __enter__(self) -> Self:
        if self.keyboard is not None:
            self._before = termios.tcgetattr(self.keyboard)
            tty.setcbreak(self.keyboard)
        self.write(_ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        # If the terminal itself has gone, there is nothing to restore.
        with contextlib.suppress(OSError):
            self.write(_LEAVE)
        if self.keyboard is not None and self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self.keyboard, termios.TCSADRAIN, self._before)

    def suspend(self) -> None:
        """Restore the terminal and stop the process, as for Ctrl-Z; take the terminal again when it continues."""
        self.__exit__()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.__enter__()

    def write(self, text: str) -> None:
        """Write and flush. Errors: OSError if the terminal has gone."""
        sys.stdout.write(text)
        sys.stdout.flush()


class _Screen:
    """The current screen, and how it reacts to keys and signals."""

    def __init__(self, gatherer: Gatherer, console: Console, interval_s: float, terminal: _Terminal) -> None:
        self._gatherer = gatherer
        self._console = console
        self._interval_s = interval_s
        self._terminal = terminal
        self._figures: Figures | None = None
        self._order: Order = "spend"
        self.stop = asyncio.Event()
        self.redraw = asyncio.Event()

    async def run(self) -> None:
        """Draw until `stop`. Errors: those of gathering and drawing."""
        loop, keyboard = asyncio.get_running_loop(), self._terminal.keyboard
        if keyboard is not None:
            loop.add_reader(keyboard, self._on_keys, keyboard)
        tasks = [asyncio.create_task(part) for part in (self._gather(), self._draw(), self.stop.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            if keyboard is not None:
                loop.remove_reader(keyboard)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def suspend(self) -> None:
        """Stop until the shell continues this process."""
        self._terminal.suspend()
        self.redraw.set()

    async def _gather(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            started_s = clock()
            self._figures = await self._gatherer.gather()
            self.redraw.set()
            await asyncio.sleep(max(_LEAST_PAUSE_S, self._interval_s - (clock() - started_s)))

    async def _draw(self) -> None:
        self._write([Text(" tollbook top: reading …", "dim")])
        while True:
            await self.redraw.wait()
            self.redraw.clear()
            if self._figures is not None:
                width, height = self._console.size
                self._write(draw(self._figures, width=width, height=height, order=self._order, keys=_KEYS))

    def _write(self, lines: Sequence[Text]) -> None:
        width = self._console.width
        with self._console.capture() as captured:
            for number, line in enumerate(lines):
                # In a full line, the code that clears the rest of the line would clear the last column.
                rest = _REST_OF_LINE if line.cell_len < width else ""
                self._console.print(line, end=rest + ("\n" if number < len(lines) - 1 else ""), soft_wrap=True)
        try:
            self._terminal.write(_BEGIN + captured.get() + _REST_OF_SCREEN + _END)
        except OSError:
            self.stop.set()

    def _on_keys(self, keyboard: int) -> None:
        try:
            keys = os.read(keyboard, 64)
        except OSError:
            keys = b""
        if not keys or keys[:1] in (b"q", b"Q"):
            self.stop.set()
        elif keys[:1] in (b"s", b"S"):
            self._order = "use" if self._order == "spend" else "spend"
            self.redraw.set()


@contextlib.contextmanager
def _signals(screen: _Screen) -> Generator[None]:
    """Let signals stop, suspend and resize the screen."""
    loop = asyncio.get_running_loop()
    handlers = dict.fromkeys(_STOPPING, screen.stop.set)
    handlers |= {signal.SIGWINCH: screen.redraw.set, signal.SIGTSTP: screen.suspend}
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
