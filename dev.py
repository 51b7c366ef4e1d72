#!/usr/bin/env python3
"""All development commands of Tollbook in one file, which needs only Python 3.11 with venv and pip.

    python3 dev.py demo             see it work, without a key, a container or a server
    python3 dev.py run -- tollbook spend --json

Each command first makes the environment in `.venv` if it is missing. uv fills it from uv.lock, in which every package
is pinned by hash; uv itself is installed from the same lock.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# This file must parse on older Pythons, so that they print a message instead of a SyntaxError.
MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent
LOCK = ROOT / "uv.lock"
VENV = ROOT / ".venv"
BIN = VENV / "bin"
PYTHON = BIN / "python"
UV = BIN / "uv"
STAMP = VENV / "tollbook-setup"
# The lock must work on every machine, so it never names a mirror from one machine's settings.
PUBLIC_INDEX = "https://pypi.org/simple"
# Tests that depend on DuckDB's own behaviour: its files, its SQL, its parser, its hashes.
DUCKDB_TESTS = (
    *(
        f"tests/integration/test_{name}.py"
        for name in ("store", "fold", "snapshot", "recomputation", "projector", "views", "forged_events", "report")
    ),
    "tests/archive",
    "tests/recovery/test_projection.py",
)
# Options of uv for each kind of environment. "runtime" keeps other packages, so that `demo` does not remove what `test`
# has installed; "dev" removes packages that are not in the lock.
KINDS = {
    "runtime": ("--no-dev", "--group", "build", "--all-extras", "--inexact"),
    "dev": ("--all-groups", "--all-extras"),
}


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


# --- The environment -------------------------------------------------------------------------------------------------


def ensure_environment(kind: str) -> None:
    """Install the packages of `kind` and the project itself into `.venv`; for kind "uv", only uv.

    The stamp says "started" until everything is installed, so that an interrupted setup is done again from scratch.
    Errors: SetupError.
    """
    import fcntl  # Missing on Windows, which `main` has refused by now.

    if kind not in ("uv", *KINDS):
        raise SetupError(f"there is no environment of kind {kind!r}; there are: uv, {', '.join(KINDS)}")
    # A second dev.py waits until the first one has finished its setup.
    with Path(__file__).open("rb") as own_file:
        fcntl.flock(own_file, fcntl.LOCK_EX)
        stamp = STAMP.read_text(encoding="utf-8") if STAMP.exists() else ""
        if PYTHON.exists() and stamp in (finished(kind), finished("dev")):
            return
        is_copied = not stamp.endswith(f" {ROOT}")  # Its scripts still start the Python of the other folder.
        if stamp and (stamp.startswith("started ") or is_copied):
            shutil.rmtree(VENV)
        report(f"setting up .venv ({kind}) ...")
        ensure_uv()
        if kind != "uv":
            STAMP.write_text(f"started {ROOT}", encoding="utf-8")
            sync(*KINDS[kind])
            STAMP.write_text(finished(kind), encoding="utf-8")
        report("the environment is ready")


def finished(kind: str) -> str:
    """Return the stamp of a finished environment; an environment that another tool made has no stamp."""
    content = hashlib.sha256(LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return f"{kind} {content} {ROOT}"


def ensure_uv() -> None:
    """Make `.venv` if it is missing, and install the locked release of uv in it, checked by hash.

    Errors: SetupError.
    """
    version, hashes = locked("uv")
    if UV.exists() and quiet([str(UV), "--version"]).stdout.split()[1:2] == [version]:
        return
    # In an existing environment, this adds pip and changes nothing else.
    made = quiet([sys.executable, "-m", "venv", str(VENV)])
    if made.returncode != 0:
        python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        hint = f"; on Debian and Ubuntu: apt-get install {python}-venv" if "ensurepip" in made.stdout else ""
        raise SetupError(f"python -m venv failed{hint}:\n{made.stdout.strip()}")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(f"uv=={version} " + " ".join(f"--hash={digest}" for digest in hashes))
        requirements.flush()
        options = ["--disable-pip-version-check", "--require-hashes", "--no-deps", "--only-binary", ":all:"]
        installed = quiet([str(PYTHON), "-m", "pip", "install", *options, "-r", requirements.name])
    if installed.returncode != 0:
        raise SetupError(f"pip could not install uv {version}:\n{installed.stdout.strip()}")


def locked(name: str) -> tuple[str, list[str]]:
    """Return the version of a package in uv.lock, and the hashes of its wheels."""
    import tomllib  # Missing in older Pythons, which `main` has refused by now.

    packages = tomllib.loads(LOCK.read_text(encoding="utf-8"))["package"]
    package = next(package for package in packages if package["name"] == name)
    return package["version"], [wheel["hash"] for wheel in package["wheels"]]


def sync(*options: str, place: Path | None = None) -> None:
    # On a terminal, uv shows its progress; elsewhere only errors.
    quietness = [] if sys.stderr.isatty() else ["--quiet"]
    # Packages are compiled here, on all processors, and not later by the first process that imports them.
    command = [str(UV), "sync", "--frozen", "--no-python-downloads", "--compile-bytecode", *quietness, *options]
    # stdout is for the output of the command that runs next.
    chosen = {} if place is None else {"UV_PROJECT_ENVIRONMENT": str(place)}
    if subprocess.run(command, cwd=ROOT, env=environment() | chosen, stdout=sys.stderr, check=False).returncode != 0:
        raise SetupError("uv could not install the packages of uv.lock; its message is above")


def quiet(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def report(text: str) -> None:
    """Print a message about the environment on stderr: stdout is for the command's output."""
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


