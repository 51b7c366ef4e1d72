"""Run every client against a gateway: `python -m tests.clients`.

Installs the clients, plays the scenarios, compares ledger and provider's book, and writes the table of
docs/callers/clients.md. Exit code 1 if a result is wrong.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.clients.catalogue import CLIENTS, Client, Environment
from tests.clients.environments import InstallFailed, command, install
from tests.clients.scenarios import EMBEDDINGS_MODEL, MODEL, PROMPTS, RETRIED_TOKENS, SCENARIOS, Played
from tests.clients.system import POOR, RunningGateway, running_gateway
from tests.clients.table import write_table

_CLIENT_TIMEOUT_S: Final = 180.0
Results = dict[str, dict[str, Played]]


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--only", action="append", choices=[client.name for client in CLIENTS], help="one client")
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="one scenario")
    parser.add_argument("--keep", type=Path, help="directory that keeps the installed clients for the next run")
    parser.add_argument("--verbose", action="store_true", help="print what each client saw")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tollbook-clients-") as temporary:
        try:
            return asyncio.run(_run(options, Path(temporary)))
        except InstallFailed as exc:
            sys.stderr.write(f"{exc}\n")
            return 2


async def _run(options: argparse.Namespace, temporary: Path) -> int:
    chosen = [client for client in CLIENTS if not options.only or client.name in options.only]
    place: Path = (options.keep or temporary / "installed").resolve()
    environments: set[Environment] = {client.environment for client in chosen}
    for environment in environments:
        await asyncio.to_thread(install, environment, place)
    results: Results = {}
    async with running_gateway(temporary) as running:
        poor_key = await running.make_key(POOR, "--plan", "penniless")
        for client in chosen:
            keys = {"GATEWAY_KEY": await running.make_key(client.name), "POOR_KEY": poor_key}
            results[client.name] = await _play(client, place, running, keys, options)
        problems = await running.ledger_differences()
    problems += [
        f"{client.name}, {name}: {wrong}" for client in chosen for name, wrong in _wrong(client, results[client.name])
    ]
    if not options.only and not options.scenario:
        write_table(results)
    for problem in problems:
        sys.stdout.write(f"WRONG {problem}\n")
    played = sum(map(len, results.values()))
    sys.stdout.write(f"{len(chosen)} clients, {played} scenarios, {len(problems)} wrong\n")
    return 1 if problems else 0


async def _play(
    client: Client, place: Path, running: RunningGateway, keys: Mapping[str, str], options: argparse.Namespace
) -> dict[str, Played]:
    variables = {
        "GATEWAY": f"{running.front.url}/{client.name}",
        "MODEL": MODEL,
        "EMBEDDINGS_MODEL": EMBEDDINGS_MODEL,
        "PROMPTS": json.dumps(PROMPTS),
        "SCENARIOS": " ".join(options.scenario or ()),
        **keys,
    }
    printed = await _lines(client, place, variables, is_verbose=options.verbose)
    played: dict[str, Played] = {}
    for line in printed:
        name = line.pop("scenario")
        entries = running.standin.book.entries.values()
        paid = sum(each.user == client.name and each.completion_tokens == RETRIED_TOKENS for each in entries)
        played[name] = Played(line, running.front.seen[client.name, name], paid)
        if options.verbose:
            sys.stdout.write(f"{client.name} {name}: {str(line)[:200]} {played[name].statuses}\n")
    return played


async def _lines(
    client: Client, place: Path, variables: Mapping[str, str], *, is_verbose: bool
) -> list[dict[str, Any]]:
    """Run a client's program; return the lines that it printed. Errors: AssertionError where it did not end well."""
    process = await asyncio.create_subprocess_exec(
        *command(client, place),
        cwd=place / client.environment,
        env=_environment({**variables, **({"VERBOSE": "1"} if is_verbose else {})}),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_CLIENT_TIMEOUT_S):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if is_verbose or process.returncode:
        sys.stderr.write(errors.decode())
    if process.returncode:
        raise AssertionError(f"the program of {client.name} ended with {process.returncode}")
    return [json.loads(line) for line in output.decode().splitlines() if line.startswith("{")]


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with no keys or addresses of somebody else's, and without proxies."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"NO_PROXY": "*", **variables}


def _wrong(client: Client, played: Mapping[str, Played]) -> list[tuple[str, str]]:
    checked = [(name, SCENARIOS[name].check(each)) for name, each in played.items() if name not in client.differs]
    return [(name, wrong) for name, wrong in checked if wrong]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
