"""What the documents say is what the code does: settings, commands, columns, error codes, links.

A table that differs is shown as it should be, to be pasted between its markers.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from tollbook.cli.app import app
from tollbook.inference.routing import MODEL_ROUTING
from tollbook.inference.settings import settings_table
from tollbook.ledger.keys import Keys
from tollbook.ledger.projection.store import Store
from tollbook.observability.catalogue import METRICS
from tollbook.schemas.identifiers import partition_of
from tollbook.schemas.plans import CAPS_NANOUSD
from tollbook.schemas.results import ErrorCode, InferenceResult
from tollbook.schemas.tasks import Task, TaskStream, TaskType

ROOT = Path(__file__).resolve().parents[2]
OBSERVABILITY = ROOT / "docs" / "observability.md"
README = ROOT / "README.md"
DUCKDB = ROOT / "docs" / "duckdb.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DECISIONS = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
# The internal table stands in the projection beside the public ones.
INTERNAL = {"counters"}
TABLES = ("spend", "calls", "events", "budgets", "position", "discrepancies")
VIEWS = (
    "spend_by_user",
    "spend_by_plan",
    "spend_by_campaign",
    "spend_by_task_type",
    "spend_by_model",
    "spend_by_day",
    "spend_by_hour",
    "cap_use",
    "denials",
    "fallback_rates",
    "fallback_reasons",
    "latency_by_model",
    "token_prices",
    "cost_certainty",
    "open_holds",
    "newest_event",
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def between(page: Path, name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text_of(page), re.DOTALL)
    assert found, f"{page.name} has no part named {name}"
    return found[1].strip()


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(value: str) -> str:
    return f"`{value}`" if value else ""


def first_column(table: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)


def test_the_table_of_settings_is_the_code_s() -> None:
    rows = [(code(name), code(default), meaning) for name, default, meaning in settings_table()]
    assert between(README, "settings") == markdown(("variable", "default", "meaning"), rows)


def test_the_table_of_metrics_is_the_code_s() -> None:
    rows = [
        (code(metric.name), metric.kind, ", ".join(map(code, metric.labels)), metric.source, metric.meaning)
        for metric in METRICS
    ]
    assert between(OBSERVABILITY, "metrics") == markdown(("metric", "type", "labels", "from", "meaning"), rows)


def test_alerts_and_questions_ask_for_metrics_that_exist() -> None:
    rules = yaml.safe_load(between(OBSERVABILITY, "alerts").removeprefix("```yaml\n").removesuffix("```"))
    expressions = " ".join(rule["expr"] for group in rules["groups"] for rule in group["rules"])
    known = {name for metric in METRICS for name in (metric.name, f"{metric.name}_bucket")}
    assert len(re.findall(r"\btollbook_\w+", expressions)) >= 6
    assert set(re.findall(r"\btollbook_\w+", expressions + text_of(OBSERVABILITY))) <= known


def test_every_error_code_is_explained_once() -> None:
    assert sorted(first_column(between(README, "error codes"))) == sorted(error.value for error in ErrorCode)


def test_every_field_of_a_task_is_explained_once() -> None:
    assert sorted(first_column(between(README, "task fields"))) == sorted(Task.model_fields)


def test_every_field_of_a_result_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", between(README, "result fields")))
    assert set(InferenceResult.model_fields) <= named


def test_streams_task_types_plans_and_routes_are_named() -> None:
    text = text_of(README)
    for value in (*TaskStream, *TaskType, *CAPS_NANOUSD):
        assert f"`{value.value}`" in text, value
    for route in MODEL_ROUTING.values():
        for fact in (route.model, route.fallback, str(route.max_tokens)):
            assert fact is not None
            assert fact in between(README, "routes")


def test_the_documented_result_key_is_the_one_that_is_written() -> None:
    assert Keys().result("<task_id>") == "{tollbook:0}:result:<task_id>"
    assert code("{tollbook:0}:result:<task_id>") in text_of(README)
    # The documented rule for several partitions, on CRC-32's published check value.
    assert partition_of("123456789", 1024) == 0xCBF43926 % 1024


# --- Commands


def group() -> Any:
    return typer.main.get_command(app)


def commands_of(command: Any, name: str = "") -> dict[str, Any]:
    """Every command by its full name, for example `dead-letters list`."""
    if not hasattr(command, "commands"):
        return {name: command}
    found: dict[str, Any] = {}
    context = typer.Context(command)
    for child in command.list_commands(context):
        each = command.get_command(context, child)
        found |= commands_of(each, f"{name} {child}".strip())
    return found


COMMANDS = commands_of(group())


def used_in(page: Path) -> list[str]:
    """Every `tollbook ...` in code blocks and in code in a line."""
    text = text_of(page)
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    found = [re.search(r"(?:^|[\s/(])tollbook (?!_)(.+)$", line) for line in (*lines, *spans)]
    return [match[1] for match in found if match]


USES = [(page, use) for page in PAGES if page.name != "CHANGELOG.md" for use in used_in(page)]


@pytest.mark.parametrize(("page", "use"), USES, ids=[f"{page.name}-{use[:40]}" for page, use in USES])
def test_a_command_that_is_shown_exists_with_its_options(page: Path, use: str) -> None:
    words = shlex.split(use, comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", "&", ">", "&&", ";")), len(words))]
    name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
    if name is None:
        is_group = words[0] in group().commands and len(words) == 1
        assert is_group or words[0].startswith("-"), f"{page.name}: tollbook {use}"
        return
    known = {option for param in COMMANDS[name].params for option in param.opts} | {"--help", "-h"}
    shown = {word.partition("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
    assert shown <= known, f"{page.name}: tollbook {use}"


def test_every_command_is_in_the_table_and_no_other() -> None:
    named = {use.removeprefix("tollbook ").split(" [")[0] for use in first_column(between(README, "commands"))}
    assert named == set(COMMANDS)


# --- DuckDB


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store.open(tmp_path_factory.mktemp("documents") / "tollbook.duckdb", "ledger")
    yield made
    made.close()


def described(store: Store) -> dict[str, str]:
    """Heading, meaning and columns of every public table and view, as docs/duckdb.md shows them."""
    relations = store.query(
        "SELECT table_name AS name, comment, 'table' AS kind FROM duckdb_tables() WHERE NOT internal "
        "UNION ALL SELECT view_name, comment, 'view' FROM duckdb_views() WHERE NOT internal"
    )
    columns = store.query(
        "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() WHERE NOT internal "
        "ORDER BY table_name, column_index"
    )
    return {
        relation["name"]: f"## `{relation['name']}` ({relation['kind']})\n\n{relation['comment']}\n\n"
        + markdown(
            ("column", "type", "meaning"),
            [
                (code(column["column_name"]), column["data_type"], column["comment"])
                for column in columns
                if column["table_name"] == relation["name"]
            ],
        )
        for relation in relations
        if relation["name"] not in INTERNAL
    }


def test_every_table_and_column_is_documented_and_no_other(store: Store) -> None:
    expected = described(store)
    order = [*TABLES, *VIEWS]
    assert sorted(order) == sorted(expected)
    assert between(DUCKDB, "tables") == "\n\n".join(expected[name] for name in order)


def test_the_readme_names_every_public_table(store: Store) -> None:
    assert sorted(first_column(between(README, "tables"))) == sorted(described(store))


def queries() -> list[str]:
    blocks = re.findall(r"^```sql\n(.*?)^```", text_of(README) + text_of(DUCKDB), re.DOTALL | re.MULTILINE)
    return [query for block in blocks for query in block.split(";") if query.strip()]


@pytest.mark.parametrize("query", queries())
def test_a_query_that_is_shown_runs(store: Store, query: str) -> None:
    assert isinstance(store.query(query), list)


# --- Links and form


def links() -> list[tuple[Path, str]]:
    return [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M))
        if not re.match(r"https?:|mailto:", target)
    ]


@pytest.mark.parametrize(("page", "target"), links(), ids=[f"{page.name}-{target}" for page, target in links()])
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists(), f"{page.name}: {target}"
    if anchor:
        headings = re.findall(r"^#+ (.+)$", text_of(there), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page.name}: {target}"


def test_files_that_the_readme_names_exist() -> None:
    named = re.findall(
        r"`((?:tests|docs|benchmarks|schemas|ledger|inference|consumers|audit|standin|observability|app|views|demo|cli)/[\w./-]+)`",
        text_of(README),
    )
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", DECISIONS, ids=[page.name for page in DECISIONS])
def test_a_decision_has_its_four_parts(page: Path) -> None:
    headings = re.findall(r"^## (.+)$", text_of(page), re.MULTILINE)
    assert headings == ["Context", "Decision", "Consequences", "Rejected"]


def test_decisions_are_numbered_without_gaps() -> None:
    assert [page.name[:4] for page in DECISIONS] == [f"{number:04}" for number in range(1, len(DECISIONS) + 1)]
    assert len(DECISIONS) >= 5
