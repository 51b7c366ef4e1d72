"""dev.py makes the environment from uv.lock, once, and again when a setup was interrupted."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands in for uv: prints its version and records how it was called.
UV = """#!/bin/sh
[ "$1" = --version ] && exec echo "uv {version}"
echo "$@" >> "{calls}"
exit "$(cat "{exit_code}")"
"""


class Checkout:
    """A folder with dev.py and its lock, and an environment of which only uv is there."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.venv = root / ".venv"
        self._calls, self._exit_code = root / "calls", root / "exit-code"
        for name in ("dev.py", "uv.lock", "pyproject.toml"):
            shutil.copy(ROOT / name, root)
        binaries = self.venv / "bin"
        binaries.mkdir(parents=True)
        (binaries / "python").symlink_to(sys.executable)
        uv = UV.format(version=locked_packages()["uv"]["version"], calls=self._calls, exit_code=self._exit_code)
        (binaries / "uv").write_text(uv, encoding="utf-8")
        (binaries / "uv").chmod(0o755)
        self.let_uv_exit_with(0)

    def let_uv_exit_with(self, code: int) -> None:
        self._exit_code.write_text(str(code), encoding="utf-8")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run dev.py with a `venv` module that only says that it was asked to make an environment."""
        modules = self.root / "modules"
        modules.mkdir(exist_ok=True)
        (modules / "venv.py").write_text('raise SystemExit("asked for a new environment")', encoding="utf-8")
        return subprocess.run(
            [sys.executable, str(self.root / "dev.py"), *arguments],
            env={**os.environ, "PYTHONPATH": str(modules)},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    def uv_calls(self) -> list[str]:
        return self._calls.read_text(encoding="utf-8").splitlines() if self._calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def locked_packages() -> dict[str, dict[str, Any]]:
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    return {package["name"]: package for package in lock["package"]}


def test_the_lock_names_only_the_public_index_and_a_hash_for_every_file() -> None:
    packages = locked_packages()
    project = packages.pop("tollbook")
    files = [file for package in packages.values() for file in [*package["wheels"], package.get("sdist")] if file]

    assert project["source"] == {"editable": "."}
    assert {package["source"]["registry"] for package in packages.values()} == {"https://pypi.org/simple"}
    assert all(file["url"].startswith("https://files.pythonhosted.org/") for file in files)
    assert all(file["hash"].startswith("sha256:") for file in files)


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("uv")), "lock", "--check", "--offline"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )

    assert result.returncode == 0, result.stderr


def test_setup_installs_what_is_locked_and_a_second_one_does_nothing(checkout: Checkout) -> None:
    first, second = checkout.run("setup"), checkout.run("setup")

    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    (call,) = checkout.uv_calls()
    assert call.startswith("sync --frozen ")
    assert "--all-groups --all-extras" in call


@pytest.mark.slow
def test_the_demo_takes_the_environment_of_the_tests_and_the_tests_extend_the_demo_s(checkout: Checkout) -> None:
    for arguments in (["setup", "runtime"], ["setup"], ["setup", "runtime"]):
        assert checkout.run(*arguments).returncode == 0

    runtime, dev = checkout.uv_calls()
    assert "--no-dev" in runtime
    assert "--no-dev" not in dev


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uv.lock", "pyproject.toml"])
def test_another_lock_or_project_is_installed(checkout: Checkout, name: str) -> None:
    checkout.run("setup")
    with (checkout.root / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")

    checkout.run("setup")

    assert len(checkout.uv_calls()) == 2


@pytest.mark.slow
def test_a_failed_setup_is_reported_and_repeated_from_scratch(checkout: Checkout) -> None:
    checkout.let_uv_exit_with(2)

    failed = checkout.run("setup")
    assert failed.returncode == 1
    assert "uv could not install" in failed.stderr

    again = checkout.run("setup")
    assert not (checkout.venv / "bin").exists()
    assert "asked for a new environment" in again.stderr


@pytest.mark.slow
def test_an_environment_copied_from_another_folder_is_made_anew(checkout: Checkout) -> None:
    checkout.run("setup")
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))

    result = checkout.run("setup")

    assert not (checkout.root / ".venv" / "bin").exists()
    assert "asked for a new environment" in result.stderr


def test_setup_refuses_a_kind_that_it_does_not_know(checkout: Checkout) -> None:
    result = checkout.run("setup", "everything")

    assert result.returncode == 1
    assert "there is no environment of kind 'everything'; there are: uv, runtime, dev" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [("demo", "--", "--tasks", "5"), ("run", "--", "tollbook", "demo", "--tasks", "5")])
def test_two_dashes_before_the_arguments_of_a_command_are_not_passed_on(
    checkout: Checkout, command: tuple[str, ...]
) -> None:
    program = checkout.venv / "bin" / "tollbook"
    program.write_text('#!/bin/sh\necho "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    assert checkout.run(*command).stdout == "demo --tasks 5\n"


@pytest.mark.slow
def test_what_it_runs_keeps_its_bytecode(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images set PYTHONDONTWRITEBYTECODE; in the hundreds of processes of a suite, the compiler then takes the time."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    program = checkout.venv / "bin" / "tollbook"
    program.write_text('#!/bin/sh\necho "[$PYTHONDONTWRITEBYTECODE]"\n', encoding="utf-8")
    program.chmod(0o755)
    assert checkout.run("run", "tollbook").stdout == "[]\n"
    assert "--compile-bytecode" in checkout.uv_calls()[0]
