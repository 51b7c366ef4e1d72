"""The tables of the reference pages that are made from the code, one function for each."""

import ast
import inspect
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, cast, get_args, get_origin

from pydantic import BaseModel

from docs.generate.markdown import code, table, with_part
from tollbook.inference.routing import MODEL_ROUTING
from tollbook.inference.settings import settings_table
from tollbook.ledger.projection.store import Store
from tollbook.observability.catalogue import METRICS
from tollbook.schemas.expectations import is_model
from tollbook.schemas.money import format_usd
from tollbook.schemas.policy import Policy, default_policy
from tollbook.schemas.results import ErrorCode, InferenceResult
from tollbook.schemas.tasks import PING, Task

DOCS: Final = Path(__file__).resolve().parents[1]

# What a publisher sees and does; what the code means stands in the code, as its docstring.
_ADVICE: Final[Mapping[ErrorCode, tuple[str, str]]] = {
    ErrorCode.PLAN_LIMIT_REACHED: (
        "denied",
        "Raise the cap or plan, make the call smaller, or wait for the next period; then use a new task id.",
    ),
    ErrorCode.BUDGET_WAIT_TIMEOUT: ("denied", "Publish again with a new task id."),
    ErrorCode.INFERENCE_FAILED: (
        "failed",
        "See `error`. `cost_usd` is what the attempts cost. Publish again with a new task id.",
    ),
    ErrorCode.OUTPUT_LIMIT_REACHED: (
        "failed",
        "The same limit would be paid for in vain. Raise `max_tokens` or lower the reasoning, and use a new task id.",
    ),
    ErrorCode.CONTENT_FILTERED: (
        "failed",
        "Change the prompt, and use a new task id. `provider_error` has the provider's words.",
    ),
    ErrorCode.PRICE_UNKNOWN: ("failed", "No call was made. Set the price in `TOLLBOOK_PRICES`, or use another model."),
    ErrorCode.INVALID_TASK: (
        "invalid",
        "Correct the task and use a new task id. The task is in the dead-letter stream.",
    ),
    ErrorCode.IDEMPOTENCY_CONFLICT: (
        "invalid",
        "Use a new task id. The first result stands; only `reply_to` gets this answer.",
    ),
    ErrorCode.ATTEMPTS_EXHAUSTED: ("failed", "Find out why, then run `tollbook dead-letters retry`."),
    ErrorCode.LEDGER_UNAVAILABLE: ("", "Python only. Try again with the same task id."),
}

_TABLES: Final = (
    "spend",
    "calls",
    "events",
    "budgets",
    "budget_use",
    "credits",
    "alerts",
    "policies",
    "api_keys",
    "position",
    "discrepancies",
)
_VIEWS: Final = (
    "spend_by_user", "spend_by_plan", "spend_by_campaign", "spend_by_task_type", "spend_by_model", "spend_by_day",
    "spend_by_hour", "cap_use", "denials", "fallback_rates", "fallback_reasons", "latency_by_model", "token_prices",
    "cost_certainty", "open_holds", "newest_event", "policy_calendar",
)  # fmt: skip
# Stands in the projection beside the public tables.
_INTERNAL: Final = {"counters", "checksums"}


def documents() -> dict[Path, str]:
    """Return every page with such a table, with its text."""
    found: dict[Path, str] = {}
    for page, name, make in _PARTS:
        path = DOCS / page
        text = found.get(path) or path.read_text(encoding="utf-8")
        found[path] = with_part(text, name, make())
    return found


def task_fields() -> str:
    """Every field of a task."""
    return table(("field", "meaning"), _fields_of(Task, with_default={"plan"}))


def result_fields() -> str:
    """Every field of a result."""
    return table(("field", "meaning"), _fields_of(InferenceResult))


def routes() -> str:
    """The default route of each task type."""
    rows = [
        (
            code(kind),
            code(route.model),
            ", ".join(code(str(target)) for target in route.fallbacks),
            str(route.max_tokens),
            str(route.temperature),
        )
        for kind, route in MODEL_ROUTING.items()
    ]
    ping = (code(PING), "none: answers `pong`, free of charge", "", "", "")
    return table(("task type", "model", "fallback", "max_tokens", "temperature"), [*rows, ping])


def policy_fields() -> str:
    """Every field of a policy file."""
    return table(("field", "meaning", "default"), _policy_rows(Policy, ""))


