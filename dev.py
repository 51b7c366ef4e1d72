#!/usr/bin/env python3
"""Everything a checkout of Tollbook can do, from one file that needs nothing but Python 3.11.

    python3 dev.py demo             see it work, without a key, a container or a server
    python3 dev.py run -- tollbook spend --json

Each command first sees to the environment in `.venv`: made when missing, filled from a lock file in which every
package is pinned by hash, and left alone when it is already right.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

# This file must parse on older Pythons, so that they get a sentence instead of a SyntaxError.
MINIMUM = (3, 11)
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
PYTHON = BIN / "python"
STAMP = VENV / "tollbook-setup.json"
LOCKS = {"runtime": ROOT / "requirements.lock", "dev": ROOT / "requirements-dev.lock"}


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


# --- The environment -------------------------------------------------------------------------------------------------


def ensure_environment(kind: str) -> None:
    """Make `.venv` hold at least the packages of `kind` ("runtime" or "dev") and the project itself.

    The stamp is removed first and written last, so an interrupted setup is done again from nothing.
    Errors: SetupError.
    """
    if is_ready(kind):
        return
    with one_at_a_time():
        if is_ready(kind):
            return  # Another dev.py has just done it.
        stamp = read_stamp()
        started = time.monotonic()
        install(kind, keep=may_be_extended(stamp), previous=stamp)
        report(f"environment ready in {time.monotonic() - started:.0f} s\n")


def is_ready(kind: str) -> bool:
    """Whether the last finished setup had the same Python, place, lock and project as are here now."""
    stamp = read_stamp()
    held = str(stamp.get("kind"))
    return held in (kind, "dev") and stamp == wanted_stamp(held) and PYTHON.exists()


def wanted_stamp(kind: str) -> dict[str, str]:
    return {
        "state": "finished",
        "kind": kind,
        "root": str(ROOT),
        "lock": digest(LOCKS[kind]),
        "project": digest(ROOT / "pyproject.toml"),
    }


def read_stamp() -> dict[str, str]:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_stamp(content: Mapping[str, str]) -> None:
    """Replace the stamp in one step: a reader sees the old one or the new one, never half of one."""
    fresh = STAMP.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1), encoding="utf-8")
    fresh.replace(STAMP)


def may_be_extended(stamp: Mapping[str, str]) -> bool:
    """Whether pip may add to what is there: it was finished, here, and from the lock as it is now.

    An environment that somebody else made (no stamp) is filled too, never deleted.
    """
    if not stamp:
        return True
    kind = stamp.get("kind", "")
    if stamp.get("state") != "finished" or kind not in LOCKS or not PYTHON.exists():
        return False
    return stamp.get("root") == str(ROOT) and stamp.get("lock") == digest(LOCKS[kind])


def install(kind: str, *, keep: bool, previous: Mapping[str, str]) -> None:
    if previous.get("state") == "finished" and previous.get("kind") == "dev":
        kind = "dev"  # What `test` has installed is not taken away by `demo`.
    packages = sum(bool(re.match(r"[a-z0-9]", line)) for line in LOCKS[kind].read_text(encoding="utf-8").splitlines())
    what = "the demo" if kind == "runtime" else "development"
    report(f"setting up .venv for {what}: {packages} packages, checked by hash; a minute the first time ...\n")
    if keep and PYTHON.exists():
        check_usable()
    else:
        make_venv(clear=not keep)
    write_stamp({"state": "started"})
    # Without --no-deps, the pip of Python 3.11 (23.2) looks for the newest release of a requirement with an extra, such
    # as `coverage[toml]`, and refuses it as unpinned. The lock is complete; `pip check` says so.
    locked = ("install", "--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(LOCKS[kind]))
    pip(*locked, packages=packages)
    # The build backend comes from the lock as well: nothing unpinned is downloaded or run.
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    pip("check")
    write_stamp(wanted_stamp(kind))


def check_usable() -> None:
    is_new_enough = f"import sys; sys.exit(sys.version_info < {MINIMUM})"
    if not succeeds("-c", is_new_enough) or not (succeeds("-m", "pip", "--version") or succeeds("-m", "ensurepip")):
        raise SetupError("there is a .venv with an old Python or without pip, which dev.py did not make: remove it")


def make_venv(*, clear: bool) -> None:
    made = quiet([sys.executable, "-m", "venv", *(["--clear"] if clear else []), str(VENV)])
    if made.returncode == 0:
        return
    if "ensurepip" in made.stdout or "No module named venv" in made.stdout:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise SetupError(f"this Python has no venv module; on Debian and Ubuntu: apt-get install {package}")
    raise SetupError(f"python -m venv failed: {last_line(made.stdout)}")


def pip(*arguments: str, packages: int = 0) -> None:
    """Run pip in `.venv` under the user's own pip settings; on a terminal, show how far it is."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    output: list[str] = []
    seen = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        try:
            for line in process.stdout or ():
                output.append(line)
                if packages and line.startswith("Collecting "):
                    seen += 1
                    report_progress(f"{seen} of {packages}: {line.split()[1]}")
                elif packages and line.startswith("Installing collected packages"):
                    report_progress("unpacking")
        except BaseException:
            process.terminate()  # A pip that outlives us would write into the next setup.
            raise
        finally:
            report_progress("")
    if process.returncode != 0:
        errors = [line for line in output if line.startswith("ERROR")] or output[-5:]
        raise SetupError(f"pip failed (exit code {process.returncode}):\n{''.join(errors).rstrip()}")


