"""Installs the clients from PyPI and npm into a directory of its own; nothing of it reaches the project's environment.

An environment that exists, with the same pins, is used again.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.clients.catalogue import Client, Environment

HERE: Final = Path(__file__).parent
PROGRAMS: Final = HERE / "programs"
_PINS: Final[dict[Environment, str]] = {
    "newest": "requirements-newest.txt", "older": "requirements-older.txt", "node": "package.json",
    "fuzz": "requirements-fuzz.txt",
}  # fmt: skip


class InstallFailed(Exception):
    """The clients cannot be installed; the message has what the installer said."""


def install(environment: Environment, directory: Path) -> None:
    """Make an environment under `directory`. Errors: InstallFailed."""
    pins = HERE / _PINS[environment]
    stamp = directory / f"{environment}.installed"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text("utf-8") == digest:
        return
    place = directory / environment
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if environment == "node":
        shutil.copy(pins, place)
        _run("npm", "install", "--no-audit", "--no-fund", "--loglevel=error", cwd=place)
    else:
        uv = str(Path(sys.executable).with_name("uv"))
        _run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, ".", cwd=place)
        _run(uv, "pip", "install", "--quiet", "--python", "bin/python", "-r", str(pins), cwd=place)
    stamp.write_text(digest, "utf-8")


def command(client: Client, directory: Path) -> list[str]:
    """Return how a client's program is started. It must be run in `directory / client.environment`."""
    if client.environment == "node":
        # Node looks for packages beside the program, not in the directory where it is started.
        shutil.copytree(PROGRAMS, directory / "node" / "programs", dirs_exist_ok=True)
        interpreter, program = directory / "node/node_modules/.bin/node", directory / "node/programs" / client.program
    else:
        interpreter, program = directory / client.environment / "bin" / "python", PROGRAMS / client.program
    return [str(interpreter), str(program), *([client.mode] if client.mode else [])]


def versions(client: Client) -> str:
    """Return the pinned versions of a client's packages."""
    text = (HERE / _PINS[client.environment]).read_text("utf-8")
    if client.environment == "node":
        pinned: dict[str, str] = json.loads(text)["dependencies"]
    else:
        pinned = dict(line.split("==") for line in text.splitlines() if "==" in line)
        pinned = {name.partition("[")[0]: version for name, version in pinned.items()}
    return ", ".join(f"{name} {pinned[name]}" for name in client.packages)


def _run(*arguments: str, cwd: Path) -> None:
    finished = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise InstallFailed(f"{' '.join(arguments)} ended with {finished.returncode}:\n{finished.stderr[-2000:]}")