def _policy_rows(model: type[BaseModel], place: str) -> Iterable[tuple[str, str, str]]:
    """Yield a row for each field, and below a table of the file those of what it holds."""
    for name, field in model.model_fields.items():
        path = f"{place}{field.alias or name}"
        inner = _inner_model(field.annotation)
        default = (
            ""
            if inner or field.is_required() or field.default is None
            else str(field.get_default(call_default_factory=True))
        )
        yield code(path), field.description or "", code("" if default in ("()", "{}") else default.removesuffix("()"))
        if inner is not None:
            is_list = get_origin(field.annotation) is tuple
            is_named = get_origin(field.annotation) is dict
            yield from _policy_rows(inner, f"{path}[]." if is_list else f"{path}.<name>." if is_named else f"{path}.")


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a field holds, alone, in a list or by name."""
    if is_model(annotation):
        return annotation
    found = (_inner_model(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)


def plans() -> str:
    """The plans and their caps."""
    return table(
        ("plan", "cap per user and billing period"),
        [(code(plan), format_usd(cap)) for plan, cap in default_policy().plan_caps_nanousd.items()],
    )


def error_codes() -> str:
    """Every error code. Errors: KeyError for one without a status and an advice."""
    meanings = _member_docstrings(ErrorCode)
    rows = [(code(each.value), *_status_meaning_advice(each, meanings[each.name])) for each in ErrorCode]
    return table(("code", "status", "meaning", "what to do"), rows)


def settings() -> str:
    """Every setting."""
    rows = [(code(name), code(default), meaning) for name, default, meaning in settings_table()]
    return table(("variable", "default", "meaning"), rows)


def metrics() -> str:
    """Every metric."""
    rows = [
        (code(metric.name), metric.kind, ", ".join(map(code, metric.labels)), metric.source, metric.meaning)
        for metric in METRICS
    ]
    return table(("metric", "type", "labels", "from", "meaning"), rows)


def duckdb_index() -> str:
    """Every public table and view of the projection, one line each."""
    relations, _ = _projection()
    rows = [(f"[`{name}`](#{name}-{kind})", comment) for name, (kind, comment) in relations.items()]
    return table(("table or view", "what it holds"), rows)


def duckdb_columns() -> str:
    """Every column of every public table and view of the projection."""
    relations, columns = _projection()
    parts: list[str] = []
    for name, (kind, comment) in relations.items():
        rows = [(code(column), form, meaning) for column, form, meaning in columns[name]]
        parts += [f"## `{name}` ({kind})", comment, table(("column", "type", "meaning"), rows)]
    return "\n\n".join(parts)


def _fields_of(model: type[BaseModel], *, with_default: Collection[str] = ()) -> Iterable[tuple[str, str]]:
    for name, field in model.model_fields.items():
        default = f" Default: `{field.default}`." if name in with_default else ""
        yield code(name), (field.description or "") + default


def _status_meaning_advice(error: ErrorCode, meaning: str) -> tuple[str, str, str]:
    status, advice = _ADVICE[error]
    return status, meaning, advice


def _member_docstrings(enum: type[ErrorCode]) -> dict[str, str]:
    """Return the docstring below each member of an enum, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(enum)).body
    lines = cast("ast.ClassDef", definition).body
    found: dict[str, str] = {}
    for member, below in pairwise(lines):
        if isinstance(member, ast.Assign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[cast("ast.Name", member.targets[0]).id] = str(below.value.value)
    return found


def _projection() -> tuple[dict[str, tuple[str, str]], dict[str, list[tuple[str, str, str]]]]:
    """Return kind and comment of each public relation, in the order of the page, and the columns of each.

    Errors: ValueError where the projection has a table or view that the page has no place for, or the other way.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "tollbook.duckdb", "ledger")
        try:
            relations = store.query(
                "SELECT table_name AS name, comment, 'table' AS kind FROM duckdb_tables() WHERE NOT internal "
                "UNION ALL SELECT view_name, comment, 'view' FROM duckdb_views() WHERE NOT internal"
            )
            columns = store.query(
                "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() WHERE NOT internal "
                "ORDER BY table_name, column_index"
            )
        finally:
            store.close()
    known = {row["name"]: (row["kind"], row["comment"]) for row in relations if row["name"] not in _INTERNAL}
    if set(known) != {*_TABLES, *_VIEWS}:
        raise ValueError(f"the projection and this list differ: {sorted(set(known) ^ {*_TABLES, *_VIEWS})}")
    return {name: known[name] for name in (*_TABLES, *_VIEWS)}, {name: list(_columns(columns, name)) for name in known}


def _columns(columns: Iterable[Mapping[str, Any]], name: str) -> Iterable[tuple[str, str, str]]:
    for column in columns:
        if column["table_name"] == name:
            yield column["column_name"], column["data_type"], column["comment"]


_PARTS: Final[tuple[tuple[str, str, Callable[[], str]], ...]] = (
    ("reference/fields.md", "task fields", task_fields),
    ("reference/fields.md", "result fields", result_fields),
    ("reference/fields.md", "routes", routes),
    ("reference/fields.md", "plans", plans),
    ("reference/policy.md", "policy fields", policy_fields),
    ("publishers/budgets.md", "plans", plans),
    ("reference/error-codes.md", "error codes", error_codes),
    ("reference/settings.md", "settings", settings),
    ("reference/metrics.md", "metrics", metrics),
    ("reference/tables.md", "index", duckdb_index),
    ("reference/tables.md", "tables", duckdb_columns),
)
