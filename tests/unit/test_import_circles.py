"""No file of the project imports itself through others, wherever the import stands.

import-linter holds the direction between rooms; circles inside a room are found here. Imports inside functions count,
since they only hide a circle; imports for type checkers alone do not.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".venv", "tollbook", "data", "build", "dist"}
PACKAGE = "tollbook"


def module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    # A room is imported through the one package.
    is_room = (root / PACKAGE / parts[0]).exists() if parts else False
    return ".".join([PACKAGE, *parts] if is_room else parts)


def project_files(root: Path) -> dict[str, Path]:
    files = {
        module_name(path, root): path
        for folder in root.iterdir()
        if folder.is_dir() and folder.name not in SKIPPED and not folder.name.startswith(".")
        for path in folder.rglob("*.py")
    }
    package = {f"{PACKAGE}.{path.stem}": path for path in (root / PACKAGE).glob("*.py") if path.stem != "__init__"}
    return {PACKAGE: root / PACKAGE / "__init__.py", **package, **files}


def imports_of(path: Path, module: str, known: Mapping[str, Path]) -> set[str]:
    """The project's modules that a file imports by name; a package's `__init__` only where a name is taken from it."""
    found: set[str] = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
            base = ".".join([*(package[: len(package) - node.level + 1] if node.level else []), node.module or ""])
            base = base.strip(".")
            for alias in node.names:
                child = f"{base}.{alias.name}"
                found.add(child if child in known else base)
    return {name for name in found if name in known and name != module}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield from (other, *_running(other))
            continue
        yield child
        yield from _running(child)


def circle_in(root: Path) -> list[str]:
    """The files of a circle, each imported by the next; empty where there is none."""
    files = project_files(root)
    try:
        TopologicalSorter({module: imports_of(path, module, files) for module, path in files.items()}).prepare()
    except CycleError as exc:
        return exc.args[1]
    return []


@pytest.mark.slow
def test_no_file_imports_itself_through_others() -> None:
    files = project_files(ROOT)
    assert {PACKAGE, "tollbook.schemas.tasks", "tollbook.cli.app", "tests.system"} <= files.keys()
    assert imports_of(files["tollbook.schemas.entries"], "tollbook.schemas.entries", files) == {
        "tollbook.schemas.identifiers",
        "tollbook.schemas.json_text",
        "tollbook.schemas.policy",
        "tollbook.schemas.problems",
        "tollbook.schemas.tasks",
    }
    assert circle_in(ROOT) == []


@pytest.mark.parametrize(
    ("text", "is_circle"),
    [
        ("from tollbook.schemas.b import x", True),
        ("from tollbook.schemas import b", True),
        ("import tollbook.schemas.b", True),
        ("from .b import x", True),
        ("from . import b", True),
        ("def f():\n    from tollbook.schemas import b", True),
        ("try:\n    import tollbook.schemas.b\nexcept ImportError:\n    pass", True),
        ("if TYPE_CHECKING:\n    from tollbook.schemas import b", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from tollbook.schemas import b", True),
        ("import b", False),
    ],
)
def test_an_import_circle_is_found(tmp_path: Path, text: str, is_circle: bool) -> None:
    """A check that cannot fail checks nothing."""
    for name, content in {
        "tollbook/__init__.py": "",
        "schemas/__init__.py": "",
        "schemas/a.py": text,
        "schemas/b.py": "from tollbook.schemas import c",
        "schemas/c.py": "from tollbook.schemas.a import x",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n", encoding="utf-8")
    (tmp_path / "tollbook" / "schemas").symlink_to("../schemas", target_is_directory=True)
    circle = circle_in(tmp_path)
    assert set(circle) == ({"tollbook.schemas.a", "tollbook.schemas.b", "tollbook.schemas.c"} if is_circle else set())
