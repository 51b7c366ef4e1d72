"""`python -m tollbook.standin`: the stand-in as a process. It prints one line of JSON when it is ready."""

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import uvloop

from tollbook.schemas.json_text import NotJson, RepeatedKey, parse_json
from tollbook.standin.faults import FaultPlan
from tollbook.standin.prices import add_prices
from tollbook.standin.server import StandIn, StandInConfig


def main() -> None:
    """Parse the command line and serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m tollbook.standin", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0: a free one")
    parser.add_argument("--seed", type=int, default=1, help="seed from which faults are drawn")
    parser.add_argument("--faults", type=Path, help='JSON file: {"rates": {"http_503": 0.01}, "script": [...]}')
    parser.add_argument("--book", type=Path, help="file that keeps the billing book, as JSON lines")
    parser.add_argument("--latency-ms", type=int, default=0, help="time until a reply is sent, milliseconds")
    parser.add_argument("--chunk-ms", type=int, help="stream answers token by token, with this pause after each")
    parser.add_argument(
        "--prices", type=Path, help='JSON file with further models: {"my/model": {"prompt": "0.5", "completion": "1"}}'
    )
    options = parser.parse_args()
    if options.prices:
        add_prices(json.loads(options.prices.read_text(encoding="utf-8")))
    config = StandInConfig(
        port=options.port,
        latency_ms=options.latency_ms,
        chunk_ms=options.chunk_ms,
        faults=_fault_plan(parser, options.faults, options.seed),
        book_path=options.book,
    )
    uvloop.run(_serve(config))


def _fault_plan(parser: argparse.ArgumentParser, path: Path | None, seed: int) -> FaultPlan:
    try:
        return FaultPlan.from_json(parse_json(path.read_text(encoding="utf-8")) if path else {}, seed=seed)
    except OSError as exc:
        parser.error(f"--faults: {path} cannot be read: {exc.strerror}")
    except ValueError as exc:
        parser.error(f"--faults: it {exc}" if isinstance(exc, NotJson | RepeatedKey) else f"--faults: {exc}")


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
