"""What a user gets: the distributions, built as a release is, and environments into which they are installed.

uv builds in an isolated environment and installs what the package index has, so that a dependency which only the
development environment brings is missed here.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
UV: Final = Path(sys.executable).with_name("uv")


@dataclass(frozen=True, slots=True)
class Distributions:
    """The built files."""

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command with nothing of this process's environment but PATH and HOME; return its standard output."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith(("UV_", "SSL_", "PIP_"))}
    done = subprocess.run(
        command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def environment(directory: Path, *requirements: str | Path) -> Path:
    """Make a virtual environment with these requirements and return its `bin`."""
    run(UV, "venv", "--quiet", "--python", sys.executable, directory, cwd=ROOT)
    run(UV, "pip", "install", "--quiet", "--python", directory / "bin" / "python", *requirements, cwd=ROOT)
    return directory / "bin"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The wheel, the sdist, and the wheel that is built from the sdist."""
    directory = tmp_path_factory.mktemp("built")

    def build(kind: str, source: Path, name: str) -> Path:
        run(UV, "build", "--quiet", f"--{kind}", "--out-dir", directory / name, source, cwd=ROOT)
        (found,) = (path for path in (directory / name).iterdir() if path.name.startswith("tollbook-"))
        return found

    sdist = build("sdist", ROOT, "sdist")
    return Distributions(build("wheel", ROOT, "wheel"), sdist, build("wheel", sdist, "wheel-of-sdist"))


@pytest.fixture(scope="session")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and FastAPI."""
    return environment(tmp_path_factory.mktemp("installed") / "venv", built.wheel, "fastapi")