# --- Running things in it --------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return the caller's environment variables, changed as by an activated `.venv`."""
    child = {**os.environ, "VIRTUAL_ENV": str(VENV), "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    # Many images set PYTHONDONTWRITEBYTECODE; then each process of the tests would compile all its imports.
    for name in ("PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "UV_PROJECT_ENVIRONMENT"):
        child.pop(name, None)
    return child


def become(program: str, *arguments: str, cwd: Path | None = ROOT) -> int:
    """Replace this process by a program of `.venv`, which then gets all signals. Does not return."""
    if cwd is not None:
        os.chdir(cwd)
    found = shutil.which(program, path=environment()["PATH"])
    if found is None:
        raise SetupError(f"no such program in .venv: {program} (for development tools, first: python3 dev.py setup)")
    sys.stdout.flush()
    os.execve(found, [program, *arguments], environment())


def call(program: str, *arguments: str, bin_folder: Path = BIN) -> int:
    """Run a program of `.venv` in the project's folder and return its exit code.

    Ctrl-C reaches the program too, so this only waits for its end; SIGTERM is passed on.
    Errors: KeyboardInterrupt after the program has ended.
    """
    sys.stdout.flush()
    with subprocess.Popen([str(bin_folder / program), *arguments], cwd=ROOT, env=environment()) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        except SystemExit:
            process.terminate()
            raise
    return 128 - code if code < 0 else code


def in_parallel(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return pytest's options for several processes; none if the arguments have such options.

    Four processes for two cores, since tests mostly wait for servers and processes. tests/conftest.py sets the order.
    """
    chosen = any(argument.startswith(("-n", "--dist", "--pdb", "-s")) for argument in arguments)
    return () if chosen else ("-n", "4", "--dist", "loadfile", "--no-loadscope-reorder")


# --- The commands ----------------------------------------------------------------------------------------------------


def demo(arguments: Sequence[str]) -> int:
    """Run the demo, from where you are: tollbook demo [...]."""
    return become("tollbook", "demo", *arguments, cwd=None)


def test(arguments: Sequence[str]) -> int:
    """Run the tests that take under three minutes: pytest [...]. The long ones: test --slow."""
    if "--slow" in arguments:
        # Some long tests run only in `soak`. Property tests run again, with many more examples.
        rest = [argument for argument in arguments if argument != "--slow"]
        arguments = ["-m", "(slow or hypothesis) and not soak", "--hypothesis-profile=full", *rest]
    return become("pytest", *in_parallel(arguments), *arguments)


def soak(arguments: Sequence[str]) -> int:
    """Run the tests that load the machine for minutes: soak [--minutes 5] [--seed N] [--store KIND] for chaos."""
    return become("pytest", "-m", "soak", "--timeout=0", *arguments)


def clients(arguments: Sequence[str]) -> int:
    """Run SDKs and frameworks against a gateway: clients [--only NAME]; bad requests: clients --fuzz [--examples N]."""
    if "--fuzz" in arguments:
        return become("python", "-m", "tests.clients.fuzz", *(each for each in arguments if each != "--fuzz"))
    return become("python", "-m", "tests.clients", *arguments)


def duckdb(arguments: Sequence[str]) -> int:
    """Test with the oldest and with the newest DuckDB that pyproject.toml allows: pytest [...]."""
    return max(duckdb_end(end, arguments) for end in ("lowest", "highest"))


def duckdb_end(end: str, arguments: Sequence[str]) -> int:
    """Make an environment from the lock with another DuckDB, and run the tests that depend on DuckDB in it.

    Errors: SetupError.
    """
    place = VENV / f"duckdb-{end}"
    sync("--quiet", *KINDS["dev"], place=place)
    wanted = next(each for each in dependencies() if each.startswith("duckdb"))
    chosen = (
        "--resolution",
        end,
        "--upgrade",
        "--no-deps",
        "--quiet",
        "--python",
        str(place / "bin" / "python"),
        wanted,
    )
    if call("uv", "pip", "install", *chosen) != 0:
        raise SetupError(f"uv could not install {wanted}, {end}; its message is above")
    found = duckdb_in(place)
    print(f"== DuckDB, {end} of {wanted}: {found}", flush=True)
    if found == duckdb_in(VENV):
        print("This is the version in uv.lock, which `python3 dev.py test` tests.", flush=True)
        return 0
    return call("pytest", *in_parallel(arguments), *arguments, *DUCKDB_TESTS, bin_folder=place / "bin")


def duckdb_in(place: Path) -> str:
    """Return DuckDB's name and version in an environment."""
    return next((place / "lib").glob("*/site-packages/duckdb-*.dist-info")).stem


def dependencies() -> list[str]:
    """Return the dependencies in pyproject.toml."""
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]


def bench(arguments: Sequence[str]) -> int:
    """Measure: python -m benchmarks [...]."""
    return become("python", "-m", "benchmarks", *arguments)


def docs(arguments: Sequence[str]) -> int:
    """Write the generated documents and build the site into site/: docs [--serve]."""
    code = call("python", "-m", "docs.generate")
    if code == 0 and "--serve" in arguments:
        return become("zensical", "serve")
    return code or call("zensical", "build", "--strict", "--clean")


def lint(arguments: Sequence[str]) -> int:
    """Check format and style: ruff (lint --fix fixes what it can)."""
    if "--fix" in arguments:
        return max(call("ruff", "check", *arguments), call("ruff", "format"))
    return max(call("ruff", "format", "--check"), call("ruff", "check", *arguments))


def types(arguments: Sequence[str]) -> int:
    """Check types: basedpyright [...]."""
    return call("basedpyright", "--pythonpath", str(PYTHON), *arguments)


def imports(arguments: Sequence[str]) -> int:
    """Check the direction of imports: lint-imports [...]."""
    return call("lint-imports", *arguments)


def check(arguments: Sequence[str]) -> int:
    """Run lint, types, imports and test, even if an earlier one has failed. Arguments go to pytest."""
    failed: list[str] = []
    for step in (lint, types, imports):
        print(f"== {step.__name__}", flush=True)
        if step(()) != 0:
            failed.append(step.__name__)
    if failed:
        report(f"failed: {', '.join(failed)}; the tests follow")
    print("== test", flush=True)
    code = call("pytest", *in_parallel(arguments), *arguments)
    return code or bool(failed)


def lock(arguments: Sequence[str]) -> int:
    """Resolve uv.lock again: uv lock [--upgrade] [--upgrade-package NAME]."""
    return call("uv", "lock", "--default-index", PUBLIC_INDEX, *arguments)


def run(arguments: Sequence[str]) -> int:
    """Run any program in the environment, from where you are: run -- tollbook spend --json."""
    if not arguments:
        raise SetupError("run needs a program, for example: python3 dev.py run -- tollbook --help")
    return become(*arguments, cwd=None)


def setup(arguments: Sequence[str]) -> int:
    """Make or repair the environment and stop: setup [runtime | uv]. `uv` installs only uv, for the image."""
    print(f"{UV if 'uv' in arguments else PYTHON} is ready")
    return 0


COMMANDS = {
    command.__name__: command
    for command in (demo, run, test, soak, clients, duckdb, bench, docs, lint, types, imports, check, lock, setup)
}


# --- The command line ------------------------------------------------------------------------------------------------


def needed(command: str, arguments: Sequence[str]) -> str:
    if command == "setup" and arguments:
        return arguments[0]
    return "runtime" if command in ("demo", "run") else "dev"


def parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    listing = "\n".join(
        f"  {name:<9} {(command.__doc__ or '').splitlines()[0].rstrip('.')}" for name, command in COMMANDS.items()
    )
    parser = argparse.ArgumentParser(
        prog="dev.py",
        usage="python3 dev.py COMMAND [arguments of the command]",
        description=f"{__doc__}\ncommands:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    if not arguments:
        parser.print_help()
        raise SystemExit(2)
    command, *rest = arguments
    # `--` may be written between the command and its arguments.
    return parser.parse_args([command]).command, rest[1:] if rest[:1] == ["--"] else rest


def leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def main(arguments: Sequence[str]) -> int:
    if sys.version_info < MINIMUM:
        version = ".".join(map(str, sys.version_info[:3]))
        newer = [name for minor in range(11, 20) for name in [f"python3.{minor}"] if shutil.which(name)]
        advice = f"; try: {newer[-1]} dev.py" if newer else ""
        raise SetupError(f"Tollbook needs Python {MINIMUM[0]}.{MINIMUM[1]} or later, this is {version}{advice}")
    if os.name != "posix":
        raise SetupError("Tollbook runs on Linux and macOS; on Windows, use WSL")
    signal.signal(signal.SIGTERM, leave)
    command, rest = parse(arguments)
    ensure_environment(needed(command, rest))
    return COMMANDS[command](rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SetupError as error:
        sys.exit(f"dev.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
