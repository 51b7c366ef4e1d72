"""Installed as a user would, beside an application whose modules are named as Tollbook's folders are: both work."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.packaging.conftest import run

pytestmark = pytest.mark.slow

APPLICATION = '''
"""Serves, or prints, whose modules it has got, and what of Tollbook cannot be imported."""
import json
import pkgutil
from importlib import import_module
from pathlib import Path

import consumers.handlers
import inference
import ledger
import schemas
from fastapi import FastAPI

import tollbook
from tollbook import InferenceClient, Publisher, connect_runtime


def found() -> dict[str, object]:
    missing = set()
    names = [module.name for module in pkgutil.walk_packages(tollbook.__path__, "tollbook.", onerror=lambda _: None)]
    for name in names:
        if not name.endswith("__main__"):
            try:
                import_module(name)
            except ModuleNotFoundError as exc:
                missing.add(exc.name.partition(".")[0])
    owners = [module.OWNER for module in (schemas, ledger, consumers.handlers, inference)]
    return {
        "owners": owners,
        "is_installed": "site-packages" in Path(tollbook.__file__).parts,
        "modules": len(names),
        "missing": sorted(missing),
    }


app = FastAPI()
app.get("/")(found)

if __name__ == "__main__":
    print(json.dumps(found()))
'''


@pytest.fixture(scope="module")
def environment_with_inference(installed: Path) -> Path:
    """The environment, with a distribution that has the top-level name of PyPI's `inference`, and no more of it."""
    site = Path(run(installed / "python", "-c", "import site; print(site.getsitepackages()[0])", cwd=installed).strip())
    package = site / "inference"
    package.mkdir()
    (package / "__init__.py").write_text('OWNER = "PyPI"\n')
    metadata = site / "inference-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: inference\nVersion: 0.1\n")
    return installed


@pytest.fixture(params=["PyPI", "application"])
def application(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """An application's folder, and whose `inference` it imports: the package of that name, or a module of its own."""
    folder = tmp_path / "application"
    (folder / "consumers").mkdir(parents=True)
    (folder / "app.py").write_text(APPLICATION)
    owned = ["schemas.py", "ledger.py", "consumers/handlers.py", "cli.py", "audit.py"]
    if request.param == "application":
        owned.append("inference.py")
    for name in owned:
        (folder / name).write_text('OWNER = "application"\n')
    return folder, request.param


def check(found: dict[str, object], owner_of_inference: str) -> None:
    assert found["owners"] == ["application"] * 3 + [owner_of_inference]
    assert found["is_installed"]
    assert isinstance(found["modules"], int)
    assert found["modules"] > 100
    # Of the extras; Starlette is there, with FastAPI.
    assert found["missing"] == ["altair", "botocore", "marimo", "opentelemetry"]


@pytest.mark.parametrize("path", ["", "."])
def test_as_a_program(application: tuple[Path, str], environment_with_inference: Path, path: str) -> None:
    folder, owner = application
    set_path = {"PYTHONPATH": path} if path else {}
    check(json.loads(run(environment_with_inference / "python", "app.py", cwd=folder, **set_path)), owner)


@pytest.mark.parametrize("path", ["", "."])
def test_under_uvicorn(application: tuple[Path, str], environment_with_inference: Path, path: str) -> None:
    folder, owner = application
    with served(environment_with_inference, folder, {"PYTHONPATH": path} if path else {}) as url:
        check(httpx.get(url, timeout=60).json(), owner)


@contextmanager
def served(programs: Path, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run `uvicorn app:app` in the folder and yield its address."""
    process = subprocess.Popen(
        [programs / "uvicorn", "app:app", "--port", "0"],
        cwd=folder, env={"PATH": str(programs)} | environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if address := re.search(r"running on (http://\S+)", line):
                yield address[1]
                return
        raise AssertionError("".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_commands_run_from_the_applications_folder(
    application: tuple[Path, str], environment_with_inference: Path
) -> None:
    """A base install runs `up`, workers and commands."""
    folder, _ = application
    programs = environment_with_inference
    run(programs / "tollbook", "demo", "--tasks", "40", "--json", cwd=folder, PYTHONPATH=".")
    assert "stand-in" in run(programs / "python", "-m", "tollbook", "--help", cwd=folder)


@pytest.mark.parametrize(
    ("extra", "arguments", "variables"),
    [
        ("report", ["report"], {}),
        ("tracing", ["up", "--stand-in"], {"TOLLBOOK_TRACES": "console"}),
        ("lake", ["lake", "books.ducklake"], {}),
    ],
)
def test_what_needs_an_extra_names_it(
    installed: Path, tmp_path: Path, extra: str, arguments: list[str], variables: dict[str, str]
) -> None:
    refused = subprocess.run(
        [installed / "tollbook", *arguments], cwd=tmp_path, env={"PATH": str(installed)} | variables,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert refused.returncode == 1
    assert f"pip install 'tollbook[{extra}]'" in refused.stderr
