"""`from tollbook import ...`: the public names, each loaded when it is first used, and the tree of errors."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import tollbook
from tests.packaging.conftest import ROOT
from tollbook import AppError
from tollbook.schemas import errors
from tollbook.schemas.results import ErrorCode

# Of each line of the drawing: its indentation, a class, its code.
DRAWN = re.compile(r"^ {4}([│├└─ ]*)(\w+) *([A-Z_]*)", re.MULTILINE)


def loaded_by(statement: str) -> set[str]:
    """Return the names of the modules that a new interpreter has after a statement, and had not before."""
    program = (
        "import json, sys; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout))


def drawn() -> dict[str, tuple[str | None, str]]:
    """Return the parent and the code of every class in the drawing."""
    found: dict[str, tuple[str | None, str]] = {}
    parents: list[str] = []
    assert errors.__doc__ is not None
    drawing = errors.__doc__[errors.__doc__.index("    AppError") :].split("\n\n")[0]
    for indent, name, code in DRAWN.findall(drawing):
        depth = len(indent) // 4
        del parents[depth:]
        found[name] = (parents[-1] if parents else None, code)
        parents.append(name)
    return found


def test_the_package_by_itself_loads_nothing_else() -> None:
    assert {name for name in loaded_by("import tollbook") if name.startswith("tollbook")} == {"tollbook"}


def test_a_publisher_loads_what_it_needs_and_no_more() -> None:
    loaded = {name.partition(".")[0] for name in loaded_by("from tollbook import Publisher")}
    heavy = {
        "IPython", "aiohttp", "altair", "duckdb", "faststream", "genai_prices", "httpx", "ipykernel", "marimo",
        "prometheus_client", "pyarrow", "rich", "starlette", "structlog", "typer", "uvicorn", "vl_convert",
    }  # fmt: skip
    assert loaded & heavy == set()


@pytest.mark.slow
def test_a_client_loads_no_notebook_and_no_server() -> None:
    loaded = {name.partition(".")[0] for name in loaded_by("from tollbook import InferenceClient, connect_runtime")}
    assert loaded & {"IPython", "altair", "faststream", "genai_prices", "marimo", "typer", "uvicorn"} == set()


def test_every_public_name_is_there_and_listed() -> None:
    listed = dir(tollbook)
    assert {*tollbook.__all__} <= {*listed}
    assert {name for name in tollbook.__all__ if getattr(tollbook, name) is None} == set()
    exec_names: dict[str, object] = {}
    exec("from tollbook import *", exec_names)  # noqa: S102 - what a user may write.
    assert {*tollbook.__all__} == exec_names.keys() - {"__builtins__"}
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        _ = tollbook.Missing


def test_type_checkers_see_the_same_names() -> None:
    """The imports that only a type checker reads are those that `__getattr__` makes."""
    assert tollbook.__file__ is not None
    tree = ast.parse(Path(tollbook.__file__).read_text(encoding="utf-8"))
    imported = {
        (node.module, name.name)
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert imported == {(module, name) for name, module in tollbook._MODULES.items()}
    assert {name for _, name in imported} == {*tollbook.__all__}


def test_the_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tollbook.__version__ == version("tollbook") == project["version"]


def test_the_public_errors_are_the_drawn_tree() -> None:
    tree = drawn()
    exported = {
        name
        for name in tollbook.__all__
        if isinstance(value := getattr(tollbook, name), type) and issubclass(value, Exception)
    }
    assert tree.keys() == exported
    for name, (parent, code) in tree.items():
        kind = getattr(tollbook, name)
        if parent is None:
            assert kind is AppError
            continue
        assert kind.__bases__[0] is getattr(tollbook, parent), name
        assert kind.code == code, name


def test_every_result_code_has_its_error() -> None:
    assert {code.value for code in ErrorCode} <= {code for _, code in drawn().values()}


def test_every_error_of_the_package_has_a_code_of_the_tree() -> None:
    """Also those that only commands raise: they are subclasses, and none invents a code."""
    for module in pkgutil.walk_packages(tollbook.__path__, "tollbook."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    codes = {code for _, code in drawn().values()}
    pending, found = [AppError], set[type[AppError]]()
    while pending:
        kinds = pending.pop().__subclasses__()
        found.update(kinds)
        pending += kinds
    shipped = {kind for kind in found if kind.__module__.startswith("tollbook.")}
    assert len(shipped) > 30
    assert {kind for kind in shipped if kind.code not in codes} == set()