@contextlib.contextmanager
def one_at_a_time() -> Generator[None]:
    """Hold a lock on this file: a second dev.py waits for the first one's setup instead of tearing at it."""
    import fcntl  # Not on Windows, which `main` has refused by now.

    with Path(__file__).open("rb") as own_file:
        try:
            fcntl.flock(own_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another dev.py is setting up .venv; waiting for it ...\n")
            fcntl.flock(own_file, fcntl.LOCK_EX)
        yield


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quiet(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def succeeds(*arguments: str) -> bool:
    return quiet([str(PYTHON), *arguments]).returncode == 0


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(it said nothing)"])[-1]


def report(text: str) -> None:
    """Say something about the environment on stderr: stdout belongs to the command."""
    sys.stderr.write(f"dev.py: {text}")
    sys.stderr.flush()


def report_progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K  {text[:70]}" if text else "\r\x1b[K")
        sys.stderr.flush()


# --- Running things in it --------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """The caller's environment as an activated `.venv` would have it."""
    child = {**os.environ, "VIRTUAL_ENV": str(VENV), "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    child.pop("PYTHONHOME", None)
    return child


def become(program: str, *arguments: str, cwd: Path | None = ROOT) -> int:
    """Turn into a program of `.venv`: its exit code and its signals are then simply ours. Does not return."""
    if cwd is not None:
        os.chdir(cwd)
    found = shutil.which(program, path=environment()["PATH"])
    if found is None:
        raise SetupError(f"no such program in .venv: {program} (for development tools, first: python3 dev.py setup)")
    sys.stdout.flush()
    os.execve(found, [program, *arguments], environment())


def call(program: str, *arguments: str) -> int:
    """Run a program of `.venv` in the project's folder and return its exit code.

    Ctrl-C reaches it as well as us, so we only wait for it to end; a SIGTERM is handed on.
    Errors: KeyboardInterrupt after the program has ended.
    """
    sys.stdout.flush()
    stopped = False

    def stop(number: int, _: object) -> None:
        nonlocal stopped
        stopped = True
        if number == signal.SIGTERM:
            process.terminate()

    with subprocess.Popen([str(BIN / program), *arguments], cwd=ROOT, env=environment()) as process:
        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        code = process.wait()
    for number, handler in previous.items():
        signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt
    return 128 - code if code < 0 else code


def in_parallel(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return pytest's options for several processes, unless the arguments say otherwise.

    Four of them for two cores: much of a test is waiting for servers and processes.
    """
    said = any(argument.startswith(("-n", "--dist", "--pdb", "-s")) for argument in arguments)
    return () if said else ("-n", "4", "--dist", "loadfile")


# --- The commands ----------------------------------------------------------------------------------------------------


def demo(arguments: Sequence[str]) -> int:
    """Run the demo, from where you are: tollbook demo [...]."""
    return become("tollbook", "demo", *arguments, cwd=None)


def test(arguments: Sequence[str]) -> int:
    """Run the tests: pytest [...]."""
    return become("pytest", *in_parallel(arguments), *arguments)


def soak(arguments: Sequence[str]) -> int:
    """Run the long tests: soak [--minutes 5] [--seed N], for the chaos run, and what else pytest -m soak takes."""
    return become("pytest", "-m", "soak", "--timeout=0", *arguments)


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
    """Check format and style: ruff (lint --fix mends what it can)."""
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
    """Run lint, types, imports and test, each even when one before it failed; what CI runs. Arguments go to pytest."""
    steps = (("lint", lint, ()), ("types", types, ()), ("imports", imports, ()))
    failed: list[str] = []
    for name, step, step_arguments in steps:
        print(f"== {name}", flush=True)
        if step(step_arguments) != 0:
            failed.append(name)
    if failed:
        report(f"failed: {', '.join(failed)}; the tests follow\n")
    print("== test", flush=True)
    code = call("pytest", *in_parallel(arguments), *arguments)
    return code or bool(failed)


def lock(arguments: Sequence[str]) -> int:
    """Resolve both locks anew: lock [--upgrade] [--upgrade-package NAME]."""
    common = ["pip", "compile", "pyproject.toml", "--universal", "--generate-hashes", "--quiet", "--no-emit-index-url"]
    common += ["--custom-compile-command", "python3 dev.py lock"]
    runtime, dev = LOCKS["runtime"].name, LOCKS["dev"].name
    # The runtime lock holds the build backend too, since the project is installed without build isolation.
    # The runtime lock holds what the demo's user may try next, the report too.
    common += ["--extra", "report", "--extra", "tracing"]
    code = call("uv", *common, "--group", "build", "--output-file", runtime, *arguments)
    return code or call("uv", *common, "--group", "dev", "-c", runtime, "--output-file", dev, *arguments)


def run(arguments: Sequence[str]) -> int:
    """Run any program in the environment, from where you are: run -- tollbook spend --json."""
    program, *rest = [*arguments[1:]] if arguments[:1] == ["--"] else [*arguments] or [""]
    if not program:
        raise SetupError("run needs a program, for example: python3 dev.py run -- tollbook --help")
    return become(program, *rest, cwd=None)


def setup(arguments: Sequence[str]) -> int:
    """Make or mend the environment and stop: setup [runtime]."""
    print(f"{PYTHON} is ready")
    return 0


COMMANDS = {
    command.__name__: command
    for command in (demo, run, test, soak, bench, docs, lint, types, imports, check, lock, setup)
}


# --- The command line ------------------------------------------------------------------------------------------------


def needed(command: str, arguments: Sequence[str]) -> str:
    is_enough = command in ("demo", "run") or (command == "setup" and "runtime" in arguments)
    return "runtime" if is_enough else "dev"


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
    return parser.parse_args(arguments[:1]).command, list(arguments[1:])


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
