"""Wheel, sdist, the wheel of the sdist and the editable install hold the same modules and data files."""

import json
import os
import tarfile
import tomllib
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

import tollbook
from tests.packaging.conftest import ROOT, UV, Distributions, environment, run

pytestmark = pytest.mark.slow

# In a checkout the notebook is in notebooks/, in a wheel beside the module that shows it.
NOTEBOOK = "tollbook/views/report/spend_report.py"
DATA = {".lua", ".sql", ".css", ".html", ".js", ".csv", ".json", ".toml"}


def package_files() -> dict[str, bytes]:
    """Return the files of the package in this checkout, through its links to the rooms."""
    found = {
        (Path(folder) / name).relative_to(ROOT).as_posix(): (Path(folder) / name).read_bytes()
        for folder, _, names in os.walk(ROOT / "tollbook", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    return found | {NOTEBOOK: (ROOT / "notebooks" / "spend_report.py").read_bytes()}


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def without_metadata(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_adds_one_top_level_name_and_every_file_of_the_package(built: Distributions) -> None:
    files = wheel_files(built.wheel)
    assert {name.split("/")[0] for name in files} == {"tollbook", f"tollbook-{tollbook.__version__}.dist-info"}
    packaged = without_metadata(files)
    assert packaged == package_files()
    assert packaged.keys() >= {"tollbook/py.typed", NOTEBOOK}
    assert {PurePosixPath(name).suffix for name in packaged} == DATA | {".py", ".typed"}


def test_the_wheel_of_the_sdist_is_the_same_wheel(built: Distributions) -> None:
    # RECORD lists sizes and hashes of all the others.
    assert wheel_files(built.wheel_of_sdist) == wheel_files(built.wheel)


def test_the_sdist_holds_the_package_the_notebooks_and_what_describes_them(built: Distributions) -> None:
    with tarfile.open(built.sdist) as archive:
        files = {member.name.partition("/")[2]: member for member in archive.getmembers() if not member.isdir()}
    assert all(member.isfile() for member in files.values()), "a link would lead out of the sdist"
    tops = {name.partition("/")[0] for name in files}
    # hatchling adds the last two.
    assert tops == {"tollbook", "notebooks", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml"} | {
        ".gitignore", "PKG-INFO",
    }  # fmt: skip
    assert {name for name in files if name.startswith("tollbook/")} == package_files().keys() - {NOTEBOOK}
    assert {"notebooks/spend_report.py", "notebooks/spend.ipynb"} <= files.keys()


def test_metadata_names_version_script_and_extras(built: Distributions) -> None:
    files = wheel_files(built.wheel)
    metadata = files[f"tollbook-{tollbook.__version__}.dist-info/METADATA"].decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")}
    assert f"\nVersion: {tollbook.__version__}\n" in metadata
    named = {"alerts", "lake", "report", "notebook", "s3", "tokenizers", "tracing"}
    assert extras == project["optional-dependencies"].keys() == named
    scripts = files[f"tollbook-{tollbook.__version__}.dist-info/entry_points.txt"].decode()
    assert scripts.split() == ["[console_scripts]", "tollbook", "=", "tollbook.cli:main"]


# Walks what `import tollbook` finds, without importing more of it.
LIST_FILES = """
import json, os, tollbook
from importlib.metadata import version
from pathlib import Path
root = Path(tollbook.__file__).parent
files = [(Path(folder) / name).relative_to(root.parent).as_posix()
         for folder, _, names in os.walk(root, followlinks=True) for name in names if "__pycache__" not in folder]
print(json.dumps({"files": files, "version": version("tollbook"), "attribute": tollbook.__version__}))
"""


def test_the_editable_install_has_the_same_files_as_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    # The project is built without isolation (pyproject.toml), so its build backend must be there.
    editable = environment(tmp_path / "venv", "hatchling")
    run(UV, "pip", "install", "--quiet", "--python", editable / "python", "--no-deps", "--editable", ROOT, cwd=ROOT)
    of_wheel, of_checkout = (
        json.loads(run(programs / "python", "-c", LIST_FILES, cwd=tmp_path)) for programs in (installed, editable)
    )
    assert {*of_wheel["files"]} == package_files().keys()
    assert {*of_checkout["files"]} == package_files().keys() - {NOTEBOOK}
    for found in (of_wheel, of_checkout):
        assert found["version"] == found["attribute"] == tollbook.__version__
