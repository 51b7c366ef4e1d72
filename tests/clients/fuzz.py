"""Bad input: schemathesis makes requests from a served gateway's own OpenAPI document. `python -m tests.clients.fuzz`.

Exit code 1 where an answer is a fault of the gateway's or not as the document says, where ledger and provider's book
differ, or where money stays held.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.clients.environments import install
from tests.clients.system import RunningGateway, running_gateway

_CHECKS: Final = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=100, help="requests for each endpoint and kind of request")
    parser.add_argument("--seed", type=int, default=1, help="from which requests are drawn")
    parser.add_argument("--keep", type=Path, help="directory that keeps what is installed for the next run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tollbook-fuzz-") as temporary:
        return asyncio.run(_run(options, Path(temporary)))


async def _run(options: argparse.Namespace, temporary: Path) -> int:
    place: Path = (options.keep or temporary / "installed").resolve()
    await asyncio.to_thread(install, "fuzz", place)
    async with running_gateway(temporary) as running:
        key = await running.make_key("fuzzer")
        code = await _send(running, place / "fuzz" / "bin" / "schemathesis", key, options, temporary)
        problems = await running.ledger_differences()
    for problem in problems:
        sys.stdout.write(f"WRONG {problem}\n")
    return 1 if code or problems else 0


async def _send(
    running: RunningGateway, schemathesis: Path, key: str, options: argparse.Namespace, directory: Path
) -> int:
    """Run schemathesis, and return its exit code."""
    process = await asyncio.create_subprocess_exec(
        schemathesis,
        *("run", f"{running.url}/openapi.json", "--header", f"Authorization: Bearer {key}", "--checks", _CHECKS),
        *("--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-shrink"),
        *("--max-examples", str(options.examples), "--seed", str(options.seed)),
        cwd=directory,
    )
    return await process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
