"""`python -m tollbook.standin`: the stand-in as a process; prints one line of JSON when it listens."""

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import uvloop

from tollbook.standin.faults import FaultPlan
from tollbook.standin.server import StandIn, StandInConfig


def main() -> None:
    """Parse the command line and serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m tollbook.standin", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--seed", type=int, default=1, help="seed of the faults")
    parser.add_argument("--faults", type=Path, help='JSON file: {"rates": {"http_503": 0.01}, "script": [...]}')
    parser.add_argument("--book", type=Path, help="file of JSON lines that keeps the billing book")
    parser.add_argument("--latency-ms", type=int, default=0, help="how long an answer takes")
    options = parser.parse_args()
    document: dict[str, object] = json.loads(options.faults.read_text(encoding="utf-8")) if options.faults else {}
    config = StandInConfig(
        port=options.port,
        latency_ms=options.latency_ms,
        faults=FaultPlan.from_json({"seed": options.seed} | document),
        book_path=options.book,
    )
    uvloop.run(_serve(config))


async def _serve(config: StandInConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with StandIn(config) as server:
        ready = {"base_url": server.base_url, "root_url": server.root_url, "pid": os.getpid(), "is": "a stand-in"}
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        await stop.wait()


main()
