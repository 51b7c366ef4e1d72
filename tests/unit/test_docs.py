"""The documents are true: generated parts are current, links lead somewhere, commands and code blocks are real."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from docs.generate import __main__ as generate
from docs.generate.commands import commands
from docs.generate.markdown import between
from tollbook.inference.routing import MODEL_ROUTING
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.observability.catalogue import METRICS
from tollbook.schemas.identifiers import partition_of
from tollbook.schemas.policy import default_policy
from tollbook.schemas.results import ErrorCode, InferenceResult
from tollbook.schemas.tasks import Task

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
MONITORING = DOCS / "operators" / "metrics.md"
GUARANTEES = DOCS / "guarantees.md"
FIELDS = DOCS / "reference" / "fields.md"
SYSTEMD = ROOT / "deploy" / "systemd"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
DECISIONS = sorted((DOCS / "adr").glob("[0-9]*.md"))
COMMANDS = commands()
ROOMS = (
    "schemas|ledger|inference|consumers|audit|standin|observability|gateway|app|views|demo|cli|"
    "tests|docs|benchmarks|notebooks"
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def part(page: Path, name: str) -> str:
    return between(text_of(page), name)


def first_column(table: str) -> list[str]:
    return re.findall(r"^\| \[?`([^`]+)`", table, re.MULTILINE)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in one of these languages, without the indentation of a list around them."""
    found = re.findall(rf"^( *)```(?:{'|'.join(languages)})\n(.*?)^ *```", text_of(page), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


# --- Generated parts


def test_what_is_generated_is_current() -> None:
    for path, text in generate.documents().items():
        assert text_of(path) == text, f"{path.relative_to(ROOT)}: run python -m docs.generate"


def test_check_finds_outdated_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(generate, "documents", lambda: {page: "new"})
    assert generate.main(["--check"]) == 1
    page.write_text("old", encoding="utf-8")
    assert generate.main(["--check"]) == 1
    assert generate.main([]) == 0
    assert text_of(page) == "new"
    assert generate.main(["--check"]) == 0


def test_every_error_code_is_explained_once() -> None:
    codes = first_column(part(DOCS / "reference" / "error-codes.md", "error codes"))
    assert codes == [error.value for error in ErrorCode]


@pytest.mark.parametrize(("name", "model"), [("task fields", Task), ("result fields", InferenceResult)])
def test_every_field_is_explained_once(name: str, model: type[Task | InferenceResult]) -> None:
    assert first_column(part(FIELDS, name)) == list(model.model_fields)
    assert "|  |" not in part(FIELDS, name), "a field has no meaning: add a docstring below it"


def test_streams_task_types_plans_and_routes_are_named() -> None:
    policy = default_policy()
    text = text_of(FIELDS)
    for value in (*policy.streams, *policy.task_types, *policy.plans):
        assert f"`{value}`" in text, value
    for route in MODEL_ROUTING.values():
        for fact in (*(target.model for target in route.targets), str(route.max_tokens)):
            assert fact in part(FIELDS, "routes")


def test_the_documented_result_key_is_the_one_that_is_written() -> None:
    assert Keys().result("<task_id>") == "{tollbook:0}:result:<task_id>"
    for page in (FIELDS, DOCS / "publishers" / "results.md"):
        assert "`{tollbook:0}:result:<task_id>`" in text_of(page)
    # The documented rule for several partitions, on CRC-32's published check value.
    assert partition_of("123456789", 1024) == 0xCBF43926 % 1024


def test_every_command_is_in_the_index_and_described() -> None:
    page = DOCS / "reference" / "commands.md"
    assert first_column(part(page, "index")) == [f"tollbook {name}" for name in COMMANDS]
    for name, command in COMMANDS.items():
        _, _, described = part(page, "commands").partition(f"## `tollbook {name}`\n")
        described = described.partition("\n## ")[0]
        for option in command.params:
            is_shown = getattr(option, "hidden", False) or option.opts[0].upper() in described.upper()
            assert is_shown, f"tollbook {name} {option.opts[0]}"


def test_alerts_and_questions_ask_for_metrics_that_exist() -> None:
    (block,) = (block for block in blocks(MONITORING, "yaml") if "alert:" in block)
    rules = yaml.safe_load(block)
    expressions = " ".join(rule["expr"] for group in rules["groups"] for rule in group["rules"])
    known = {name for metric in METRICS for name in (metric.name, f"{metric.name}_bucket")}
    assert len(re.findall(r"\btollbook_\w+", expressions)) >= 6
    assert set(re.findall(r"\btollbook_\w+", expressions + text_of(MONITORING))) <= known


# --- Commands


def used_in(page: Path) -> list[str]:
    """Every `tollbook ...` in code blocks and in code in a line."""
    lines = [line for block in blocks(page, "sh", "console") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    found = [
        re.search(r"(?:^|[\s/(])tollbook (?!_)(.+)$", line) for line in (*lines, *re.findall(r"`([^`\n]+)`", prose))
    ]
    return [match[1] for match in found if match]


USES = [(page, use) for page in PAGES if page.name != "CHANGELOG.md" for use in used_in(page)]


def test_a_command_that_is_shown_exists_with_its_options() -> None:
    for page, use in USES:
        check_use(page, use)


def check_use(page: Path, use: str) -> None:
    words = shlex.split(use, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", "&", ">", "&&", ";")), len(words))]
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None:
        is_group = len(words) == 1 and any(command.startswith(f"{words[0]} ") for command in COMMANDS)
        assert is_group or words[0].startswith("-"), f"{page.name}: tollbook {use}"
        return
    known = {option for param in COMMANDS[name].params for option in param.opts} | {"--help", "-h"}
    shown = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
    assert shown <= known, f"{page.name}: tollbook {use}"


# What a reader has beside Tollbook.
PROGRAMS = {
    "cp", "curl", "docker", "duckdb", "export", "git", "pip", "python3", "redis-cli", "rsync", "systemctl",
    "systemd-run", "tollbook", "useradd",
}  # fmt: skip
SHELL = [(page, block) for page in PAGES for block in blocks(page, "sh")]


@pytest.mark.parametrize(("page", "block"), SHELL, ids=[f"{page.name}-{block[:30]!r}" for page, block in SHELL])
def test_a_shell_example_can_be_run(page: Path, block: str) -> None:
    checked = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            assert Path(words[0]).name in PROGRAMS, f"{page.name}: {line}"
        if words[:2] == ["python3", "dev.py"] and len(words) > 2:
            assert f"def {words[2]}(" in text_of(ROOT / "dev.py"), f"{page.name}: {line}"


# --- Other code blocks

PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(
    ("page", "block"), PYTHON, ids=[f"{page.name}-{number}" for number, (page, _) in enumerate(PYTHON)]
)
def test_a_python_example_compiles_and_its_imports_exist(page: Path, block: str) -> None:
    tree = compile(block, str(page), "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tollbook":
            exec(compile(ast.Module([node], []), str(page), "exec"), {})  # noqa: S102


DATA = [
    (page, language, block)
    for page in PAGES
    for language in ("json", "yaml", "toml")
    for block in blocks(page, language)
]


@pytest.mark.parametrize(
    ("page", "language", "block"), DATA, ids=[f"{page.name}-{n}" for n, (page, _, _) in enumerate(DATA)]
)
def test_a_data_example_can_be_read(page: Path, language: str, block: str) -> None:
    {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}[language](block)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store.open(tmp_path_factory.mktemp("documents") / "tollbook.duckdb", "ledger")
    yield made
    made.close()


QUERIES = [query for page in PAGES for block in blocks(page, "sql") for query in block.split(";") if query.strip()]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_is_shown_runs(store: Store, query: str) -> None:
    assert isinstance(store.query(query), list)


def test_there_are_examples_of_every_kind() -> None:
    """A pattern that no longer matches anything would leave the examples unchecked."""
    counts = {"sh": len(SHELL), "python": len(PYTHON), "data": len(DATA), "sql": len(QUERIES), "commands": len(USES)}
    assert all(count >= least for count, least in zip(counts.values(), (25, 6, 12, 7, 100), strict=True)), counts


# --- Workflows, and the units of systemd


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda file: file.name)
def test_a_workflow_pins_its_actions_and_may_write_nothing(workflow: Path) -> None:
    content = yaml.safe_load(text_of(workflow))
    used = re.findall(r"uses: (.+)", text_of(workflow))
    local = [action for action in used if action.startswith("./")]
    assert all((ROOT / action).exists() for action in local)
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", action) for action in used if action not in local)
    assert content["permissions"] == {"contents": "read"}
    granted = {name: job.get("permissions") for name, job in content["jobs"].items() if "permissions" in job}
    assert granted in ({}, {"publish": {"contents": "read", "id-token": "write"}})


@pytest.mark.parametrize("unit", sorted(SYSTEMD.glob("*.service")), ids=lambda unit: unit.name)
def test_a_systemd_unit_is_well_formed(unit: Path, tmp_path: Path) -> None:
    program, command = re.findall(r"^ExecStart=(\S+) (\S+)(?: --standby)?$", text_of(unit), re.MULTILINE)[0]
    assert program == "/opt/tollbook/bin/tollbook"
    assert command in COMMANDS
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("there is no systemd-analyze on the PATH")
    # The installed program is not there; what else systemd says is a fault of the unit.
    there = tmp_path / unit.name.replace("@", "@1")
    there.write_text(text_of(unit).replace(program, shutil.which("true") or "/bin/true"), encoding="utf-8")
    checked = subprocess.run([analyze, "verify", str(there)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


# --- Links and form


def links() -> list[tuple[Path, str]]:
    return [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.S | re.M))
        if not re.match(r"https?:|mailto:", target)
    ]


def test_a_link_leads_somewhere() -> None:
    found = links()
    assert len(found) > 100
    for page, target in found:
        check_link(page, target)


def check_link(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists(), f"{page.name}: {target}"
    assert page.parent == ROOT or there.is_relative_to(DOCS), f"{page.name}: {target} is not part of the site"
    if anchor:
        headings = re.findall(r"^#+ (.+)$", text_of(there), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page.name}: {target}"


NAMED = [(page, name) for page in PAGES for name in re.findall(rf"`((?:{ROOMS})/[\w./-]*)`", text_of(page))]


def test_a_file_that_is_named_exists() -> None:
    assert len(NAMED) > 100
    assert [f"{page.name}: {name}" for page, name in NAMED if not (ROOT / name).exists()] == []


def test_a_page_that_the_code_names_exists() -> None:
    sources = [file for room in ROOMS.split("|") for file in (ROOT / room).rglob("*.py")]
    named = {
        (file.relative_to(ROOT), name)
        for file in sources
        if file != Path(__file__)
        for name in re.findall(r"\b(docs/[\w/-]+\.(?:md|yaml|py))", text_of(file))
    }
    assert named
    assert [(file, name) for file, name in named if not (ROOT / name).exists()] == []


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    listed = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "index.html").exists()
    assert not (tmp_path / "site" / "generate").exists()


def test_the_readme_fits_on_one_page() -> None:
    assert len(text_of(README).splitlines()) <= 110


def test_the_readme_names_every_extra() -> None:
    extras = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    named = first_column(part(README, "extras"))
    assert sorted(named) == sorted(["tollbook", *(f"tollbook[{extra}]" for extra in extras)])


def test_the_guarantees_are_kept_audited_and_tested_somewhere() -> None:
    rows = [line.split(" | ") for line in part(GUARANTEES, "guarantees").splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| G{number}" for number in range(1, len(rows) + 1)]
    assert len(rows) >= 10
    for row in rows:
        for cell in row[3:]:
            assert re.search(rf"`(?:{ROOMS})/", cell) or cell.startswith("no event shows it"), row[0]
        assert "no event shows it" not in row[3] + row[5]


@pytest.mark.parametrize("page", DECISIONS, ids=[page.name for page in DECISIONS])
def test_a_decision_has_its_four_parts(page: Path) -> None:
    headings = re.findall(r"^## (.+)$", text_of(page), re.MULTILINE)
    assert headings == ["Context", "Decision", "Consequences", "Rejected"]


def test_decisions_are_numbered_without_gaps() -> None:
    assert [page.name[:4] for page in DECISIONS] == [f"{number:04}" for number in range(1, len(DECISIONS) + 1)]
    assert len(DECISIONS) >= 5
