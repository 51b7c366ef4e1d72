"""`python -m tests.chaos.provider`: the stand-in, with a log of every request beside its billing book.

The book has only charges. The log has a line for each request, written before it is charged or
answered: the task whose mark is in the prompt, when the request came, and the generation id that a
charge would have in the book.
"""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Final

import uvloop
from aiohttp import web

from tollbook.standin import FaultPlan, StandIn, StandInConfig
from tollbook.standin.apis import Api
from tollbook.standin.replies import CompletionRequest

_MARK: Final = re.compile(rb"\[\[task=([A-Za-z0-9-]+)\]\]")


def mark(task_id: str) -> str:
    """Return the mark in a prompt by which the log knows its task."""
    return f"[[task={task_id}]]"


class LoggedStandIn(StandIn):
    """The stand-in, which writes down each request as it comes."""

    def __init__(self, config: StandInConfig, log: Path) -> None:
        super().__init__(config)
        self._log = log.open("a", encoding="utf-8")

    async def _answer(
        self, request: web.Request, asked: CompletionRequest, generation_id: str, fault: str | None, api: Api
    ) -> web.StreamResponse:
        # The body was read before; aiohttp keeps it.
        found = _MARK.search(await request.read())
        line = {
            "task_id": found[1].decode() if found else "",
            "user": asked.user,
            "generation_id": generation_id,
            "fault": fault,
            "at_ms": time.time_ns() // 1_000_000,
        }
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()
        return await super()._answer(request, asked, generation_id, fault, api)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--latency-ms", type=int, default=0)
    parser.add_argument("--chunk-ms", type=int, default=None)
    options = parser.parse_args()
    config = StandInConfig(
        port=options.port,
        latency_ms=options.latency_ms,
        chunk_ms=options.chunk_ms,
        faults=FaultPlan.from_json(json.loads(options.faults.read_text(encoding="utf-8"))),
        book_path=options.directory / "book.jsonl",
    )
    uvloop.run(_serve(LoggedStandIn(config, options.directory / "requests.jsonl")))


async def _serve(server: LoggedStandIn) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server:
        watching = asyncio.create_task(_end_of_input(stop))
        await stop.wait()
        watching.cancel()


async def _end_of_input(stop: asyncio.Event) -> None:
    """Stop when the process that started this one has ended, which closes the pipe it holds."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stop.set()


if __name__ == "__main__":
    main()
